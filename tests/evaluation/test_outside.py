"""Runs of models from outside: what is written, what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from baselines.rows import find_runs, row_of, seeds_as_one
from recformer.data.processed import ProcessedFolder
from recformer.evaluation.evaluator import Evaluator
from recformer.evaluation.outside import write_run
from recformer.evaluation.ranks import TargetRanks, count_ranks
from recformer.evaluation.runs import RankedRun, RunResult, read_ranks
from recformer.files import UserError, read_json, write_json
from tests.evaluation.test_figures import TEST, TRAIN, VAL, written


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> ProcessedFolder:
    """Five users, five items; four have a validation target."""
    return written(tmp_path_factory.mktemp("folder"), TRAIN, VAL, TEST)


def ranked(above: list[int], split: str = "test", candidates: int = 5) -> Evaluator:
    """The first users of a split, each with so many items above the target."""
    targets = {"test": [0, 1, 3, 0, 4], "val": [2, 2, 3, 2]}[split][: len(above)]
    evaluator, count = Evaluator((1, 10)), len(above)
    ranks = TargetRanks(np.array(above), np.zeros(count, int), np.full(count, candidates))
    evaluator.update(np.arange(count), targets, ranks)
    return evaluator


def test_what_is_written_is_read(folder: ProcessedFolder, tmp_path: Path) -> None:
    test, validation = ranked([0, 4, 0, 0, 0]), ranked([1, 0, 0, 1], "val")
    about: dict[str, Any] = {"settings": {"width": 8}, "parameters": np.int64(70), "seed": 3}
    cost = {"train_seconds": 9.0, "seconds_a_user": 0.5}
    write_run(tmp_path / "mine", folder, test, validation, model="mine", **about, **cost)
    result = RunResult.load(tmp_path / "mine")
    assert (result.test["Recall@1"], result.validation["Recall@1"]) == (4 / 5, 1 / 2)
    assert result.test["slices"]["frequent target"]["Recall@1"] == 0  # user 1 alone
    assert (result.split_hash, result.ties, result.filter_seen) == (
        folder.split_hash, "expected", False
    )  # fmt: skip
    assert (result.test_users, result.eval_users, result.model) == (None, None, "mine")
    assert read_json(tmp_path / "mine" / "run.json")["width"] == 8
    row = row_of(*find_runs(tmp_path)[0])
    assert row.figures["Recall@10"][0] == 1
    assert (row.parameters, row.train_seconds, row.milliseconds_a_user) == (70, 9, 500)
    kept = read_ranks(tmp_path / "mine" / "ranks" / "trained_val.parquet")
    assert kept["above"].tolist() == [1, 0, 0, 1]


def test_a_sample_of_users_and_no_validation(folder: ProcessedFolder, tmp_path: Path) -> None:
    """An earlier run of the same folder leaves nothing."""
    for evaluators in ([ranked([0] * 5), ranked([0] * 4, "val")], [ranked([0, 4])]):
        write_run(tmp_path, folder, *evaluators, model="mine")
    values = read_json(tmp_path / "metrics.json")
    assert (values["test_users"], values["test"]["drawn_from"]) == (2, 5)
    assert "validation" not in values
    assert [path.name for path in (tmp_path / "ranks").iterdir()] == ["trained_test.parquet"]
    assert RankedRun.read(tmp_path).judged == "2 of 5 test users"


def test_seeds_are_one_row(folder: ProcessedFolder, tmp_path: Path) -> None:
    for seed, above in ((1, 0), (2, 4)):
        write_run(tmp_path / f"mine_{seed}", folder, ranked([above] * 5), model="mine", seed=seed)
    write_run(tmp_path / "other", folder, ranked([0] * 5), model="other", seed=3)
    rows = seeds_as_one([row_of(*run) for run in find_runs(tmp_path)])
    found = {row.run.name: row.seeds for row in rows}
    assert found == {"mine (2 seeds)": (1, 2), "other": (3,)}
    assert rows[0].figures["MRR"][0] == pytest.approx((1 + 1 / 5) / 2)


def test_other_settings_and_models_of_the_package_are_rows_of_their_own(
    folder: ProcessedFolder, tmp_path: Path
) -> None:
    for seed, settings in enumerate([{"width": 8}, {}, {}]):
        write_run(tmp_path / str(seed), folder, ranked([0] * 5), model="sasrec", seed=seed,
                  settings=settings)  # fmt: skip
    about = read_json(tmp_path / "2" / "run.json")
    del about["written_by"]  # as `recformer baseline` writes it
    write_json(tmp_path / "2" / "run.json", about)
    rows = seeds_as_one([row_of(*run) for run in find_runs(tmp_path)])
    assert [row.seeds for row in rows] == [(0,), (1,), (2,)]


def test_candidates_are_all_items_or_those_not_seen(
    folder: ProcessedFolder, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="test user 0 was ranked among 4 items, expected 5, all "):
        write_run(tmp_path, folder, ranked([0] * 5, candidates=4), model="mine")
    assert not list(tmp_path.iterdir())
    examples = folder.eval_examples("test")
    rows = np.concatenate([np.full(len(examples.histories[u]), u) for u in range(5)])
    items = np.concatenate([examples.histories[u] for u in range(5)])
    ranks = count_ranks(np.zeros((5, 5)), examples.targets, (rows, items))
    evaluator = Evaluator((10,))
    evaluator.update(examples.user_ids, examples.targets, ranks)
    write_run(tmp_path, folder, evaluator, model="mine", filter_seen=True)
    assert RankedRun.read(tmp_path).rule["filter_seen"] is True
    with pytest.raises(UserError, match="user 0 was ranked among 3 items, expected 5"):
        write_run(tmp_path, folder, evaluator, model="mine")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"settings": {"seed": 1}}, "settings hold seed"),
        ({"settings": {"path": Path("x")}}, "settings are no JSON"),
        ({"validation": Evaluator((1,), ties="optimistic")}, "expected in the test and optimistic"),
        ({"test": ranked([0] * 4, "val")}, "not the test target"),
        ({"test": Evaluator((1,))}, "no users were ranked"),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_written(
    folder: ProcessedFolder, tmp_path: Path, changed: dict[str, Any], message: str
) -> None:
    given: dict[str, Any] = {"test": ranked([0] * 5), "model": "mine", "seed": 1}
    with pytest.raises(UserError, match=message):
        write_run(tmp_path, folder, **(given | changed))
    assert not list(tmp_path.iterdir())


def test_other_runs_are_not_overwritten(folder: ProcessedFolder, tmp_path: Path) -> None:
    write_json(tmp_path / "run.json", {"model": "sasrec"})
    with pytest.raises(UserError, match="holds run.json of a run that `write_run` did not write"):
        write_run(tmp_path, folder, ranked([0] * 5), model="mine")
    assert [path.name for path in tmp_path.iterdir()] == ["run.json"]
    with pytest.raises(UserError, match="run.json is no folder"):
        write_run(tmp_path / "run.json", folder, ranked([0] * 5), model="mine")
