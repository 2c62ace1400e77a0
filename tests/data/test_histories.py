"""Histories of item ids: newest first, cut, their distinct items with ages, by hand."""

from __future__ import annotations

from itertools import pairwise

import numpy as np

from recformer.data.collators import EvalExample, TrainExample
from recformer.data.histories import (
    HistoryEvalCollator,
    NextItemCollator,
    histories_of,
    prefixes_of,
)


def as_lists(histories) -> list[list[tuple[int, int]]]:
    """(item, age) of every history."""
    pairs = list(zip(histories.items.tolist(), histories.ages.tolist(), strict=True))
    ends = histories.offsets.tolist()
    return [pairs[start:end] for start, end in pairwise(ends)]


def test_histories_are_newest_first_and_cut() -> None:
    histories = histories_of([np.array([4, 7, 4, 2]), np.array([9])], max_history=3)
    assert len(histories) == 2
    assert as_lists(histories) == [[(2, 0), (4, 1), (7, 2)], [(9, 0)]]


def test_distinct_items_have_their_newest_age() -> None:
    histories = histories_of([np.array([5, 3, 5, 3, 8]), np.array([3, 3])], max_history=10)
    found = zip(
        histories.rows.tolist(), histories.distinct.tolist(), histories.newest.tolist(),
        strict=True,
    )  # fmt: skip
    assert sorted(found) == [(0, 3, 1), (0, 5, 2), (0, 8, 0), (1, 3, 0)]


def test_prefixes_end_before_their_place() -> None:
    sequences = [np.array([1, 2, 3]), np.array([6, 5, 4, 3])]
    prefixes = prefixes_of(sequences, [np.array([1, 3]), np.array([2])], max_history=2)
    assert as_lists(prefixes) == [[(1, 0)], [(3, 0), (2, 1)], [(5, 0), (6, 1)]]


def test_every_item_but_the_first_is_a_label() -> None:
    examples = [TrainExample(0, np.array([3, 1, 2]), 0), TrainExample(1, np.array([7, 8]), 0)]
    batch = NextItemCollator(max_history=5)(examples)
    assert batch.labels.tolist() == [1, 2, 8]
    assert as_lists(batch.history) == [[(3, 0)], [(1, 0), (3, 1)], [(7, 0)]]


def test_labels_of_a_long_sequence_are_its_newest() -> None:
    example = TrainExample(0, np.arange(10), 0)
    batch = NextItemCollator(max_history=3)([example])
    assert batch.labels.tolist() == [7, 8, 9]
    assert as_lists(batch.history)[0] == [(6, 0), (5, 1), (4, 2)]  # reads beyond the labels


def test_an_evaluation_batch_knows_seen_items_beyond_the_cut() -> None:
    batch = HistoryEvalCollator(max_history=2)([EvalExample(4, np.array([1, 2, 3]), 9)])
    assert as_lists(batch.history) == [[(3, 0), (2, 1)]]
    assert batch.labels.tolist() == [9]
    assert batch.user_ids.tolist() == [4]
    assert batch.seen[1].tolist() == [1, 2, 3]
