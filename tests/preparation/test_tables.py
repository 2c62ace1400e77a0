"""The same interactions and items out of every kind of file, and what is said of wrong ones."""

from __future__ import annotations

import gzip
import json
import os
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from recformer.data.processed import ProcessedFolder, read_times
from recformer.files import UserError
from recformer.preparation.finetuning import prepare_finetuning
from recformer.preparation.options import Filters, SplitOptions
from recformer.preparation.pretraining import PretrainingSource, prepare_pretraining_sources
from recformer.preparation.tables import Columns, open_sources

# user, item, time, rating
EVENTS = [
    ("u", "1", 30, 5), ("u", "2", 10, 4), ("v", "1", 10, 5), ("u", "3", 20, 1), ("v", "2", 20, 5),
    ("v", "x", 25, 5), ("v", "3", 30, 5), ("u", "1", 40, 5), ("v", "2", 40, 2),
]  # fmt: skip
ITEMS = [("1", "One", "Acme"), ("2", 'Two "inch", round', "Acme"), ("3", "Three", "Borex")]

Writer = Callable[[Path], tuple[Path, Path]]


def text(path: Path, lines: list[str]) -> Path:
    data = ("\n".join(lines) + "\n").encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def as_csv(folder: Path) -> tuple[Path, Path]:
    rows = [f"{u},{i},{r},{t}" for u, i, t, r in EVENTS]
    items = [f'{i},"{t.replace(chr(34), chr(34) * 2)}",{b}' for i, t, b in ITEMS]
    return (
        text(folder / "ratings.csv", ["userId,movieId,rating,timestamp", *rows]),
        text(folder / "movies.csv.gz", ["movieId,title,brand", *items]),
    )


def as_tsv(folder: Path) -> tuple[Path, Path]:
    rows = [f"{t}\t{u}\t{i}\t{r}.0" for u, i, t, r in EVENTS]
    return (
        text(folder / "log.tsv.gz", ["time\tuser\titem\tscore", *rows]),
        text(folder / "items.tsv", ["item\ttitle\tbrand", *("\t".join(row) for row in ITEMS)]),
    )


def as_atomic(folder: Path) -> tuple[Path, Path]:
    rows = [f"{u}\t{i}\t{r}\t{t}.0" for u, i, t, r in EVENTS]
    header = "user_id:token\titem_id:token\trating:float\ttimestamp:float"
    return (
        text(folder / "d.inter.gz", [header, *rows]),
        text(
            folder / "d.item",
            ["item_id:token\ttitle:token_seq\tbrand:token", *("\t".join(row) for row in ITEMS)],
        ),
    )


def as_parquet(folder: Path) -> tuple[Path, Path]:
    log = pl.DataFrame(EVENTS, ["user_id", "item_id", "timestamp", "rating"], orient="row")
    log.write_parquet(folder / "log.parquet")
    items = pl.DataFrame(ITEMS, ["item_id", "title", "brand"], orient="row")
    items.write_parquet(folder / "items.parquet")
    return folder / "log.parquet", folder / "items.parquet"


def lines(rows: list[dict[str, Any]]) -> list[str]:
    return [json.dumps(row) for row in rows]


def as_jsonl(folder: Path) -> tuple[Path, Path]:
    log = [{"user_id": u, "item_id": i, "ts": t, "stars": r, "text": "…"} for u, i, t, r in EVENTS]
    items = [{"item_id": i, "title": t, "brand": b} for i, t, b in ITEMS]
    return text(folder / "log.jsonl", lines(log)), text(folder / "items.jsonl.gz", lines(items))


def as_amazon_2023(folder: Path) -> tuple[Path, Path]:
    log = [
        {"rating": float(r), "title": "!", "asin": "?", "parent_asin": i, "user_id": u,
         "timestamp": t}
        for u, i, t, r in EVENTS
    ]  # fmt: skip
    items = [
        {"main_category": "M", "title": t, "store": b, "categories": [], "parent_asin": i}
        for i, t, b in ITEMS
    ]
    return (
        text(folder / "Things.jsonl.gz", lines(log)),
        text(folder / "meta_Things.jsonl.gz", lines(items)),
    )


def as_amazon_2014(folder: Path) -> tuple[Path, Path]:
    log = [
        {"reviewerID": u, "asin": i, "overall": float(r), "unixReviewTime": t}
        for u, i, t, r in EVENTS
    ]
    items = [
        {"asin": i, "title": t, "brand": b, "categories": [[]], "price": None} for i, t, b in ITEMS
    ]
    return (
        text(folder / "reviews_Things_5.json.gz", lines(log)),
        text(folder / "meta_Things.json.gz", [repr(row) for row in items]),
    )


KINDS = [as_csv, as_tsv, as_atomic, as_parquet, as_jsonl, as_amazon_2023, as_amazon_2014]


@pytest.mark.parametrize("write", KINDS)
def test_every_kind_gives_the_same_folder(tmp_path: Path, write: Writer) -> None:
    dataset = prepare_finetuning(*write(tmp_path), tmp_path / "out")
    data = ProcessedFolder.load(tmp_path / "out")
    assert data.asins == ["1", "2", "3"]
    # u: 2 at 10, 3 at 20, 1 at 30 and 40. v: 1, 2, 3, 2 at 10, 20, 30, 40; x is unknown.
    assert [data.train[user].tolist() for user in (0, 1)] == [[1, 2], [0, 1]]
    assert (data.val.items.tolist(), data.test.items.tolist()) == ([0, 2], [0, 1])
    assert data.items == [{"title": title, "brand": brand} for _, title, brand in ITEMS]
    times = read_times(data)
    assert times is not None
    assert times.tolist() == [10, 20, 30, 40, 10, 20, 30, 40]
    assert dataset["counts"]["reviews"] == {
        "reviews": 9,
        "reviews_of_unknown_products": 1,
        "duplicate_reviews": 0,
    }


@pytest.mark.parametrize("write", KINDS)
def test_ratings_are_found_in_every_kind(tmp_path: Path, write: Writer) -> None:
    dataset = prepare_finetuning(
        *write(tmp_path), tmp_path / "out", min_interactions=1, filters=Filters(min_rating=4)
    )
    assert dataset["counts"]["reviews"]["reviews_below_min_rating"] == 2
    assert dataset["num_interactions"] == 6
    assert dataset["parameters"]["min_rating"] == 4


def test_sasrec_text_has_an_order_and_no_times(tmp_path: Path) -> None:
    _, items = as_csv(tmp_path)
    log = text(tmp_path / "log.txt.gz", ["7 3", "7 1", "7 2", "8 2", "7 1"])
    dataset = prepare_finetuning(log, items, tmp_path / "out")
    data = ProcessedFolder.load(tmp_path / "out")
    assert [data.asins[item] for item in (*data.train[0], *data.val[0], *data.test[0])] == [
        "3", "1", "2", "1"
    ]  # fmt: skip
    assert read_times(data) is None
    assert dataset["counts"]["histories"]["users_with_too_few_interactions"] == 1
    with pytest.raises(UserError, match="--time_column"):
        prepare_finetuning(log, items, tmp_path / "no", options=SplitOptions(split="temporal"))
    with pytest.raises(UserError, match="--rating_column"):
        prepare_finetuning(log, items, tmp_path / "no", filters=Filters(min_rating=1))
    assert not (tmp_path / "no").exists()


def test_columns_and_attributes_by_flags(tmp_path: Path) -> None:
    log = text(tmp_path / "a.csv", ["who,what,when", "u,1,3", "u,2,2", "u,3,1"])
    items = text(tmp_path / "b.csv", ["id,name,maker,year", "1,One,A,1990", "2,Two,,", "3,T,B,2"])
    prepare_finetuning(
        log, items, tmp_path / "out", min_interactions=3, attributes=["title=name", "year"],
        columns=Columns(user="who", item="what", time="when", item_key="id"),
    )  # fmt: skip
    data = ProcessedFolder.load(tmp_path / "out")
    assert data.train[0].tolist() == [2]
    assert data.items[0] == {"title": "One", "year": "1990"}
    assert data.items[1] == {"title": "Two"}


LOG = ["user_id,item_id,timestamp", "u,1,1"]


@pytest.mark.parametrize(
    ("log", "columns", "message"),
    [
        (LOG, Columns(user="who"), r"no column 'who' \(--user_column\), found: user_id, item_id"),
        (["a,b", "1,2"], Columns(), r"columns a, b is known as 'user_id'.*--user_column"),
        ([*LOG, "u,2,soon"], Columns(), "line 3: timestamp is no number and no ISO.*got 'soon'"),
        ([*LOG, "u,2,"], Columns(), "line 3: no timestamp"),
        ([*LOG, ",2,4"], Columns(), "line 3: no user_id"),
        (LOG[:1], Columns(), "empty but for its header"),
        ([""], Columns(), "is empty"),
        ([*LOG, "u,1,2,3,4"], Columns(), "line 3: 5 fields, expected 3"),
        (['{"user_id": "u"}'], Columns(), "holds JSON lines: rename it"),
    ],
)
def test_wrong_interactions(tmp_path: Path, log: list[str], columns: Columns, message: str) -> None:
    path, items = text(tmp_path / "log.csv", log), as_csv(tmp_path)[1]
    with pytest.raises(UserError, match=message):
        prepare_finetuning(path, items, tmp_path / "out", columns=columns)
    assert not (tmp_path / "out").exists()


def test_wrong_parquet(tmp_path: Path) -> None:
    log, items = as_parquet(tmp_path)
    timeless = pl.read_parquet(log).with_columns(timestamp=pl.Series([1, None, *range(7)]))
    timeless.write_parquet(log)
    with pytest.raises(UserError, match="row 2: no timestamp"):
        prepare_finetuning(log, items, tmp_path / "out")
    log.write_bytes(log.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"log.parquet cannot be read as parquet"):
        prepare_finetuning(log, items, tmp_path / "out")


def test_bad_lines_are_left_out_and_counted(tmp_path: Path) -> None:
    log, items = as_csv(tmp_path)
    text(log, [*log.read_text().splitlines(), "u,1,5,soon", ",1,5,3"])
    dataset = prepare_finetuning(log, items, tmp_path / "out", skip_bad_lines=True)
    assert dataset["counts"]["bad_lines"]["total"] == 2
    assert dataset["num_interactions"] == 8


def test_a_literal_among_json_is_a_bad_line(tmp_path: Path) -> None:
    log, items = as_amazon_2014(tmp_path)
    text(items, [json.dumps({"asin": "1", "title": "One"}), repr({"asin": "2", "title": "Two"})])
    with pytest.raises(UserError, match="line 2: not valid JSON"):
        prepare_finetuning(log, items, tmp_path / "out")


def test_both_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="a.csv.*b.csv"):
        open_sources(tmp_path / "a.csv", tmp_path / "b.csv", Columns(), None)


def test_ids_of_two_sources_do_not_collide(tmp_path: Path) -> None:
    sources = []
    for name, write in (("films", as_csv), ("tools", as_amazon_2023), ("dev", as_parquet)):
        (tmp_path / name).mkdir()
        sources.append(PretrainingSource(name, *write(tmp_path / name)))
    out = tmp_path / "out"
    dataset = prepare_pretraining_sources(sources[:2], sources[2], out)
    train, dev = (json.loads((out / name).read_text()) for name in ("train.json", "dev.json"))
    ids = ["2", "3", "1", "1"], ["1", "2", "3", "2"]
    assert train == [[f"{n}:{i}" for i in row] for n in ("films", "tools") for row in ids]
    assert dev == [[f"dev:{i}" for i in row] for row in ids]
    meta = json.loads((out / "meta_data.json").read_text())
    assert sorted(meta) == [f"{n}:{i}" for n in ("dev", "films", "tools") for i in "123"]
    assert meta["tools:1"] == {"title": "One", "brand": "Acme"}
    assert dataset["files"]["train.json"] == {"sequences": 4, "interactions": 16}
    with pytest.raises(UserError, match="twice"):
        prepare_pretraining_sources(sources[:1], sources[0], out)


REAL = {
    "gift_cards": (
        "Gift_Cards_5.json.gz meta_Gift_Cards.json.gz --min_interactions 1", (458, 148, 2972)
    ),
    "scientific": (
        "Industrial_and_Scientific_5.json.gz meta_Industrial_and_Scientific.json.gz",
        (8442, 4385, 59427),
    ),
    "beauty": ("Beauty_5.json.gz meta_Beauty.json.gz", (22363, 12101, 198502)),
    "ml100k": ("ml-100k.inter.gz ml-100k.item --split temporal", (943, 1682, 100000)),
    "ml1m": (
        "ml-1m.txt.gz items.tsv --item_key_column sas_item --attributes title genres "
        "--val_users 512",
        (6040, 3416, 999496),
    ),
}  # fmt: skip


@pytest.mark.real_data
@pytest.mark.skipif("RECFORMER_REAL_DATA" not in os.environ, reason="needs RECFORMER_REAL_DATA")
@pytest.mark.parametrize("name", REAL)
def test_real_data_load_with_one_command(
    name: str, tmp_path: Path, repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command, sizes = REAL[name]
    folder = Path(os.environ["RECFORMER_REAL_DATA"]) / name
    log, items, *flags = command.split()
    argv = ["--file_path", str(folder / log), "--meta_file_path", str(folder / items), *flags]
    monkeypatch.setattr(sys, "argv", ["process.py", *argv, "--output_path", str(tmp_path)])
    monkeypatch.setattr(sys, "path", list(sys.path))
    runpy.run_path(str(repository / "finetune_data" / "process.py"), run_name="__main__")
    data = ProcessedFolder.load(tmp_path)
    assert data.dataset is not None
    assert (data.num_users, data.num_items, data.dataset["num_interactions"]) == sizes
    assert data.num_without_metadata == 0
    if name == "ml100k":
        before = data.train.lengths + data.val.lengths
        assert (data.test.lengths > 0).sum() == 166
        assert ((data.test.lengths > 0) & (before > 0)).sum() == 90
        known = {*data.train.items.tolist(), *data.val.items.tolist()}
        assert len(set(data.test.items.tolist()) - known) == 45
    if name == "ml1m":
        assert (data.val.lengths > 0).sum() == 512
        assert (data.test.lengths > 0).sum() == 6040
