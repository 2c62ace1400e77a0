"""Search settings of a model by validation, with Optuna: `recformer sweep FILE --output_dir DIR`.

FILE is YAML: the command, its fixed flags, and what is searched.

    command: baseline                  # or finetune
    flags: {model: sasrec, data_path: finetune_data/Scientific, num_train_epochs: 30}
    search:
      learning_rate: {low: 1.0e-4, high: 1.0e-2, log: true}
      num_layers: {low: 1, high: 3}                        # whole numbers
      dropout: [0.1, 0.3, 0.5]                             # one of these

Every trial is a run of its own in DIR/trial_<hash of its settings>. The study sees validation
figures alone: the best one of each trial. Trials that fall behind the median of the others at the
same epoch end early. The same command goes on where it was cut off, a trial that was under way
included; `--trials` counts those that are done. DIR/study.db is an Optuna storage, so its
dashboard reads it too. Needs `pip install "recformer[sweep]"`.
"""

from __future__ import annotations

import hashlib
import json
import math
import shlex
import sqlite3
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from baselines.command_lines import COMMANDS, checked
from recformer.cli import (
    check_seed,
    command_parser,
    exit_with_message,
    flag_words,
    keep_freed_memory,
)
from recformer.data.processed import ProcessedFolder
from recformer.evaluation.runs import RunResult
from recformer.evaluation.table import csv_table, markdown_table
from recformer.files import UserError, atomic_write, read_yaml
from recformer.processes import say
from recformer.training.run_folder import RunFolder

STUDY_FILE = "study.db"
# Flags of finetuning that say how files of the processed folder are called.
NAMED_FILES = ("train_file", "dev_file", "test_file", "item2id_file", "meta_file")
FIRST_TRIALS = 5  # that no trial is ended before


@dataclass(frozen=True)
class Sweep:
    """A file of this form, checked.

    Attributes:
        command: `baseline` or `finetune`.
        flags: the same in every trial.
        search: flag -> `{low, high[, log]}`, or a list of values.
    """

    command: str
    flags: dict[str, Any]
    search: dict[str, Any]

    @classmethod
    def load(cls, path: str) -> Sweep:
        """Read a file.

        Raises:
            FileNotFoundError: no such file.
            UserError: it is not of this form.
        """
        content = read_yaml(path)
        try:
            this = cls(content["command"], content.get("flags", {}), content["search"])
            flags, search = dict(this.flags), dict(this.search)
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise UserError(f"{path}: expected command, flags and search ({error})") from error
        if this.command not in COMMANDS:
            raise UserError(f"{path}: command {this.command!r}, expected {' or '.join(COMMANDS)}")
        for name in ("output_dir", "seeds", "overwrite_output_dir"):
            if name in flags or name in search:
                raise UserError(f"{path}: {name} is the sweep's own")
        twice = sorted(set(flags) & set(search))
        if twice or not search:
            raise UserError(f"{path}: {twice or 'nothing'} is fixed and searched")
        for name, space in search.items():
            _check_space(path, name, space)
        for name, value in flags.items():
            if not all(_plain(each) for each in (value if isinstance(value, list) else [value])):
                raise UserError(f"{path}: {name} is {value!r}, expected a value, or a list of them")
        return this

    def borders(self) -> list[dict[str, Any]]:
        """Settings that between them have every value of a list, and both ends of every range."""
        ends = {
            name: space if isinstance(space, list) else [space["low"], space["high"]]
            for name, space in self.search.items()
        }
        first = {name: values[0] for name, values in ends.items()}
        others = ({name: value} for name, values in ends.items() for value in values[1:])
        return [first, *(first | other for other in others)]

    def words(self, settings: dict[str, Any], output_dir: Path) -> list[str]:
        """Flags of a trial as a command line has them."""
        return flag_words(self.flags | settings | {"output_dir": str(output_dir)})


def _check_space(path: str, name: str, space: Any) -> None:
    if isinstance(space, list) and space and all(_plain(value) for value in space):
        return
    known = isinstance(space, dict) and set(space) <= {"low", "high", "log"}
    numbers = known and all(_is_number(space.get(n)) for n in ("low", "high"))
    if not numbers or space["low"] >= space["high"] or type(space.get("log", False)) is not bool:
        raise UserError(
            f"{path}: search of {name} is {space}, expected a list of values, or low below high"
        )
    if space.get("log") and space["low"] <= 0:
        raise UserError(f"{path}: search of {name}: low must be above 0 with log")


def _plain(value: Any) -> bool:
    return isinstance(value, str | int | float | bool)


def _is_number(value: Any) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and math.isfinite(value)


def suggested(trial: Any, search: dict[str, Any]) -> dict[str, Any]:
    """Settings that Optuna proposes for a trial."""
    settings: dict[str, Any] = {}
    for name, space in search.items():
        if isinstance(space, list):
            settings[name] = trial.suggest_categorical(name, space)
        elif isinstance(space["low"], int) and isinstance(space["high"], int):
            log = space.get("log", False)
            settings[name] = trial.suggest_int(name, space["low"], space["high"], log=log)
        else:
            log = space.get("log", False)
            settings[name] = trial.suggest_float(name, space["low"], space["high"], log=log)
    return settings


def folder_of(output_dir: Path, settings: dict[str, Any]) -> Path:
    """Folder of a trial of these settings, where it goes on if it is tried again."""
    text = json.dumps(settings, sort_keys=True)
    return output_dir / f"trial_{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def objective(sweep: Sweep, output_dir: Path, trial: Any) -> float:
    """Validation metric of a trial's best model."""
    from optuna_integration import PyTorchLightningPruningCallback

    settings = suggested(trial, sweep.search)
    folder = folder_of(output_dir, settings)
    trial.set_user_attr("folder", folder.name)
    args, run = checked(sweep.command, sweep.words(settings, folder))
    say(f"== trial {trial.number}: {settings}")
    pruning = PyTorchLightningPruningCallback(trial, monitor=f"val/{args.metric}")
    run(args, callbacks=[pruning])
    return RunResult.load(folder).validation[args.metric]


def open_study(sweep: Sweep, output_dir: Path, seed: int, split_hash: str) -> Any:
    """The study in `output_dir`, new or as it was left; nobody else gets the folder.

    Args:
        sweep: what is searched.
        output_dir: of the sweep.
        seed: of the search.
        split_hash: of the data, whose figures alone can be compared.

    Raises:
        UserError: another sweep is there, or another process is at work in it.
    """
    import optuna

    flags = {name: value for name, value in sweep.flags.items() if name != "data_path"}
    plan = {"command": sweep.command, "flags": flags, "search": sweep.search, "seed": seed}
    RunFolder.claim(output_dir, plan | {"split_hash": split_hash}, (STUDY_FILE,))
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    path = output_dir.absolute() / STUDY_FILE
    # Not by URL, in which a path with `?` or `{` means something else.
    storage = optuna.storages.RDBStorage(
        "sqlite://",
        engine_kwargs={"creator": lambda: sqlite3.connect(path, check_same_thread=False)},
    )
    study = optuna.create_study(
        storage=storage,
        study_name="sweep",
        direction="maximize",
        load_if_exists=True,
        pruner=optuna.pruners.MedianPruner(n_startup_trials=FIRST_TRIALS, n_warmup_steps=1),
    )
    _try_again(study, len(sweep.search))
    return study


def search(sweep: Sweep, study: Any, output_dir: Path, trials: int, seed: int) -> None:
    """Try until so many trials are done.

    Each is drawn by the seed and the number of those done before it, so that a search that was cut
    off proposes what it would have proposed.
    """
    import optuna

    ended = (optuna.trial.TrialState.COMPLETE, optuna.trial.TrialState.PRUNED)
    while (done := len(study.get_trials(states=ended))) < trials:
        study.sampler = optuna.samplers.TPESampler(seed=seed + done)
        study.optimize(lambda trial: objective(sweep, output_dir, trial), n_trials=1)


def _try_again(study: Any, count: int) -> None:
    """Put trials first that were cut off: with the same settings, so in the same folder."""
    from optuna.trial import TrialState

    for trial in study.get_trials(states=(TrialState.RUNNING,)):  # it went with its process
        study.tell(trial.number, state=TrialState.FAIL)
    known = [
        trial.system_attrs.get("fixed_params") or trial.params
        for trial in study.get_trials()
        if trial.state != TrialState.FAIL
    ]
    for trial in study.get_trials(states=(TrialState.FAIL,)):
        if len(trial.params) == count and trial.params not in known:
            known.append(trial.params)
            study.enqueue_trial(trial.params)


def report(sweep: Sweep, study: Any, output_dir: Path) -> None:
    """Print and write trials, the best flags, their test figures and what mattered."""
    import optuna

    names = list(sweep.search)
    records = [
        {"trial": t.number, "state": t.state.name.lower(), "validation": t.value}
        | {name: t.params.get(name) for name in names}
        | {"folder": t.user_attrs.get("folder", "")}
        for t in study.get_trials()
    ]
    with atomic_write(output_dir / "trials.csv") as handle:
        handle.write(csv_table(records))
    done = [t for t in study.get_trials() if t.state == optuna.trial.TrialState.COMPLETE]
    if not done:
        raise UserError(f"{output_dir}: no trial came to its end")
    rows = [
        [str(t.number), f"{t.value:.4f}", *(str(t.params[name]) for name in names)]
        for t in sorted(done, key=lambda t: -t.value)[:10]
    ]
    best = study.best_trial
    folder = output_dir / best.user_attrs["folder"]
    test = RunResult.load(folder).test
    metrics = ", ".join(f"{n} {x:.4f}" for n, x in test.items() if n in ("NDCG@10", "Recall@10"))
    text = markdown_table(["trial", "validation", *names], rows)
    line = ["recformer", sweep.command, *sweep.words(best.params, Path("DIR"))]
    text += f"\nbest: {shlex.join(line)}\ntest of it: {metrics}\n"
    print("\n" + text, end="")
    written = f"trials.csv, sweep.md, {STUDY_FILE}"
    if len(done) > 1 and len(names) > 1 and len({t.value for t in done}) > 1:
        draw_importance(study, output_dir / "importance.png")
        written += ", importance.png"
    with atomic_write(output_dir / "sweep.md") as handle:
        handle.write(text)
    print(f"written to {output_dir}: {written}")


def draw_importance(study: Any, path: Path) -> None:
    """PNG: how much of the variance of validation each setting explains (fANOVA)."""
    import matplotlib
    import optuna

    matplotlib.use("Agg")
    from matplotlib import pyplot

    found = optuna.importance.get_param_importances(study)
    figure, axis = pyplot.subplots(figsize=(7, 1 + 0.4 * len(found)), constrained_layout=True)
    axis.barh(list(found), list(found.values()))
    axis.invert_yaxis()
    axis.set_xlabel("share of the variance of validation (fANOVA)")
    with atomic_write(path, "wb") as handle:
        figure.savefig(handle, format="png", dpi=120)
    pyplot.close(figure)


def main(argv: Sequence[str] | None = None) -> None:
    """Parse flags, try, report."""
    parser = command_parser("sweep", __doc__)
    parser.add_argument("file", metavar="FILE", help="YAML of this form")
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--trials", type=int, default=20, help="in all (20)")
    parser.add_argument("--seed", type=int, default=0, help="of the search (0)")
    args = parser.parse_args(argv)
    check_seed(args.seed)
    if args.trials < 1:
        raise UserError(f"--trials {args.trials}: must be at least 1")
    sweep = Sweep.load(args.file)
    try:
        for settings in sweep.borders():
            flags = checked(sweep.command, sweep.words(settings, args.output_dir))[0]
    except ValueError as error:
        raise UserError(f"{args.file}: {error}") from error
    if flags.num_processes > 1 or len(flags.device or []) > 1:
        raise UserError(f"{args.file}: a trial runs in one process, on one device")
    try:
        import optuna  # noqa: F401
        import optuna_integration  # noqa: F401
    except ImportError as error:
        raise UserError(f'{error}: pip install "recformer[sweep]"') from error
    keep_freed_memory()
    files = {name: getattr(flags, name) for name in NAMED_FILES if hasattr(flags, name)}
    split_hash = ProcessedFolder.load(flags.data_path, **files).split_hash
    study = open_study(sweep, args.output_dir, args.seed, split_hash)
    search(sweep, study, args.output_dir, args.trials, args.seed)
    report(sweep, study, args.output_dir)


if __name__ == "__main__":
    exit_with_message(main)
