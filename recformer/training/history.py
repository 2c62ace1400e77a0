"""Histories of training: a row an epoch or an interval, as CSV and as a picture."""

from __future__ import annotations

import csv
import resource
import time
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DeepSpeedStrategy
from torch import Tensor

from recformer.data.batches import PairBatch
from recformer.files import atomic_write
from recformer.processes import say


def print_line(trainer: Trainer, line: str) -> None:
    """Print a line above the progress bar, if there is one."""
    bar = trainer.progress_bar_callback
    say(line) if bar is None else bar.print(line)


class History(Callback):
    """One row an epoch: loss and validation metrics; printed, kept in `history.csv` and plotted.

    The rows are part of every checkpoint, so a resumed run continues its own history.

    Args:
        folder: where `history.csv` goes.
        stage: name of the stage, first column.
        metric: validation metric named in the printed line.
    """

    def __init__(self, folder: Path, stage: str, metric: str) -> None:
        self.path = folder / "history.csv"
        self.stage = stage
        self.metric = metric
        self.rows: list[dict[str, Any]] = []
        self._started = 0.0

    def state_dict(self) -> dict[str, Any]:
        return {"rows": self.rows}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.rows = state_dict["rows"]

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._started = time.monotonic()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
        row: dict[str, Any] = {"stage": self.stage, "epoch": trainer.current_epoch + 1}
        row["step"] = trainer.global_step
        row["train/loss"] = metrics["train/loss_epoch"]
        row |= {
            name.removesuffix("_epoch"): value
            for name, value in metrics.items()
            if name.startswith("train/") and name.endswith("_epoch")
        }
        row["seconds"] = round(time.monotonic() - self._started, 2)
        interval = trainer.check_val_every_n_epoch
        validated = interval is None or row["epoch"] % interval == 0
        if validated:
            row |= {name: value for name, value in metrics.items() if name.startswith("val/")}
        self.rows.append(row)
        if trainer.is_global_zero:
            columns = list(dict.fromkeys(name for each in self.rows for name in each))
            with atomic_write(self.path) as handle:
                writer = csv.DictWriter(handle, columns)
                writer.writeheader()
                writer.writerows(self.rows)
            line = f"{self.stage} epoch {row['epoch']}: loss {row['train/loss']:.4f}"
            if validated:
                line += f", validation {self.metric} {row['val/' + self.metric]:.4f}"
            print_line(trainer, f"{line}, {row['seconds']:.0f} s")


def plot_history(
    stages: dict[str, list[dict[str, Any]]],
    path: Path,
    metric: str,
    zero_shot: float | None = None,
) -> None:
    """PNG of the training loss and a validation metric over all epochs, stage by stage.

    Args:
        stages: name of each stage -> rows of its `History`.
        zero_shot: value of the metric before training, plotted as a dashed line.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import MaxNLocator

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4), constrained_layout=True)
    offset = 0
    for number, (stage, rows) in enumerate(stages.items()):
        epochs = [offset + row["epoch"] for row in rows]
        left.plot(epochs, [row["train/loss"] for row in rows], f"C{number}.-", label=stage)
        points = [
            (e, row[f"val/{metric}"])
            for e, row in zip(epochs, rows, strict=True)
            if f"val/{metric}" in row
        ]
        if points:
            right.plot(*zip(*points, strict=True), f"C{number}.-", label=stage)
        offset += len(rows)
    if zero_shot is not None:
        right.axhline(zero_shot, color="grey", linestyle="--", label="zero-shot")
    left.set(title="training loss", xlabel="epoch")
    right.set(title=f"validation {metric}", xlabel="epoch")
    for axis in (left, right):
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.grid(alpha=0.3)
        axis.legend()
    with atomic_write(path, "wb") as handle:
        figure.savefig(handle, format="png", dpi=120)
    pyplot.close(figure)


LOSSES = ("loss", "contrastive", "mlm_a", "mlm_b")


class StepHistory(Callback):
    """A row every `interval` batches and every validation, in `history.csv` and in checkpoints.

    Losses are means over the batches since the last row. A resumed run continues its own history,
    means included.

    Args:
        path: of the CSV file.
        interval: batches.
        metric: validation metric named in the printed line.
    """

    def __init__(self, path: Path, interval: int, metric: str) -> None:
        self.path, self.interval, self.metric = path, interval, metric
        self.rows: list[dict[str, float]] = []
        self._sums: dict[str, Tensor] = {}
        self._batches = 0
        self._tokens = 0
        self._started: float | None = None

    def state_dict(self) -> dict[str, Any]:
        sums = {name: float(value) for name, value in self._sums.items()}
        return {"rows": self.rows, "sums": sums, "batches": self._batches}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.rows = list(state_dict["rows"])
        self._sums = {name: torch.tensor(value) for name, value in state_dict["sums"].items()}
        self._batches = state_dict["batches"]

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self._started is None:
            self._started = time.monotonic()

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: PairBatch,
        batch_idx: int,
    ) -> None:
        self._tokens += batch.num_tokens
        self._batches += 1
        metrics = trainer.callback_metrics
        for name in LOSSES:
            value = metrics.get(f"train/{name}_step", metrics.get(f"train/{name}"))
            if value is not None:
                before = self._sums.get(name)
                value = value.detach().float()
                self._sums[name] = value if before is None else before.to(value.device) + value
        if self._batches % self.interval:
            return
        assert self._started is not None
        row: dict[str, float] = self._place(trainer)
        row |= {f"train/{name}": float(v) / self._batches for name, v in self._sums.items()}
        for name in ("train/grad_norm", "train/lr"):
            if name in metrics:
                row[name] = float(metrics[name])
        if isinstance(trainer.strategy, DeepSpeedStrategy):
            row["train/grad_norm"] = float(trainer.strategy.deepspeed_engine.get_global_grad_norm())
        seconds = time.monotonic() - self._started
        row["tokens_per_s"] = round(self._tokens * trainer.world_size / seconds)
        row["memory_mb"] = _memory_mb(pl_module.device)
        if trainer.logger is not None:
            rates = {name: row[name] for name in ("tokens_per_s", "memory_mb")}
            trainer.logger.log_metrics(rates, trainer.global_step)
        self._sums, self._batches, self._tokens, self._started = {}, 0, 0, None
        self.rows.append(row)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._started, self._tokens = None, 0  # validation is not training time
        metrics = {name: float(v) for name, v in trainer.callback_metrics.items()}
        row = self._place(trainer) | {k: v for k, v in metrics.items() if k.startswith("val/")}
        self.rows.append(row)
        self._write(trainer)
        if trainer.is_global_zero:
            line = f"step {trainer.global_step}: validation loss {row['val/loss']:.4f}, in-batch "
            line += f"accuracy {row['val/accuracy']:.4f}, {self.metric} of all dev items "
            print_line(trainer, line + f"{row['val/' + self.metric]:.4f}")

    def _place(self, trainer: Trainer) -> dict[str, float]:
        return {"epoch": trainer.current_epoch + 1, "step": trainer.global_step}

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._write(trainer)

    def _write(self, trainer: Trainer) -> None:
        if trainer.is_global_zero and self.rows:
            columns = list(dict.fromkeys(name for each in self.rows for name in each))
            with atomic_write(self.path) as handle:
                writer = csv.DictWriter(handle, columns)
                writer.writeheader()
                writer.writerows(self.rows)


def _memory_mb(device: torch.device) -> int:
    """Most memory held so far: of the device, or of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) >> 20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10  # Linux counts in kB


def plot_steps(rows: list[dict[str, float]], path: Path, metric: str) -> None:
    """PNG of the losses and the validation figures over the optimizer steps."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, middle, right) = pyplot.subplots(1, 3, figsize=(14, 4), constrained_layout=True)
    panels = [
        (left, "contrastive loss", ["train/contrastive", "val/contrastive"]),
        (middle, "MLM loss", ["train/mlm_a", "train/mlm_b", "val/mlm_a", "val/mlm_b"]),
        (right, "validation", ["val/accuracy", f"val/{metric}"]),
    ]
    for axis, title, names in panels:
        for name in names:
            points = [(row["step"], row[name]) for row in rows if name in row]
            if points:
                style = ".-" if name.startswith("val/") else "-"
                axis.plot(*zip(*points, strict=True), style, label=name)
        axis.set(title=title, xlabel="optimizer step")
        axis.grid(alpha=0.3)
        if axis.lines:
            axis.legend()
    with atomic_write(path, "wb") as handle:
        figure.savefig(handle, format="png", dpi=120)
    pyplot.close(figure)
