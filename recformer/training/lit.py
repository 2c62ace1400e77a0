"""The one Lightning module: every model of the repository trains and is evaluated inside it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Protocol, runtime_checkable

import lightning
import numpy as np
import torch
from lightning.pytorch.strategies import DeepSpeedStrategy
from torch import Tensor
from transformers import (
    get_constant_schedule_with_warmup,
    get_cosine_schedule_with_warmup,
    get_inverse_sqrt_schedule,
    get_linear_schedule_with_warmup,
)

from recformer.data.batches import EvalBatch, LabelledBatch
from recformer.evaluation.evaluator import Evaluator
from recformer.evaluation.negatives import sample_unseen
from recformer.evaluation.ranks import Pairs, TargetRanks
from recformer.evaluation.recommender import Recommender, joined_pairs
from recformer.files import UserError, sha256_of


@dataclass(frozen=True)
class Users:
    """Users that are asked about in one call.

    Attributes:
        read: what the model has read of them.
        ids, targets: int64 (B,).
        seen: (rows, items), every item of the histories.
    """

    read: Any
    ids: Tensor
    targets: Tensor
    seen: Pairs


@runtime_checkable
class Trainable(Protocol):
    """A model that can be trained."""

    def training_loss(self, batch: Any) -> Tensor | dict[str, Tensor]:
        """Scalar loss of a batch of its training collator, or a dict of `loss` and its parts."""


def parameter_groups(
    model: torch.nn.Module, weight_decay: float, learning_rate: float | None = None
) -> list[dict[str, Any]]:
    """Trainable parameters in two groups: no decay on biases and on weights of normalisation.

    Parameters named in the model's `learning_rate_factors`, if it has any, are groups of their own,
    without decay, whose learning rate is that factor times `learning_rate`.
    """
    norms = {
        id(parameter)
        for module in model.modules()
        if "Norm"
        in type(module).__name__  # LayerNorm, T5's, RMSNorm, whatever their place is called
        for parameter in module.parameters(recurse=False)
    }
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
        plain = name.endswith("bias") or id(parameter) in norms
        (no_decay if plain else decay).append(parameter)
    return [
        {"params": decay, "weight_decay": weight_decay},
        {"params": no_decay, "weight_decay": 0.0},
        *own,
    ]


class LitTraining(lightning.LightningModule):
    """A model with its optimizer and schedule; subclasses add validation.

    The learning rate is warmed up over `warmup_steps` optimizer steps.

    Args:
        model: a `Trainable`, or a model that is never trained.
        learning_rate, weight_decay, warmup_steps: of the optimizer and its schedule.
        schedule: `linear` or `cosine` (down to 0 at the last step), `constant` after the warm-up,
            or `inverse_sqrt`, in proportion to 1 / sqrt(step) after it.
        optimizer: `adamw`; or `adafactor` (Shazeer and Stern, 2018), whose learning rate is
            relative to the size of each tensor's weights and never above 1 / sqrt(step).
        seed: dropout of each step depends on it, epoch, step and process alone, so that a resumed
            run goes on as the uninterrupted one would have.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        learning_rate: float = 5e-5,
        weight_decay: float = 0.0,
        warmup_steps: int = 0,
        schedule: str = "linear",
        optimizer: str = "adamw",
        seed: int = 42,
    ) -> None:
        super().__init__()
        self.model = model
        self.learning_rate = learning_rate
        self.weight_decay = weight_decay
        self.warmup_steps = warmup_steps
        self.schedule = schedule
        self.optimizer = optimizer
        self.seed = seed

    def configure_optimizers(self) -> Any:
        groups = parameter_groups(self.model, self.weight_decay, self.learning_rate)
        optimizer: torch.optim.Optimizer
        if self.optimizer == "adafactor":
            optimizer = torch.optim.Adafactor(groups, lr=self.learning_rate)
        else:
            # With float16 gradients are unscaled and clipped before the step; the fused kernel
            # would unscale them itself, too late for that.
            fused = self.trainer.precision != "16-mixed"
            optimizer = torch.optim.AdamW(groups, lr=self.learning_rate, fused=fused)
        if self.schedule == "constant":
            schedule = get_constant_schedule_with_warmup(optimizer, self.warmup_steps)
        elif self.schedule == "inverse_sqrt":
            schedule = get_inverse_sqrt_schedule(optimizer, self.warmup_steps)
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

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        # Every step draws its own dropout, whatever else drew numbers before it: loaders do, and
        # not at the same moments in a resumed run.
        place = (self.seed, self.current_epoch, batch_idx, self.global_rank)
        torch.manual_seed(int(sha256_of(*map(str, place))[:15], 16))

    def batch_loss(self, batch: Any) -> Tensor | dict[str, Tensor]:
        """Loss of a training step, or a dict of `loss` and its parts."""
        if not isinstance(self.model, Trainable):
            raise TypeError(f"{type(self.model).__name__} has no training_loss")
        return self.model.training_loss(batch)

    def training_step(self, batch: LabelledBatch, batch_idx: int) -> Tensor:
        losses = self.batch_loss(batch)
        parts = dict(losses) if isinstance(losses, dict) else {"loss": losses}
        loss = parts.pop("loss")
        if not torch.isfinite(loss):
            raise UserError(
                f"the loss is {loss.item()} at step {self.global_step}: lower the learning rate, "
                "or train in float32"
            )
        size = len(batch.labels)
        # Of this process: with several, the log shows the first one's share of each batch.
        self.log("train/loss", loss, on_step=True, on_epoch=True, batch_size=size, prog_bar=True)
        for name, part in parts.items():
            self.log(f"train/{name}", part.detach(), on_step=True, on_epoch=True, batch_size=size)
        self.log("train/lr", self.lr_schedulers().get_last_lr()[0], on_step=True, on_epoch=False)
        return loss


class LitWrapper(LitTraining):
    """A recommender with its optimizer, schedule and evaluation.

    Validation logs `val/<metric>`, test logs `test/<metric>` (see
    `recformer.evaluation.evaluator.Evaluator`); the evaluator of the last evaluation stays at
    `self.evaluator`, so that ranks can be written. A test counts what is recommended too, and keeps
    ranks among sampled negatives at `self.sampled`.

    Args:
        model: a `recformer.evaluation.recommender.Recommender`; a `Trainable` too where it is
            trained.
        metric_ks: cut-offs of NDCG and Recall.
        ties: `expected`, `pessimistic` or `optimistic`.
        filter_seen: take items of the history out of the candidates (never the target).
        num_items: size of the catalogue, for coverage, Gini and sampled negatives.
        sampled_negatives: rank the targets of a test also among so many sampled items.
        options: of the optimizer and its schedule: `learning_rate`, `weight_decay`, `warmup_steps`,
            `schedule`, `optimizer` and `seed`, see `LitTraining`.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        metric_ks: tuple[int, ...] = (10, 50),
        ties: str = "expected",
        filter_seen: bool = False,
        num_items: int = 0,
        sampled_negatives: int | None = None,
        **options: Any,
    ) -> None:
        super().__init__(model, **options)
        self.metric_ks = tuple(metric_ks)
        self.ties = ties
        self.filter_seen = filter_seen
        self.num_items = num_items
        self.sampled_negatives = sampled_negatives
        self.evaluator = Evaluator(self.metric_ks, self.ties)
        self.sampled: Evaluator | None = None
        self._waiting: list[tuple[Any, EvalBatch]] = []  # users that are read and not yet judged

    @property
    def recommender(self) -> Recommender:
        """The model."""
        if not isinstance(self.model, Recommender):
            raise TypeError(f"{type(self.model).__name__} is no Recommender")
        return self.model

    def on_validation_epoch_start(self) -> None:
        self.evaluator, self._waiting = Evaluator(self.metric_ks, self.ties), []

    def validation_step(self, batch: EvalBatch, batch_idx: int) -> dict[str, TargetRanks]:
        return self._read(batch, self._rank)

    def _read(
        self, batch: EvalBatch, judge: Callable[[Users], TargetRanks]
    ) -> dict[str, TargetRanks]:
        """Read users, and judge all that wait when there are enough."""
        users = self.recommender.read(batch.history, batch.seen)
        self._waiting.append((users, replace(batch, history=None)))  # which is not needed again
        if sum(len(each.labels) for _, each in self._waiting) < self.recommender.users_at_once:
            return {}
        return {"ranks": self._judge(judge)}  # for callbacks: ranks may say more than is asked

    def _judge(self, judge: Callable[[Users], TargetRanks]) -> TargetRanks:
        """Ask about all users that wait."""
        batches = [batch for _, batch in self._waiting]
        starts = np.cumsum([0, *(len(batch.labels) for batch in batches)])
        users = Users(
            self.recommender.join([read for read, _ in self._waiting]),
            torch.cat([batch.user_ids for batch in batches]),
            torch.cat([batch.labels for batch in batches]),
            joined_pairs([batch.seen for batch in batches], starts),
        )
        self._waiting = []
        ranks = judge(users)
        self.evaluator.update(users.ids, users.targets, ranks)
        return ranks

    def _rank(self, users: Users) -> TargetRanks:
        return self.recommender.rank(users.read, users.targets, self.filter_seen)

    def on_validation_epoch_end(self) -> None:
        if self._waiting:
            self._judge(self._rank)
        self._log_metrics("val")

    def on_test_epoch_start(self) -> None:
        self.evaluator, self._waiting = Evaluator(self.metric_ks, self.ties), []
        if self.sampled_negatives is not None:
            self.sampled = Evaluator(self.metric_ks, self.ties)

    def test_step(self, batch: EvalBatch, batch_idx: int) -> dict[str, TargetRanks]:
        return self._read(batch, self._rank_and_recommend)

    def _rank_and_recommend(self, users: Users) -> TargetRanks:
        ranks, items = self.recommender.rank_and_recommend(
            users.read, users.targets, max(self.metric_ks), self.filter_seen
        )
        self.evaluator.count_recommended(items, self.num_items)
        if self.sampled is not None and self.sampled_negatives is not None:
            negatives = sample_unseen(
                users.ids, users.targets, users.seen, self.num_items, self.sampled_negatives
            )
            among = self.recommender.rank_among(users.read, users.targets, negatives)
            self.sampled.update(users.ids, users.targets, among)
        return ranks

    def on_test_epoch_end(self) -> None:
        if self._waiting:
            self._judge(self._rank_and_recommend)
        self._log_metrics("test")
        if self.sampled is not None:
            self.sampled.gather()

    def _log_metrics(self, split: str) -> None:
        log_figures(self, self.evaluator, split)


def log_figures(module: lightning.LightningModule, evaluator: Evaluator, split: str) -> None:
    """Log the figures of an evaluation that is over, with several processes those of all users."""
    evaluator.gather()  # every process then holds all users and logs the same figures
    for name, value in evaluator.compute().items():
        module.log(f"{split}/{name}", float(value), rank_zero_only=False)
