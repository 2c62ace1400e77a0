"""Search settings of a model by validation, with Optuna: `recformer sweep FILE --output_dir DIR`.

FILE is YAML: the command, its fixed flags, and what is searched.

    command: baseline                  # or finetune
    flags: {model: sasrec, data_path: finetune_data/Scientific, num_train_epochs: 30}
    search:
      learning_rate: {low: 1.0e-4, high: 1.0e-2, log: true}
      num_layers: {low: 1, high: 3}                        # whole numbers
      dropout: [0.1, 0.3, 0.5]                             # one of these

Every trial is a run of its own in DIR/trial_<hash of its settings>, and the same settings are not
trained twice: a search without ranges of fractions ends when all of them are tried. The study sees
validation figures alone: the best one of each trial. Trials that fall behind the median of the
others at the same epoch end early. A trial that fails is noted with its error, and the others go
on; exit status 1 if none came to its end. Remove the folder of a failed trial to have it tried
again. The same command goes on where it was cut off, a trial that was under way included;
`--trials` counts those that are done. DIR/study.db is an Optuna storage, so its dashboard reads it
too. Needs `pip install "recformer[sweep]"`.
"""

from __future__ import annotations

import hashlib
import json
import math
import random
import shlex
import sqlite3
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from baselines.command_lines import checked
from baselines.sweep_file import Sweep
from recformer.cli import (
    check_seed,
    command_parser,
    exit_with_message,
    keep_freed_memory,
)
from recformer.data.processed import ProcessedFolder
from recformer.evaluation.runs import METRICS_FILE, RunResult
from recformer.evaluation.table import csv_table, latex_table, markdown_table
from recformer.files import UserError, atomic_write
from recformer.processes import say
from recformer.training.run_folder import FolderError, RunFolder, advising

STUDY_FILE = "study.db"
# Flags of finetuning that say how files of the processed folder are called.
NAMED_FILES = ("train_file", "dev_file", "test_file", "item2id_file", "meta_file")
TRIALS = "trial_"  # begins the name of a trial's folder
FIRST_TRIALS = 5  # that no trial is ended before
# Attributes of trials that Optuna counts as failed.
ERROR = "error"  # of one that its settings made fail: the error's line
REPEATS = "repeats"  # of a proposal that was done before, which is no trial: the number of that one

Settings = tuple[Any, ...]  # values in the order of `search`


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
    return output_dir / f"{TRIALS}{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def objective(sweep: Sweep, output_dir: Path, trial: Any) -> float:
    """Validation metric of a trial's best model."""
    from optuna_integration import PyTorchLightningPruningCallback

    settings = suggested(trial, sweep.search)
    folder = folder_of(output_dir, settings)
    trial.set_user_attr("folder", folder.name)
    folder.mkdir(exist_ok=True)  # also where flags are refused: it says that this was tried
    args, run = checked(sweep.command, sweep.words(settings, folder))
    say(f"== trial {trial.number}: {settings}")
    pruning = PyTorchLightningPruningCallback(trial, monitor=f"val/{args.metric}")
    with advising(f"remove {folder}, and the same command trains that trial anew"):
        run(args, callbacks=[pruning])
    value = RunResult.load(folder).validation[args.metric]
    if not math.isfinite(value):
        raise UserError(f"{args.metric} of validation is {value}")
    return value


def open_study(sweep: Sweep, output_dir: Path, seed: int, split_hash: str) -> Any:
    """The study in `output_dir`, new or as it was left; nobody else gets the folder.

    Args:
        sweep: what is searched.
        output_dir: of the sweep.
        seed: of the search.
        split_hash: of the data, whose figures alone can be compared.

    Raises:
        UserError: another sweep is there, another process is at work in it, or the study is
            damaged.
    """
    import optuna

    flags = {name: value for name, value in sweep.flags.items() if name != "data_path"}
    plan = {"command": sweep.command, "flags": flags, "search": sweep.search, "seed": seed}
    with advising(f"choose another --output_dir, or remove {output_dir} to search anew"):
        RunFolder.claim(output_dir, plan | {"split_hash": split_hash}, (STUDY_FILE,))
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    path = output_dir.absolute() / STUDY_FILE
    begun = path.exists() and any(output_dir.glob(f"{TRIALS}*"))
    if path.exists():
        _check(path)
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
    if begun and not study.get_trials(deepcopy=False):
        raise _damaged(path, f"no trial stands in it, and folders {TRIALS}… are there")
    _try_again(sweep, study, output_dir)
    return study


def _damaged(path: Path, why: object) -> UserError:
    return UserError(
        f"{path} is damaged ({why}): put a copy in its place; or remove it, and the same command "
        "searches anew, taking from the trials' folders what is trained"
    )


def _check(path: Path) -> None:
    """Refuse a damaged study before Optuna reads it.

    Raises:
        UserError: SQLite says what is wrong with it, or cannot read it now.
    """
    try:
        with closing(sqlite3.connect(path)) as connection:
            said = connection.execute("PRAGMA quick_check(1)").fetchone()[0]
    except sqlite3.OperationalError as error:  # locked by another program, not to be opened
        raise UserError(f"{path} cannot be read: {error}") from error
    except sqlite3.DatabaseError as error:
        raise _damaged(path, error) from error
    if said != "ok":
        raise _damaged(path, " ".join(said.split()))


@contextmanager
def errors_of_storage(path: Path) -> Iterator[None]:
    """Errors of reading and writing the study (full disk, another program's lock) as one line.

    Raises:
        UserError: names the file.
    """
    from optuna.exceptions import StorageInternalError
    from sqlalchemy.exc import SQLAlchemyError

    try:
        yield
    except (SQLAlchemyError, StorageInternalError) as error:
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        raise UserError(f"{path}: {cause}; once that is mended the same command goes on") from error


def trials_of(sweep: Sweep, study: Any) -> dict[Settings, Any]:
    """The last trial of every settings that were tried."""
    return {
        tuple(trial.params[name] for name in sweep.search): trial
        for trial in study.get_trials(deepcopy=False)
        if REPEATS not in trial.user_attrs and len(trial.params) == len(sweep.search)
    }


def state_of(trial: Any, output_dir: Path) -> str:
    """`complete`, `pruned` or `failed`; `cut off` where it is to be tried again."""
    if trial.state.name in ("COMPLETE", "PRUNED"):
        return trial.state.name.lower()
    failed = ERROR in trial.user_attrs and (output_dir / trial.user_attrs["folder"]).exists()
    return "failed" if failed else "cut off"


def search(sweep: Sweep, study: Any, output_dir: Path, trials: int, seed: int) -> None:
    """Try until so many trials are done, or all settings there are.

    Each is drawn by the seed and the number of those done before it, so that a search that was cut
    off proposes what it would have proposed.
    """
    import optuna

    grid = sweep.grid()
    most = trials if grid is None else min(trials, math.prod(map(len, grid)))
    while True:
        known = trials_of(sweep, study)
        done = {key: t for key, t in known.items() if state_of(t, output_dir) != "cut off"}
        if len(done) >= most:
            return
        repeats = sum(REPEATS in t.user_attrs for t in study.get_trials(deepcopy=False))
        drawn_by = seed + len(done) + repeats
        study.sampler = optuna.samplers.TPESampler(seed=drawn_by)
        trial = study.ask()
        settings = suggested(trial, sweep.search)
        before = done.get(tuple(settings.values()))
        if before is None:
            _try(sweep, study, output_dir, trial)
            continue
        trial.set_user_attr(REPEATS, before.number)
        study.tell(trial, state=optuna.trial.TrialState.FAIL)
        if grid is not None:
            study.enqueue_trial(_untried(sweep.search, grid, done, drawn_by))


def _untried(
    names: Iterable[str], grid: Iterable[Sequence[Any]], done: Mapping[Settings, Any], seed: int
) -> dict[str, Any]:
    """Settings of the grid that are not done; there are some."""
    generator = random.Random(seed)
    while (values := tuple(generator.choice(each) for each in grid)) in done:
        pass
    return dict(zip(names, values, strict=True))


def _try(sweep: Sweep, study: Any, output_dir: Path, trial: Any) -> None:
    """One trial, noted as complete, pruned or failed; whatever else ends it leaves it to be tried
    again."""
    import optuna
    import torch

    try:
        study.tell(trial, objective(sweep, output_dir, trial))
    except optuna.TrialPruned:
        study.tell(trial, state=optuna.trial.TrialState.PRUNED)
    except FolderError:  # says nothing about the settings
        raise
    except (UserError, MemoryError, RuntimeError) as error:
        lacks_memory = isinstance(error, torch.OutOfMemoryError) or "allocate memory" in str(error)
        if isinstance(error, RuntimeError) and not lacks_memory:
            raise  # a fault of the code; torch says of a CPU without memory no more than that
        line = (str(error) or "out of memory").splitlines()[0]
        trial.set_user_attr(ERROR, line)
        study.tell(trial, state=optuna.trial.TrialState.FAIL)
        say(f"trial {trial.number} failed: {line}")


def _try_again(sweep: Sweep, study: Any, output_dir: Path) -> None:
    """Put trials first that were cut off: with the same settings, so in the same folder."""
    from optuna.trial import TrialState

    for trial in study.get_trials(states=(TrialState.RUNNING,)):  # it went with its process
        study.tell(trial.number, state=TrialState.FAIL)
    waiting = [
        trial.system_attrs.get("fixed_params")
        for trial in study.get_trials(states=(TrialState.WAITING,))
    ]
    for trial in trials_of(sweep, study).values():
        if state_of(trial, output_dir) == "cut off" and trial.params not in waiting:
            study.enqueue_trial(trial.params)


def summary(sweep: Sweep, states: Sequence[str], trials: int) -> str:
    """How many trials there were, and what became of them."""
    counts = {state: states.count(state) for state in ("complete", "pruned", "failed", "cut off")}
    text = ", ".join(f"{number} {state}" for state, number in counts.items() if number)
    grid = sweep.grid()
    done = len(states) - counts["cut off"]
    if grid is not None and done >= math.prod(map(len, grid)) and done < trials:
        text += f"; the search has no other settings, so it ends before --trials {trials}"
    if counts["failed"]:
        text += "; trials.csv has the errors, a failed one is tried again without its folder"
    return f"{len(states)} trial{'s' if len(states) > 1 else ''}: {text}"


def report(sweep: Sweep, study: Any, output_dir: Path, trials: int) -> None:
    """Print and write trials, the best flags, their test figures and what mattered.

    Raises:
        UserError: no trial came to its end, or the folder of the best one is gone.
    """
    names = list(sweep.search)
    tried = sorted(trials_of(sweep, study).values(), key=lambda trial: trial.number)
    records = [
        {"trial": t.number, "state": state_of(t, output_dir), "validation": t.value}
        | {name: t.params[name] for name in names}
        | {"folder": t.user_attrs.get("folder", ""), "error": t.user_attrs.get(ERROR, "")}
        for t in tried
    ]
    with atomic_write(output_dir / "trials.csv") as handle:
        handle.write(csv_table(records))
    ends = summary(sweep, [record["state"] for record in records], trials)
    done = sorted((t for t in tried if t.state.name == "COMPLETE"), key=lambda t: -t.value)
    if not done:
        errors = [record["error"] for record in records if record["error"]]
        last = f"; the last error: {errors[-1]}" if errors else ""
        raise UserError(f"{output_dir}: no trial came to its end ({ends}){last}")
    rows = [
        [str(t.number), f"{t.value:.4f}", *(str(t.params[name]) for name in names)]
        for t in done[:10]
    ]
    best = done[0]
    folder = output_dir / best.user_attrs["folder"]
    if not (folder / METRICS_FILE).exists():
        line = ["recformer", sweep.command, *sweep.words(best.params, folder)]
        raise UserError(
            f"{folder} of the best trial has no {METRICS_FILE}, was it removed? "
            f"`{shlex.join(line)}` trains it again, then the same sweep goes on"
        )
    test = RunResult.load(folder).test
    metrics = ", ".join(f"{n} {x:.4f}" for n, x in test.items() if n in ("NDCG@10", "Recall@10"))
    line = ["recformer", sweep.command, *sweep.words(best.params, Path("DIR"))]
    below = [ends, f"best: {shlex.join(line)}", f"test of it: {metrics}"]
    heads = ["trial", "validation", *names]
    text = markdown_table(heads, rows) + "\n" + "".join(f"{line}\n" for line in below)
    print("\n" + text, end="")
    written = f"trials.csv, sweep.md, .tex, {STUDY_FILE}"
    if len(done) > 1 and len(names) > 1 and len({t.value for t in done}) > 1:
        draw_importance(study, output_dir / "importance.png")
        written += ", importance.png"
    comments = "".join(f"% {' '.join(line.split())}\n" for line in below)
    for ending, content in (("md", text), ("tex", latex_table(heads, rows) + comments)):
        with atomic_write(output_dir / f"sweep.{ending}") as handle:
            handle.write(content)
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
    with errors_of_storage(args.output_dir / STUDY_FILE):
        study = open_study(sweep, args.output_dir, args.seed, split_hash)
        search(sweep, study, args.output_dir, args.trials, args.seed)
        report(sweep, study, args.output_dir, args.trials)


if __name__ == "__main__":
    exit_with_message(main)
