"""Logs that are larger than memory: the same files, byte for byte, as from memory."""

from __future__ import annotations

import csv
import gzip
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from recformer.commands import process, process_pretraining
from recformer.data import processed_files, processed_store
from recformer.data.mapped import open_mapped
from recformer.data.processed import READ_FILES, ProcessedFolder
from recformer.files import UserError
from recformer.preparation import log_frames, options, spool
from recformer.preparation.finetuning import prepare_finetuning
from recformer.preparation.log_arrays import value_at
from recformer.preparation.options import Filters, SessionOptions, SplitOptions
from recformer.preparation.pretraining import PretrainingSource, prepare_pretraining_sources
from recformer.preparation.times import Fractions, Moments, in_one_unit, in_unit, units_a_second

MEMORY = 2 * 10**9


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """A few interactions at a time."""
    monkeypatch.setattr(log_frames, "AT_ONCE", 7)
    monkeypatch.setattr(options, "_BYTES_A_ROW", int(MEMORY * options._SHARE / 5))
    monkeypatch.setattr(spool, "PARTS", 3)
    monkeypatch.setattr(processed_files, "_ROWS", 6)
    monkeypatch.setattr(processed_files, "_USERS_AT_ONCE", 2)
    monkeypatch.setattr(processed_store, "LARGE", 0)


@dataclass(frozen=True)
class Log:
    """A log as a file, and how it is prepared."""

    rows: list[tuple[str, str, str]]
    form: str
    with_items: bool
    arguments: dict[str, Any]


MINUTES = st.integers(0, 9)
FRACTIONS = st.sampled_from(["", "", "", ".5", ".25", ".000001"])
ROWS = st.tuples(
    st.integers(0, 6).map("u{}".format),
    st.integers(0, 7).map("i{}".format),
    st.tuples(MINUTES, FRACTIONS).map(lambda parts: f"{1_600_000_000 + 60 * parts[0]}{parts[1]}"),
)
SPLITS = st.one_of(
    st.builds(SplitOptions, val_users=st.one_of(st.none(), st.integers(1, 3))),
    st.builds(SplitOptions, cold_items=st.sampled_from([0.1, 0.3])),
    st.builds(SplitOptions, cold_items=st.just(0.3), val_users=st.just(2)),
    st.builds(
        SplitOptions,
        split=st.just("temporal"),
        test_quantile=st.sampled_from([0.6, 0.8]),
        val_quantile=st.just(0.7),
        cold_items=st.one_of(st.none(), st.just(0.3)),
    ),
)
FILTERS = st.builds(
    Filters,
    deduplicate=st.booleans(),
    drop_consecutive_repeats=st.booleans(),
    k_core=st.sampled_from([0, 2, 3]),
    max_users=st.one_of(st.none(), st.integers(1, 4)),
)


@st.composite
def logs(draw: st.DrawFn) -> Log:
    rows = draw(st.lists(ROWS, min_size=8, max_size=60))
    gap = draw(st.one_of(st.none(), st.just(100), st.just(400)))
    arguments = {
        "min_interactions": draw(st.integers(1, 3)),
        "user_sample_rate": draw(st.sampled_from([1.0, 1.0, 0.7])),
        "seed": draw(st.integers(0, 2)),
        "skip_bad_lines": True,
        "filters": draw(FILTERS),
        "options": draw(SPLITS),
        "sessions": SessionOptions(gap=gap),
    }
    if draw(st.booleans()):  # a line that cannot be used, in some batch
        place = draw(st.integers(0, len(rows) - 1))
        rows[place] = draw(st.sampled_from([("", "i1", "5"), ("u1", "i1", "yesterday")]))
    form = draw(st.sampled_from(["csv", "quoted", "parquet", "json"]))
    return Log(rows, form, draw(st.booleans()), arguments)


def write(folder: Path, log: Log) -> tuple[Path, Path | None]:
    """The log, with two further columns that describe the item, and a file of some items."""
    names = ["user_id", "item_id", "timestamp", "title"]
    rows = [(*row, f"T{row[1]}" if n % 3 else "") for n, row in enumerate(log.rows)]
    items = None
    if log.with_items:
        items = folder / "items.csv"
        items.write_text("item_id,title\n" + "".join(f"i{n},Item {n}\n" for n in range(6)))
    if log.form == "parquet":
        path = folder / "log.parquet"
        pl.DataFrame(rows, schema=dict.fromkeys(names, pl.String), orient="row").write_parquet(path)
    elif log.form == "json":
        path = folder / "log.jsonl.gz"
        lines = [json.dumps(dict(zip(names, row, strict=True))) for row in rows]
        path.write_bytes(gzip.compress("\n".join(lines).encode()))
    else:
        path = folder / "log.csv"
        with open(path, "w", newline="") as handle:
            writer = csv.writer(handle)
            writer.writerows([names, *rows])
            if log.form == "quoted":  # a line that Python's reader has to judge
                handle.write("too,few\n")
    return path, items


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


@settings(
    max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(logs())
def test_same_files_as_in_memory(tmp_path_factory: pytest.TempPathFactory, log: Log) -> None:
    folder = tmp_path_factory.mktemp("log")
    path, items = write(folder, log)

    def prepared(name: str, memory: int | None) -> Any:
        try:
            about = prepare_finetuning(path, items, folder / name, memory=memory, **log.arguments)
        except UserError as error:
            return str(error)
        return about, files(folder / name)

    in_memory = prepared("in_memory", None)
    assert prepared("in_files", MEMORY) == in_memory
    if isinstance(in_memory, str):
        return
    out = folder / "in_files"
    assert sorted(entry.name for entry in out.iterdir() if entry.is_dir()) == ["mapped"]
    # The copy that it leaves is the one that a reader of the JSON files would make.
    (store,) = (out / "mapped").glob("processed-*")
    written = open_mapped(store)
    assert store == processed_store.store_path(out, processed_store.content_key(out, READ_FILES))
    processed_store.remove_stores(out)
    ProcessedFolder.load(out)
    read = open_mapped(store)
    assert written.key == read.key
    assert written.facts == read.facts
    for name, array in read.arrays.items():
        assert written.arrays[name].tolist() == array.tolist(), name


def test_no_path_of_the_property_test_is_empty(tmp_path: Path) -> None:
    """One log with known figures, so that both paths cannot fail alike."""
    rows = [(f"u{n % 4}", f"i{n % 7}", str(1_600_000_000 + n * 60)) for n in range(40)]
    log = Log([*rows, *rows[:3]], "csv", True, {})
    path, items = write(tmp_path, log)
    about = prepare_finetuning(
        path,
        items,
        tmp_path / "out",
        memory=MEMORY,
        filters=Filters(deduplicate=True, k_core=5),
    )
    # Of 40 interactions, item 6 is not in the file of items: n = 6, 13, 20, 27, 34.
    assert about["counts"]["reviews"]["reviews_of_unknown_products"] == 5
    assert about["counts"]["reviews"]["duplicate_reviews"] == 3
    assert about["counts"]["filters"] == {
        "duplicates_removed": 3,
        "interactions_outside_k_core": 0,
    }
    assert (about["num_users"], about["num_items"], about["num_interactions"]) == (4, 6, 35)
    data = ProcessedFolder.load(tmp_path / "out")
    names = [data.asins[item] for item in data.train[1].tolist()]
    assert names == ["i1", "i5", "i2", "i3", "i0", "i4", "i1"]  # n = 1, 5, 9, …; 13 is unknown
    assert [data.asins[data.test[1][0]], data.items[0]] == ["i2", {"title": "Item 0"}]


@pytest.mark.parametrize("form", ["csv", "json"])
def test_pretraining_writes_the_same_files(tmp_path: Path, form: str) -> None:
    draw = np.random.default_rng(1)
    sources = []
    for name in ("one", "two", "dev"):
        (tmp_path / name).mkdir()
        rows = [
            (f"u{draw.integers(9)}", f"i{draw.integers(7)}", str(1_600_000_000 + draw.integers(9)))
            for _ in range(60)
        ]
        path, items = write(tmp_path / name, Log(rows, form, True, {}))
        assert items is not None
        sources.append(PretrainingSource(name, path, items))
    for name, memory in (("in_memory", None), ("in_files", MEMORY)):
        prepare_pretraining_sources(
            sources[:2],
            sources[2],
            tmp_path / name,
            memory=memory,
            filters=Filters(k_core=3, drop_consecutive_repeats=True),
        )
    assert files(tmp_path / "in_files") == files(tmp_path / "in_memory")
    assert len(json.loads((tmp_path / "in_files" / "train.json").read_text())) == 17


def test_what_needs_everything_in_memory_is_refused_before_any_work(tmp_path: Path) -> None:
    path, _ = write(tmp_path, Log([("u", "i", "5")], "csv", False, {}))
    histories = tmp_path / "lines.txt"
    histories.write_text("1 2 3 4\n2 3 4\n3 1 2 5 4\n")
    out = tmp_path / "out"
    for arguments, file, message in (
        ({"options": SplitOptions(split="windows", window=60)}, path, "--split windows: needs all"),
        ({"sessions": SessionOptions(gap=60, previous=1)}, path, "--previous_sessions: needs all"),
        ({}, histories, "lines.txt is a file of whole histories"),
        ({"memory": 10**8}, path, "--memory: got 0.10GB, expected 1GB or more"),
    ):
        with pytest.raises(UserError, match=message):
            prepare_finetuning(file, None, out, **{"memory": MEMORY, **arguments})
    assert not out.exists()


def test_flags(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [(f"u{n % 3}", f"i{n % 5}", str(n)) for n in range(30)]
    path, items = write(tmp_path, Log(rows, "csv", True, {}))
    shared = ["--memory", "1.5GB", "--k_core", "2"]
    process.main(
        ["--file_path", str(path), "--meta_file_path", str(items)]
        + ["--output_path", str(tmp_path / "out"), *shared]
    )
    assert "3 users, 5 items, 30 interactions" in capsys.readouterr().out
    three = ["shop", str(path), str(items)]
    process_pretraining.main(
        ["--source", *three, "--dev_source", "dev", *three[1:]]
        + ["--output_dir", str(tmp_path / "pretraining"), *shared]
    )
    assert "train.json: 3 sequences, 30 interactions" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        process.main(["--file_path", "a", "--output_path", "b", "--memory", "4"])
    assert "got 4, expected a size such as 4GB" in capsys.readouterr().err


VALUES = st.integers(-(2**63), 2**63 - 1) | st.integers(-3, 3)


@given(st.lists(st.lists(VALUES), max_size=5), st.integers(1, 5), st.data())
def test_value_at_a_place(parts: list[list[int]], held: int, data: st.DataObject) -> None:
    everything = sorted(value for part in parts for value in part)
    if not everything:
        return
    place = data.draw(st.integers(0, len(everything) - 1))
    arrays = [np.array(part, np.int64) for part in parts]
    assert value_at(lambda: arrays, place, held) == everything[place]


@given(
    st.lists(
        st.tuples(
            st.sampled_from([0, 5, 1_600_000_000, 2**62]),
            st.sampled_from([0, 0, 5 * 10**8, 10**6, 10**3, 1]),
        ),
        min_size=1,
    ),
    st.integers(1, 5),
)
def test_units_of_batches_are_those_of_all(times: list[tuple[int, int]], size: int) -> None:
    wholes, billionths = (np.array(column, np.int64) for column in zip(*times, strict=True))
    fractions, moments = Fractions(), Moments()
    for start in range(0, len(times), size):
        part = slice(start, start + size)
        fractions.add(wholes[part], billionths[part])
        moments.add(wholes[part])
    expected = in_one_unit(wholes, billionths)
    found = in_unit(wholes, billionths, fractions.exponent())
    assert [own.tolist() for own in found] == [own.tolist() for own in expected]
    assert fractions.all_fit() == (not expected[1].any())
    try:
        units = units_a_second(wholes, "--flag")
    except UserError:
        with pytest.raises(UserError, match="--flag needs moments"):
            moments.units_a_second("--flag")
    else:
        assert moments.units_a_second("--flag") == units
        assert 10**8 <= sorted(wholes)[(len(wholes) - 1) // 2] / units < 10**10
