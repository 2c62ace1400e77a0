"""The one Lightning module: every model of the repository trains and is evaluated inside it."""

from __future__ import annotations

from typing import Any, Protocol, cast

import lightning
import torch
from lightning.pytorch.strategies import DeepSpeedStrategy
from torch import Tensor
from transformers import (
    get_constant_schedule_with_warmup,
    get_cosine_schedule_with_warmup,
    get_linear_schedule_with_warmup,
)

from recformer.evaluation.evaluator import Evaluator
from recformer.evaluation.negatives import sample_negatives
from recformer.evaluation.ranks import TargetRanks
from recformer.files import UserError, sha256_of


class Recommender(Protocol):
    """What a model brings to `LitWrapper` (besides being an `nn.Module`).

    A test also calls, where a model has them,

    - `encode_users(batch)`, first: the batch with what the others would compute again each;
    - `recommend(batch, k, filter_seen)`: item ids, best first, int64 (B, k), -1 where there is
      none, for coverage and Gini of what is recommended;
    - `rank_among(batch, candidates)`: where the labels stand among items (B, C) of each user's own,
      for sampled negatives.
    """

    def training_loss(self, batch: dict[str, Any]) -> Tensor | dict[str, Tensor]:
        """Scalar loss of a batch of its training collator, or a dict of `loss` and its parts."""

    def rank(self, batch: dict[str, Any], filter_seen: bool) -> TargetRanks:
        """Where `batch["labels"]` stand among all items, for a batch of its evaluation collator."""


def parameter_groups(
    model: torch.nn.Module, weight_decay: float, learning_rate: float | None = None
) -> list[dict[str, Any]]:
    """Trainable parameters in two groups: no decay on biases and LayerNorm weights.

    Where the model has `learning_rate_factors`, by name, those parameters are groups of their own,
    without decay, whose learning rate is so many times `learning_rate`.
    """
    decay: list[torch.nn.Parameter] = []
    no_decay: list[torch.nn.Parameter] = []
    own: list[dict[str, Any]] = []
    factors = getattr(model, "learning_rate_factors", {}) if learning_rate else {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if name in factors:
            lr = factors[name] * learning_rate
            own.append({"params": [parameter], "weight_decay": 0.0, "lr": lr})
            continue
        plain = name.endswith("bias") or "layernorm" in name.lower() or "layer_norm" in name
        (no_decay if plain else decay).append(parameter)
    return [
        {"params": decay, "weight_decay": weight_decay},
        {"params": no_decay, "weight_decay": 0.0},
        *own,
    ]


class LitWrapper(lightning.LightningModule):
    """A recommender with its optimizer, schedule and evaluation.

    AdamW, its learning rate warmed up over `warmup_steps` optimizer steps. Validation logs
    `val/<metric>`, test logs `test/<metric>` (see `recformer.evaluation.evaluator.Evaluator`); the
    evaluator of the last evaluation stays at `self.evaluator`, so that ranks can be written. A test
    counts what is recommended too, and keeps ranks among sampled negatives at `self.sampled`.

    Args:
        model: a `Recommender`.
        learning_rate, weight_decay, warmup_steps: of AdamW and its schedule.
        schedule: `linear` or `cosine` (down to 0 at the last step) or `constant` after the warm-up.
        metric_ks: cut-offs of NDCG and Recall.
        ties: `expected`, `pessimistic` or `optimistic`.
        filter_seen: take items of the history out of the candidates (never the target).
        num_items: size of the catalogue, for coverage, Gini and sampled negatives.
        sampled_negatives: rank the targets of a test also among so many sampled items.
        seed: dropout of each step depends on it, epoch, step and process alone, so that a resumed
            run goes on as the uninterrupted one would have.

    Raises:
        UserError: sampled negatives for a model that has no `rank_among`.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        learning_rate: float = 5e-5,
        weight_decay: float = 0.0,
        warmup_steps: int = 0,
        schedule: str = "linear",
        metric_ks: tuple[int, ...] = (10, 50),
        ties: str = "expected",
        filter_seen: bool = False,
        num_items: int = 0,
        sampled_negatives: int | None = None,
        seed: int = 42,
    ) -> None:
        super().__init__()
        self.model = model
        self.learning_rate = learning_rate
        self.weight_decay = weight_decay
        self.warmup_steps = warmup_steps
        self.schedule = schedule
        self.metric_ks = tuple(metric_ks)
        self.ties = ties
        self.filter_seen = filter_seen
        self.num_items = num_items
        self.sampled_negatives = sampled_negatives
        self.seed = seed
        self.evaluator = Evaluator(self.metric_ks, self.ties)
        self.sampled: Evaluator | None = None
        if sampled_negatives is not None and not hasattr(model, "rank_among"):
            raise UserError(
                f"--sampled_negatives: {type(model).__name__} cannot rank among sampled items"
            )

    @property
    def recommender(self) -> Recommender:
        return cast(Recommender, self.model)

    def configure_optimizers(self) -> Any:
        groups = parameter_groups(self.model, self.weight_decay, self.learning_rate)
        # With float16 gradients are unscaled and clipped before the step; the fused kernel would
        # unscale them itself, too late for that.
        fused = self.trainer.precision != "16-mixed"
        optimizer = torch.optim.AdamW(groups, lr=self.learning_rate, fused=fused)
        if self.schedule == "constant":
            schedule = get_constant_schedule_with_warmup(optimizer, self.warmup_steps)
        else:
            shape = get_cosine_schedule_with_warmup
            if self.schedule == "linear":
                shape = get_linear_schedule_with_warmup
            steps = int(self.trainer.estimated_stepping_batches)
            schedule = shape(optimizer, self.warmup_steps, steps)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> Any:
        # Lightning refuses every fused optimizer under mixed precision, bfloat16's as well, where
        # there is nothing to unscale. DeepSpeed clips by itself: gradients are shared out by now.
        if gradient_clip_val and not isinstance(self.trainer.strategy, DeepSpeedStrategy):
            return torch.nn.utils.clip_grad_norm_(self.parameters(), gradient_clip_val)
        return None

    def on_train_batch_start(self, batch: dict[str, Any], batch_idx: int) -> None:
        # Every step draws its own dropout, whatever else drew numbers before it: loaders do, and
        # not at the same moments in a resumed run.
        place = (self.seed, self.current_epoch, batch_idx, self.global_rank)
        torch.manual_seed(int(sha256_of(*map(str, place))[:15], 16))

    def batch_loss(self, batch: dict[str, Any]) -> Tensor | dict[str, Tensor]:
        """What a step trains on: a loss, or a dict of `loss` and its parts."""
        return self.recommender.training_loss(batch)

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        losses = self.batch_loss(batch)
        parts = dict(losses) if isinstance(losses, dict) else {"loss": losses}
        loss = parts.pop("loss")
        if not torch.isfinite(loss):
            raise UserError(
                f"the loss is {loss.item()} at step {self.global_step}: lower the learning rate, "
                "or train in float32"
            )
        size = len(batch["labels"])
        # Of this process: with several, the log shows the first one's share of each batch.
        self.log("train/loss", loss, on_step=True, on_epoch=True, batch_size=size, prog_bar=True)
        for name, part in parts.items():
            self.log(f"train/{name}", part.detach(), on_step=True, on_epoch=False)
        self.log("train/lr", self.lr_schedulers().get_last_lr()[0], on_step=True, on_epoch=False)
        return loss

    def on_validation_epoch_start(self) -> None:
        self.evaluator = Evaluator(self.metric_ks, self.ties)

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> Any:
        ranks = self.recommender.rank(batch, filter_seen=self.filter_seen)
        self.evaluator.update(batch["user_ids"], batch["labels"], ranks)
        return {"ranks": ranks}  # for callbacks: they may say more than the evaluator asks

    def on_validation_epoch_end(self) -> None:
        self._log_metrics("val")

    def on_test_epoch_start(self) -> None:
        self.evaluator = Evaluator(self.metric_ks, self.ties)
        if self.sampled_negatives is not None:
            self.sampled = Evaluator(self.metric_ks, self.ties)

    def test_step(self, batch: dict[str, Any], batch_idx: int) -> Any:
        model: Any = self.model
        if hasattr(model, "encode_users"):
            batch = model.encode_users(batch)
        output = self.validation_step(batch, batch_idx)
        if hasattr(model, "recommend"):
            items = model.recommend(batch, max(self.metric_ks), self.filter_seen)
            self.evaluator.count_recommended(items, self.num_items)
        if self.sampled is not None and self.sampled_negatives is not None:
            users, labels = batch["user_ids"], batch["labels"]
            negatives = sample_negatives(
                users, labels, batch["seen"], self.num_items, self.sampled_negatives
            )
            self.sampled.update(users, labels, model.rank_among(batch, negatives))
        return output

    def on_test_epoch_end(self) -> None:
        self._log_metrics("test")
        if self.sampled is not None:
            self.sampled.gather()

    def _log_metrics(self, split: str) -> None:
        self.evaluator.gather()  # every process then holds all users and logs the same figures
        for name, value in self.evaluator.compute().items():
            self.log(f"{split}/{name}", float(value), rank_zero_only=False)
