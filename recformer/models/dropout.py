"""Dropout that does not dominate a training step on CPU.

torch draws the Bernoulli mask of a CPU tensor one element after the other, which at small model
sizes costs more than the matrix products around it. Here 16 random bits decide about an element:
the probability is met to 2**-17, the survivors are scaled by the share that really survives, and
the mean is kept exactly.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

_LEVELS = 1 << 16


def _drop_threshold(p: float) -> int:
    """How many of the 2**16 values of a draw mean "dropped"."""
    return min(round(p * _LEVELS), _LEVELS - 1)


def keep_scale(p: float) -> float:
    """What survivors of `keep_mask(..., p)` are multiplied by: one over the share that survives."""
    return _LEVELS / (_LEVELS - _drop_threshold(p))


def keep_mask(shape: torch.Size, p: float) -> Tensor:
    """Random (CPU) boolean mask of `shape`, True where an element survives dropout.

    Seeded from torch's CPU generator, so that `torch.manual_seed` and a saved generator state
    reproduce it.
    """
    seed = int(torch.randint(1 << 62, ()))
    draws = np.random.Generator(np.random.SFC64(seed)).integers(
        0, 1 << 64, size=-(-shape.numel() // 4), dtype=np.uint64
    )
    bits = torch.from_numpy(draws.view(np.int16))[: shape.numel()].view(shape)
    return bits >= _drop_threshold(p) - _LEVELS // 2


class _MaskedScale(torch.autograd.Function):
    """x * mask * scale; keeps the boolean mask alone for the way back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, mask: Tensor, scale: float) -> Tensor:
        ctx.save_for_backward(mask)
        ctx.scale = scale
        return (x * mask).mul_(scale)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (mask,) = ctx.saved_tensors
        return (grad * mask).mul_(ctx.scale), None, None


def dropout(x: Tensor, p: float, training: bool) -> Tensor:
    """Dropout with probability `p` when training, as `torch.nn.functional.dropout`."""
    if not training or p == 0.0:
        return x
    if x.device.type != "cpu":
        return torch.nn.functional.dropout(x, p)
    return _MaskedScale.apply(x, keep_mask(x.shape, p), keep_scale(p))
