"""Runs of a folder as rows of tables: figures, intervals, slices, cost, and paired tests.

Runs that differ in split, tie rule or `filter_seen` get tables of their own; runs that differ in
their seed alone are one row. A flag that a run of an older version lacks counts as its default.

Shapes: U test users.
"""

from __future__ import annotations

import os
import sys
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from baselines.command_lines import defaults_of
from recformer.data.processed import ProcessedFolder
from recformer.evaluation.compare import METRICS, by_sequence, cuts, interval
from recformer.evaluation.figures import slices
from recformer.evaluation.metrics import per_user_metrics
from recformer.evaluation.outside import WRITTEN_BY
from recformer.evaluation.runs import METRICS_FILE, RULE, RUN_FILE, RankedRun, RunResult
from recformer.evaluation.seeds import common_name, differ_in_seed_alone, mean_and_deviation
from recformer.evaluation.statistics import holm, permutation_p
from recformer.files import UserError, read_json
from recformer.training.seeds import FOLDERS

# A folder of another program, a run that was not finished, a file cut off.
UNREADABLE = (UserError, OSError, KeyError, AttributeError, TypeError, ValueError)


@dataclass(frozen=True)
class Row:
    """One model in a table, of one seed or of several.

    Attributes:
        run: its ranks; of the first seed.
        values: metric -> (U,) of each user, the mean over seeds.
        figures: metric -> [value, low, high].
        slices: slice -> [users, value of the first metric].
        parameters: trained ones, None where the run does not say.
        train_seconds: of all epochs, validation included; 0 for what is not trained.
        milliseconds_a_user: of ranking a test user, loading of batches included.
        evaluation: which of the run's; empty for its last one.
        settings: what its `run.json` holds; empty where there is none.
        seeds: of the runs behind it.
        deviation: metric -> standard deviation over seeds; empty for one.
        p: of the paired permutation test against the best row, corrected by Holm; None for it.
    """

    run: RankedRun
    values: dict[str, NDArray[np.float64]]
    figures: dict[str, list[float]]
    slices: dict[str, list[float]]
    parameters: int | None
    train_seconds: float | None
    milliseconds_a_user: float | None
    evaluation: str = ""
    settings: dict[str, Any] = field(default_factory=dict)
    seeds: tuple[int, ...] = ()
    deviation: dict[str, float] = field(default_factory=dict)
    p: float | None = None

    def record(self) -> dict[str, Any]:
        """The row as JSON has it."""
        left_out = ("run", "values", "settings", "evaluation")
        facts = {name: value for name, value in vars(self).items() if name not in left_out}
        return {"name": self.run.name, "rule": self.run.rule} | facts


def find_runs(folder: Path) -> list[tuple[Path, str, str]]:
    """Arguments of `RankedRun.read` for every run in `folder`, at any depth; by name, the path
    within it.

    Folders of something else are named on stderr and left out.
    """
    found = []
    for path in sorted(_run_folders(folder)):
        name = folder.resolve().name if path == folder else path.relative_to(folder).as_posix()
        try:
            found += _evaluations_of(path, name)
        except UNREADABLE as error:
            _leave_out(path, error)
    return found


def _run_folders(folder: Path) -> list[Path]:
    """Folders that hold a `metrics.json`, each once; of what lies in a run's folder (checkpoints,
    its windows) only runs of their own."""
    found, seen, waiting = [], set(), deque([folder])
    while waiting:
        path = waiting.popleft()
        real = os.path.realpath(path)
        if real in seen or not path.is_dir():
            continue
        seen.add(real)
        try:
            entries = [entry for entry in os.scandir(path) if entry.is_dir()]
        except OSError as error:
            _leave_out(path, error)
            continue
        if (path / METRICS_FILE).exists():
            found.append(path)
        children = [
            Path(entry.path)
            for entry in sorted(entries, key=lambda entry: (entry.is_symlink(), entry.name))
            if not entry.name.startswith(".")
        ]
        waiting += filter(_holds_runs, children) if _is_run(path) else children
    return found


def _is_run(path: Path) -> bool:
    return (path / METRICS_FILE).exists() or (path / RUN_FILE).exists()


def _holds_runs(path: Path) -> bool:
    return _is_run(path) or any(path.glob(FOLDERS))


def _evaluations_of(path: Path, name: str) -> list[tuple[Path, str, str]]:
    evaluations = list(RunResult.load(path).evaluations)
    last = [(path, "", name)]
    if "zero_shot" not in evaluations or len(evaluations) == 1:
        return last
    return [(path, "zero_shot", f"{name}, zero-shot"), *last]


def rows_of(
    runs: Sequence[tuple[Path, str, str]],
    folder: ProcessedFolder | None,
    metrics: Sequence[str] = METRICS,
) -> list[Row]:
    """The rows of runs; one that cannot be read is said and left out."""
    rows = []
    for run in runs:
        try:
            rows.append(row_of(*run, folder, metrics))
        except UNREADABLE as error:
            _leave_out(run[0], error)
    return rows


def _leave_out(path: Path, error: Exception) -> None:
    lacking = isinstance(error, KeyError | AttributeError)  # another program's metrics.json
    why = "its metrics.json is not of a run on a processed folder" if lacking else error
    print(f"{path} is left out: {why}", file=sys.stderr, flush=True)


def row_of(
    path: Path,
    evaluation: str,
    name: str,
    folder: ProcessedFolder | None = None,
    metrics: Sequence[str] = METRICS,
) -> Row:
    """Read one run; see `RankedRun.read`. The data give slices to a run that has none."""
    run = RankedRun.read(path, evaluation, name)
    result = RunResult.load(path)
    figures = result.evaluations[evaluation]["test"] if evaluation else result.test
    values = per_user_metrics(run.ranks, cuts(metrics), run.rule["ties"])
    intervals = {name: interval(values[name], run.sequences, 0) for name in metrics}
    seconds: float | None = 0.0
    parameters = result.parameters
    if evaluation == "zero_shot":
        parameters = 0
    else:
        rows = [row for stage in result.stages.values() for row in stage.rows]
        seconds = float(sum(row["seconds"] for row in rows)) or result.train_seconds
    parts = {
        slice_name: [part["num_users"], part[metrics[0]]]
        for slice_name, part in figures.get("slices", {}).items()
        if metrics[0] in part  # --metric_ks may have been others
    }
    of_users = run.sequences is None  # not of windows, whose examples are no users of the folder
    same = folder is not None and run.rule["split_hash"] == folder.split_hash
    if not parts and folder is not None and same and of_users:
        for name, chosen in slices(folder, "test", run.user_ids, run.targets).items():
            parts[name] = [int(chosen.sum()), float(values[metrics[0]][chosen].mean())]
    settings = read_json(path / RUN_FILE) if (path / RUN_FILE).exists() else {}
    if seconds is None and WRITTEN_BY not in settings:
        seconds = 0.0  # not trained
    # Of older runs, as `RunFolder.claim` reads them.
    if settings.get("num_nodes") == 1 and WRITTEN_BY not in settings:
        del settings["num_nodes"]
    return Row(
        run,
        {name: values[name] for name in metrics},
        {name: [float(values[name].mean()), *intervals[name]] for name in metrics},
        parts,
        parameters,
        seconds,
        1000 * result.seconds_a_user if result.seconds_a_user else None,
        evaluation=evaluation,
        settings=settings,
        seeds=() if result.seed is None else (result.seed,),
    )


def seeds_as_one(rows: Sequence[Row]) -> list[Row]:
    """Rows of runs that differ in their seed alone become one, where the first of them stood."""
    groups: list[list[Row]] = []
    for row in rows:
        for group in groups:
            if all(_of_one_setting(row, other) for other in group):
                group.append(row)
                break
        else:
            groups.append([row])
    return [group[0] if len(group) == 1 else _mean_of(group) for group in groups]


def _of_one_setting(one: Row, other: Row) -> bool:
    if one.evaluation != other.evaluation or one.parameters != other.parameters:
        return False
    if not differ_in_seed_alone(one.settings, other.settings) or not same_users(one, other):
        return False
    if one.settings.keys() == other.settings.keys():
        return True
    if WRITTEN_BY in one.settings.keys() | other.settings.keys():  # from outside: no flags
        return False
    # Only now: the flags of a command take seconds to import.
    return differ_in_seed_alone(one.settings, other.settings, defaults_of(one.settings))


def same_users(one: Row, other: Row) -> bool:
    """Whether two rows can be compared user by user: rule, users and targets are the same."""
    return (
        one.run.rule == other.run.rule
        and np.array_equal(one.run.user_ids, other.run.user_ids)
        and np.array_equal(one.run.targets, other.run.targets)
    )


def _mean_of(group: Sequence[Row]) -> Row:
    group = sorted(group, key=lambda row: row.seeds)
    first, seeds = group[0], tuple(seed for row in group for seed in row.seeds)
    ending = ", zero-shot" if first.evaluation else ""
    name = common_name([row.run.name.removesuffix(ending) for row in group]) + ending
    values = {m: np.mean([row.values[m] for row in group], axis=0) for m in first.values}

    def mean(figures: Sequence[float | None]) -> float | None:
        known = [x for x in figures if x is not None]
        return sum(known) / len(known) if known else None

    return Row(
        replace(first.run, name=f"{name} ({len(seeds)} seeds)"),
        values,
        {m: [float(x.mean()), *interval(x, first.run.sequences, 0)] for m, x in values.items()},
        {
            part: [users, float(np.mean([r.slices[part][1] for r in group if part in r.slices]))]
            for part, (users, _) in first.slices.items()
        },
        first.parameters,
        mean([row.train_seconds for row in group]),
        mean([row.milliseconds_a_user for row in group]),
        first.evaluation,
        first.settings,
        seeds,
        {m: mean_and_deviation([row.figures[m][0] for row in group])[1] for m in values},
    )


def tables(rows: Sequence[Row], metric: str = METRICS[0]) -> list[list[Row]]:
    """Rows that may stand together, best first, each tested against the best of its table.

    Runs stand together if they share split, ties, `filter_seen`, users and targets.
    """
    groups: dict[tuple, list[Row]] = {}
    for row in rows:
        rule = tuple(row.run.rule[name] for name in RULE)
        users = (row.run.user_ids.tobytes(), row.run.targets.tobytes())
        groups.setdefault((*rule, *users), []).append(row)
    result = []
    for group in groups.values():
        group.sort(key=lambda row: (-row.figures[metric][0], row.run.name))
        values = [row.values[metric] for row in group]
        sequences = group[0].run.sequences
        p_values = holm(
            [permutation_p(by_sequence(values[0] - other, sequences)[0]) for other in values[1:]]
        )
        result.append(
            [
                group[0],
                *(replace(row, p=p) for row, p in zip(group[1:], p_values, strict=True)),
            ]
        )
    return sorted(result, key=len, reverse=True)
