"""A training run and its folder, shared by finetuning and all baselines.

output_dir/run.json              the settings that figures depend on, see `run_folder`
output_dir/<stage>/last.ckpt     to continue from, after every epoch
output_dir/<stage>/best.ckpt     of the best validation
output_dir/<stage>/history.csv   a row an epoch
output_dir/<stage>/done.json     the stage is over
output_dir/evaluation/<name>.json, output_dir/ranks/<name>_<split>.parquet
output_dir/metrics.json          the run is over, see `recformer.evaluation.runs.RunResult`
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from lightning import Callback

from recformer.data.datamodule import SeqRecDataModule
from recformer.evaluation.figures import SplitName, check_sampled_negatives, detailed_figures
from recformer.evaluation.protocol import Protocol
from recformer.evaluation.runs import (
    METRICS_FILE,
    Figures,
    RunResult,
    StageResult,
    data_rules,
    ranks_file,
)
from recformer.files import UserError, read_checked_json, write_checked_json
from recformer.processes import is_first, say
from recformer.training.arguments import RunArguments
from recformer.training.callbacks import EarlyStop, ExtraFigures, LastEpochIsValidated
from recformer.training.history import History
from recformer.training.lit import LitWrapper
from recformer.training.run_folder import FolderError, RunFolder, checked
from recformer.training.trainer import Compute, Keeper, build_trainer, wandb_logger, whole_group


class Experiment:
    """Trains a model stage by stage and evaluates it; continues where an earlier run was cut off.

    Takes the output folder, or continues there if it holds this very run.

    Args:
        args: flags of the run, checked.
        compute: devices and precision.
        model: trained and evaluated.
        data: loaders of training, validation and test.
        settings: everything that figures depend on.
        stages: names of the stages that this kind of run may have.
        written: names of further files and folders that it leaves there.
        project: name of the project in W&B.
        schedule, optimizer: see `LitTraining`.

    Attributes:
        folder: the output folder.
        finished: result of an earlier run of the same command; None if there is none.
        seconds_a_user: of the last test evaluation, loading of batches included.

    Raises:
        UserError: the folder holds another run and may not be overwritten, the data were processed
            under another protocol, or users have met too many items to sample negatives for them.
    """

    def __init__(
        self,
        args: RunArguments,
        compute: Compute,
        model: torch.nn.Module,
        data: SeqRecDataModule,
        settings: Mapping[str, Any],
        stages: Sequence[str],
        written: Sequence[str],
        project: str = "recformer",
        schedule: str = "linear",
        optimizer: str = "adamw",
    ) -> None:
        if args.protocol is not None:
            Protocol.load(args.protocol).check_folder(data.folder.path, data.folder.dataset)
        if args.sampled_negatives is not None:
            check_sampled_negatives(data.folder, args.sampled_negatives)
        self.args, self.compute, self.model, self.data = args, compute, model, data
        self.schedule, self.optimizer = schedule, optimizer
        settings = {name: value for name, value in settings.items() if name != "data_path"}
        self.folder = RunFolder.claim(
            args.output_dir,
            settings | {"precision": compute.precision},
            (METRICS_FILE, "evaluation", "ranks", *stages, *written),
            args.overwrite_output_dir,
        )
        self.output_dir = self.folder.path
        self.finished: RunResult | None = None
        if self.folder.has(METRICS_FILE):
            self.finished = RunResult.load(self.output_dir)
        self._logger = wandb_logger(self.output_dir, project) if args.wandb else None
        self._best: str | None = None  # the stage that the best epoch of all belongs to
        self.seconds_a_user = 0.0

    def _module(self) -> LitWrapper:
        args = self.args
        return LitWrapper(
            self.model,
            learning_rate=args.learning_rate,
            weight_decay=args.weight_decay,
            warmup_steps=args.warmup_steps,
            schedule=self.schedule,
            optimizer=self.optimizer,
            metric_ks=tuple(args.metric_ks),
            ties=args.ties,
            filter_seen=args.filter_seen,
            num_items=self.data.folder.num_items,
            sampled_negatives=args.sampled_negatives,
            seed=args.seed,
        )

    def _trainer(self, callbacks: Sequence[Callback]) -> Any:
        args, compute = self.args, self.compute
        return build_trainer(
            self.output_dir,
            args.num_train_epochs,
            compute.accelerator,
            compute.devices,
            compute.precision,
            callbacks,
            strategy="ddp" if compute.num_processes > 1 else "auto",
            validate_every=args.verbose,
            accumulate=args.gradient_accumulation_steps,
            max_grad_norm=args.max_grad_norm,
            logger=self._logger,
        )

    def evaluate(self, name: str, callbacks: Callable[[], Sequence[Callback]]) -> Figures:
        """Rank all validation and test users with the model as it stands.

        Per-user ranks go to `ranks/<name>_<split>.parquet`; figures already on disk are read.

        Args:
            name: of the evaluation.
            callbacks: makes the callbacks that the model needs around an evaluation; those that are
                `ExtraFigures` add theirs.
        """
        done = self.output_dir / "evaluation" / f"{name}.json"
        before = self._evaluated(name) if done.exists() else None
        if before is not None:
            return before
        module, around = self._module(), list(callbacks())
        trainer = self._trainer(around)
        figures: Figures = {}
        splits: tuple[SplitName, ...] = ("val", "test")
        for split in splits:
            loader = self.data.val_dataloader() if split == "val" else self.data.test_dataloader()
            # Of the test alone: a user's validation batch does not know which later items were met.
            module.sampled_negatives = self.args.sampled_negatives if split == "test" else None
            started = time.monotonic()
            with whole_group(trainer):
                trainer.test(module, loader, verbose=False)
            seconds = time.monotonic() - started
            figures[split] = detailed_figures(
                module.evaluator, self.data.folder, split, module.sampled
            )
            self.seconds_a_user = seconds / figures[split]["num_users"]
            for callback in around:
                if isinstance(callback, ExtraFigures):
                    figures[split] |= callback.figures(trainer)
            if is_first():
                module.evaluator.write_parquet(ranks_file(self.output_dir, name, split))
        if is_first():
            write_checked_json(done, figures | {"seconds_a_user": self.seconds_a_user})
        return figures

    def _evaluated(self, name: str) -> Figures | None:
        """Figures that were written down; None where they are damaged or of an older form."""
        path = self.output_dir / "evaluation" / f"{name}.json"
        try:
            figures = read_checked_json(path)
        except UserError as error:
            say(f"{error}: evaluated again")
            return None
        seconds = figures.pop("seconds_a_user", 0.0)
        if set(figures) != {"val", "test"} or not all("intervals" in f for f in figures.values()):
            return None
        self.seconds_a_user = seconds
        return figures

    def train(
        self,
        stage: str,
        patience: int,
        callbacks: Sequence[Callback] = (),
        best_before: float | None = None,
    ) -> StageResult:
        """Train one stage, or what is left of it, and leave the model at the best epoch so far.

        Args:
            stage: its folder within the output folder.
            patience: validations without gain before it ends.
            callbacks: those that the model needs in training.
            best_before: validation metric that an earlier stage reached; only better counts.
        """
        folder = self.output_dir / stage
        done, last = folder / "done.json", folder / "last.ckpt"
        monitor = f"val/{self.args.metric}"
        if done.exists():
            result = _stage_result(done)
        else:
            stopper = EarlyStop(
                monitor, patience=patience, mode="max", check_on_train_epoch_end=False
            )
            if best_before is not None:
                stopper.best_score = torch.tensor(best_before)
            keeper = Keeper(folder, "best", monitor, save_on_train_epoch_end=False)
            saver = Keeper(folder, "last", save_on_train_epoch_end=True)
            history = History(folder, stage, self.args.metric)
            around = [*callbacks, LastEpochIsValidated(), stopper, history, keeper, saver]
            trainer = self._trainer(around)
            started = time.monotonic()
            resume = str(checked(last)) if last.exists() else None
            if resume:
                say(f"{stage}: continuing from {last}")
            with whole_group(trainer):
                trainer.fit(self._module(), datamodule=self.data, ckpt_path=resume)
            score = float(keeper.best_model_score)
            result = StageResult(
                score if best_before is None or score > best_before else None,
                history.rows,
                round(time.monotonic() - started, 1),
            )
            if is_first():
                write_checked_json(done, asdict(result))
        if result.best is not None:
            self._best = stage
        # A stage without improvement still changed the weights: reload the best checkpoint.
        assert self._best is not None  # there was a stage before
        self._load_best(self._best)
        return result

    def _load_best(self, stage: str) -> None:
        path = checked(self.output_dir / stage / "best.ckpt")
        state = torch.load(path, map_location="cpu", weights_only=True)["state_dict"]
        self.model.cpu().load_state_dict({k.removeprefix("model."): v for k, v in state.items()})

    def _rules(self) -> dict[str, Any]:
        """The rules that the figures of `metrics.json` were made by."""
        args = self.args
        return {
            "ties": args.ties,
            "filter_seen": args.filter_seen,
            **data_rules(self.data.folder),
            "protocol": args.protocol_record(),
            "eval_users": args.eval_users,
            "test_users": args.test_users,
            "sampled_negatives": args.sampled_negatives,
            "seed": args.seed,
            "precision": self.compute.precision,
            "seconds_a_user": self.seconds_a_user,
        }

    def result(
        self, evaluations: dict[str, Figures], stages: dict[str, StageResult], **facts: Any
    ) -> RunResult:
        """The result of the run, see `RunResult`.

        Args:
            evaluations, stages: results of `evaluate` and `train`.
            facts: further fields of `RunResult`.
        """
        return RunResult(evaluations=evaluations, stages=stages, **self._rules(), **facts)

    def headline(self, figures: dict[str, Any]) -> str:
        """The rules in words, above a table of figures."""
        seen = "filtered" if self.args.filter_seen else "kept"
        drawn = f" drawn from {figures['drawn_from']:,}" if "drawn_from" in figures else ""
        return (
            f"test, {figures['num_users']:,.0f} users{drawn}, full ranking, ties {self.args.ties}, "
            f"seen items {seen}"
        )


def _stage_result(path: Path) -> StageResult:
    """Read `done.json`.

    Raises:
        FolderError: it is damaged.
    """
    try:
        return StageResult(**read_checked_json(path))
    except (UserError, TypeError) as error:
        raise FolderError(
            f"{path} is damaged ({error}); remove it, and the same command makes it again from "
            "last.ckpt"
        ) from error
