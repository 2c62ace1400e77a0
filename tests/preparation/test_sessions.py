"""Sessions by gap and by column, and those of the same user before them, by hand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from recformer.commands.process import main
from recformer.data.processed import ProcessedFolder
from recformer.files import UserError, read_json
from recformer.preparation.sessions import split_at_gaps, with_previous_sessions
from recformer.preparation.splits import build_histories
from recformer.preparation.times import parse_duration, units_a_second
from tests.preparation.test_splits import interactions

START = 1_700_000_000  # seconds
EVENTS = interactions(
    ("ann", "a", START),
    ("bob", "x", START + 5),
    ("ann", "c", START + 4000),  # 2201 s after ann's b
    ("ann", "b", START + 1799),
    ("bob", "y", START + 1805),  # exactly 1800 s: the same session
    ("ann", "d", START + 4001),
)


def test_a_session_ends_at_a_pause_longer_than_the_gap() -> None:
    found = split_at_gaps(EVENTS, 1800)
    # by first appearance in the source: ann's first, bob's, ann's second
    assert found.user_names == ["ann/1", "bob/1", "ann/2"]
    assert found.users.tolist() == [0, 1, 2, 0, 1, 2]
    assert found.owners is not None
    assert found.owners.tolist() == [0, 1, 0, 0, 1, 0]
    histories = build_histories(found)
    names = [[histories.item_names[i] for i in histories.sequences[row]] for row in range(3)]
    assert names == [["a", "b"], ["x", "y"], ["c", "d"]]
    assert split_at_gaps(EVENTS, 1798).user_names == ["ann/1", "bob/1", "ann/3", "ann/2", "bob/2"]


def test_milliseconds_are_told_by_their_size() -> None:
    thousandths = replace(EVENTS, times=EVENTS.times * 1000)
    assert split_at_gaps(thousandths, 1800).users.tolist() == [0, 1, 2, 0, 1, 2]
    assert [units_a_second(EVENTS.times * f, "--x") for f in (1, 10**3, 10**6, 10**9)] == [
        1, 10**3, 10**6, 10**9
    ]  # fmt: skip
    with pytest.raises(UserError, match="--session_gap needs moments.*begin at 4000"):
        split_at_gaps(replace(EVENTS, times=np.full(6, 4000)), 1800)
    with pytest.raises(UserError, match="--session_gap needs times"):
        split_at_gaps(replace(EVENTS, has_times=False), 1800)


def test_durations() -> None:
    assert [parse_duration(t) for t in ("45s", "30m", "2h", "1d", "1w")] == [
        45, 1800, 7200, 86_400, 604_800
    ]  # fmt: skip
    for wrong in ("30", "0m", "1.5h", "m", "-1d", "1y"):
        with pytest.raises(ValueError, match="such as 30m"):
            parse_duration(wrong)


def test_previous_sessions_of_the_same_user() -> None:
    events = interactions(
        ("s1", "a", 10), ("s1", "b", 20),
        ("s2", "c", 30), ("s2", "d", 50),
        ("s3", "e", 40), ("s3", "f", 60),  # began before s2 had ended
        ("s4", "g", 70), ("s4", "h", 80),
        ("t1", "i", 90), ("t1", "j", 95),
    )  # fmt: skip
    owners = np.array([0, 0, 0, 0, 0, 0, 0, 0, 1, 1], dtype=np.int32)
    histories = build_histories(replace(events, owners=owners))
    for count, expected in (
        (1, ["ab", "abcd", "abef", "efgh", "ij"]),
        (2, ["ab", "abcd", "abef", "cedfgh", "ij"]),
    ):
        found = with_previous_sessions(histories, count)
        rows = ["".join(found.item_names[i] for i in found.sequences[r]) for r in range(5)]
        assert rows == expected
        assert found.context is not None
        assert found.times is not None
        own = [
            "".join(np.array(list(row))[~found.context[a:b]])
            for row, a, b in zip(rows, found.sequences.offsets, found.sequences.offsets[1:])
        ]
        assert own == ["ab", "cd", "ef", "gh", "ij"]
        assert found.counts["sessions_with_earlier_ones"] == 3
    nobody = replace(histories, owners=np.full(5, -1, dtype=np.int32))  # users are not known
    assert with_previous_sessions(nobody, 2).sequences.lengths.tolist() == [2] * 5


def log(folder: Path) -> Path:
    """Sessions in the REES46 form: u's s1 and s3, v's s2, and one of a single event."""
    rows = [
        ("2019-10-01 00:00:00 UTC", "view", "i1", "u", "s1"),
        ("2019-10-01 00:00:09 UTC", "cart", "i2", "u", "s1"),
        ("2019-10-01 00:30:00 UTC", "view", "i3", "v", "s2"),
        ("2019-10-01 00:40:00 UTC", "view", "i1", "v", "s2"),
        ("2019-10-01 01:00:00 UTC", "view", "i2", "u", "s3"),
        ("2019-10-01 01:00:05 UTC", "view", "i3", "u", "s3"),
        ("2019-10-01 02:00:05 UTC", "view", "i3", "w", "s4"),
    ]
    names = ["event_time", "event_type", "product_id", "user_id", "user_session"]
    path = folder / "log.csv"
    path.write_text("\n".join(",".join(row) for row in [names, *rows]) + "\n")
    (folder / "items.csv").write_text("item_id,title\ni1,One\ni2,Two\ni3,Three\n")
    return path


def process(folder: Path, *flags: str) -> ProcessedFolder:
    out = folder / "out"
    main(
        ["--file_path", str(log(folder)), "--meta_file_path", str(folder / "items.csv")]
        + ["--output_path", str(out), *flags]
    )
    return ProcessedFolder.load(out)


def test_sessions_by_column(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = process(tmp_path, "--session_column", "user_session", "--min_interactions", "2")
    assert list(read_json(found.path / "umap.json")) == ["s1", "s2", "s3"]
    assert found.dataset is not None
    assert found.dataset["counts"]["histories"]["sessions_of_one_event"] == 1
    assert "(1 of one event)" in capsys.readouterr().out
    with_earlier = process(
        tmp_path, "--session_column", "user_session", "--previous_sessions", "1"
    )  # two interactions are enough for a session
    assert [with_earlier.asins[i] for i in with_earlier.train[2]] == ["i1", "i2"]
    assert with_earlier.train.lengths.tolist() == [2, 2, 2]  # s3: s1 trains, i2 and i3 are held out
    named = process(
        tmp_path, "--session_column", "user_session", "--user_column", "user_id",
        "--previous_sessions", "1",
    )  # fmt: skip
    assert named.split_hash == with_earlier.split_hash


def test_sessions_by_gap(tmp_path: Path) -> None:
    found = process(tmp_path, "--session_gap", "15m")
    assert list(read_json(found.path / "umap.json")) == ["u/1", "v/1", "u/2"]
    earlier = process(tmp_path, "--session_gap", "15m", "--previous_sessions", "3")
    assert earlier.train.lengths.tolist() == [2, 2, 2]


def test_flags_that_do_not_go_together(tmp_path: Path) -> None:
    for flags in (
        ["--session_gap", "30m", "--session_column", "user_session"],
        ["--previous_sessions", "2"],
        ["--session_gap", "30"],
        ["--split", "windows"],
        ["--split", "windows", "--window", "1d", "--k_core", "5"],
        ["--window", "1d"],
        ["--split", "windows", "--window", "1d", "--cold_items", "0.1"],
    ):
        with pytest.raises(SystemExit) as stopped:
            process(tmp_path, *flags)
        assert stopped.value.code == 2
    with pytest.raises(UserError, match="--user_column"):
        process(tmp_path, "--session_column", "user_session", "--user_column", "user_id")


def test_session_lists_know_no_user(tmp_path: Path) -> None:
    path = tmp_path / "sessions.parquet"
    pl.DataFrame(
        {"session_id": [1, 2], "item_id-list": [["i1", "i2"], ["i3", "i1"]]}
    ).write_parquet(path)
    log(tmp_path)
    with pytest.raises(UserError, match="--previous_sessions needs the users of the sessions"):
        main(
            ["--file_path", str(path), "--meta_file_path", str(tmp_path / "items.csv")]
            + ["--output_path", str(tmp_path / "o"), "--session_column", "session_id"]
            + ["--previous_sessions", "1"]
        )
