"""Curves of several runs: which points are drawn, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from recformer.evaluation.runs import RunResult, StageResult
from recformer.files import UserError
from scripts.curves import load, main, points


def run_with(figure: str) -> RunResult:
    rows = [
        {"epoch": 1, "seconds": 2.0},  # not validated
        {"epoch": 2, "seconds": 3.0, f"val/{figure}": 0.25},
        {"epoch": 3, "seconds": 4.5, f"val/{figure}": 0.5},
    ]
    figures = {"val": {figure: 0.125}, "test": {figure: 0.1}}
    return RunResult(evaluations={"zero_shot": figures}, stages={"head": StageResult(0.5, rows, 9)})


def test_points_stand_at_the_seconds_trained_so_far() -> None:
    assert points(run_with("NDCG@10"), "NDCG@10") == [(0, 0.125), (5, 0.25), (9.5, 0.5)]
    untrained = RunResult(evaluations={"untrained": {"val": {"NDCG@10": 0.1}}}, stages={})
    assert points(untrained, "NDCG@10") == []


def test_unfinished_runs_are_read_from_their_histories(tmp_path: Path) -> None:
    stage = tmp_path / "training"
    stage.mkdir()
    (stage / "history.csv").write_text(
        "stage,epoch,seconds,val/NDCG@10\ntraining,1,2.0,\ntraining,2,3.0,0.25\n"
    )
    assert points(load(tmp_path), "NDCG@10") == [(5, 0.25)]
    run_with("NDCG@10").save(tmp_path)  # finished
    assert points(load(tmp_path), "NDCG@10") == [(0, 0.125), (5, 0.25), (9.5, 0.5)]
    with pytest.raises(FileNotFoundError):
        load(tmp_path / "nothing")


def test_a_picture_of_named_runs(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        run_with("NDCG@10").save(tmp_path / name)
    picture = tmp_path / "curves.png"
    main([f"first={tmp_path / 'a'}", str(tmp_path / "b"), "--output", str(picture)])
    assert picture.read_bytes().startswith(b"\x89PNG")
    RunResult(evaluations={"untrained": {"val": {}, "test": {}}}, stages={}).save(tmp_path / "a")
    with pytest.raises(UserError, match="no validation by NDCG@10"):
        main([str(tmp_path / "a"), "--output", str(picture)])
