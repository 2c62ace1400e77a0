"""Batches as dataclasses: what a collator gives, and what Lightning moves to a device.

Shapes: B sequences or users, S pairs (user, item of the history), P predictions.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from recformer.packing import PackedTokens

NO_LABEL = -100  # label of a token that is not predicted, in transformers too

H = TypeVar("H")
Self = TypeVar("Self", bound="Batch")


@dataclass(frozen=True)
class Batch:
    """A batch whose fields are tensors, arrays of the host, tuples of them, None, or have `to` and
    `pin_memory`."""

    def to(self: Self, device: torch.device | str, non_blocking: bool | None = None) -> Self:
        """The same batch on another device.

        Args:
            device: where to.
            non_blocking: go on while it is copied; None: wherever that is safe, which Lightning
                asks of tensors alone.
        """
        if non_blocking is None:
            non_blocking = torch.device(device).type not in ("cpu", "mps")
        return self._map(lambda value: value.to(device, non_blocking=non_blocking))

    def pin_memory(self: Self) -> Self:
        """The same batch in memory that a GPU reads directly."""
        return self._map(lambda value: value.pin_memory())

    def _map(self: Self, move: Callable[[Any], Any]) -> Self:
        moved = {field.name: _moved(getattr(self, field.name), move) for field in fields(self)}
        return replace(self, **moved)


def _moved(value: Any, move: Callable[[Any], Any]) -> Any:
    if value is None or isinstance(value, np.ndarray):  # what the host keeps
        return value
    if isinstance(value, tuple):
        return tuple(_moved(part, move) for part in value)
    return move(value)


@dataclass(frozen=True)
class LabelledBatch(Batch):
    """A batch with item ids to be predicted.

    Attributes:
        labels: int64 (B,), or (P,) or (B, n) where a sequence has several predictions.
    """

    labels: Tensor


@dataclass(frozen=True)
class TrainBatch(LabelledBatch, Generic[H]):
    """Histories and what comes next.

    Attributes:
        history: the histories, in the form that the model reads.
    """

    history: H


@dataclass(frozen=True)
class EvalBatch(LabelledBatch, Generic[H]):
    """Users to be evaluated.

    Attributes:
        labels: int64 (B,), the targets.
        history: the histories, in the form that the model reads.
        user_ids: int64 (B,).
        seen: (rows, items), int64 (S,) each: every item of the histories, for `filter_seen`.
    """

    history: H
    user_ids: Tensor
    seen: tuple[Tensor, Tensor]


@dataclass(frozen=True)
class PairBatch(LabelledBatch):
    """Pairs of pretraining: sequences of items, side a, and the items that follow them, side b.

    Attributes:
        labels: int64 (B,), the targets; in validation their places in the pool.
        a, b: both sides.
        target_ids: int64 (B,), item ids of side b.
        user_ids: int64 (B,), the sequence that each pair is from.
        mlm_a, mlm_b: masked ids and labels of each side's tokens, int64 (T,) each, or None.
        masked_before: tokens that are to be predicted before each sequence of either side, and all
            of them, int64 (B + 1,) each, on the host, so that nobody waits for a device to know how
            many there are; None where nobody counted them.
    """

    a: PackedTokens
    b: PackedTokens
    target_ids: Tensor
    user_ids: Tensor
    mlm_a: tuple[Tensor, Tensor] | None = None
    mlm_b: tuple[Tensor, Tensor] | None = None
    masked_before: tuple[NDArray[np.int64], NDArray[np.int64]] | None = None

    @property
    def num_tokens(self) -> int:
        """Tokens that go through the encoder, masked copies included."""
        sides = ((self.a, self.mlm_a), (self.b, self.mlm_b))
        return sum(side.num_tokens * (1 if mlm is None else 2) for side, mlm in sides)
