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
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]

from recformer.cli import command_parser, exit_with_message, flag_words, keep_freed_memory
from recformer.evaluation.runs import RunResult
from recformer.evaluation.table import csv_table, markdown_table
from recformer.files import UserError, atomic_write, read_json, write_json
from recformer.processes import say

# The module that parses and runs each.
COMMANDS = {"baseline": "baselines.__main__", "finetune": "recformer.finetune"}
PLAN_FILE = "sweep.json"
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
        try:
            content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
            this = cls(content["command"], content.get("flags", {}), content["search"])
            flags, search = dict(this.flags), dict(this.search)
        except (yaml.YAMLError, ValueError, RecursionError) as error:
            raise UserError(f"{path} is no YAML: {error}") from error
        except (KeyError, TypeError, AttributeError) as error:
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
        return this

    def words(self, settings: dict[str, Any], output_dir: Path) -> list[str]:
        """Flags of a trial as a command line has them."""
        return flag_words(self.flags | settings | {"output_dir": str(output_dir)})


def _check_space(path: str, name: str, space: Any) -> None:
    if isinstance(space, list) and space and all(_plain(value) for value in space):
        return
    known = isinstance(space, dict) and set(space) <= {"low", "high", "log"}
    numbers = known and all(isinstance(space.get(n), int | float) for n in ("low", "high"))
    if not numbers or space["low"] >= space["high"]:
        raise UserError(
            f"{path}: search of {name} is {space}, expected a list of values, or low below high"
        )
    if space.get("log") and space["low"] <= 0:
        raise UserError(f"{path}: search of {name}: low must be above 0 with log")


def _plain(value: Any) -> bool:
    return isinstance(value, str | int | float | bool)


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


def parsed(sweep: Sweep, words: Sequence[str]) -> tuple[Any, Callable[..., Any]]:
    """Flags of a trial as their dataclass, and the function that runs them."""
    module = import_module(COMMANDS[sweep.command])
    return module.parse(words), module.run


def objective(sweep: Sweep, output_dir: Path, trial: Any) -> float:
    """Validation metric of a trial's best model."""
    from optuna_integration import PyTorchLightningPruningCallback

    settings = suggested(trial, sweep.search)
    folder = folder_of(output_dir, settings)
    trial.set_user_attr("folder", folder.name)
    args, run = parsed(sweep, sweep.words(settings, folder))
    say(f"== trial {trial.number}: {settings}")
    pruning = PyTorchLightningPruningCallback(trial, monitor=f"val/{args.metric}")
    run(args, callbacks=[pruning])
    return RunResult.load(folder).validation[args.metric]


def open_study(sweep: Sweep, output_dir: Path, seed: int) -> Any:
    """The study in `output_dir`, new or as it was left.

    Raises:
        UserError: another sweep is there.
    """
    import optuna

    output_dir.mkdir(parents=True, exist_ok=True)
    plan = {"command": sweep.command, "flags": sweep.flags, "search": sweep.search, "seed": seed}
    path = output_dir / PLAN_FILE
    if path.exists() and read_json(path) != plan:
        raise UserError(f"{output_dir} holds another sweep, see {path}: choose another folder")
    write_json(path, plan, indent=1)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(
        storage=f"sqlite:///{(output_dir / 'study.db').resolve()}",
        study_name="sweep",
        direction="maximize",
        load_if_exists=True,
        sampler=optuna.samplers.TPESampler(seed=seed + _trials_so_far(output_dir)),
        pruner=optuna.pruners.MedianPruner(n_startup_trials=FIRST_TRIALS, n_warmup_steps=1),
    )
    _try_again(study, len(sweep.search))
    return study


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


def _trials_so_far(output_dir: Path) -> int:
    """Folders of trials: a sampler that begins anew must not propose its first settings again."""
    return len(list(output_dir.glob("trial_*")))


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
    written = "trials.csv, sweep.md, study.db"
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
    if args.trials < 1:
        raise UserError(f"--trials {args.trials}: must be at least 1")
    sweep = Sweep.load(args.file)
    first = {n: s[0] if isinstance(s, list) else s["low"] for n, s in sweep.search.items()}
    try:
        parsed(sweep, sweep.words(first, args.output_dir))[0].check()
    except ValueError as error:  # flags that nothing reads
        raise UserError(f"{args.file}: {error}") from error
    try:
        import optuna
        import optuna_integration  # noqa: F401
    except ImportError as error:
        raise UserError(f'{error}: pip install "recformer[sweep]"') from error
    keep_freed_memory()
    study = open_study(sweep, args.output_dir, args.seed)
    ended = (optuna.trial.TrialState.COMPLETE, optuna.trial.TrialState.PRUNED)
    left = args.trials - len(study.get_trials(states=ended))
    if left > 0:
        study.optimize(lambda trial: objective(sweep, args.output_dir, trial), n_trials=left)
    report(sweep, study, args.output_dir)


if __name__ == "__main__":
    exit_with_message(main)
