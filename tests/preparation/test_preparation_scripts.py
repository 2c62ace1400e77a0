"""The three data scripts, through their command lines."""

from __future__ import annotations

import gzip
import json
import os
import runpy
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest

from recformer.data.processed import ProcessedFolder

Run = Callable[..., tuple[int, str, str]]


def write_lines(path: Path, rows: Iterable[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with gzip.open(path, "wt", encoding="utf-8") as handle:
        handle.writelines(json.dumps(row) + "\n" for row in rows)
    return path


def reviews(*rows: str) -> list[dict[str, Any]]:
    """`user asin time` each."""
    return [
        {"overall": 5, "reviewerID": user, "asin": asin, "unixReviewTime": int(time)}
        for user, asin, time in map(str.split, rows)
    ]


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.fixture
def run(
    repository: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Run:
    """Run a script in this process: exit status, stdout, stderr."""

    def run_script(script: str, *arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", [script, *map(str, arguments)])
        monkeypatch.setattr(sys, "path", list(sys.path))
        status = 0
        try:
            runpy.run_path(str(repository / script), run_name="__main__")
        except SystemExit as error:
            status = int(error.code or 0)
        captured = capfd.readouterr()
        return status, captured.out, captured.err

    return run_script


# --- finetune_data/process.py ---------------------------------------------------------------------

META = [
    {"asin": "C", "title": "Cup &amp; saucer", "brand": "", "category": ["Home", "Kitchen"]},
    {"asin": "A", "title": "Apple", "brand": "Orchard", "category": ["Food"]},
    {"asin": "B", "title": "<b>Bread</b>", "brand": None, "category": []},
    {"asin": "E", "title": "", "brand": None},
    {"asin": "N", "title": "Never reviewed"},
    {"asin": "A", "title": "Apple, new", "brand": "Orchard", "category": ["Food", "Fruit"]},
]
REVIEWS = reviews(
    "first ?? 1",  # unknown: `first` first appears two lines below
    "u A 9",
    "first B 1",
    "u C 2",
    "u E 2",  # a product without text
    "first A 1",
    "short A 1",
    "u B 2",
    "first A 1",
    "first C 0",
    "short B 2",
    "short C 3",
    "u A 5",
)


@pytest.fixture
def raw(tmp_path: Path) -> dict[str, Path]:
    return {
        "--file_path": write_lines(tmp_path / "raw" / "Things_5.json.gz", REVIEWS),
        "--meta_file_path": write_lines(tmp_path / "raw" / "meta_Things.json.gz", META),
        "--output_path": tmp_path / "out",
    }


def arguments(raw: dict[str, Path]) -> list[object]:
    return [part for pair in raw.items() for part in pair]


def test_finetuning_files_by_hand(run: Run, raw: dict[str, Path]) -> None:
    status, out, err = run("finetune_data/process.py", *arguments(raw))
    assert (status, err) == (0, "")
    folder = raw["--output_path"]
    assert "2 users, 3 items, 8 interactions" in out

    assert read(folder / "umap.json") == {"u": 0, "first": 1}
    assert read(folder / "smap.json") == {"A": 0, "C": 1, "B": 2}
    # u: C and B at time 2, C stands first; A at 5 and 9. first: C at 0, then B, A, A.
    assert read(folder / "train.json") == {"0": [1, 2], "1": [1, 2]}
    assert read(folder / "val.json") == {"0": [0], "1": [0]}
    assert read(folder / "test.json") == {"0": [0], "1": [0]}
    assert read(folder / "meta_data.json") == {
        "C": {"title": "Cup & saucer", "category": "Home Kitchen"},
        "A": {"title": "Apple, new", "brand": "Orchard", "category": "Food Fruit"},
        "B": {"title": "Bread"},
        "N": {"title": "Never reviewed"},
    }
    dataset = read(folder / "dataset.json")
    assert dataset["source"] == {"reviews": "Things_5.json.gz", "metadata": "meta_Things.json.gz"}
    assert dataset["parameters"] == {
        "split": "leave_one_out",
        "attributes": ["title", "brand", "category"],
        "clean": True,
        "min_interactions": 4,
        "user_sample_rate": 1.0,
        "seed": 0,
        "skip_bad_lines": False,
    }
    assert dataset["counts"] == {
        "metadata": {
            "rows": 6,
            "duplicate_rows": 1,
            "products": 4,
            "products_without_text": 1,
            "values_that_are_no_text": 0,
        },
        "reviews": {"reviews": 13, "reviews_of_unknown_products": 2, "duplicate_reviews": 1},
        "histories": {
            "users": 3,
            "users_with_too_few_interactions": 1,
            "users_not_sampled": 0,
            "users_kept": 2,
            "interactions_kept": 8,
            "users_with_val_and_test_item": 2,
        },
        "bad_lines": {"total": 0, "reasons": {}, "first": []},
    }
    data = ProcessedFolder.load(folder)
    assert data.split_hash == dataset["split_hash"]
    assert data.items == [
        {"title": "Apple, new", "brand": "Orchard", "category": "Food Fruit"},
        {"title": "Cup & saucer", "category": "Home Kitchen"},
        {"title": "Bread"},
    ]


def test_a_lower_minimum(run: Run, raw: dict[str, Path]) -> None:
    write_lines(raw["--file_path"], [*REVIEWS, *reviews("one B 7", "two B 8", "two C 7")])
    assert run("finetune_data/process.py", *arguments(raw), "--min_interactions", 1)[0] == 0
    data = ProcessedFolder.load(raw["--output_path"])
    assert read(raw["--output_path"] / "umap.json")["short"] == 2
    # Exactly three: one each. Fewer than three: to train alone.
    assert [part[2].tolist() for part in (data.train, data.val, data.test)] == [[0], [2], [1]]
    assert [part[3].tolist() for part in (data.train, data.val, data.test)] == [[2], [], []]
    assert [part[4].tolist() for part in (data.train, data.val, data.test)] == [[1, 2], [], []]
    assert set(read(raw["--output_path"] / "val.json")) == {"0", "1", "2"}


def test_no_clean_and_other_attributes(run: Run, raw: dict[str, Path]) -> None:
    flags = ["--no_clean", "--attributes", "category", "title"]
    assert run("finetune_data/process.py", *arguments(raw), *flags)[0] == 0
    meta = read(raw["--output_path"] / "meta_data.json")
    assert meta["C"] == {"category": "Home Kitchen", "title": "Cup &amp; saucer"}
    assert list(meta["C"]) == ["category", "title"]
    assert meta["B"] == {"category": "", "title": "<b>Bread</b>"}
    assert meta["E"] == {"title": ""}


def test_a_seeded_sample_of_users(run: Run, raw: dict[str, Path]) -> None:
    many = [row for n in range(60) for row in reviews(*(f"user{n} {asin} 1" for asin in "ABCA"))]
    write_lines(raw["--file_path"], many)
    samples = []
    for seed in (1, 1, 2):
        flags = ["--user_sample_rate", "0.5", "--seed", seed]
        assert run("finetune_data/process.py", *arguments(raw), *flags)[0] == 0
        samples.append(set(read(raw["--output_path"] / "umap.json")))
    assert samples[0] == samples[1] != samples[2]
    assert 15 < len(samples[0]) < 45
    assert read(raw["--output_path"] / "dataset.json")["counts"]["histories"][
        "users_not_sampled"
    ] == 60 - len(samples[2])


def break_line(path: Path, number: int, line: str) -> None:
    lines = gzip.decompress(path.read_bytes()).decode().splitlines()
    lines[number - 1] = line
    path.write_bytes(gzip.compress("\n".join(lines).encode()))


def cut_off(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-9])


WRONG_INPUTS = {
    "missing": (lambda raw: raw["--file_path"].unlink(), "no such file: {--file_path}"),
    "missing metadata": (
        lambda raw: raw["--meta_file_path"].unlink(),
        "no such file: {--meta_file_path}",
    ),
    "empty": (lambda raw: raw["--file_path"].write_bytes(b""), "{--file_path} is empty"),
    "nothing inside": (
        lambda raw: raw["--meta_file_path"].write_bytes(gzip.compress(b"")),
        "{--meta_file_path} is empty",
    ),
    "cut off": (lambda raw: cut_off(raw["--file_path"]), "{--file_path} is cut off"),
    "metadata cut off": (
        lambda raw: cut_off(raw["--meta_file_path"]),
        "{--meta_file_path} is cut off",
    ),
    "not gzip": (
        lambda raw: raw["--file_path"].write_text("<html>"),
        "{--file_path} is a web page",
    ),
    "broken line": (
        lambda raw: break_line(raw["--file_path"], 7, '{"reviewerID": "u", "as'),
        "{--file_path}, line 7: not valid JSON",
    ),
    "broken metadata line": (
        lambda raw: break_line(raw["--meta_file_path"], 2, "{'asin': 'A'}"),
        "{--meta_file_path}, line 2: not valid JSON",
    ),
    "line without asin": (
        lambda raw: break_line(raw["--meta_file_path"], 3, '{"title": "x"}'),
        "{--meta_file_path}, line 3: no asin",
    ),
    "swapped": (
        lambda raw: raw.update(
            {"--file_path": raw["--meta_file_path"], "--meta_file_path": raw["--file_path"]}
        ),
        "are the two files swapped?",
    ),
    "reviews twice": (
        lambda raw: raw.update({"--meta_file_path": raw["--file_path"]}),
        "{--meta_file_path} holds reviews",
    ),
    "of two categories": (
        lambda raw: write_lines(raw["--file_path"], reviews("u X 1", "u Y 2")),
        "none of the 2 reviews",
    ),
    "too few": (
        lambda raw: write_lines(raw["--file_path"], reviews("u A 1", "u B 2", "v A 1")),
        "no user is left of 2 in {--file_path}: 2 have fewer than 4",
    ),
    "output is a file": (
        lambda raw: raw.update({"--output_path": raw["--file_path"] / "out"}),
        "cannot write to {--output_path}",
    ),
}


@pytest.mark.parametrize("case", WRONG_INPUTS)
def test_wrong_inputs_are_named_and_nothing_is_written(
    run: Run, raw: dict[str, Path], case: str
) -> None:
    spoil, message = WRONG_INPUTS[case]
    spoil(raw)
    status, out, err = run("finetune_data/process.py", *arguments(raw))
    assert status == 1
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    for name, path in raw.items():
        message = message.replace("{" + name + "}", str(path))
    assert message in err
    assert out == ""
    assert not raw["--output_path"].exists()


def test_an_older_folder_survives_a_failed_run(run: Run, raw: dict[str, Path]) -> None:
    assert run("finetune_data/process.py", *arguments(raw))[0] == 0
    before = {path.name: path.read_bytes() for path in raw["--output_path"].iterdir()}
    cut_off(raw["--file_path"])
    assert run("finetune_data/process.py", *arguments(raw))[0] == 1
    assert {path.name: path.read_bytes() for path in raw["--output_path"].iterdir()} == before


def test_bad_lines_are_counted_and_reported_on_request(run: Run, raw: dict[str, Path]) -> None:
    with gzip.open(raw["--file_path"], "at") as handle:
        handle.write('{"reviewerID": "u", "asin": "A"}\n{"half a li\n')
    with gzip.open(raw["--meta_file_path"], "at") as handle:
        handle.write('{"title": "whose?"}\n')
    status, _, err = run("finetune_data/process.py", *arguments(raw), "--skip_bad_lines")
    assert status == 0
    assert "left out 3 bad lines: 1 no asin, 1 no unixReviewTime, 1 not valid JSON" in err
    assert "Things_5.json.gz, line 15: not valid JSON" in err
    folder = raw["--output_path"]
    assert read(folder / "train.json") == {"0": [1, 2], "1": [1, 2]}
    assert read(folder / "dataset.json")["counts"]["bad_lines"] == {
        "total": 3,
        "reasons": {"no asin": 1, "no unixReviewTime": 1, "not valid JSON": 1},
        "first": [
            "meta_Things.json.gz, line 7: no asin",
            "Things_5.json.gz, line 14: no unixReviewTime",
            "Things_5.json.gz, line 15: not valid JSON",
        ],
    }


@pytest.mark.parametrize(
    "flags",
    [
        ["--min_interactions", "0"],
        ["--user_sample_rate", "0"],
        ["--user_sample_rate", "1.5"],
        ["--attributes", "title", "title"],
        ["--no_such_flag"],
    ],
)
def test_usage_errors(run: Run, raw: dict[str, Path], flags: list[str]) -> None:
    status, _, err = run("finetune_data/process.py", *arguments(raw), *flags)
    assert status == 2
    assert flags[0] in err
    assert not raw["--output_path"].exists()


def test_from_its_own_folder_on_a_plain_checkout(repository: Path, raw: dict[str, Path]) -> None:
    """As published: `cd finetune_data && python process.py …`, with relative paths."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    relative = {
        name: os.path.relpath(path, repository / "finetune_data") for name, path in raw.items()
    }
    result = subprocess.run(
        [sys.executable, "process.py", *[part for pair in relative.items() for part in pair]],
        cwd=repository / "finetune_data",
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (result.returncode, result.stderr) == (0, "")
    assert read(raw["--output_path"] / "umap.json") == {"u": 0, "first": 1}


# --- pretrain_data/ -------------------------------------------------------------------------------


@pytest.fixture
def categories(tmp_path: Path) -> Path:
    root = tmp_path / "raw"
    write_lines(
        root / "meta_Toys.json.gz",
        [
            {"asin": "T1", "title": "Top", "brand": "Spin", "category": ["Toys"]},
            {"asin": "T2", "title": None, "brand": "Spin", "category": ["Toys"]},
            {"asin": "T3", "title": "Not reviewed", "brand": "", "category": []},
            {"asin": "X", "title": "in both, older"},
        ],
    )
    write_lines(root / "meta_Pens.json.gz", [{"asin": "P1", "title": "Pen"}, {"asin": "X"}])
    write_lines(
        root / "meta_Dev.json.gz",
        [{"asin": "D1", "title": "D&eacute;"}, {"asin": "D2", "title": 2}],
    )
    write_lines(
        root / "Toys_5.json.gz",
        reviews("b T1 5", "a X 5", "b X 5", "a T1 5", "a T2 1", "b T1 4", "lonely T1 1"),
    )
    write_lines(root / "Pens_5.json.gz", reviews("a P1 2", "a X 1", "c X 1", "c X 1"))
    write_lines(root / "Dev_5.json.gz", reviews("b D2 1", "a D1 3", "b D1 1", "a D2 2"))
    return root


def pretraining_flags(root: Path, output: Path) -> list[object]:
    names = ["--categories", "Toys", "Pens", "--dev_category", "Dev"]
    return ["--seq_root", root, *names, "--output_dir", output]


def test_pretraining_files_by_hand(run: Run, categories: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    flags = pretraining_flags(categories, output)
    status, out, err = run("pretrain_data/meta_data_process.py", "--meta_root", categories, *flags)
    assert (status, err) == (0, "")
    assert "5 products of 6 reviewed and 8 metadata rows" in out
    meta = read(output / "meta_data.json")
    assert meta == {
        "T1": {"title": "Top", "brand": "Spin", "category": "Toys"},
        "X": {"title": "in both, older"},
        "P1": {"title": "Pen"},
        "D1": {"title": "Dé"},
        "D2": {"title": "2"},
    }
    counts = read(output / "dataset.json")["meta_data"]["counts"]
    assert counts["metadata"]["products_without_title"] == 1
    assert counts["metadata"]["rows_of_products_without_reviews"] == 1

    status, out, err = run("pretrain_data/interaction_data_process.py", *flags)
    assert (status, err) == (0, "")
    assert "train.json: 4 sequences, 9 interactions" in out
    assert "dev.json: 2 sequences, 4 interactions" in out
    # A sequence per user and category; at equal times the file's order, not the asins'.
    assert read(output / "train.json") == [["T1", "T1", "X"], ["X", "T1"], ["X", "P1"], ["X", "X"]]
    assert read(output / "dev.json") == [["D2", "D1"], ["D2", "D1"]]
    about = read(output / "dataset.json")
    assert about["meta_data"]["counts"] == counts
    toys = about["sequences"]["counts"]["categories"]["Toys"]
    assert toys == {
        "reviews": 7,
        "reviews_of_unknown_products": 1,
        "duplicate_reviews": 0,
        "users": 3,
        "users_with_too_few_interactions": 1,
        "users_not_sampled": 0,
        "users_kept": 2,
        "interactions_kept": 5,
    }
    assert about["sequences"]["counts"]["categories"]["Pens"]["duplicate_reviews"] == 1
    assert about["sequences"]["files"] == {
        "dev.json": {"sequences": 2, "interactions": 4},
        "train.json": {"sequences": 4, "interactions": 9},
    }

    # Everyone, as published; another split has another hash.
    assert run("pretrain_data/interaction_data_process.py", *flags, "--min_interactions", 1)[0] == 0
    assert ["T1"] in read(output / "train.json")
    assert (
        read(output / "dataset.json")["sequences"]["split_hash"]
        != (about["sequences"]["split_hash"])
    )


def test_pretraining_samples_the_same_users_everywhere(
    run: Run, categories: Path, tmp_path: Path
) -> None:
    names = [f"user{n}" for n in range(40)]
    for category, asins in (("Toys", "T1 X"), ("Pens", "P1 X"), ("Dev", "D1 D2")):
        rows = [f"{name} {asin} 1" for name in names for asin in asins.split()]
        write_lines(categories / f"{category}_5.json.gz", reviews(*rows))
    output = tmp_path / "out"
    flags = pretraining_flags(categories, output)
    assert run("pretrain_data/meta_data_process.py", "--meta_root", categories, *flags)[0] == 0
    sample = ["--user_sample_rate", "0.5", "--seed", "4"]
    assert run("pretrain_data/interaction_data_process.py", *flags, *sample)[0] == 0
    found = read(output / "dataset.json")["sequences"]["counts"]["categories"]
    kept = {counts["users_kept"] for counts in found.values()}
    assert len(kept) == 1
    assert 10 < kept.pop() < 30


def test_pretraining_inputs_are_checked_first(run: Run, categories: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    flags = pretraining_flags(categories, output)
    items = ["pretrain_data/meta_data_process.py", "--meta_root", categories, *flags]
    sequences = ["pretrain_data/interaction_data_process.py", *flags]

    def fails_with(command: list[object], message: str) -> None:
        status, out, err = run(*command)
        assert (status, out) == (1, "")
        assert err.startswith("error: ")
        assert message in err

    fails_with(sequences, f"{output / 'meta_data.json'} does not exist: run meta_data_process.py")
    fails_with([*items, "--dev_category", "Toys"], "Toys named twice")
    pens = categories / "Pens_5.json.gz"
    whole = pens.read_bytes()
    pens.unlink()
    fails_with(items, f"no such file: {pens}")
    fails_with(sequences, f"no such file: {pens}")
    pens.write_bytes(whole[:-9])
    fails_with(items, f"{pens} is cut off")
    assert not output.exists()

    pens.write_bytes(whole)
    assert run(*items)[0] == 0
    before = {path.name: path.read_bytes() for path in output.iterdir()}
    assert set(before) == {"meta_data.json", "dataset.json"}
    write_lines(pens, [*reviews("a P1 1"), {"reviewerID": "a", "unixReviewTime": 1}])
    fails_with(sequences, f"{pens}, line 2: no asin")
    write_lines(categories / "Dev_5.json.gz", reviews("a D1 1", "b D2 2"))
    fails_with(sequences, "no sequence is left for dev.json from Dev")
    assert {path.name: path.read_bytes() for path in output.iterdir()} == before

    (output / "meta_data.json").write_text('{"T1": "text"}')
    fails_with(sequences, "meta_data.json is not {asin: {attribute: text}}")


@pytest.mark.parametrize(
    "script", ["pretrain_data/meta_data_process.py", "pretrain_data/interaction_data_process.py"]
)
def test_roots_must_be_named(run: Run, script: str) -> None:
    status, _, err = run(script)
    assert status == 2
    assert "--seq_root" in err


# --- real data ------------------------------------------------------------------------------------


def published_finetuning(reviews_path: Path, meta_path: Path) -> dict[str, Any]:
    """The published algorithm in a few plain lines, without its sampling of users."""
    meta = {}
    with gzip.open(meta_path) as lines:
        for row in map(json.loads, lines):
            text = {"title": row["title"], "brand": row["brand"]}
            meta[row["asin"]] = text | {"category": " ".join(row["category"])}
    met = defaultdict(list)
    with gzip.open(reviews_path) as lines:
        for row in map(json.loads, lines):
            if row["asin"] in meta:
                met[row["reviewerID"]].append((row["asin"], row["unixReviewTime"]))
    users: dict[str, int] = {}
    items: dict[str, int] = {}
    train, val, test = {}, {}, {}
    for name, events in met.items():
        if len(events) > 3:
            user = str(users.setdefault(name, len(users)))
            coded = [(items.setdefault(asin, len(items)), time) for asin, time in events]
            history = [item for item, _ in sorted(coded, key=lambda event: event[1])]
            train[user], val[user], test[user] = history[:-2], history[-2:-1], history[-1:]
    return {
        "train.json": train,
        "val.json": val,
        "test.json": test,
        "umap.json": users,
        "smap.json": items,
        "meta_data.json": meta,
    }


@pytest.mark.real_data
@pytest.mark.parametrize(
    ("folder", "category", "sizes"),
    [
        ("gift_cards", "Gift_Cards", (458, 148, 2972)),
        ("scientific", "Industrial_and_Scientific", (8442, 4385, 59427)),
    ],
)
def test_the_published_files_come_out(
    run: Run,
    real_data: Path,
    tmp_path: Path,
    folder: str,
    category: str,
    sizes: tuple[int, int, int],
) -> None:
    reviews_path = real_data / folder / f"{category}_5.json.gz"
    meta_path = real_data / folder / f"meta_{category}.json.gz"
    files = ["--file_path", reviews_path, "--meta_file_path", meta_path]
    expected = published_finetuning(reviews_path, meta_path)

    flags = ["--output_path", tmp_path / "raw", "--no_clean"]
    assert run("finetune_data/process.py", *files, *flags)[0] == 0
    for name, content in expected.items():
        found = read(tmp_path / "raw" / name)
        assert found == content, name
        assert list(found) == list(content), f"order of {name}"
    dataset = read(tmp_path / "raw" / "dataset.json")
    assert (dataset["num_users"], dataset["num_items"], dataset["num_interactions"]) == sizes

    # Cleaning changes text alone.
    assert run("finetune_data/process.py", *files, "--output_path", tmp_path / "clean")[0] == 0
    for name in set(expected) - {"meta_data.json"}:
        assert (tmp_path / "clean" / name).read_bytes() == (tmp_path / "raw" / name).read_bytes()
    assert read(tmp_path / "clean" / "dataset.json")["split_hash"] == dataset["split_hash"]
    clean = ProcessedFolder.load(tmp_path / "clean")
    assert clean.num_without_metadata == 0
    texts = [text for item in clean.items for text in item.values()]
    assert all(text and text == " ".join(text.split()) for text in texts)
    assert not any("&amp;" in text or "&quot;" in text or "</" in text for text in texts)


@pytest.mark.real_data
def test_duplicate_reviews_of_gift_cards(run: Run, real_data: Path, tmp_path: Path) -> None:
    source = real_data / "gift_cards"
    files = ["--file_path", source / "Gift_Cards_5.json.gz"]
    files += ["--meta_file_path", source / "meta_Gift_Cards.json.gz"]
    status, out, _ = run("finetune_data/process.py", *files, "--output_path", tmp_path / "out")
    assert status == 0
    assert "3 duplicate reviews kept" in out
