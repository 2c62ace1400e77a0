"""Dropout that does not dominate a training step on CPU.

torch draws the Bernoulli mask of a CPU tensor one element after the other and multiplies by
booleans slowly, which at small model sizes costs more than the matrix products around it. Here 16
random bits decide about an element, and bits are cleared instead of numbers multiplied. The
probability is met to 2**-17; survivors are scaled by the share that really survives, so the mean is
kept exactly.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

_LEVELS = 1 << 16
# Integers as wide as the floating type.
BITS = {
    torch.bfloat16: torch.int16,
    torch.float16: torch.int16,
    torch.float32: torch.int32,
    torch.float64: torch.int64,
}


def num_dropped(p: float) -> int:
    """Number of the 2**16 values of a draw that mean "dropped"."""
    return min(round(p * _LEVELS), _LEVELS - 1)


def keep_scale(p: float) -> float:
    """Factor that the survivors of `drop` are multiplied by."""
    return _LEVELS / (_LEVELS - num_dropped(p))


def draw_keep(shape: torch.Size, p: float, dtype: torch.dtype) -> Tensor:
    """(CPU) integers as wide as `dtype`: all bits set where an element survives, else none.

    Seeded from torch's generator, so that `torch.manual_seed` and saved generator states reproduce
    it.
    """
    seed = int(torch.randint(1 << 62, ()))
    size = shape.numel()
    draws = np.random.Generator(np.random.SFC64(seed)).integers(
        0, 1 << 64, size=-(-size // 4), dtype=np.uint64
    )
    keep = torch.from_numpy(draws.view(np.int16))[:size].view(shape)
    if num_dropped(p) == 0:
        keep.fill_(-1)
    else:
        kept_from = num_dropped(p) - _LEVELS // 2  # of -2**15 .. 2**15 - 1
        # kept_from - 1 where dropped and kept_from where kept, then 0 and -1
        keep.clamp_(kept_from - 1, kept_from).neg_().add_(kept_from - 1)
    return keep.to(BITS[dtype])


def clear(x: Tensor, keep: Tensor) -> Tensor:
    """`x` with zeros where `keep` has no bits; `keep` as `draw_keep` makes it."""
    return torch.bitwise_and(x.view(keep.dtype), keep).view(x.dtype)


class _Drop(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, p: float) -> Tensor:
        keep = draw_keep(x.shape, p, x.dtype)
        ctx.save_for_backward(keep)
        return clear(x, keep)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (keep,) = ctx.saved_tensors
        return clear(grad, keep), None


def drop(x: Tensor, p: float) -> Tensor:
    """Set elements of a CPU tensor to zero with probability `p`, without scaling the others."""
    return _Drop.apply(x, p)


def dropout(x: Tensor, p: float, training: bool) -> Tensor:
    """Dropout with probability `p` when training, as `torch.nn.functional.dropout`."""
    if not training or p == 0.0:
        return x
    if x.device.type != "cpu":
        return torch.nn.functional.dropout(x, p)
    return drop(x, p) * keep_scale(p)


def add_dropout(residual: Tensor, x: Tensor, p: float, training: bool) -> Tensor:
    """`residual + dropout(x)`, the scaling done on the way."""
    if not training or p == 0.0:
        return residual + x
    if x.device.type != "cpu":
        return residual + torch.nn.functional.dropout(x, p)
    return torch.add(residual, drop(x, p), alpha=keep_scale(p))


class Dropout(torch.nn.Dropout):
    """`torch.nn.Dropout` by `dropout`."""

    def forward(self, input: Tensor) -> Tensor:
        return dropout(input, self.p, self.training)


def with_fast_dropout(module: torch.nn.Module) -> None:
    """Put a `Dropout` in place of every `torch.nn.Dropout` within a module."""
    for parent in list(module.modules()):
        for name, child in parent.named_children():
            if type(child) is torch.nn.Dropout:
                setattr(parent, name, Dropout(child.p))
