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
_BITS = {
    torch.bfloat16: torch.int16,
    torch.float16: torch.int16,
    torch.float32: torch.int32,
    torch.float64: torch.int64,
}


def _num_dropped(p: float) -> int:
    """How many of the 2**16 values of a draw mean "dropped"."""
    return min(round(p * _LEVELS), _LEVELS - 1)


def keep_scale(p: float) -> float:
    """What the survivors of `drop` are to be multiplied by."""
    return _LEVELS / (_LEVELS - _num_dropped(p))


def _draw(shape: torch.Size, p: float) -> Tensor:
    """(CPU) int16 of `shape`: all bits set where an element survives, none where it is dropped.

    Seeded from torch's generator, so that `torch.manual_seed` and saved generator states reproduce
    it.
    """
    seed = int(torch.randint(1 << 62, ()))
    size = shape.numel()
    draws = np.random.Generator(np.random.SFC64(seed)).integers(
        0, 1 << 64, size=-(-size // 4), dtype=np.uint64
    )
    bits = torch.from_numpy(draws.view(np.int16))[:size].view(shape)
    kept_from = _num_dropped(p) - _LEVELS // 2  # of -2**15 .. 2**15 - 1
    if kept_from == -_LEVELS // 2:
        return bits.fill_(-1)
    # kept_from - 1 where dropped and kept_from where kept, then 0 and -1
    return bits.clamp_(kept_from - 1, kept_from).neg_().add_(kept_from - 1)


def _clear(x: Tensor, keep: Tensor) -> Tensor:
    bits = _BITS[x.dtype]
    return torch.bitwise_and(x.view(bits), keep.to(bits)).view(x.dtype)


class _Drop(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, p: float) -> Tensor:
        keep = _draw(x.shape, p)
        ctx.save_for_backward(keep)
        return _clear(x, keep)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (keep,) = ctx.saved_tensors
        return _clear(grad, keep), None


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
