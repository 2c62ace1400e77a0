"""Temporal, cold-item and sampled-validation splits; nothing that is tested is trained on."""

from __future__ import annotations

import argparse
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from recformer.data.processed import ProcessedFolder, Sequences, read_times, write_processed
from recformer.files import UserError
from recformer.preparation import flags
from recformer.preparation.filters import filter_interactions
from recformer.preparation.held_out import hold_out_items
from recformer.preparation.options import SplitOptions
from recformer.preparation.splits import (
    DROPPED,
    Histories,
    Interactions,
    Split,
    draw_names,
    split_leave_one_out,
    split_temporal,
)

SPLITS = [
    SplitOptions(),
    SplitOptions(val_users=2, val_seed=1),
    SplitOptions(split="temporal", test_quantile=0.7, val_quantile=0.6),
    SplitOptions(cold_items=0.3),
    SplitOptions(cold_items=0.3, val_users=2),
    SplitOptions(split="temporal", test_quantile=0.7, val_quantile=0.6, cold_items=0.3),
]


def histories(*users: list[tuple[int, int]]) -> Histories:
    """One list of (item, time) a user, sorted by time."""
    num_items = 1 + max(item for user in users for item, _ in user)
    return Histories(
        Sequences.from_lists([[item for item, _ in user] for user in users]),
        [f"u{number}" for number in range(len(users))],
        [f"i{number}" for number in range(num_items)],
        {},
        np.array([time for user in users for _, time in user], dtype=np.int64),
    )


def lists(split: Split, of: Histories) -> list[list[list[int]]]:
    parts = split.sequences(of)
    return [[part[row].tolist() for row in range(len(part))] for part in parts]


def ordered(*items: int) -> list[tuple[int, int]]:
    return [(item, time) for time, item in enumerate(items)]


def test_only_sampled_users_validate() -> None:
    data = histories(*(ordered(0, 1, 2, 3) for _ in range(6)), ordered(0, 1))
    split = split_leave_one_out(data, val_users=2, val_seed=42)
    drawn = draw_names([f"u{n}" for n in range(6)], 2, 42)
    train, val, test = lists(split, data)
    assert drawn.sum() == 2
    assert train == [[0, 1] if chosen else [0, 1, 2] for chosen in drawn] + [[0, 1]]
    assert val == [[2] if chosen else [] for chosen in drawn] + [[]]
    assert test == [[3]] * 6 + [[]]
    assert split.about == {"name": "leave_one_out", "val_users": 2, "val_seed": 42}
    other = [split_leave_one_out(data, val_users=2, val_seed=seed).parts for seed in range(20)]
    assert len({parts.tobytes() for parts in other}) > 1


def test_published_draw_of_validating_users() -> None:
    data = histories(*(ordered(0, 1, 2, 3) for _ in range(9)), ordered(0, 1))
    split = split_leave_one_out(data, val_users=4, val_seed=42, val_draw="places")
    # numpy.random.RandomState(42).choice(10, 4) gives 6, 3, 7, 4.
    assert [user for user, row in enumerate(lists(split, data)[1]) if row] == [3, 4, 6, 7]
    assert split.about["val_draw"] == "places"
    # … .choice(10, 6): 6, 3, 7, 4, 6, 9: one user twice, one without an item to validate on.
    split = split_leave_one_out(data, val_users=6, val_seed=42, val_draw="places")
    assert [user for user, row in enumerate(lists(split, data)[1]) if row] == [3, 4, 6, 7]


def test_temporal_by_hand() -> None:
    # Times 1 … 10: the test cut at place 8 of 10 is time 9; of 1 … 8 the place 4 is time 5.
    data = histories(
        [(0, 1), (1, 2), (2, 5), (3, 9), (4, 10)], [(0, 3), (1, 4), (2, 8)], [(5, 6), (5, 7)]
    )
    split = split_temporal(data, test_quantile=0.8, val_quantile=0.5)
    assert split.about["test_cut"] == 9
    assert split.about["val_cut"] == 5
    assert lists(split, data) == [
        [[0, 1], [0, 1], []],
        [[2], [2], [5, 5]],
        [[3, 4], [], []],
    ]


def test_one_time_stays_on_one_side() -> None:
    data = histories([(0, 1), (1, 2), (2, 3)], [(0, 3), (1, 3), (2, 3)])
    split = split_temporal(data, test_quantile=0.8, val_quantile=0.5)
    assert split.about["test_cut"] == 3
    assert lists(split, data)[2] == [[2], [0, 1, 2]]


def test_temporal_refuses_what_cannot_be_cut() -> None:
    with pytest.raises(UserError, match="share one time"):
        split_temporal(histories([(0, 5), (1, 5), (2, 5)]))
    untimed = Histories(Sequences.from_lists([[0, 1, 2]]), ["u"], ["a", "b", "c"], {})
    with pytest.raises(UserError, match="--time_column"):
        split_temporal(untimed)


def cold_of(data: Histories, share: float, seed: int) -> set[int]:
    number = max(1, round(share * len(data.item_names)))
    return set(np.flatnonzero(draw_names(data.item_names, number, seed)).tolist())


def test_cold_items_by_hand() -> None:
    names = 10
    seed = next(s for s in range(1000) if cold_of(histories(ordered(*range(10))), 0.2, s) == {8, 9})
    data = histories(
        ordered(0, 1, 2, 3),  # no cold item: as before
        ordered(0, 8, 1, 9, 2, 3),  # tested on 9, validated on 8; 2 and 3 left out
        ordered(0, 1, 2, 9),  # cold item last
        ordered(8, 0, 8, 1, 9),  # the first 8 leaves the training sequence
        ordered(*range(names)),
    )
    split = hold_out_items(data, split_leave_one_out(data), share=0.2, seed=seed)
    train, val, test = lists(split, data)
    assert train == [[0, 1], [0], [0, 1], [0], [0, 1, 2, 3, 4, 5, 6, 7]]
    assert val == [[2], [8], [2], [8], [8]]
    assert test == [[3], [1, 9], [9], [1, 9], [9]]
    assert split.about["num_cold_items"] == 2
    assert split.about["cold_items_that_are_targets"] == 2
    assert split.about["cold_interactions_taken_out_of_train"] == 1
    assert split.about["interactions_dropped"] == 3


def test_a_single_cold_item_is_tested_or_validated_on() -> None:
    users = 40
    data = histories(*(ordered(0, 1, 4, 2, 3) for _ in range(users)))
    seed = next(s for s in range(1000) if cold_of(data, 0.2, s) == {4})
    split = hold_out_items(data, split_leave_one_out(data), share=0.2, seed=seed)
    outcomes = [tuple(map(tuple, parts)) for parts in zip(*lists(split, data))]
    on_val, on_test = ((0, 1), (4,), (2, 3)), ((0,), (1,), (4,))
    assert set(outcomes) == {on_val, on_test}
    assert 8 < outcomes.count(on_val) < 32


def test_the_lowest_draws_of_users_are_split_as_well() -> None:
    names = [f"u{n}" for n in range(400)]
    few = np.flatnonzero(draw_names(names, 40, seed=0)).tolist()  # as --max_users 40 keeps them
    data = histories(*(ordered(0, 1, 4, 2, 3) for _ in few))
    data = replace(data, user_names=[names[user] for user in few])
    data = replace(data, item_names=next(
        drawn for n in range(1000)
        if draw_names(drawn := [f"{n} {item}" for item in range(5)], 1, 0)[4]
    ))  # fmt: skip
    split = hold_out_items(data, split_leave_one_out(data), share=0.2, seed=0)
    val, test = (Counter(map(tuple, part)) for part in lists(split, data)[1:])
    assert set(val) == {(4,), (1,)}
    assert set(test) == {(2, 3), (4,)}
    assert 8 < test[4,] < 32


def test_nothing_left_to_train_on() -> None:
    data = histories(ordered(0, 0, 0))
    with pytest.raises(UserError, match="nothing to train on"):
        hold_out_items(data, split_leave_one_out(data), share=0.5, seed=0)


@given(
    st.lists(
        st.lists(st.tuples(st.integers(0, 9), st.integers(0, 30)), min_size=1, max_size=9),
        min_size=1,
        max_size=8,
    ),
    st.sampled_from(SPLITS),
    st.integers(0, 3),
)
def test_nothing_tested_is_trained(
    users: list[list[tuple[int, int]]], options: SplitOptions, seed: int
) -> None:
    data = histories(*(sorted(user, key=lambda pair: pair[1]) for user in users))
    try:
        split = options.apply(data, seed)
    except UserError:
        return  # no place to cut, or everything is cold
    # Every interaction gets an id of its own, and the split is looked at through its sequences.
    ids = Sequences(data.sequences.offsets, np.arange(len(data.sequences.items), dtype=np.int32))
    train, val, test = split.sequences(replace(data, sequences=ids))
    assert not set(train.items.tolist()) & set(val.items.tolist())
    assert not set(train.items.tolist()) & set(test.items.tolist())
    assert not set(val.items.tolist()) & set(test.items.tolist())
    kept = len(train.items) + len(val.items) + len(test.items)
    assert kept == (split.parts != DROPPED).sum()
    for user in range(len(ids)):
        joined = np.concatenate([train[user], val[user], test[user]])
        assert (np.diff(joined) > 0).all()  # in order: nothing of val before train, …
        assert set(joined.tolist()) <= set(ids[user].tolist())
    if options.split == "temporal":
        assert data.times is not None
        assert (data.times[train.items] < split.about["val_cut"]).all()
        assert (data.times[val.items] < split.about["test_cut"]).all()
        assert (data.times[val.items] >= split.about["val_cut"]).all()
        assert (data.times[test.items] >= split.about["test_cut"]).all()
    if options.cold_items is not None:
        cold = cold_of(data, options.cold_items, seed)
        assert not cold & set(data.sequences.items[train.items].tolist())
    if options.val_users is not None:
        assert (val.lengths > 0).sum() <= options.val_users


def test_times_stand_beside_their_interactions(tmp_path: Path) -> None:
    data = histories([(0, 1), (1, 2), (2, 5), (3, 9)], [(0, 3), (1, 4), (2, 8)])
    split = split_leave_one_out(data)
    split.parts[1] = DROPPED
    assert data.times is not None

    def write(times: np.ndarray | None) -> ProcessedFolder:
        train, val, test = split.sequences(data)
        write_processed(
            tmp_path, train=train, val=val, test=test, user_names=data.user_names,
            asins=data.item_names, meta={}, dataset={}, times=times,
        )  # fmt: skip
        return ProcessedFolder.load(tmp_path)

    times = read_times(write(data.times[split.parts != DROPPED]))
    assert times is not None
    assert times.tolist() == [1, 5, 9, 3, 4, 8]
    assert read_times(write(None)) is None
    folder = write(data.times[split.parts != DROPPED])
    (tmp_path / "val.json").write_text('{"0": [1], "1": [1]}')
    (tmp_path / "dataset.json").unlink()
    with pytest.raises(UserError, match="other sequences"):
        read_times(ProcessedFolder.load(tmp_path))
    (tmp_path / "interactions.parquet").write_bytes(b"nonsense")
    with pytest.raises(UserError, match="is damaged or of another preparation"):
        read_times(folder)
    (tmp_path / "interactions.parquet").unlink()
    assert read_times(folder) is None


def events(*rows: tuple[int, int, int]) -> Interactions:
    columns = np.array(rows).T
    return Interactions(
        columns[0].astype(np.int32), columns[1].astype(np.int32), columns[2],
        ["a", "b", "c"], ["x", "y", "z"],
    )  # fmt: skip


def left(interactions: Interactions) -> list[tuple[int, int, int]]:
    return list(zip(*(column.tolist() for column in
                      (interactions.users, interactions.items, interactions.times))))  # fmt: skip


def test_filters_by_hand() -> None:
    rows = [(0, 0, 5), (0, 1, 1), (0, 0, 5), (0, 0, 6), (1, 0, 2), (0, 1, 7), (2, 2, 1)]
    kept, counts = filter_interactions(events(*rows), deduplicate=True)
    assert left(kept) == [rows[n] for n in (0, 1, 3, 4, 5, 6)]
    assert counts == {"duplicates_removed": 1}
    # In time: 1 at 1, 0 at 5, 5 and 6, 1 at 7. The other user's 0 follows nothing of its own.
    kept, counts = filter_interactions(events(*rows), drop_consecutive_repeats=True)
    assert left(kept) == [rows[n] for n in (0, 1, 4, 5, 6)]
    assert counts == {"consecutive_repeats_removed": 2}


def test_k_core_goes_on_until_nothing_changes() -> None:
    # c has one; then z has one; then b has one: only a with x is left.
    rows = [(0, 0, 1), (0, 0, 2), (1, 1, 3), (1, 2, 4), (2, 2, 5), (0, 1, 6)]
    kept, counts = filter_interactions(events(*rows), k_core=2)
    assert left(kept) == rows[:2]
    assert counts == {"interactions_outside_k_core": 4}
    nothing, _ = filter_interactions(events(*rows), k_core=3)
    assert left(nothing) == []


def test_repeats_that_k_core_brings_together_go_too() -> None:
    # y is met once and leaves: a met x, x, z then, of which one x stays.
    rows = [(0, 0, 1), (0, 1, 2), (0, 0, 3), (0, 2, 4), (1, 0, 1), (1, 2, 2), (2, 2, 1), (2, 0, 2)]
    kept, counts = filter_interactions(events(*rows), drop_consecutive_repeats=True, k_core=2)
    assert left(kept) == [rows[n] for n in (0, 3, 4, 5, 6, 7)]
    assert counts == {"consecutive_repeats_removed": 1, "interactions_outside_k_core": 1}
    # Here a is left with a single x after that, and goes in a second round.
    rows = [(0, 0, 1), (0, 1, 2), (0, 0, 3), (1, 0, 1), (1, 2, 2), (2, 0, 1), (2, 2, 2)]
    kept, counts = filter_interactions(events(*rows), drop_consecutive_repeats=True, k_core=2)
    assert left(kept) == rows[3:]
    assert counts == {"consecutive_repeats_removed": 1, "interactions_outside_k_core": 2}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("--split temporal --val_users 3", "--val_users means nothing with --split temporal"),
        ("--test_quantile 0.8", "--test_quantile means nothing with --split leave_one_out"),
        ("--val_seed 3", "--val_seed means nothing without --val_users"),
        ("--val_draw places", "--val_draw means nothing without --val_users"),
        ("--cold_items 1.5", "expected a share above 0 and below 1"),
    ],
)
def test_flags_without_effect_are_refused(
    given: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    parser = argparse.ArgumentParser()
    flags.add_split_flags(parser)
    with pytest.raises(SystemExit):
        flags.split_options(parser, parser.parse_args(given.split()))
    assert message in capsys.readouterr().err


def test_flags_of_splits() -> None:
    parser = argparse.ArgumentParser()
    flags.add_split_flags(parser)

    def options(given: str) -> SplitOptions:
        return flags.split_options(parser, parser.parse_args(given.split()))

    assert options("") == SplitOptions("leave_one_out", 0.9, 0.9, None, None, 42)
    assert options("--split temporal --test_quantile 0.8 --cold_items 0.1") == SplitOptions(
        "temporal", 0.8, 0.9, 0.1, None, 42
    )
    assert options("--val_users 512 --val_seed 7") == SplitOptions(val_users=512, val_seed=7)
