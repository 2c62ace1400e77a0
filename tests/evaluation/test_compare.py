"""Intervals and paired tests by hand, and what may not be compared."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from recformer.commands.compare import main, verdict
from recformer.evaluation.compare import RankedRun, compare
from recformer.evaluation.evaluator import Evaluator
from recformer.evaluation.ranks import TargetRanks
from recformer.evaluation.statistics import bootstrap_interval, holm, permutation_p
from recformer.files import UserError


def test_bootstrap_interval_of_a_coin():
    values = np.repeat([0.0, 1.0], [300, 100])
    low, high = bootstrap_interval(values, seed=1)
    error = 1.96 * np.sqrt(0.25 * 0.75 / 400)  # of the normal approximation
    assert low == pytest.approx(0.25 - error, abs=0.005)
    assert high == pytest.approx(0.25 + error, abs=0.005)
    assert (low, high) == bootstrap_interval(values[::-1], seed=1)
    assert bootstrap_interval(np.full(5, 0.3)) == (pytest.approx(0.3), pytest.approx(0.3))


def test_many_different_values_go_in_chunks(monkeypatch):
    values = np.random.default_rng(0).normal(2.0, 1.0, 900)
    whole = bootstrap_interval(values)
    monkeypatch.setattr("recformer.evaluation.statistics.DRAWS_AT_ONCE", 900 * 70)
    assert bootstrap_interval(values) == whole
    assert whole[1] - whole[0] == pytest.approx(2 * 1.96 / 30, rel=0.08)


def test_permutation_p_by_hand():
    # 8 ways to sign three ones: two of them reach |sum| = 3; all of them reach 1.
    assert permutation_p(np.ones(3)) == pytest.approx(2 / 8, abs=0.015)
    assert permutation_p(np.array([1.0, 1.0, -1.0])) == 1
    # |2 + 1 - 1| = 2: sums are 4, 2, 2, 0 and their negatives.
    assert permutation_p(np.array([2.0, 1.0, -1.0, 0.0])) == pytest.approx(6 / 8, abs=0.015)
    assert permutation_p(np.zeros(7)) == 1
    assert permutation_p(np.ones(40), resamples=999) == 1 / 1000


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.6]) == [1.0, 1.0]
    assert holm([0.02]) == [0.02]


def ranked(name, above, rule=None, targets=None) -> RankedRun:
    above = np.array(above)
    count = len(above)
    ranks = TargetRanks(above, np.zeros(count, int), np.full(count, 50))
    targets = np.arange(count) if targets is None else np.array(targets)
    rule = {"split_hash": "s", "ties": "expected", "filter_seen": False} | (rule or {})
    return RankedRun(name, rule, np.arange(count), targets, ranks)


def test_pairs_are_tested_user_by_user():
    draw = np.random.default_rng(3)
    base = draw.integers(0, 50, 400)
    better = np.maximum(base - 3, 0)
    rows, pairs = compare(
        [ranked("a", base), ranked("b", better), ranked("c", base[::-1].copy())], "Recall@10"
    )
    assert [row["name"] for row in rows] == ["a", "b", "c"]
    cell = rows[0]["Recall@10"]
    assert cell["value"] == (base < 10).mean()
    assert cell["low"] < cell["value"] < cell["high"]
    assert [pair["runs"] for pair in pairs] == [["a", "b"], ["a", "c"], ["b", "c"]]
    first, second, _ = pairs
    assert first["difference"] == pytest.approx((base < 10).mean() - (better < 10).mean())
    assert first["high"] < 0
    assert first["p_holm"] < 0.01
    assert second["difference"] == 0
    assert second["p"] == 1


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"rule": {"split_hash": "t"}}, "split_hash: s and t"),
        ({"rule": {"ties": "optimistic"}}, "ties: expected and optimistic"),
        ({"rule": {"filter_seen": True}}, "filter_seen: False and True"),
        ({"targets": [0, 1, 9]}, "different users or targets"),
    ],
)
def test_what_differs_is_not_compared(other, message):
    with pytest.raises(ValueError, match=message):
        compare([ranked("a", [1, 2, 3]), ranked("b", [1, 2, 3], **other)])


def test_names_and_metrics_are_checked():
    run = ranked("a", [1, 2, 3])
    with pytest.raises(ValueError, match="runs of the same name: a, a"):
        compare([run, run])
    with pytest.raises(ValueError, match="--metric Precision@3"):
        compare([run, ranked("b", [1, 2, 3])], "Precision@3")
    with pytest.raises(UserError, match="--metric NDCG@ten"):
        compare([run, ranked("b", [1, 2, 3])], "NDCG@ten")


def write_run(folder: Path, above: list[int], evaluations: tuple[str, ...]) -> None:
    evaluator = Evaluator((10,))
    count = len(above)
    ranks = TargetRanks(np.array(above), np.zeros(count, int), np.full(count, 50))
    evaluator.update(torch.arange(count), torch.arange(count), ranks)
    metrics = {"split_hash": "s", "ties": "expected", "filter_seen": False}
    metrics["evaluations"] = {name: {} for name in evaluations}
    for name in evaluations:
        if name != "stage2":  # it brought nothing
            evaluator.write_parquet(folder / "ranks" / f"{name}_test.parquet")
    (folder / "metrics.json").write_text(json.dumps(metrics))


def test_from_folders_to_table_and_picture(tmp_path, capsys):
    write_run(tmp_path / "line", [0, 20, 30, 40], ("untrained",))
    write_run(tmp_path / "run", [0, 1, 2, 40], ("zero_shot", "stage1", "stage2"))
    out = tmp_path / "out"
    runs = [f"popularity={tmp_path / 'line'}", str(tmp_path / "run"), f"{tmp_path / 'run'}:stage1"]
    main([*runs, "--metric", "Recall@10", "--output_dir", str(out)])
    printed = capsys.readouterr().out
    assert printed.startswith(
        "Split s, 4 test users, full ranking, ties expected, seen items kept;"
    )
    assert "|popularity - run|-0.5000|" in printed
    assert "|run - run:stage1|+0.0000|" in printed
    assert (out / "comparison.md").read_text() in printed
    assert json.loads((out / "comparison.json").read_text())["runs"][0]["name"] == "popularity"
    assert (out / "comparison.png").stat().st_size > 1000
    write_run(tmp_path / "lr=0.1", [0, 20, 30, 40], ("untrained",))
    named = [RankedRun.load(f"{name}{tmp_path / 'lr=0.1'}").name for name in ("", "a=")]
    assert named == ["lr=0.1", "a"]
    with pytest.raises(ValueError, match="has the evaluations zero_shot, stage1, stage2"):
        main([str(tmp_path / "line"), f"{tmp_path / 'run'}:stage3"])
    with pytest.raises(ValueError, match="has the evaluations untrained; "):
        main([f"{tmp_path / 'line'}:stage1", str(tmp_path / "run")])
    with pytest.raises(ValueError, match="1 run given"):
        main([str(tmp_path / "run")])
    with pytest.raises(FileNotFoundError, match="metrics.json"):
        main([str(tmp_path / "none"), str(tmp_path / "run")])


def test_against_one_run_pairs_every_other_with_it():
    draw = np.random.default_rng(3)
    base = draw.integers(0, 50, 400)
    better = np.maximum(base - 3, 0)
    runs = [ranked("a", base), ranked("b", better), ranked("c", base[::-1].copy())]
    _, all_pairs = compare(runs, "Recall@10")
    _, pairs = compare(runs, "Recall@10", against="b")
    assert [pair["runs"] for pair in pairs] == [["b", "a"], ["b", "c"]]
    assert pairs[0]["difference"] == -all_pairs[0]["difference"] > 0
    with pytest.raises(UserError, match="--against d: expected one of a, b, c"):
        compare(runs, against="d")


@pytest.mark.parametrize(
    ("difference", "p", "expected"),
    [
        (0.1, 0.01, "a beats b: +0.1000 MRR [-0.1000, +0.3000], p 0.0100"),
        (-0.1, 0.01, "a falls behind b: -0.1000 MRR [-0.3000, +0.1000], p 0.0100"),
        (0.1, 0.05, "a and b cannot be told apart on this many users: "
         "+0.1000 MRR [-0.1000, +0.3000], p 0.0500"),
    ],
)  # fmt: skip
def test_a_verdict_claims_only_what_the_numbers_show(difference, p, expected):
    pair = {"runs": ["a", "b"], "difference": difference, "p_holm": p}
    pair |= {"low": difference - 0.2, "high": difference + 0.2}
    assert verdict(pair, "MRR") == expected
