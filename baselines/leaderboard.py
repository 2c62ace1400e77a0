"""All runs of a folder in one table: figures, intervals, paired tests, slices, cost.

`recformer leaderboard FOLDER` collects every run in FOLDER, at any depth, by its path there: output
folders of `recformer baseline` and of `recformer finetune` (its last evaluation; zero-shot as a row
of its own). With `--data_path` and `--models` it first runs those that are not there yet, each into
FOLDER/NAME; a model is a name (`sasrec`) or a file of flags (`baselines/configs/t4r.yaml`). Further
flags go to `recformer baseline`; untrained models get none of training (epochs, batches, learning
rate, …), none of the trained models' settings, and no seeds. If a run fails, the others go on, the
table is written, and the exit status is 1. `--data_path` also gives slices to runs that were
written before there were any.

Runs that differ in split, tie rule or `filter_seen` get tables of their own. Runs that differ in
their seed alone are one row: mean and standard deviation over the seeds, intervals and tests on
the means of every user. `--seeds 1 2 3` runs models with each.

A run that is damaged is left out and named below the tables; a row of several seeds that lacks one,
which is damaged or not finished, says so. Exit status 1 then, with what to do. Other runs that are
not finished are named on stderr.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence, Set
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from baselines.arguments import BaselineArguments, BaselineTrainingArguments
from baselines.command_lines import checked, defaults_of, parsed
from baselines.rows import (
    UNREADABLE,
    LeftOut,
    Row,
    find_runs,
    noted_settings,
    rows_of,
    seeds_as_one,
    tables,
)
from baselines.settings import SETTINGS, names_of
from recformer.cli import command_parser, exit_with_message
from recformer.data.processed import ProcessedFolder
from recformer.evaluation.compare import METRICS
from recformer.evaluation.runs import METRICS_FILE, RunResult
from recformer.evaluation.table import csv_table, figure_text, latex_table, markdown_table
from recformer.files import UserError, atomic_write, write_json
from recformer.pictures import drawable
from recformer.training.run_folder import IGNORED, RUN_FILE
from recformer.training.seeds import run_command

TRAINING = frozenset(field.name for field in fields(BaselineTrainingArguments))


def caption(group: Sequence[Row], metric: str = METRICS[0]) -> str:
    """Rules that all rows of a table share, and a legend."""
    run, rule = group[0].run, group[0].run.rule
    seen = "filtered" if rule["filter_seen"] else "kept"
    several = "; ±: standard deviation over seeds" if any(row.deviation for row in group) else ""
    lacking = "".join(f" {r.run.name} lacks {', '.join(r.missing)}." for r in group if r.missing)
    return (
        f"Split {str(rule['split_hash'])[:12]}, {run.judged}, full "
        f"ranking, ties {rule['ties']}, seen items {seen}. 95 % bootstrap intervals over "
        f"{run.resampled}{several}; p: paired permutation test of {metric} against the first row, "
        f"corrected by Holm.{lacking}"
    )


def cells_of(group: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """Heads and cells of the table of figures."""
    rows = []
    for row in group:
        cells = [row.run.name]
        for name, (value, low, high) in row.figures.items():
            cells.append(figure_text(value, low, high, row.deviation.get(name)))
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
            record["missing"] = ", ".join(row.missing)
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
        UserError: two models of one name, flags that are not allowed, or a finished run of other
            flags or data.
    """
    from baselines.models import UNTRAINED  # seconds, which a table of finished runs need not wait

    names = [Path(m).stem if m.endswith((".yaml", ".yml")) else m for m in models]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise UserError(f"--models: two are called {twice}, and a name is a folder of {folder}")
    lines = {}
    for model, name in zip(models, names, strict=True):
        line = ["--model" if name == model else "--config", model]
        own = parsed("baseline", line).model
        line += ["--data_path", str(data.path), "--output_dir", str(folder / name)]
        line += flags_without_training(own, flags) if own in UNTRAINED else flags
        lines[name] = line
    # What is wrong with the last model is said before the first one is trained.
    asked = {name: checked("baseline", line)[0] for name, line in lines.items()}
    finished = [name for name in names if (folder / name / METRICS_FILE).exists()]
    for name in finished:
        without = TRAINING if asked[name].model in UNTRAINED else frozenset()
        _refuse_another(folder / name, asked[name], data, without)
    failed = []
    for name, line in lines.items():
        if name in finished:
            continue
        print(f"== {name}", flush=True)
        if asked[name].model in UNTRAINED:
            _note_as_asked(folder / name, asked[name])
        command = [sys.executable, "-m", "baselines", *line]
        if run_command(command) != 0:
            print(f"{name} failed: {' '.join(command)}", file=sys.stderr, flush=True)
            failed.append(name)
    return failed


def _refuse_another(path: Path, args: Any, data: ProcessedFolder, without: Set[str]) -> None:
    """Refuse a finished run of other flags or data than those that are asked for.

    Flags in `without` may differ: figures of its model do not depend on them, though `recformer
    baseline`, and this command before, noted them of untrained models too.
    """
    try:
        split_hash = RunResult.load(path).split_hash
    except UNREADABLE:  # damaged, which is said where the tables are made
        return
    if split_hash != data.split_hash:
        raise UserError(f"{path} is a run on other data than {data.path}")
    noted = noted_settings(path)
    if not noted:
        return
    asked = asdict(args) | args.settings().as_dict()
    held = defaults_of(asked) | noted
    compared = (asked.keys() & held.keys()) - IGNORED - without - {"data_path"}
    different = sorted(name for name in compared if asked[name] != held[name])
    if different:
        raise UserError(
            f"{path} is a finished run of other flags (different: {', '.join(different)}): take "
            "another folder, or remove it to run it anew"
        )


def _note_as_asked(path: Path, args: Any) -> None:
    """Let a run of this untrained model that was begun with flags of training go on without."""
    noted = noted_settings(path)
    if noted.get("model") != args.model:  # not begun, damaged or another's: the run itself says so
        return
    now = {name: value for name, value in asdict(args).items() if name in TRAINING & noted.keys()}
    if noted | now != noted:
        write_json(path / RUN_FILE, noted | now, indent=1)


def flags_without_training(model: str, flags: Sequence[str]) -> list[str]:
    """Flags, each with its values, but for those of training, settings that other models have and
    an untrained one has not, and seeds, which do not matter to it.

    How it is evaluated must reach every model, or they would not stand in one table.
    """
    foreign = set().union(*map(names_of, SETTINGS)) - names_of(model) | TRAINING | {"seeds"}
    kept, keep = [], True
    for word in flags:
        if word.startswith("--"):
            keep = flag_of(word) not in foreign
        if keep:
            kept.append(word)
    return kept


def flag_of(word: str) -> str:
    """Name of the flag that a word of a command line gives, hyphenated or cut short though it may
    be, as the parser of `recformer baseline` takes it."""
    name = word.removeprefix("--").partition("=")[0].replace("-", "_")
    known = [*(field.name for field in fields(BaselineArguments)), "config"]
    longer = [each for each in known if each.startswith(name)]
    return longer[0] if len(longer) == 1 else name


def main(argv: Sequence[str] | None = None) -> None:
    """Parse flags, run what is missing, print, write and draw."""
    parser = command_parser("leaderboard", __doc__)
    parser.add_argument("folder", type=Path, help="folder of the runs, where the table is written")
    parser.add_argument("--data_path", help="processed folder to run models on")
    parser.add_argument("--models", nargs="+", default=[], help="names or YAML files to run")
    args, flags = parser.parse_known_args(argv)
    if args.models and not args.data_path:
        raise UserError("--models needs --data_path, the processed folder to run them on")
    if flags and not args.models:
        raise UserError(f"{flags[0]}: flags of models need --models")
    given = [word for word in flags if word.startswith("--")]
    if own := [word for word in given if flag_of(word) in ("output_dir", "config")]:
        raise UserError(f"{own[0]}: each model has a folder of its own in {args.folder}")
    data = ProcessedFolder.load(args.data_path) if args.data_path else None
    failed = [] if data is None else run_models(args.folder, data, args.models, flags)
    failures = [f"{', '.join(failed)} failed, see above"] if failed else []
    left_out: list[LeftOut] = []
    runs = find_runs(args.folder, left_out)
    singles = rows_of(runs, data, left_out=left_out)
    rows = seeds_as_one(singles, left_out)
    lacking = {name for row in rows for name in row.missing}
    spoilt = [run for run in left_out if run.finished or run.name in lacking]
    for run in spoilt:
        print(f"{run.path} is left out: {run.why}", file=sys.stderr)
    if begun := [run.name for run in left_out if run not in spoilt]:
        print(f"not finished, so in no table: {', '.join(begun)}", file=sys.stderr)
    if not runs:
        raise UserError(*failures or [f"no folder in {args.folder} holds a metrics.json"])
    if not rows:
        raise UserError(*failures or [f"no run in {args.folder} could be read, see above"])
    write(args.folder, tables(rows), spoilt)
    failures += advice(spoilt)
    if failures:
        raise UserError("; ".join(failures))


def advice(runs: Sequence[LeftOut]) -> list[str]:
    """What to do about runs that the tables lack."""
    # Whose flags cannot be read: its command would refuse the folder.
    nameless = [r for r in runs if r.finished and not r.settings and (r.path / RUN_FILE).exists()]
    damaged = ", ".join(run.name for run in runs if run.finished and run not in nameless)
    begun = ", ".join(run.name for run in runs if not run.finished)
    said = []
    if damaged:
        said.append(
            f"the tables lack {damaged}, see above: remove {METRICS_FILE}, evaluation and ranks "
            "there, and the command that made it makes them again and trains nothing; or remove "
            "the folder, and it is not missed"
        )
    if nameless:
        said.append(
            f"the tables lack {', '.join(run.name for run in nameless)}, see above: put {RUN_FILE} "
            "back from a copy, or remove the folder and run it anew"
        )
    if begun:
        said.append(
            f"the tables lack {begun}, not finished: the command that began it goes on there; or "
            "remove the folder, and it is not missed"
        )
    return said


def write(folder: Path, groups: Sequence[Sequence[Row]], spoilt: Sequence[LeftOut]) -> None:
    """Print the tables, and write them in every form; runs that they lack are named below."""
    below = [f"Left out: {run.name}, {' '.join(run.why.split())}" for run in spoilt]
    text = "\n".join([*(markdown(group) for group in groups), *(f"{line}\n" for line in below)])
    print(text, end="")
    comments = [f"% {line}\n" for line in below]
    for ending, content in (
        ("md", text),
        ("tex", "\n".join([*(latex(group) for group in groups), *comments])),
        ("csv", csv_table(records(groups))),
    ):
        with atomic_write(folder / f"leaderboard.{ending}") as handle:
            handle.write(content)
    write_json(folder / "leaderboard.json", [[row.record() for row in g] for g in groups], indent=1)
    plot(groups, folder / "leaderboard.png")
    print(f"written to {folder}: leaderboard.md, .tex, .csv, .json, .png")


if __name__ == "__main__":
    exit_with_message(main)
