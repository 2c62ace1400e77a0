"""Train and evaluate a baseline on a processed folder, as Recformer is.

`recformer baseline --model sasrec --data_path FOLDER --output_dir DIR`

The same command again continues a run that was cut off, and prints the results of a finished one.
On a folder that was split by windows it trains up to each window and judges on the next, see
`baselines/windows.py`.
`--config NAME` reads flags from a YAML file, of `baselines/configs` or by its path; flags given
beside it win.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lightning import Callback, seed_everything
from safetensors.torch import save

from baselines.arguments import BaselineArguments, BaselineRunArguments, read_config
from baselines.generative.accuracy import (
    CodeAccuracy,
    format_code_accuracy,
    format_code_losses,
)
from baselines.generative.entropy import CodeEntropies
from baselines.generative.recommender import CodeRecommender
from baselines.models import Built, build
from baselines.sequence.collators import CausalCollator
from baselines.settings import GenerativeSettings, Settings
from baselines.windows import PICTURE, TABLE, go_on_from, run_windows, weights_checksum
from recformer.cli import exit_with_message, fill, flags_parser, keep_freed_memory
from recformer.data.datamodule import SeqRecDataModule
from recformer.data.overfit import OverfitView
from recformer.data.processed import ProcessedFolder
from recformer.data.windows import Windows, WindowView
from recformer.evaluation.over_time import format_over_time
from recformer.evaluation.protocol import with_protocol
from recformer.evaluation.report import report
from recformer.evaluation.runs import RunResult, StageResult
from recformer.files import UserError, atomic_folder, write_checksums, write_json
from recformer.processes import is_first, say
from recformer.training.experiment import Experiment
from recformer.training.history import plot_history
from recformer.training.seeds import run_seeds, summarize
from recformer.training.trainer import Compute

#: Flags that later versions brought, at the value that stands for what was before: left out of
#: run.json, so that earlier runs go on.
SINCE = {"schedule": "constant", "optimizer": "adamw", "user_tokens": 0}


def run(args: BaselineRunArguments, callbacks: Sequence[Callback] = ()) -> dict[str, Any]:
    """Train where there is something to train, evaluate, and write; returns `metrics.json`.

    Args:
        args: flags.
        callbacks: Lightning's, of a caller that watches training; not in windows, which are many
            trainings.

    Raises:
        FileNotFoundError, UserError: as `ProcessedFolder.load`, a flag that the model does not
            have, or values that do not go together.
    """
    started = time.monotonic()
    args.output_dir = args.output_dir or f"result/{args.model}"
    args.check()
    settings = args.settings()
    Compute.of(args)  # finds out which process this is, before any of them speaks
    if (
        isinstance(settings, GenerativeSettings)
        and not settings.exact_rank
        and settings.num_beams < max(args.metric_ks)
    ):
        say(
            f"--num_beams {settings.num_beams}: no more items are generated for a user, so that "
            f"figures at --metric_ks beyond count these alone; --num_beams {max(args.metric_ks)} "
            "or --exact_rank gives them in full"
        )
    folder = ProcessedFolder.load(args.data_path)
    say(
        f"{args.data_path}: {folder.num_users:,} users, {folder.num_items:,} items, "
        f"split {folder.split_hash[:12]}"
    )
    windows = Windows.of(folder)
    if args.overfit_users is not None:
        if windows is not None:
            raise UserError(f"--overfit_users: {args.data_path} is split by windows, leave it out")
        folder = OverfitView.of(folder, args.overfit_users, args.seed)
        say(f"{args.overfit_users:,} users are trained on, and judged on what they are trained on")
    if windows is None:
        return run_one(args, settings, folder, started=started, callbacks=callbacks).as_dict()

    def run_view(own: BaselineRunArguments, view: WindowView, before: Path | None) -> RunResult:
        return run_one(own, settings, view, before, quiet=True)

    result = run_windows(args, windows, run_view)
    if is_first():
        print(f"\n{format_over_time(result.test, [args.metric])}")
        print(report({args.model: result.test}, args.metric))
        written = f"metrics.json, ranks, windows, {TABLE}, .tex, .csv, {PICTURE}"
        print(f"written to {args.output_dir}: {written}")
    return result.as_dict()


def run_one(
    args: BaselineRunArguments,
    settings: Settings,
    folder: ProcessedFolder,
    before: Path | None = None,
    *,
    quiet: bool = False,
    started: float | None = None,
    callbacks: Sequence[Callback] = (),
) -> RunResult:
    """Train and evaluate on one folder, or on one window's view of it.

    Args:
        args: flags, checked.
        settings: of the model.
        folder: the data.
        before: best_model folder of the window before, whose weights go on; None: from scratch.
        quiet: print no figures.
        started: when the command began, by the monotonic clock; None: now.
        callbacks: as `run`.
    """
    started = time.monotonic() if started is None else started
    compute = Compute.of(args)
    generative = isinstance(settings, GenerativeSettings)
    seed_everything(args.seed, verbose=False)
    built = build(args.model, settings, folder)
    of_window: dict[str, Any] = {}
    if isinstance(folder, WindowView):
        of_window |= {"window": folder.window, "windows_hash": folder.hash}
        if before is not None and built.train_collator is not None:
            go_on_from(built.model, before)
            of_window["weights_from"] = weights_checksum(before)
    data = SeqRecDataModule(
        folder,
        built.train_collator or CausalCollator(1),
        built.eval_collator,
        args.batch_size,
        args.dataloader_num_workers,
        args.eval_users,
        args.seed,
        args.test_users,
        every_prefix=built.every_prefix,
    )
    flags = asdict(args) | settings.as_dict()
    if not of_window:
        del flags["windows"]  # means nothing here
    for name, value in SINCE.items():
        if flags.get(name) == value:
            del flags[name]
    experiment = Experiment(
        args,
        compute,
        built.model,
        data,
        flags
        | of_window
        | {"split_hash": folder.split_hash, "semantic_ids_hash": built.semantic_ids_hash}
        | ({} if built.content_hash is None else {"content_hash": built.content_hash}),
        ["training"],
        ("best_model", "curves.png"),
        project=args.model,
        schedule=args.schedule,
        optimizer=args.optimizer or "adamw",  # `__post_init__` left none unset
    )
    trains = built.train_collator is not None and not args.evaluate_only
    leaves = ("curves.png", "best_model") if trains else ()
    result = experiment.finished
    with experiment.folder as output:
        if result is None or not output.has("ranks", *leaves):
            result = train_and_evaluate(
                experiment, args, settings, built, folder, started, callbacks
            )
    if is_first() and not quiet:
        print("\n" + experiment.headline(result.test))
        print(report({args.model: result.test}, args.metric))
        if generative:
            print(format_code_accuracy(result.test["code_accuracy"]))
            if "code_loss" in result.test:  # not in runs of before
                print(format_code_losses(result.test["code_loss"], result.test["code_entropy"]))
        written = ", ".join(("metrics.json", "ranks", *leaves))
        print(f"written to {experiment.output_dir}: {written}")
    return result


def train_and_evaluate(
    experiment: Experiment,
    args: BaselineRunArguments,
    settings: Settings,
    built: Built,
    folder: ProcessedFolder,
    started: float,
    callbacks: Sequence[Callback] = (),
) -> RunResult:
    """Do what is left of `run`, which began at `started` by the monotonic clock."""
    trains = built.train_collator is not None and not args.evaluate_only
    stages: dict[str, StageResult] = {}
    model = built.model
    around: list[Callback] = []
    if isinstance(model, CodeRecommender):
        codes = model.item_tokens.cpu().numpy()
        around = [CodeAccuracy(CodeEntropies.of_training(codes, folder.train))]
    name = "published" if args.evaluate_only else "untrained"
    if trains:
        name = "trained"
        stages["training"] = experiment.train("training", args.patience, [*around, *callbacks])
    evaluations = {name: experiment.evaluate(name, lambda: around)}
    weights = [p for p in built.model.parameters() if p.requires_grad]
    result = experiment.result(
        evaluations,
        stages,
        model=args.model,
        settings=settings.as_dict(),
        parameters=sum(p.numel() for p in weights),
        train_seconds=float(sum(row["seconds"] for s in stages.values() for row in s.rows)),
        seconds=round(time.monotonic() - started, 1),
    )
    if is_first():
        if trains:
            best_model = experiment.output_dir / "best_model"
            save_best(best_model, built, args.model, settings, folder)
            rows = {stage: entry.rows for stage, entry in stages.items()}
            plot_history(rows, experiment.output_dir / "curves.png", args.metric)
        result.save(experiment.output_dir)
    return result


def save_best(
    path: Path, built: Built, name: str, settings: Settings, folder: ProcessedFolder
) -> None:
    """The trained model as a folder that `baselines.models.load` reads."""
    # Cloned: tied tensors share their memory, which the format has no room for.
    state = {k: v.detach().cpu().clone().contiguous() for k, v in built.model.state_dict().items()}
    config = {
        "model": name,
        "settings": settings.as_dict(),
        "semantic_ids_hash": built.semantic_ids_hash,
        "asins": list(folder.asins),
    }
    with atomic_folder(path) as new:
        (new / "model.safetensors").write_bytes(save(state))
        write_json(new / "config.json", config)
        write_checksums(new)


def flags_of(argv: Sequence[str] | None) -> list[str]:
    """The command's flags, with those of `--config` and `--protocol` before them."""
    finder = argparse.ArgumentParser(add_help=False)
    finder.add_argument("--config")
    known, line = finder.parse_known_args(sys.argv[1:] if argv is None else list(argv))
    if known.config is not None:
        line = [*read_config(known.config), *line]  # of a flag given twice the later one counts
    return with_protocol(line, "evaluation")


def parse(argv: Sequence[str] | None) -> BaselineRunArguments:
    """Flags of the command as their dataclass."""
    parser = flags_parser("baseline", __doc__, BaselineArguments)
    parser.add_argument(
        "--config",
        help="YAML file of flags, or the name of one in baselines/configs, such as t4r; a flag "
        "given on the line wins",
        metavar="NAME",
    )
    return fill(parser, flags_of(argv))[0]


def main(argv: Sequence[str] | None = None) -> None:
    """Parse flags and run."""
    args = parse(argv)
    if args.seeds is not None:
        output_dir = args.output_dir or f"result/{args.model}"
        folders = run_seeds("baseline", flags_of(argv), output_dir, args.num_nodes)
        if is_first():
            summarize(folders, output_dir)
        return
    keep_freed_memory()
    run(args)


if __name__ == "__main__":
    exit_with_message(main)
