"""What happens around training: the item table, a line an epoch, the history and its picture."""

from __future__ import annotations

import csv
import os
import time
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping

from recformer.data.items import TokenizedItems
from recformer.files import atomic_write
from recformer.training.item_encoder import catalogue_vectors, encode_items


class ItemTable(Callback):
    """Keeps the item table of a `RecformerForSeqRec` (paper, section 2.4, algorithm 1).

    Args:
        store: the tokenised items.
        every_epoch: encode all items anew at the start of every training epoch (stage 1); otherwise
            only where the model has no table yet (stage 2, zero-shot), through a store of files.
        vectors_dir: where such stores are kept.
    """

    def __init__(
        self, store: TokenizedItems, every_epoch: bool, vectors_dir: str | os.PathLike
    ) -> None:
        self.store = store
        self.every_epoch = every_epoch
        self.vectors_dir = vectors_dir

    def _refresh(self, trainer: Trainer, module: LightningModule) -> None:
        autocast = trainer.strategy.precision_plugin.forward_context()
        model, progress = module.model, not trainer.sanity_checking
        if self.every_epoch:  # the weights change, nobody would read these vectors again
            table = encode_items(model, self.store, autocast, progress)
        else:
            vectors = catalogue_vectors(
                model, self.store, self.vectors_dir, trainer.precision, autocast, progress
            )
            table = torch.from_numpy(vectors).to(module.device)
        model.init_item_embedding(table)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.every_epoch or pl_module.model.item_embedding is None:
            self._refresh(trainer, pl_module)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if pl_module.model.item_embedding is None:
            self._refresh(trainer, pl_module)

    on_test_start = on_validation_start


class LastEpochIsValidated(Callback):
    """Validate at the last epoch also where `check_val_every_n_epoch` does not divide the epochs.

    The published code left no checkpoint when there were fewer epochs than its interval.
    """

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.max_epochs is not None and trainer.current_epoch + 1 >= trainer.max_epochs:
            trainer.check_val_every_n_epoch = 1


class EarlyStop(EarlyStopping):
    """Early stopping that a resumed run remembers.

    Lightning restores the count of evaluations without gain but not that the run was over; a run
    killed just after its last evaluation would go on.
    """

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.wait_count >= self.patience:
            trainer.should_stop = True


def print_line(trainer: Trainer, line: str) -> None:
    """Print without tearing the progress bar."""
    bar = trainer.progress_bar_callback
    print(line, flush=True) if bar is None else bar.print(line)


class History(Callback):
    """One row an epoch: loss and validation metrics; printed, kept in `history.csv`, drawn.

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


def draw_history(
    stages: dict[str, list[dict[str, Any]]],
    path: Path,
    metric: str,
    zero_shot: float | None = None,
) -> None:
    """PNG of the training loss and a validation metric over all epochs, stage by stage.

    Args:
        stages: name of each stage -> rows of its `History`.
        zero_shot: value of the metric before training, drawn as a dashed line.
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
