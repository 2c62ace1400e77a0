"""Records and tables of `recformer reproduce`, from rows and reports made by hand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from baselines.experiment import Experiment, Run, Step
from baselines.reproduce import tables_of, tests_of, verdict
from baselines.rows import Row
from baselines.steps import audit_facts, csv_line, step_record, step_tables
from recformer.evaluation.compare import compare
from recformer.evaluation.metrics import per_user_metrics
from recformer.evaluation.ranks import TargetRanks
from recformer.evaluation.runs import RankedRun
from recformer.files import write_json

tests_of.__test__ = False  # type: ignore[attr-defined]  # it is no test

TITLE = "one against another"


def ranked(name: str, seed: int, sequences: bool) -> RankedRun:
    """40 targets, four in a row of a session, of which those of a session are alike."""
    draw = np.random.default_rng(seed)
    above = np.repeat(draw.integers(0, 9, 10), 4) + draw.integers(0, 2, 40)
    ranks = TargetRanks(above=above, tied=np.zeros(40, int), num_candidates=np.full(40, 50))
    rule = {"split_hash": "a", "ties": "expected", "filter_seen": False}
    groups = np.arange(40) // 4 if sequences else None
    return RankedRun(name, rule, np.arange(40), np.arange(40) % 7, ranks, groups)


def row(run: RankedRun) -> Row:
    values = per_user_metrics(run.ranks, (10,), "expected")
    return Row(run, {"NDCG@10": values["NDCG@10"]}, {}, {}, None, None, None)


@pytest.mark.parametrize("sequences", [True, False])
def test_pairs_are_tested_as_compare_tests_them(sequences: bool) -> None:
    runs = [ranked(name, seed, sequences) for seed, name in enumerate("abc")]
    pairs = [["a", "b"], ["a", "c"], ["b", "c"]]
    experiment = Experiment("x", "", "", {}, [], metrics=("NDCG@10",), tests={TITLE: pairs})
    failed: dict[str, str] = {}
    (test,) = tests_of(experiment, {run.name: row(run) for run in runs}, failed)
    _, expected = compare(runs, "NDCG@10")
    assert not failed
    assert test["resampled"] == ("sessions" if sequences else "users")
    for record, pair in zip(test["rows"], expected, strict=True):
        assert record["runs"] == pair["runs"]
        assert record["p"] == pair["p_holm"]
        for name in ("difference", "low", "high"):
            assert record[name] == pair[name]
    assert any(pair["p_holm"] > pair["p"] for pair in expected)
    # Of pairs that are not there yet p is corrected for, too.
    (some,) = tests_of(experiment, {run.name: row(run) for run in runs[:2]}, failed)
    assert [record["runs"] for record in some["rows"]] == [["a", "b"]]
    assert some["rows"][0]["p"] == pytest.approx(min(1, 3 * expected[0]["p"]))


@pytest.mark.parametrize(
    "other",
    [
        {"targets": np.arange(40) % 5},
        {"user_ids": np.arange(40) + 1},
        {"rule": {"split_hash": "b", "ties": "expected", "filter_seen": False}},
    ],
)
def test_a_pair_that_cannot_be_compared_is_said_and_stops_no_other(other: dict[str, Any]) -> None:
    runs = [ranked("a", 0, True), ranked("b", 1, True), replace(ranked("c", 2, True), **other)]
    tests = {TITLE: [["a", "c"], ["a", "b"]]}
    experiment = Experiment("x", "", "", {}, [], metrics=("NDCG@10",), tests=tests)
    failed: dict[str, str] = {}
    (test,) = tests_of(experiment, {run.name: row(run) for run in runs}, failed)
    assert [record["runs"] for record in test["rows"]] == [["a", "b"]]
    assert failed == {"a against c": "other users, targets or rules"}


def test_captions_say_who_is_drawn_and_what_pairs_are() -> None:
    record = {
        "name": "a", "data": "shop", "figures": {"MRR": [0.5, 0.25, 0.75]}, "deviation": {},
        "seeds": [], "p": None, "train_seconds": 90, "verdict": "reproduced",
        "rule": {"split_hash": "a", "ties": "expected", "filter_seen": False},
        "slices": {"known target": [3, 0.5], "new target": [1, 0.25]},
    }  # fmt: skip
    pair = {"runs": ["a", "b"], "difference": -0.125, "low": -0.25, "high": 0.5, "p": 0.03}
    test = {"title": TITLE, "metric": "MRR", "resampled": "sessions", "rows": [pair]}
    content = {"metrics": ["MRR"], "steps": [], "rows": [record], "tests": []}
    users, slices = tables_of(content)
    assert "intervals over users; p: paired permutation test of MRR against" in users[0]
    assert users[0].endswith("by Holm")
    assert slices[1:] == (
        ["", "known target (3 users)", "new target (1 users)"], [["a", "0.5000", "0.2500"]]
    )  # fmt: skip
    content |= {"rows": [record | {"resampled": "sessions"}], "tests": [test]}
    windows, slices, tested = tables_of(content)
    assert "intervals over sessions; p:" in windows[0]
    assert windows[0].endswith("by Holm; all targets of all windows weigh alike")
    assert slices[1] == ["", "known target (3 targets)", "new target (1 targets)"]
    assert tested == (
        "one against another: paired differences of MRR, 95 % bootstrap intervals and permutation "
        "tests over sessions, p corrected by Holm",
        ["", "against", "difference", "p"],
        [["a", "b", "-0.1250 [-0.2500, +0.5000]", "0.0300"]],
    )


@pytest.mark.parametrize(
    ("expected", "said"),
    [
        ({"MRR": 0.5, "cold target": 0.251}, "reproduced"),
        ({"MRR": 0.5, "cold target": 0.2}, "differs: cold target +0.0500"),
        ({"MRR": 0.6, "cold target": 0.2}, "differs: MRR -0.1000"),
        ({"MRR": 0.5, "rare target": 0.25}, "differs: rare target not there"),
    ],
)
def test_a_slice_that_is_expected_is_judged_as_a_metric(
    expected: dict[str, float], said: str
) -> None:
    found = Row(ranked("a", 0, False), {}, {"MRR": [0.5, 0.4, 0.6]}, {"cold target": [9, 0.25]},
                None, None, None)  # fmt: skip
    assert verdict(Run("a", "baseline", "shop", {}, expected, 0.002, 1), found) == said


def audit(**others: Any) -> dict[str, Any]:
    """Shares that differ from each other."""
    test = {
        "evaluated": 4,
        "decided_by_ties": {"share": 0.1},
        "cold": {"share": 0.2},
        "in_history": {"share": 0.3},
        "nothing_before_the_part": {"share": 0.4},
    }
    found = {
        "sizes": {"users": 6, "items": 1500, "interactions": 9, "train": 1},
        "targets": {"test": test},
        "texts": {"identical": {"test_targets": {"share": 0.5}}},
        "tokens": None,
        "times": {"synthetic": False, "mean_share_of_train_after_a_target": 0.6},
    }
    return found | others


def test_what_a_table_says_of_an_audit() -> None:
    facts = audit_facts(audit())
    assert facts == {
        "users": 6, "items": 1500, "interactions": 9, "targets": 4, "ties": 0.1, "cold": 0.2,
        "seen": 0.3, "same": 0.5, "no_history": 0.4, "later": 0.6,
    }  # fmt: skip
    synthetic = {"synthetic": True, "mean_share_of_train_after_a_target": 0.6}
    for times in (None, synthetic):
        own = audit_facts(audit(times=times))
        assert own == facts | {"ties": None, "later": None}
    tokens = {"identical": {"test_targets": {"share": 0.7}}}
    assert audit_facts(audit(tokens=tokens)) == facts | {"same": 0.7}
    (table,) = step_tables([{"name": "a", "kind": "audit", "verdict": "said", **own}])
    assert table[2] == [
        ["a", "6", "1,500", "9", "4", "", "20.0%", "30.0%", "50.0%", "40.0%", "", "said"]
    ]
    line = csv_line({"name": "a", "kind": "audit", "verdict": "said", **own})
    assert (line["ties"], line["same"], line["verdict"]) == ("", 0.5, "said")


@pytest.mark.parametrize(
    ("expected", "verdict"),
    [
        ({"users": 6, "cold": 0.21}, "reproduced"),
        ({"cold": 0.3}, "differs: cold -33.3%"),
        ({"items": 1501}, "differs: items -0.1%"),  # a count has no tolerance
        ({"seen": 0}, "differs: seen is 0.3, expected 0"),
        ({"ties": 0.1}, "differs: ties is not there"),
    ],
)
def test_counts_are_exact_and_zeros_are_zeros(
    expected: dict[str, float], verdict: str, tmp_path: Path
) -> None:
    write_json(tmp_path / "audit.json", audit(times=None))
    step = Step("a", [["audit", "x"]], expected, tolerance=0.1)
    assert step_record(step, tmp_path)["verdict"] == verdict
