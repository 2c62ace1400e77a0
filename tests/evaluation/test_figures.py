"""Intervals and slices by hand, on five users whose place in every slice can be seen."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from recformer.data.processed import ProcessedFolder, Sequences, write_processed
from recformer.evaluation.evaluator import Evaluator
from recformer.evaluation.figures import (
    RESAMPLES,
    check_sampled_negatives,
    detailed_figures,
    slices,
)
from recformer.evaluation.metrics import per_user_metrics
from recformer.evaluation.ranks import TargetRanks
from recformer.evaluation.report import format_slices, format_table
from recformer.evaluation.statistics import bootstrap_interval
from recformer.files import UserError

# Items 0 and 1 stand four and five times in train, item 2 forty-seven times, item 3 never.
TRAIN = [
    [0, 1, 1, 1],
    [0, 1, 0, 1],
    [0, *[2] * 3],
    [2] * 20,
    [2] * 24,
]
VAL = [[2], [2], [3], [2], []]
TEST = [[0], [1], [3], [2, 0], [4]]


def written(
    path: Path, train: list[list[int]], val: list[list[int]], test: list[list[int]]
) -> ProcessedFolder:
    asins = [f"i{item}" for item in range(5)]
    write_processed(
        path,
        train=Sequences.from_lists(train),
        val=Sequences.from_lists(val),
        test=Sequences.from_lists(test),
        user_names=[f"u{user}" for user in range(len(train))],
        asins=asins,
        meta={asin: {"title": asin} for asin in asins},
        dataset={},
    )
    return ProcessedFolder.load(path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> ProcessedFolder:
    return written(tmp_path_factory.mktemp("folder"), TRAIN, VAL, TEST)


def evaluator_of(users, targets, above, tied=0) -> Evaluator:
    evaluator = Evaluator((1, 3))
    count = len(users)
    ranks = TargetRanks(np.array(above), np.full(count, tied), np.full(count, 5))
    evaluator.update(users, targets, ranks)
    return evaluator


def members(found: dict[str, np.ndarray]) -> dict[str, list[int]]:
    return {name: np.flatnonzero(chosen).tolist() for name, chosen in found.items()}


def test_who_belongs_to_which_slice(folder):
    # Histories of the test: 5, 5, 5, 22 and 24 items.
    found = slices(folder, "test", np.arange(5), np.array([0, 1, 3, 0, 4]))
    assert members(found) == {
        "cold target": [2, 4],
        "rare target": [0, 3],
        "frequent target": [1],
        "history 1-5": [0, 1, 2],
        "history 21-50": [3, 4],
        "first-time target": [3, 4],
        "repeat target": [0, 1, 2],
    }
    # A sample of the users, and the validation's own histories of 4, 4 and 20 items.
    found = slices(folder, "val", np.array([0, 2, 3]), np.array([2, 3, 2]))
    assert members(found) == {
        "cold target": [1],
        "frequent target": [0, 2],
        "history 1-5": [0, 1],
        "history 11-20": [2],
        "first-time target": [0, 1],
        "repeat target": [2],
    }


def test_figures_of_all_and_of_slices(folder):
    evaluator = evaluator_of([4, 2, 0, 1, 3], [4, 3, 0, 1, 0], above=[0, 4, 1, 0, 2])
    figures = detailed_figures(evaluator, folder, "test")
    flat = {name: x for name, x in figures.items() if name not in ("intervals", "slices")}
    assert flat == evaluator.compute()
    assert figures["Recall@1"] == 2 / 5
    assert figures["slices"]["cold target"]["num_users"] == 2  # users 2 and 4
    assert figures["slices"]["cold target"]["Recall@1"] == 1 / 2
    assert figures["slices"]["rare target"]["MRR"] == pytest.approx((1 / 2 + 1 / 3) / 2)
    assert figures["slices"]["frequent target"]["NDCG@3"] == 1

    # Ranks by user id: 2, 1, 5, 3, 1.
    ranks = TargetRanks(np.array([1, 0, 4, 2, 0]), np.zeros(5, int), np.full(5, 5))
    values = per_user_metrics(ranks, (1, 3))
    assert figures["intervals"] == {
        name: list(bootstrap_interval(x, resamples=RESAMPLES)) for name, x in values.items()
    }
    cold = figures["slices"]["cold target"]["intervals"]
    assert cold["MRR"] == list(bootstrap_interval(values["MRR"][[2, 4]], resamples=RESAMPLES))
    assert cold["Recall@1"] == [0, 1]  # both users missed, and both found, a quarter of the draws


def test_more_sampled_negatives_than_are_left(tmp_path):
    folder = written(tmp_path, [[0, 0], [1, 2]], [[0], [1]], [[3], [4]])  # met: 0, 3 and 1, 2, 4
    check_sampled_negatives(folder, 2)
    with pytest.raises(UserError, match="user 1 has met all but 2 of 5 items; ask for at most 2"):
        check_sampled_negatives(folder, 4)


def test_ranks_of_another_split_are_refused(folder):
    evaluator = evaluator_of([0, 1], [0, 2], above=[0, 0])
    with pytest.raises(UserError, match="user 1 was ranked for item 2, which is not the test"):
        detailed_figures(evaluator, folder, "test")
    with pytest.raises(UserError, match="user 4 was ranked"):  # has no validation target
        detailed_figures(evaluator_of([4], [4], above=[0]), folder, "val")


def test_tables_can_be_read(folder):
    users, targets = [0, 1, 2, 3, 4], [0, 1, 3, 0, 4]
    before = detailed_figures(evaluator_of(users, targets, [4] * 5), folder, "test")
    after = detailed_figures(evaluator_of(users, targets, [0] * 5), folder, "test")
    lines = format_table({"before": before, "after": after}).splitlines()
    assert lines[0].split() == [
        "NDCG@1",
        "Recall@1",
        "NDCG@3",
        "Recall@3",
        "MRR",
        "AUC",
        "tie_rate",
    ]
    assert lines[1].split() == ["before", *["0.0000"] * 4, "0.2000", "0.2000", "0.0000"]
    assert lines[2].split() == ["after", *["1.0000"] * 6, "0.0000"]
    assert lines[3].split() == ["95", "%", "from", *["1.0000"] * 6]
    assert lines[4].split() == ["to", *["1.0000"] * 6]
    lines = format_slices(before, "NDCG@1").splitlines()
    assert lines[0].split() == ["users", "NDCG@1", "95", "%", "from", "to", "MRR"]
    assert lines[1].split() == ["cold", "target", "2", "0.0000", "0.0000", "0.0000", "0.2000"]
    assert len(lines) == 1 + 7
