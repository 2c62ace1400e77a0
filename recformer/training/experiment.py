"""One training run and its folder: what finetuning and every baseline do around their model.

output_dir/run.json              the settings that figures depend on; another run is refused
output_dir/<stage>/last.ckpt     to continue from, after every epoch
output_dir/<stage>/best.ckpt     of the best validation
output_dir/<stage>/history.csv   a row an epoch
output_dir/<stage>/done.json     the stage is over
output_dir/evaluation/<name>.json, output_dir/ranks/<name>_<split>.parquet
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import Logger

from recformer.data.datamodule import SeqRecDataModule
from recformer.evaluation.figures import SplitName, check_sampled_negatives, detailed_figures
from recformer.evaluation.protocol import Protocol
from recformer.files import UserError, read_json, write_json
from recformer.processes import say
from recformer.training.arguments import RunArguments
from recformer.training.callbacks import EarlyStop, LastEpochIsValidated
from recformer.training.history import History
from recformer.training.lit import LitWrapper
from recformer.training.trainer import build_trainer, choose_devices, half_precision

# None of these changes a figure.
IGNORED = (
    "output_dir", "overwrite_output_dir", "wandb", "dataloader_num_workers",
    "preprocessing_num_workers", "data_path",
)  # fmt: skip


class Experiment:
    """Trains a model stage by stage and evaluates it; continues where an earlier run was cut off.

    Args:
        args: flags of the run.
        stages: names of the stages that this kind of run may have.
        schedule: of the learning rate, see `LitWrapper`.

    Raises:
        UserError: flags that make no sense.
    """

    def __init__(self, args: RunArguments, stages: Sequence[str], schedule: str = "linear") -> None:
        args.check()
        self.args = args
        self.stages = tuple(stages)
        self.schedule = schedule
        self.output_dir = Path(args.output_dir)
        self.accelerator, self.devices = choose_devices(args.device, args.num_processes)
        self.precision = half_precision(self.accelerator) if args.fp16 else "32-true"
        self.logger: Logger | None = None
        self._best: Path | None = None  # checkpoint of the best epoch of all stages
        self.seconds_a_user = 0.0  # of the last test evaluation, loading of batches included

    def begin(self, model: torch.nn.Module, data: SeqRecDataModule, settings: dict) -> None:
        """Take model and data, and the output folder, or continue there if it holds this very run.

        Args:
            settings: everything that figures depend on.

        Raises:
            UserError: the folder holds another run and may not be overwritten, the data were
                processed under another protocol, or users have met too many items to sample
                negatives for them.
        """
        self.model, self.data = model, data
        if self.args.protocol is not None:
            Protocol.load(self.args.protocol).check_folder(data.folder.path, data.folder.dataset)
        if self.args.sampled_negatives is not None:
            check_sampled_negatives(data.folder, self.args.sampled_negatives)
        settings = {name: value for name, value in settings.items() if name not in IGNORED}
        settings |= {"precision": self.precision}
        path = self.output_dir / "run.json"
        if path.exists():
            before = read_json(path)
            different = sorted(k for k in settings | before if settings.get(k) != before.get(k))
            if different and not self.args.overwrite_output_dir:
                raise UserError(
                    f"{self.output_dir} holds another run (different: {', '.join(different)}); "
                    "choose another --output_dir, or give --overwrite_output_dir"
                )
            if different:
                for name in ("evaluation", "ranks", *self.stages):
                    shutil.rmtree(self.output_dir / name, ignore_errors=True)
                (self.output_dir / "metrics.json").unlink(missing_ok=True)
        write_json(path, settings, indent=1)

    def _module(self) -> LitWrapper:
        args = self.args
        return LitWrapper(
            self.model,
            learning_rate=args.learning_rate,
            weight_decay=args.weight_decay,
            warmup_steps=args.warmup_steps,
            schedule=self.schedule,
            metric_ks=tuple(args.metric_ks),
            ties=args.ties,
            filter_seen=args.filter_seen,
            num_items=self.data.folder.num_items,
            sampled_negatives=args.sampled_negatives,
            seed=args.seed,
        )

    def _trainer(self, callbacks: Sequence[Callback]) -> Any:
        args = self.args
        processes = self.devices if isinstance(self.devices, int) else len(self.devices)
        return build_trainer(
            self.output_dir,
            args.num_train_epochs,
            self.accelerator,
            self.devices,
            self.precision,
            callbacks,
            strategy="ddp" if processes > 1 else "auto",
            validate_every=args.verbose,
            accumulate=args.gradient_accumulation_steps,
            max_grad_norm=args.max_grad_norm,
            logger=self.logger,
        )

    def evaluate(
        self, name: str, callbacks: Callable[[], Sequence[Callback]]
    ) -> dict[str, dict[str, Any]]:
        """Rank all validation and test users with the model as it stands.

        Per-user ranks go to `ranks/<name>_<split>.parquet`; figures already on disk are read.

        Args:
            name: of the evaluation.
            callbacks: makes the callbacks that the model needs around an evaluation.

        Returns:
            `recformer.evaluation.figures.detailed_figures` by split.
        """
        done = self.output_dir / "evaluation" / f"{name}.json"
        if done.exists():
            figures = read_json(done)
            seconds = figures.pop("seconds_a_user", 0.0)
            if all("intervals" in entry for entry in figures.values()):
                self.seconds_a_user = seconds
                return figures  # else written before there were intervals
        module = self._module()
        trainer = self._trainer(callbacks())
        figures = {}
        splits: tuple[SplitName, ...] = ("val", "test")
        for split in splits:
            loader = self.data.val_dataloader() if split == "val" else self.data.test_dataloader()
            # Of the test alone: a user's validation batch does not know which later items were met.
            module.sampled_negatives = self.args.sampled_negatives if split == "test" else None
            started = time.monotonic()
            trainer.test(module, loader, verbose=False)
            seconds = time.monotonic() - started
            figures[split] = detailed_figures(
                module.evaluator, self.data.folder, split, module.sampled
            )
            self.seconds_a_user = seconds / figures[split]["num_users"]
            own = {name: float(value) for name, value in trainer.callback_metrics.items()}
            own = {n: v for n, v in own.items() if n.startswith("test/codes_right@")}
            if own:  # of codes, not of items: apart from the figures
                figures[split]["code_accuracy"] = {n.partition("@")[2]: v for n, v in own.items()}
            if trainer.is_global_zero:
                module.evaluator.write_parquet(
                    self.output_dir / "ranks" / f"{name}_{split}.parquet"
                )
        if trainer.is_global_zero:
            write_json(done, figures | {"seconds_a_user": self.seconds_a_user}, indent=1)
        return figures

    def train(
        self,
        stage: str,
        patience: int,
        callbacks: Sequence[Callback] = (),
        best_before: float | None = None,
    ) -> dict[str, Any]:
        """Train one stage, or what is left of it, and leave the model at the best epoch so far.

        Args:
            stage: its folder within the output folder.
            patience: validations without gain before it ends.
            callbacks: what the model needs around training.
            best_before: validation metric that an earlier stage reached; only better counts.

        Returns:
            `best` (validation metric or None if never above `best_before`), `rows` (history),
            `seconds`.
        """
        folder = self.output_dir / stage
        done, last, best = folder / "done.json", folder / "last.ckpt", folder / "best.ckpt"
        monitor = f"val/{self.args.metric}"
        if done.exists():
            result = read_json(done)
        else:
            stopper = EarlyStop(
                monitor, patience=patience, mode="max", check_on_train_epoch_end=False
            )
            keeper = ModelCheckpoint(
                folder, "best", monitor, mode="max", enable_version_counter=False,
                save_on_train_epoch_end=False,
            )  # fmt: skip
            if best_before is not None:
                stopper.best_score = torch.tensor(best_before)
            saver = ModelCheckpoint(
                folder, "last", enable_version_counter=False, save_on_train_epoch_end=True
            )
            history = History(folder, stage, self.args.metric)
            around = [*callbacks, LastEpochIsValidated(), stopper, history, keeper, saver]
            trainer = self._trainer(around)
            started = time.monotonic()
            resume = str(last) if last.exists() else None
            if resume:
                say(f"{stage}: continuing from {last}")
            trainer.fit(self._module(), datamodule=self.data, ckpt_path=resume)
            if trainer.interrupted:
                raise KeyboardInterrupt
            score = float(keeper.best_model_score)
            result = {
                "best": score if best_before is None or score > best_before else None,
                "rows": history.rows,
                "seconds": round(time.monotonic() - started, 1),
            }
            if trainer.is_global_zero:
                write_json(done, result, indent=1)
        if result["best"] is not None:
            self._best = best
        # A stage that brought nothing has changed the model all the same.
        assert self._best is not None  # there was a stage before
        self._load_best(self._best)
        return result

    def _load_best(self, path: Path) -> None:
        state = torch.load(path, map_location="cpu", weights_only=True)["state_dict"]
        self.model.cpu().load_state_dict({k.removeprefix("model."): v for k, v in state.items()})

    def summary(self) -> dict[str, Any]:
        """The rules that the figures of `metrics.json` were made by."""
        args = self.args
        return {
            "ties": args.ties,
            "filter_seen": args.filter_seen,
            "split_hash": self.data.folder.split_hash,
            "protocol": args.protocol_record(),
            "data_protocol": (self.data.folder.dataset or {}).get("protocol"),
            "eval_users": args.eval_users,
            "sampled_negatives": args.sampled_negatives,
            "seed": args.seed,
            "precision": self.precision,
            "seconds_a_user": self.seconds_a_user,
        }

    def headline(self, figures: dict[str, Any]) -> str:
        """The rules in words, above a table of figures."""
        seen = "filtered" if self.args.filter_seen else "kept"
        return (
            f"test, {figures['num_users']:,.0f} users, full ranking, ties {self.args.ties}, "
            f"seen items {seen}"
        )
