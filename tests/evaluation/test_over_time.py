"""Figures over windows, by hand."""

from __future__ import annotations

import numpy as np
import pytest

from recformer.evaluation.compare import by_sequence, interval
from recformer.evaluation.over_time import (
    WindowRanks,
    figures_over_time,
    format_over_time,
    records_over_time,
)
from recformer.evaluation.ranks import TargetRanks
from recformer.evaluation.statistics import resampled_means


def window(number: int, above: list[int], sequences: list[int], new: list[bool]) -> WindowRanks:
    places = 100 * number + np.arange(len(above))
    ranks = TargetRanks(np.array(above), np.zeros(len(above), int), np.full(len(above), 50))
    return WindowRanks(
        number, f"day {number}", places, places, np.array(sequences), np.array(new), ranks
    )


WINDOWS = [
    window(1, [0, 9, 30], [5, 5, 8], [False, False, True]),  # Recall@10: 2 of 3
    window(2, [40], [9], [False]),  # 0 of 1
]


def test_windows_count_alike_whatever_their_size() -> None:
    found = figures_over_time(WINDOWS, [10], "expected")
    assert found["Recall@10"] == pytest.approx((2 / 3 + 0) / 2)
    assert found["NDCG@10"] == pytest.approx((1 + 1 / np.log2(11)) / 3 / 2)
    assert [row["Recall@10"] for row in found["windows"]] == pytest.approx([2 / 3, 0])
    assert (found["num_users"], found["num_sequences"]) == (4, 3)
    assert [row["num_new"] for row in found["windows"]] == [1, 0]
    assert found["slices"]["new target"]["num_users"] == 1
    assert found["slices"]["known target"]["Recall@10"] == pytest.approx(2 / 3)
    # sessions {hit, hit}, {miss} drawn anew: from none of the first to none of the second
    assert found["windows"][0]["intervals"]["Recall@10"] == [0.0, 1.0]
    assert found["intervals"]["Recall@10"] == [0.0, 0.5]
    assert found["intervals_by_window"]["Recall@10"] == pytest.approx([0.0, 2 / 3])
    table = format_over_time(found, ["Recall@10"])
    assert "|1|day 1|2|3|1|0.6667 [0.0000, 1.0000]|" in table
    assert "|average, by session||3|4||0.3333 [0.0000, 0.5000]|" in table
    first, second, by_session, by_window = records_over_time(found, ["Recall@10"])
    assert first == {
        "window": 1, "from": "day 1", "sessions": 2, "targets": 3, "new": 1,
        "Recall@10": pytest.approx(2 / 3), "Recall@10 low": 0.0, "Recall@10 high": 1.0,
    }  # fmt: skip
    assert (second["window"], second["Recall@10"]) == (2, 0.0)
    assert by_session == {
        "window": "average, by session", "from": "", "sessions": 3, "targets": 4, "new": None,
        "Recall@10": pytest.approx(1 / 3), "Recall@10 low": 0.0, "Recall@10 high": 0.5,
    }  # fmt: skip
    assert by_window["Recall@10 high"] == pytest.approx(2 / 3)


def test_members_of_a_group_are_drawn_together() -> None:
    sums, counts = np.array([3.0, 0.0]), np.array([3.0, 1.0])
    means = resampled_means(sums, counts, seed=0, resamples=4000)
    assert set(means.tolist()) == {0.0, 0.75, 1.0}
    assert (means == 0.75).mean() == pytest.approx(0.5, abs=0.03)
    values, of = np.array([1.0, 1.0, 1.0, 0.0]), np.array([7, 7, 7, 2])
    assert [x.tolist() for x in by_sequence(values, of)] == [[0.0, 3.0], [1.0, 3.0]]
    assert interval(values, of, 0) == (0.0, 1.0)
    assert interval(values, None, 0)[0] > 0  # users alone: less uncertain than they are
