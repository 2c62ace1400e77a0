"""The output folder of a model from outside, as `compare` and `leaderboard` read it.

Shapes: U evaluated users, N items.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from recformer.data.processed import ProcessedFolder
from recformer.evaluation.evaluator import Evaluator
from recformer.evaluation.figures import USERS_AT_ONCE, SplitName, detailed_figures
from recformer.evaluation.ranks import not_compared
from recformer.evaluation.runs import METRICS_FILE, RUN_FILE, RunResult, data_rules, ranks_file
from recformer.files import UserError, read_json, write_json

WRITTEN_BY, WRITER = "written_by", "recformer.evaluation.outside.write_run"  # in run.json
EVALUATION = "trained"


def write_run(
    output_dir: str | os.PathLike,
    folder: ProcessedFolder,
    test: Evaluator,
    validation: Evaluator | None = None,
    *,
    model: str,
    filter_seen: bool = False,
    seed: int | None = None,
    settings: Mapping[str, Any] | None = None,
    parameters: int | None = None,
    train_seconds: float | None = None,
    seconds_a_user: float | None = None,
) -> RunResult:
    """Write ranks and figures of a model that is not of this package as a run's output folder.

    `recformer compare` and `recformer leaderboard` read it beside the folders of `recformer
    baseline` and `recformer finetune`: `metrics.json`, `run.json` and `ranks`. A folder that this
    function wrote before is written anew. In several processes gather the evaluators, and let the
    first process write.

    Args:
        output_dir: made if missing.
        folder: the data that were ranked.
        test: ranks of its test users among all N items, of all users or of some.
        validation: of its validation users.
        model: its name.
        filter_seen: whether items of a user's history, but for the target, were no candidates.
        seed: of the run. Runs that differ in their seed alone are one row of the leaderboard.
        settings: what else the figures depend on, as JSON has it.
        parameters: trained ones.
        train_seconds: of the training.
        seconds_a_user: of ranking a test user.

    Raises:
        UserError: there are no users, or they are not of that split; they were ranked among other
            items than `filter_seen` says; the evaluators break ties in two ways; settings are no
            JSON; or the folder holds a run that this function did not write.

    Examples:
        >>> from recformer.evaluation.compare import compare
        >>> from recformer.evaluation.ranks import count_ranks
        >>> from recformer.evaluation.runs import RankedRun
        >>> folder = ProcessedFolder.load("finetune_data/MyShop")
        >>> users, bought = folder.eval_examples("test"), folder.train.items
        >>> scores = np.tile(np.bincount(bought, minlength=folder.num_items), (len(users), 1))
        >>> evaluator = Evaluator()
        >>> evaluator.update(users.user_ids, users.targets, count_ranks(scores, users.targets))
        >>> result = write_run("result_mine", folder, evaluator, model="mine")
        >>> runs = [RankedRun.load("result_mine"), RankedRun.load("runs/popularity")]
        >>> _, (pair,) = compare(runs)  # both count what was bought
        >>> pair["difference"]
        0.0
    """
    path = Path(output_dir)
    # Sums of numpy are no numbers of JSON.
    seed, parameters = (None if n is None else int(n) for n in (seed, parameters))
    seconds_a_user, train_seconds = (
        None if n is None else float(n) for n in (seconds_a_user, train_seconds)
    )
    about = {WRITTEN_BY: WRITER, "model": model, "filter_seen": filter_seen, "ties": test.ties}
    about |= {"split_hash": folder.split_hash} | ({} if seed is None else {"seed": seed})
    if both := sorted(about.keys() & (settings or {}).keys()):
        raise UserError(f"settings hold {both[0]}, which `write_run` takes or finds by itself")
    about |= settings or {}
    try:
        json.dumps(about)
    except (TypeError, ValueError) as error:
        raise UserError(f"settings are no JSON: {error}") from error
    if validation is not None and validation.ties != test.ties:
        raise UserError(f"ties are {test.ties} in the test and {validation.ties} in the validation")
    _check_place(path)
    evaluators: dict[SplitName, Evaluator] = {} if validation is None else {"val": validation}
    evaluators["test"] = test
    figures: dict[str, dict[str, Any]] = {}
    judged: dict[str, int | None] = {}
    for split, evaluator in evaluators.items():
        figures[split] = detailed_figures(evaluator, folder, split)
        number = figures[split]["num_users"]
        judged[split] = number if number < len(folder.eval_examples(split)) else None
        _check_candidates(evaluator, folder, split, filter_seen)
    result = RunResult(
        evaluations={EVALUATION: figures},
        ties=test.ties,
        filter_seen=filter_seen,
        eval_users=judged.get("val"),
        test_users=judged["test"],
        seed=seed,
        seconds_a_user=seconds_a_user,
        parameters=parameters,
        train_seconds=train_seconds,
        model=model,
        settings=dict(settings or {}),
        **data_rules(folder),
    )
    # What says that the folder is complete goes first and comes last.
    (path / METRICS_FILE).unlink(missing_ok=True)
    for split in ("val", "test"):
        ranks_file(path, EVALUATION, split).unlink(missing_ok=True)
    write_json(path / RUN_FILE, about, indent=1)
    for split, evaluator in evaluators.items():
        evaluator.write_parquet(ranks_file(path, EVALUATION, split))
    result.save(path)
    return result


def _check_place(path: Path) -> None:
    """Refuse a folder with a run that `write_run` did not write, and what is no folder."""
    if path.exists() and not path.is_dir():
        raise UserError(f"{path} is no folder: name another place for the run")
    held = [name for name in (METRICS_FILE, RUN_FILE, "ranks") if (path / name).exists()]
    if not held:
        return
    run = read_json(path / RUN_FILE) if RUN_FILE in held else None
    if not isinstance(run, dict) or run.get(WRITTEN_BY) != WRITER:
        raise UserError(
            f"{path} holds {held[0]} of a run that `write_run` did not write: take another folder, "
            "or remove it"
        )


def _check_candidates(
    evaluator: Evaluator, folder: ProcessedFolder, split: SplitName, filter_seen: bool
) -> None:
    """Refuse ranks among other items than all, without those of the history where it says so."""
    state, examples = evaluator.state(), folder.eval_examples(split)
    right = np.full(len(examples), folder.num_items, dtype=np.int64)
    for start in range(0, len(examples) if filter_seen else 0, USERS_AT_ONCE):
        own = examples.histories.between(start, start + USERS_AT_ONCE)
        targets = examples.targets[start : start + USERS_AT_ONCE]
        seen = not_compared((own.rows, own.items), targets, folder.num_items)
        right[start : start + USERS_AT_ONCE] = seen[2]
    expected = right[np.searchsorted(examples.user_ids, state["user_id"])]
    wrong = (state["num_candidates"] != expected).nonzero()[0]
    if len(wrong):
        row = wrong[0]
        without = " without those of the history" if filter_seen else ""
        raise UserError(
            f"{split} user {state['user_id'][row]} was ranked among "
            f"{state['num_candidates'][row]:,} items, expected {expected[row]:,}, all{without} "
            f"(filter_seen={filter_seen})"
        )
