"""Products of float32 on processors on which torch's are slow.

MKL, which torch multiplies float32 with, takes AVX2 alone on processors that are not Intel's, at
half the speed of oneDNN, which torch carries too and which takes AVX-512.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from recformer.machine import cpuinfo


@functools.cache
def torch_is_slow() -> bool:
    """Whether torch multiplies float32 with AVX2 alone on a processor that has AVX-512."""
    described = cpuinfo()
    return (
        torch.backends.mkl.is_available()
        and "AuthenticAMD" in described
        and "avx512f" in described.split()
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    )


def mm(a: Tensor, b: Tensor, *, out: Tensor | None = None) -> Tensor:
    """`torch.mm` by oneDNN, which compiles for each new size: a gain where sizes come back.

    Args:
        a: (M, K) float32 on a CPU.
        b: (K, N).
        out: (M, N), written to.
    """
    # An operator of torch's own compiler, without gradients; the weight of a layer is (N, K).
    product: Tensor = torch.ops.mkldnn._linear_pointwise(a, b.T, None, "none", [], "")
    return product if out is None else out.copy_(product)


def addmm_(total: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """`total.addmm_(a, b)` by oneDNN, likewise."""
    return total.add_(mm(a, b))
