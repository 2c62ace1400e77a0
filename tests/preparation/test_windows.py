"""The split by windows, by hand, and that nothing of a window is known before it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from recformer.commands.process import main
from recformer.data.processed import ProcessedFolder, join_splits, read_times
from recformer.data.windows import NO_TARGET, TEST_TARGET, VAL_TARGET, Windows
from recformer.evaluation.protocol import Protocol
from recformer.files import UserError
from recformer.preparation.splits import TEST, TRAIN, VAL, Histories, build_histories
from recformer.preparation.windows import Windowed, in_order_of_appearance, split_windows
from tests.preparation.test_splits import interactions

HOUR, DAY = 3600, 86_400
START = 18_000 * DAY  # 2019-04-14, a Sunday


def histories() -> Histories:
    """Two days and a bit: `night` runs past midnight, `one` is of the first day, others later."""
    events = [
        ("late", "z", DAY + 2 * HOUR),
        ("late", "a", DAY + 3 * HOUR),
        ("late", "new", DAY + 4 * HOUR),
        ("one", "b", HOUR),
        ("one", "a", 2 * HOUR),
        ("night", "a", DAY - 10),
        ("night", "c", DAY - 5),
        ("night", "d", DAY + 5),
        ("night", "b", DAY + 9),
        ("third", "d", 2 * DAY + 1),
        ("third", "c", 2 * DAY + 2),
        ("other", "c", 2 * DAY + 3),
        ("other", "c", 2 * DAY + 4),
    ]
    log = interactions(*((user, item, START + time) for user, item, time in events))
    return in_order_of_appearance(build_histories(log))


def split(found: Histories, **changes: object) -> Windowed:
    options = {"targets": "every", "min_sequences": 2, "seed": 0} | changes
    return split_windows(found, DAY, **options)  # type: ignore[arg-type]


def test_windows_by_hand() -> None:
    found = histories()
    assert found.item_names == ["b", "a", "c", "d", "z", "new"]  # by time
    assert found.user_names == ["late", "one", "night", "third", "other"]
    windowed = split(found)
    assert windowed.windows.tolist() == [1, 1, 1, 0, 0, 0, 0, 1, 1, 2, 2, 2, 2]
    judged = windowed.roles != NO_TARGET
    #                         late     one   night       third other
    assert judged.tolist() == [0, 1, 1, 0, 0, 0, 0, 1, 1, 0, 1, 0, 1]
    last = split(found, targets="last").roles != NO_TARGET
    assert last.tolist() == [0, 0, 1, 0, 0, 0, 0, 0, 1, 0, 1, 0, 1]
    about = windowed.about["windows"]
    assert [w["starts"] for w in about] == [
        "2019-04-14T00:00:00Z", "2019-04-15T00:00:00Z", "2019-04-16T00:00:00Z"
    ]  # fmt: skip
    assert [w["items_known"] for w in about] == [3, 6, 6]
    assert [w["targets_new_in_it"] for w in about] == [0, 2, 0]  # new, d
    assert [w["val_targets"] + w["test_targets"] for w in about] == [0, 4, 2]
    # the folder's own split is that of the last window
    assert set(windowed.parts[:9]) == {TRAIN}
    assert set(windowed.parts[9:]) == {VAL, TEST}


def test_half_of_the_sequences_validate() -> None:
    rows = 400
    events = [
        (f"u{n}", item, START + day * DAY + HOUR + n)
        for n in range(rows)
        for day, item in ((0, "a"), (0, "b"), (1, "c"), (1, "d"))
    ]
    windowed = split(in_order_of_appearance(build_histories(interactions(*events))))
    about = windowed.about["windows"][1]
    assert about["val_sequences"] + about["test_sequences"] == rows
    assert about["val_sequences"] == rows // 2
    roles = windowed.roles.reshape(rows, 4)
    assert (roles[:, 2] == roles[:, 3]).all()  # a sequence is one or the other
    assert (split(in_order_of_appearance(build_histories(interactions(*events)))).roles
            == windowed.roles).all()  # fmt: skip


def test_weeks_begin_on_monday() -> None:
    events = [
        (f"u{n}", item, START + n // 2 * DAY + time)
        for n in range(18)
        for item, time in (("a", 1), ("b", 2))
    ]
    found = in_order_of_appearance(build_histories(interactions(*events)))
    windowed = split_windows(found, 7 * DAY, targets="every", min_sequences=2, seed=3)
    assert windowed.windows.tolist()[::4] == [0, *[1] * 7, 2]  # START is a Sunday


@pytest.mark.parametrize(
    ("length", "least", "message"),
    [
        (10 * DAY, 2, "all interactions are of one window"),
        (DAY, 5, r"2 of 3 windows are sparse: 1 \(2019-04-15T00:00:00Z: 1 \+ 1 sequences\), 2"),
        (HOUR, 2, r"3 \(2019-04-14T04:00:00Z: 0 \+ 0 sequences\).* and \d+ more; expected 2"),
    ],
)
def test_sparse_windows_are_refused_by_name(length: int, least: int, message: str) -> None:
    with pytest.raises(UserError, match=message):
        split_windows(histories(), length, targets="every", min_sequences=least, seed=0)


def test_times_are_needed() -> None:
    with pytest.raises(UserError, match="--split windows needs times"):
        in_order_of_appearance(replace(histories(), times=None))


# The folder, window by window


def folder(tmp_path: Path, *flags: str, seed: int = 0) -> ProcessedFolder:
    """Four days of sessions of forty users, two to six items each; a new item every hour or so."""
    draw = np.random.default_rng(seed)
    rows = ["event_time,user_id,product_id,user_session"]
    for session in range(160):
        time = START + int(draw.integers(4 * DAY))
        for _ in range(draw.integers(2, 7)):
            time += int(draw.integers(1, 2 * HOUR))
            item = draw.integers(10 + (time - START) // HOUR)
            rows.append(f"{time},u{session % 40},i{item},s{session}")
    (tmp_path / "log.csv").write_text("\n".join(rows))
    items = [f"i{n},Item {n}" for n in range(200)]
    (tmp_path / "items.csv").write_text("\n".join(["item_id,title", *items]))
    main(
        ["--file_path", str(tmp_path / "log.csv"), "--meta_file_path", str(tmp_path / "items.csv")]
        + ["--output_path", str(tmp_path / "out"), "--split", "windows", "--window", "1d", *flags]
        + ["--session_column", "user_session", "--min_window_sequences", "4"]
    )
    return ProcessedFolder.load(tmp_path / "out")


@pytest.mark.parametrize("earlier", [0, 2])
@pytest.mark.parametrize("incremental", [False, True])
def test_nothing_of_a_window_is_known_before_it(
    tmp_path: Path, earlier: int, incremental: bool
) -> None:
    flags = ["--previous_sessions", str(earlier)] if earlier else []
    data = folder(tmp_path, *flags)
    windows = Windows.of(data)
    times = read_times(data)
    assert windows is not None
    assert times is not None
    joined = join_splits(data.train, data.val, data.test)
    first_met = np.array([times[joined.items == item].min() for item in range(data.num_items)])
    judged = []
    for number in range(1, len(windows)):
        view = windows.view(number, incremental)
        begins = START + number * DAY
        # what is trained on is what happened before, a row's oldest items
        for row in range(view.num_users):
            length = len(view.train[row])
            own = times[joined.offsets[row] : joined.offsets[row + 1]]
            assert (own[:length] < begins).all()
            np.testing.assert_array_equal(view.train[row], joined[row][:length])
        assert (first_met[: view.num_trained_items] < begins).all()
        assert (first_met[view.num_trained_items :] >= begins).all()
        assert (first_met[: view.num_items] < begins + DAY).all()
        assert view.train.items.max() < view.num_trained_items
        if incremental:
            before = windows.view(number - 1).train.lengths if number > 1 else 0
            grown = np.flatnonzero(view.train.lengths > before)
            assert set(view.train_users) <= set(grown)
            assert len(view.train_users) < len(windows.view(number).train_users) or number == 1
        for part in ("val", "test"):
            examples = view.eval_examples(part)
            assert len(examples) >= 1
            for place, target, at in zip(
                examples.user_ids, examples.targets, range(len(examples)), strict=True
            ):
                assert begins <= times[place] < begins + DAY
                assert joined.items[place] == target < view.num_items
                row = view.row_of(np.array([place]))[0]
                history = examples.histories[at]
                np.testing.assert_array_equal(history, joined.items[joined.offsets[row] : place])
                assert len(history) >= 1
            judged += examples.user_ids.tolist()
    assert len(set(judged)) == len(judged)  # no target is judged twice
    assert len(judged) == (windows.roles != NO_TARGET).sum()
    # without context: every item of a later session but its first
    if not earlier:
        later = (windows.windows > 0) & (np.diff(joined.rows, prepend=-1) == 0)
        assert set(judged) == set(np.flatnonzero(later))


def test_targets_do_not_depend_on_earlier_sessions(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir(), (tmp_path / "b").mkdir()
    alone = Windows.of(folder(tmp_path / "a"))
    aware = Windows.of(folder(tmp_path / "b", "--previous_sessions", "3"))
    assert alone is not None
    assert aware is not None
    for role in (VAL_TARGET, TEST_TARGET):
        one, other = (w.joined.items[w.roles == role].tolist() for w in (alone, aware))
        assert one == other
    longer = aware.view(2).eval_examples("test").histories.lengths
    assert (longer >= alone.view(2).eval_examples("test").histories.lengths).all()
    assert longer.sum() > alone.view(2).eval_examples("test").histories.lengths.sum()


def test_other_folders_have_no_windows(tmp_path: Path) -> None:
    data = folder(tmp_path)
    (data.path / "interactions.parquet").unlink()
    with pytest.raises(UserError, match="process the data again"):
        Windows.of(ProcessedFolder.load(data.path))
    assert Windows.of(replace(data, dataset=None)) is None


@pytest.mark.parametrize("name", ["t4rec_rees46", "t4rec_yoochoose"])
def test_published_protocols(name: str) -> None:
    protocol = Protocol.load(name)
    assert protocol.parts["data"]["split"] == "windows"
    assert protocol.parts["data"]["window"] == "1d"
    assert protocol.parts["data"]["targets"] == "last"  # the published runs judge no other item
    assert protocol.parts["evaluation"]["metric_ks"] == [20]
