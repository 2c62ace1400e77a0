"""Runs of a folder as rows of tables: figures, intervals, slices, cost, and paired tests.

Runs that differ in split, tie rule or `filter_seen` get tables of their own; runs that differ in
their seed alone are one row. A flag that a run of an older version lacks counts as its default.
A run that is damaged or not finished is in no row; the row of its other seeds says that it lacks
it.

Shapes: U test users.
"""

from __future__ import annotations

import os
import re
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

ZERO_SHOT = ", zero-shot"  # ends the name of a finetuning's evaluation before it


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
        missing: names of runs of other seeds that it should hold and that cannot be read.
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
    missing: tuple[str, ...] = ()

    def record(self) -> dict[str, Any]:
        """The row as JSON has it; `missing` only where something is."""
        left_out = ["run", "values", "settings", "evaluation"]
        left_out += [] if self.missing else ["missing"]
        facts = {name: value for name, value in vars(self).items() if name not in left_out}
        return {"name": self.run.name, "rule": self.run.rule} | facts


@dataclass(frozen=True)
class LeftOut:
    """A run that is in no row.

    Attributes:
        path: its folder.
        name: in tables.
        why: in words.
        finished: it was, and is damaged; else it is under way or was cut off.
        settings: what its `run.json` holds; empty where that cannot be read.
    """

    path: Path
    name: str
    why: str
    finished: bool
    settings: dict[str, Any]


def find_runs(folder: Path, left_out: list[LeftOut] | None = None) -> list[tuple[Path, str, str]]:
    """Arguments of `RankedRun.read` for every run in `folder`, at any depth; by name, the path
    within it.

    Args:
        folder: where to look.
        left_out: runs that are not finished are put in, and folders that cannot be looked into.
    """
    found: list[tuple[Path, str, str]] = []
    paths, others = _run_folders(folder)
    for path in sorted(paths):
        name = _name_of(path, folder)
        try:
            found += _evaluations_of(path, name)
        except UNREADABLE:  # said where it is read as a row
            found.append((path, "", name))
    if left_out is not None:
        for path, error in others:
            settings, why = noted_settings(path), f"it is not finished, it has no {METRICS_FILE}"
            why = why if error is None else str(error)
            name = _name_of(path, folder)
            left_out.append(LeftOut(path, name, why, error is not None, settings))
    return found


def _name_of(path: Path, folder: Path) -> str:
    return folder.resolve().name if path == folder else path.relative_to(folder).as_posix()


def _run_folders(folder: Path) -> tuple[list[Path], list[tuple[Path, OSError | None]]]:
    """Folders that hold a `metrics.json`, each once; of what lies in a run's folder (checkpoints,
    its windows) only runs of their own. And folders of runs that hold none yet, or that cannot be
    looked into."""
    others: list[tuple[Path, OSError | None]] = []
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
            others.append((path, error))
            continue
        if (path / METRICS_FILE).exists():
            found.append(path)
        elif _of_a_command(noted_settings(path)) or _is_a_seed(path):
            others.append((path, None))
        children = [
            Path(entry.path)
            for entry in sorted(entries, key=lambda entry: (entry.is_symlink(), entry.name))
            if not entry.name.startswith(".")
        ]
        waiting += filter(_holds_runs, children) if _is_run(path) else children
    return found, others


def _is_a_seed(path: Path) -> bool:
    """Whether this is where `--seeds` puts a run, beside others that are finished."""
    siblings = path.parent.glob(f"{FOLDERS}/{METRICS_FILE}")
    return re.fullmatch(r"seed_\d+", path.name) is not None and any(siblings)


def noted_settings(path: Path) -> dict[str, Any]:
    """What the `run.json` of a folder holds; nothing where there is none, or a damaged one."""
    try:
        settings = read_json(path / RUN_FILE)
    except (UserError, OSError):
        return {}
    return _as_now(settings) if isinstance(settings, dict) else {}


def _as_now(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings without what older runs noted, as `RunFolder.claim` reads them."""
    if settings.get("num_nodes") == 1 and WRITTEN_BY not in settings:
        del settings["num_nodes"]
    return settings


def _of_a_command(settings: dict[str, Any]) -> bool:
    """Whether settings are of a baseline, a finetuning, or a model from outside; a sweep and a
    pretraining have a `run.json` too."""
    return "model" in settings or "pretrain_ckpt" in settings


def _is_run(path: Path) -> bool:
    return (path / METRICS_FILE).exists() or (path / RUN_FILE).exists()


def _holds_runs(path: Path) -> bool:
    return _is_run(path) or any(path.glob(FOLDERS))


def _evaluations_of(path: Path, name: str) -> list[tuple[Path, str, str]]:
    evaluations = list(RunResult.load(path).evaluations)
    last = [(path, "", name)]
    if "zero_shot" not in evaluations or len(evaluations) == 1:
        return last
    return [(path, "zero_shot", name + ZERO_SHOT), *last]


def rows_of(
    runs: Sequence[tuple[Path, str, str]],
    folder: ProcessedFolder | None,
    metrics: Sequence[str] = METRICS,
    left_out: list[LeftOut] | None = None,
) -> list[Row]:
    """The rows of runs.

    Args:
        runs: of `find_runs`.
        folder, metrics: see `row_of`.
        left_out: runs that cannot be read are put in, and the others are rows all the same. What
            another program wrote is said on stderr alone.

    Raises:
        UserError: a run cannot be read, and there is no `left_out`.
    """
    rows = []
    for path, evaluation, name in runs:
        try:
            rows.append(row_of(path, evaluation, name, folder, metrics))
        except UNREADABLE as error:
            settings = noted_settings(path)
            foreign = not _of_a_command(settings) and _is_of_another_kind(path)
            lacking = isinstance(error, KeyError | AttributeError)
            why = f"its {METRICS_FILE} is not of a run on a processed folder" if lacking else error
            if left_out is None:
                raise UserError(
                    f"{path} has not the figures of a row: {why}; remove it, and its command makes "
                    "it anew"
                ) from error
            if foreign:
                print(f"{path} is left out: {why}", file=sys.stderr, flush=True)
            elif all(other.path != path for other in left_out):  # its zero-shot ranks may be, too
                own = name.removesuffix(ZERO_SHOT)
                left_out.append(LeftOut(path, own, str(why), True, settings))
    return rows


def _is_of_another_kind(path: Path) -> bool:
    """Whether a `metrics.json` is whole and of no run on a processed folder."""
    try:
        content = read_json(path / METRICS_FILE)
    except (UserError, OSError):
        return False
    evaluations = content.get("evaluations") if isinstance(content, dict) else None
    return not isinstance(evaluations, dict)


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
    settings = _as_now(read_json(path / RUN_FILE)) if (path / RUN_FILE).exists() else {}
    if seconds is None and WRITTEN_BY not in settings:
        seconds = 0.0  # not trained
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


def seeds_as_one(rows: Sequence[Row], left_out: Sequence[LeftOut] = ()) -> list[Row]:
    """Rows of runs that differ in their seed alone become one, where the first of them stood.

    Args:
        rows: of one run each.
        left_out: runs that the rows of their other seeds are to say they lack.
    """
    groups: list[list[Row]] = []
    for row in rows:
        for group in groups:
            if all(_of_one_setting(row, other) for other in group):
                group.append(row)
                break
        else:
            groups.append([row])
    missing = [[run for run in left_out if _lacks(group, run)] for group in groups]
    return [_as_one(*each) for each in zip(groups, missing, strict=True)]


def _of_one_setting(one: Row, other: Row) -> bool:
    if one.evaluation != other.evaluation or one.parameters != other.parameters:
        return False
    return same_users(one, other) and _differ_in_seed_alone(one.settings, other.settings)


def _differ_in_seed_alone(one: dict[str, Any], other: dict[str, Any]) -> bool:
    if not differ_in_seed_alone(one, other):
        return False
    if one.keys() == other.keys():
        return True
    if WRITTEN_BY in one.keys() | other.keys():  # from outside: no flags
        return False
    # Only now: the flags of a command take seconds to import.
    return differ_in_seed_alone(one, other, defaults_of(one))


def _lacks(group: Sequence[Row], run: LeftOut) -> bool:
    """Whether a run is another seed of these: by its settings, or by its folder without them."""
    if _of_a_command(run.settings):
        return all(_differ_in_seed_alone(row.settings, run.settings) for row in group)
    place = _place_of_seeds(run.name)
    return place is not None and any(_place_of_seeds(row.run.name) == place for row in group)


def _place_of_seeds(name: str) -> str | None:
    """Where the run of that name lies beside those of other seeds; None if it does not."""
    match = re.fullmatch(r"(.*/)?seed_\d+", name.removesuffix(ZERO_SHOT))
    return None if match is None else match[1] or ""


def same_users(one: Row, other: Row) -> bool:
    """Whether two rows can be compared user by user: rule, users and targets are the same."""
    return (
        one.run.rule == other.run.rule
        and np.array_equal(one.run.user_ids, other.run.user_ids)
        and np.array_equal(one.run.targets, other.run.targets)
    )


def _as_one(group: Sequence[Row], missing: Sequence[LeftOut]) -> Row:
    """The row of runs of some seeds, whose name says how many there are and should be."""
    row = group[0] if len(group) == 1 else _mean_of(group)
    name = row.run.name
    if missing:  # a seed may lie there twice; without settings its folder says which it is
        seeds = {str(r.settings.get("seed", r.name.rpartition("seed_")[2])) for r in missing}
        name += f" ({len(group)} of {len(group) + len(seeds)} seeds)"
    elif len(group) > 1:
        name += f" ({len(group)} seeds)"
    lacking = tuple(run.name for run in missing)
    return replace(row, run=replace(row.run, name=name), missing=lacking)


def _mean_of(group: Sequence[Row]) -> Row:
    group = sorted(group, key=lambda row: row.seeds)
    first, seeds = group[0], tuple(seed for row in group for seed in row.seeds)
    ending = ZERO_SHOT if first.evaluation else ""
    name = common_name([row.run.name.removesuffix(ending) for row in group]) + ending
    values = {m: np.mean([row.values[m] for row in group], axis=0) for m in first.values}

    def mean(figures: Sequence[float | None]) -> float | None:
        known = [x for x in figures if x is not None]
        return sum(known) / len(known) if known else None

    return Row(
        replace(first.run, name=name),
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
