"""The Lightning side of pretraining: the module, and what is written down on the way.

Shapes: B pairs, N items of the pool, H hidden.
"""

from __future__ import annotations

import csv
import resource
import time
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DeepSpeedStrategy
from torch import Tensor

from recformer.data.items import TokenizedItems
from recformer.evaluation.ranking import rank_by_vectors
from recformer.files import atomic_write
from recformer.models import RecformerForPretraining
from recformer.training.callbacks import print_line
from recformer.training.item_encoder import encode_items
from recformer.training.lit import LitWrapper

LOSSES = ("loss", "contrastive", "mlm_a", "mlm_b")


class PretrainModule(LitWrapper):
    """`LitWrapper` whose validation is that of pretraining (paper, section 3.1).

    Validation logs the losses, `val/accuracy` (pairs whose own target is above all other targets of
    the batch over all processes, as published) and, because that depends on the batch, the figures
    of the evaluator with every target ranked among one fixed pool of items.

    Args:
        model: the model.
        store: tokenised items.
        pool: (N,) item ids of the pool; `labels` of validation batches are places in it.
        contrast: False trains on the MLM losses alone.
        options: see `LitWrapper`.
    """

    def __init__(
        self,
        model: RecformerForPretraining,
        store: TokenizedItems,
        pool: np.ndarray,
        contrast: bool = True,
        **options: Any,
    ) -> None:
        super().__init__(model, **options)
        self.store, self.pool, self.contrast = store, pool, contrast
        self._pool_vectors: Tensor | None = None

    @property
    def pretrained(self) -> RecformerForPretraining:
        return cast(RecformerForPretraining, self.model)

    def batch_loss(self, batch: dict[str, Any]) -> Tensor | dict[str, Tensor]:
        losses = self.pretrained.training_loss(batch)
        if not self.contrast:
            losses["loss"] = losses["loss"] - losses["contrastive"]
        return losses

    def configure_gradient_clipping(self, *args: Any, **kwargs: Any) -> None:
        norm = super().configure_gradient_clipping(*args, **kwargs)
        if norm is not None:
            self.log("train/grad_norm", norm, on_step=True, on_epoch=False)

    def on_validation_epoch_start(self) -> None:
        super().on_validation_epoch_start()
        autocast = self.trainer.strategy.precision_plugin.forward_context()
        self._pool_vectors = encode_items(
            self.pretrained.longformer, self.store, autocast, progress=True, item_ids=self.pool
        )

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        assert self._pool_vectors is not None
        losses = self.pretrained.batch_losses(batch)
        size = len(batch["labels"])
        figures = {"loss": losses.loss, **losses.parts, "accuracy": losses.num_correct / size}
        for name, value in figures.items():
            self.log(f"val/{name}", value.float(), batch_size=size, sync_dist=True, on_epoch=True)
        ranks = rank_by_vectors(losses.vectors, self._pool_vectors, batch["labels"])
        self.evaluator.update(batch["user_ids"], batch["labels"], ranks)

    def on_validation_epoch_end(self) -> None:
        super().on_validation_epoch_end()
        self._pool_vectors = None


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
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        for side in ("a", "b"):  # what goes through the encoder, masked copies included
            self._tokens += batch[side].num_tokens * (1 + (f"mlm_{side}" in batch))
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


def draw_steps(rows: list[dict[str, float]], path: Path, metric: str) -> None:
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
