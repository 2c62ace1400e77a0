"""All runs of a folder in one table: figures, intervals, paired tests, slices, cost.

`python -m baselines.leaderboard FOLDER` collects every run under FOLDER: output folders of
`python -m baselines` and of `recformer.finetune` (its last evaluation; zero-shot as a row of its
own). With `--data_path` and `--models` it first runs those that are not there yet, each into
FOLDER/NAME; a model is a name (`sasrec`) or a file of flags (`baselines/configs/t4r.yaml`). Further
flags go to `python -m baselines`; untrained models get none of the trained models' settings. If a
run fails, the others go on, the table is written, and the exit status is 1. `--data_path` also
gives slices to runs that were written before there were any.

Runs that differ in split, tie rule or `filter_seen` get tables of their own. Runs that differ in
their seed alone are one row: mean and standard deviation over the seeds, intervals and tests on
the means of every user. `--seeds 1 2 3` runs models with each.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from baselines.models import UNTRAINED
from baselines.settings import SETTINGS, names_of
from recformer.cli import command_parser, exit_with_message
from recformer.data.processed import ProcessedFolder
from recformer.evaluation.compare import METRICS
from recformer.evaluation.figures import slices
from recformer.evaluation.metrics import per_user_metrics
from recformer.evaluation.runs import METRICS_FILE, RULE, RankedRun, RunResult
from recformer.evaluation.seeds import common_name, differ_in_seed_alone, mean_and_deviation
from recformer.evaluation.statistics import bootstrap_interval, holm, permutation_p
from recformer.evaluation.table import csv_table, latex_table, markdown_table
from recformer.files import UserError, atomic_write, read_json, write_json
from recformer.pictures import drawable
from recformer.training.run_folder import RUN_FILE
from recformer.training.seeds import FOLDERS, run_command

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
    """Arguments of `RankedRun.read` for every run right under `folder`, by name; and for those of
    `--seeds` one level below.

    Folders of something else are named on stderr and left out.
    """
    found = []
    places = [*folder.glob(f"*/{METRICS_FILE}"), *folder.glob(f"*/{FOLDERS}/{METRICS_FILE}")]
    for path in sorted(place.parent for place in places):
        try:
            found += _evaluations_of(path, path.relative_to(folder).as_posix())
        except UNREADABLE as error:
            _leave_out(path, error)
    return found


def _evaluations_of(path: Path, name: str) -> list[tuple[Path, str, str]]:
    evaluations = list(RunResult.load(path).evaluations)
    last = [(path, "", name)]
    if "zero_shot" not in evaluations or len(evaluations) == 1:
        return last
    return [(path, "zero_shot", f"{name}, zero-shot"), *last]


def rows_of(runs: Sequence[tuple[Path, str, str]], folder: ProcessedFolder | None) -> list[Row]:
    """The rows of runs; one that cannot be read is said and left out."""
    rows = []
    for run in runs:
        try:
            rows.append(row_of(*run, folder))
        except UNREADABLE as error:
            _leave_out(run[0], error)
    return rows


def _leave_out(path: Path, error: Exception) -> None:
    lacking = isinstance(error, KeyError | AttributeError)  # another program's metrics.json
    why = "its metrics.json is not of a run on a processed folder" if lacking else error
    print(f"{path} is left out: {why}", file=sys.stderr, flush=True)


def row_of(path: Path, evaluation: str, name: str, folder: ProcessedFolder | None = None) -> Row:
    """Read one run; see `RankedRun.read`. The data give slices to a run that has none."""
    run = RankedRun.read(path, evaluation, name)
    result = RunResult.load(path)
    figures = result.evaluations[evaluation]["test"] if evaluation else result.test
    values = per_user_metrics(run.ranks, (10, 50), run.rule["ties"])
    intervals = {name: bootstrap_interval(values[name]) for name in METRICS}
    seconds: float | None = 0.0
    parameters = result.parameters
    if evaluation == "zero_shot":
        parameters = 0
    else:
        rows = [row for stage in result.stages.values() for row in stage.rows]
        seconds = float(sum(row["seconds"] for row in rows))
    parts = {
        slice_name: [part["num_users"], part[METRICS[0]]]
        for slice_name, part in figures.get("slices", {}).items()
        if METRICS[0] in part  # --metric_ks may have been others
    }
    if not parts and folder is not None and run.rule["split_hash"] == folder.split_hash:
        for name, chosen in slices(folder, "test", run.user_ids, run.targets).items():
            parts[name] = [int(chosen.sum()), float(values[METRICS[0]][chosen].mean())]
    settings = path / RUN_FILE
    return Row(
        run,
        {name: values[name] for name in METRICS},
        {name: [float(values[name].mean()), *intervals[name]] for name in METRICS},
        parts,
        parameters,
        seconds,
        1000 * result.seconds_a_user if result.seconds_a_user else None,
        evaluation=evaluation,
        settings=read_json(settings) if settings.exists() else {},
        seeds=() if result.seed is None else (result.seed,),
    )


def seeds_as_one(rows: Sequence[Row]) -> list[Row]:
    """Rows of runs that differ in their seed alone become one, where the first of them stood."""
    groups: list[list[Row]] = []
    for row in rows:
        for group in groups:
            same = row.evaluation == group[0].evaluation and _same_users(row, group[0])
            if same and all(differ_in_seed_alone(row.settings, other.settings) for other in group):
                group.append(row)
                break
        else:
            groups.append([row])
    return [group[0] if len(group) == 1 else _mean_of(group) for group in groups]


def _same_users(one: Row, other: Row) -> bool:
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
    values = {m: np.mean([row.values[m] for row in group], axis=0) for m in METRICS}

    def mean(figures: Sequence[float | None]) -> float | None:
        known = [x for x in figures if x is not None]
        return sum(known) / len(known) if known else None

    return Row(
        replace(first.run, name=f"{name} ({len(seeds)} seeds)"),
        values,
        {m: [float(x.mean()), *bootstrap_interval(x)] for m, x in values.items()},
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
        {m: mean_and_deviation([row.figures[m][0] for row in group])[1] for m in METRICS},
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
        p_values = holm([permutation_p(values[0] - other) for other in values[1:]])
        result.append(
            [
                group[0],
                *(replace(row, p=p) for row, p in zip(group[1:], p_values, strict=True)),
            ]
        )
    return sorted(result, key=len, reverse=True)


def caption(group: Sequence[Row], metric: str = METRICS[0]) -> str:
    """What all rows of a table share, and how it is to be read."""
    rule = group[0].run.rule
    seen = "filtered" if rule["filter_seen"] else "kept"
    several = "; ±: standard deviation over seeds" if any(row.deviation for row in group) else ""
    return (
        f"Split {str(rule['split_hash'])[:12]}, {len(group[0].run.user_ids):,} test users, full "
        f"ranking, ties {rule['ties']}, seen items {seen}. 95 % bootstrap intervals over "
        f"users{several}; p: paired permutation test of {metric} against the first row, corrected "
        "by Holm."
    )


def cells_of(group: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """Heads and cells of the table of figures."""
    rows = []
    for row in group:
        cells = [row.run.name]
        for name, (value, low, high) in row.figures.items():
            deviation = f" ± {row.deviation[name]:.4f}" if row.deviation else ""
            cells.append(f"{value:.4f}{deviation} [{low:.4f}, {high:.4f}]")
        cells.append("" if row.p is None else f"{row.p:.4f}")
        cells.append("" if row.parameters is None else f"{row.parameters:,}")
        cells.append("" if not row.train_seconds else f"{row.train_seconds / 60:.1f} min")
        cells.append("" if row.milliseconds_a_user is None else f"{row.milliseconds_a_user:.1f}")
        rows.append(cells)
    return ["", *METRICS, "p", "parameters", "training", "ms a user"], rows


def slice_cells_of(group: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """Heads and cells of the table of slices; heads alone where no run has any."""
    names = list(dict.fromkeys(name for row in group for name in row.slices))
    users = {name: next(r.slices[name][0] for r in group if name in r.slices) for name in names}
    rows = [
        [
            row.run.name,
            *(f"{row.slices[n][1]:.4f}" if n in row.slices else "" for n in names),
        ]
        for row in group
    ]
    return ["", *(f"{name} ({users[name]:,.0f})" for name in names)], rows


def markdown(group: Sequence[Row], metric: str = METRICS[0]) -> str:
    """One table of figures, and one of slices."""
    text = f"{caption(group, metric)}\n\n{markdown_table(*cells_of(group))}"
    heads, rows = slice_cells_of(group)
    if len(heads) > 1:
        text += f"\n{metric} by slice of the test users\n\n{markdown_table(heads, rows)}"
    return text


def latex(group: Sequence[Row], metric: str = METRICS[0]) -> str:
    """Both tables, what they share as comments."""
    text = f"% {caption(group, metric)}\n{latex_table(*cells_of(group))}"
    heads, rows = slice_cells_of(group)
    if len(heads) > 1:
        text += f"% {metric} by slice of the test users\n{latex_table(heads, rows)}"
    return text


def records(groups: Sequence[Sequence[Row]]) -> list[dict[str, Any]]:
    """Every row of every table with its figures in full, for CSV."""
    found = []
    for group in groups:
        for row in group:
            record: dict[str, Any] = {"name": row.run.name, **row.run.rule}
            record["seeds"] = " ".join(map(str, row.seeds))
            for name, (value, low, high) in row.figures.items():
                record |= {name: value, f"{name} low": low, f"{name} high": high}
                record[f"{name} deviation"] = row.deviation.get(name)
            record |= {"p": row.p, "parameters": row.parameters}
            record["train_seconds"] = row.train_seconds
            record["milliseconds_a_user"] = row.milliseconds_a_user
            record |= {f"{METRICS[0]}, {part}": x for part, (_, x) in row.slices.items()}
            found.append(record)
    return found


def plot(groups: Sequence[Sequence[Row]], path: Path, metric: str = METRICS[0]) -> None:
    """PNG: the metric of every row with its interval, a panel a table."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    heights = [len(group) + 1 for group in groups]
    figure, axes = pyplot.subplots(
        len(groups), 1, figsize=(8, 1 + 0.4 * sum(heights)), squeeze=False,
        height_ratios=heights, constrained_layout=True,
    )  # fmt: skip
    for axis, group in zip(axes[:, 0], groups, strict=True):
        for place, row in enumerate(group):
            value, low, high = row.figures[metric]
            color = "C7" if row.parameters == 0 else "C0"  # nothing was trained
            axis.plot([low, high], [place, place], color=color)
            axis.plot(value, place, "o", color=color)
        axis.set_yticks(range(len(group)), drawable([row.run.name for row in group]))
        axis.invert_yaxis()
        axis.set_xlim(left=0)
        axis.grid(axis="x", alpha=0.3)
        axis.set_title(f"split {str(group[0].run.rule['split_hash'])[:12]}", fontsize=9, loc="left")
    axes[-1, 0].set_xlabel(f"{metric}, test, 95 % interval over users")
    with atomic_write(path, "wb") as handle:
        figure.savefig(handle, format="png", dpi=120)
    pyplot.close(figure)


def run_models(
    folder: Path, data: ProcessedFolder, models: Sequence[str], flags: Sequence[str]
) -> list[str]:
    """Run those models that FOLDER has no finished run of; an unfinished one goes on.

    Each runs in a process of its own, so that it gives its memory back.

    Returns:
        Names of the runs that failed.

    Raises:
        UserError: two models of one name, or a finished run on other data.
    """
    names = [Path(m).stem if m.endswith((".yaml", ".yml")) else m for m in models]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise UserError(f"--models: two are called {twice}, and a name is a folder of {folder}")
    finished = {n: path for n in names if (path := folder / n / "metrics.json").exists()}
    for path in finished.values():
        if RunResult.load(path.parent).split_hash != data.split_hash:
            raise UserError(f"{path.parent} is a run on other data than {data.path}")
    failed = []
    for model, name in zip(models, names, strict=True):
        if name in finished:
            continue
        print(f"== {name}", flush=True)
        command = [sys.executable, "-m", "baselines", "--model" if name == model else "--config"]
        command += [model, "--data_path", str(data.path), "--output_dir", str(folder / name)]
        command += flags_without_training(name, flags) if name in UNTRAINED else flags
        if run_command(command) != 0:
            print(f"{name} failed: {' '.join(command)}", file=sys.stderr, flush=True)
            failed.append(name)
    return failed


def flags_without_training(name: str, flags: Sequence[str]) -> list[str]:
    """Flags, each with its values, but for settings that other models have and this one has not,
    and for seeds, which do not matter to it.

    How it is evaluated must reach every model, or they would not stand in one table.
    """
    foreign = set().union(*map(names_of, SETTINGS)) - names_of(name) | {"seeds"}
    kept, keep = [], True
    for word in flags:
        if word.startswith("--"):
            keep = word[2:].partition("=")[0] not in foreign
        if keep:
            kept.append(word)
    return kept


def main(argv: Sequence[str] | None = None) -> None:
    """Parse flags, run what is missing, print, write and draw."""
    parser = command_parser("leaderboard", __doc__)
    parser.add_argument("folder", type=Path, help="holds the runs; the table is written there")
    parser.add_argument("--data_path", help="processed folder of the runs")
    parser.add_argument("--models", nargs="+", default=[], help="names or YAML files to run")
    args, flags = parser.parse_known_args(argv)
    if args.models and not args.data_path:
        raise UserError("--models needs --data_path, the processed folder to run them on")
    if flags and not args.models:
        raise UserError(f"{flags[0]}: flags of models need --models")
    data = ProcessedFolder.load(args.data_path) if args.data_path else None
    failed = [] if data is None else run_models(args.folder, data, args.models, flags)
    failure = f"{', '.join(failed)} failed, see above"
    runs = find_runs(args.folder)
    if not runs:
        raise UserError(failure if failed else f"no folder in {args.folder} holds a metrics.json")
    rows = seeds_as_one(rows_of(runs, data))
    if not rows:
        raise UserError(failure if failed else f"no run in {args.folder} could be read, see above")
    groups = tables(rows)
    text = "\n".join(markdown(group) for group in groups)
    print(text, end="")
    for ending, content in (
        ("md", text),
        ("tex", "\n".join(latex(group) for group in groups)),
        ("csv", csv_table(records(groups))),
    ):
        with atomic_write(args.folder / f"leaderboard.{ending}") as handle:
            handle.write(content)
    write_json(
        args.folder / "leaderboard.json", [[row.record() for row in g] for g in groups], indent=1
    )
    plot(groups, args.folder / "leaderboard.png")
    print(f"written to {args.folder}: leaderboard.md, .tex, .csv, .json, .png")
    if failed:
        raise UserError(failure)


if __name__ == "__main__":
    exit_with_message(main)
