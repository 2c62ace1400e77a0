"""Scores compared exactly: products in float32, decided in float64 where rounding could matter."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from recformer.evaluation.ranks import Vectors
from recformer.files import UserError

#: `rank_by_vectors` calls two items tied for a user when their scores differ by no more than this
#: times the norms of the user's and the target's vectors: one step of float32 at a cosine of 1.
#: Encoding one text in float32 in different batches was seen to move a cosine by 2e-8 in the median
#: and 2e-7 in a hundredth of the cases, so nearly all such pairs tie, as they should.
TIE_TOLERANCE = 2.0**-23

MIN_NORM = 1e-8  # least norm a vector is divided by, as in torch.nn.functional.cosine_similarity

MAX_NORM = 1e37  # beyond it products in float32 could overflow

MAX_SQUARED = 1e18  # beyond it sums of squares in float32 could overflow

USER_BLOCK = 512  # users scored against one chunk of items at a time

CHUNK_ELEMENTS = 2**21  # of a chunk of items, and of users x items: 8 MB in float32

PAIR_ELEMENTS = 2**21  # of the pairs compared one by one at a time: 16 MB in float64

DENSE_SHARE = 1 / 32  # above this share of undecided items a matrix product beats single pairs


def _count(mask: torch.Tensor) -> torch.Tensor:
    """True values in each row of a mask (B, C), int64 (B,)."""
    if mask.device.type == "cpu":  # numpy counts booleans thirty times faster than torch sums them
        return torch.from_numpy(np.count_nonzero(mask.numpy(), axis=1))
    return mask.sum(dim=1)


def _flat(mask: torch.Tensor) -> torch.Tensor:
    """Places (P,) of the true values of a mask, counted row by row."""
    if mask.device.type == "cpu":
        return torch.from_numpy(np.flatnonzero(mask.numpy()))
    return mask.flatten().nonzero()[:, 0]


def _where(mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows and columns (P,) of the true values of a mask (B, C)."""
    flat = _flat(mask)
    row = flat // mask.shape[1]
    return row, flat - row * mask.shape[1]


def _rounding(length: int, unit: float) -> float:
    """Largest relative error of an inner product of `length` terms summed in any order.

    Higham's gamma_n = n u / (1 - n u), with 16 roundings to spare for the conversions and the
    subtraction around the product.
    """
    error = (length + 16) * unit
    return error / (1 - error)


def pair_scores(users: torch.Tensor, items: torch.Tensor, cosine: bool) -> torch.Tensor:
    """Scores (P,) float64 of users (P, H) float64 with items (P, H), each in its own row.

    Only elementwise float64 operations: the same bits for a pair wherever and with whatever it is
    computed.
    """
    items = items.double()
    scores = _ordered_sum(users * items)
    return scores / _ordered_norm(items).clamp(min=MIN_NORM) if cosine else scores


def of_length_one(users: torch.Tensor, first: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Vectors (B, H) float64 of length 1, and the lengths (B,) they had, 1 for zero vectors.

    A zero vector stays zero, so that all its items tie. `first` is the row of the first vector, for
    messages.
    """
    users = users.to(torch.float32)
    _checked_norms(users, "user", first)
    vectors = users.double()
    lengths = _ordered_norm(vectors)
    lengths[lengths == 0] = 1
    return vectors / lengths[:, None], lengths


def _ordered_norm(vectors: torch.Tensor) -> torch.Tensor:
    squares = _ordered_sum(vectors * vectors)
    if squares.device.type == "cpu":  # torch's root may be off by a bit, on each processor another
        return torch.from_numpy(np.sqrt(squares.detach().numpy()))
    return squares.sqrt()


def _ordered_sum(values: torch.Tensor) -> torch.Tensor:
    """Sum over the last dimension by halves: an order that no kernel, thread or batch changes."""
    while (length := values.shape[-1]) > 1:
        half = length // 2
        folded = values[..., :half] + values[..., half : 2 * half]
        if length % 2:
            folded[..., 0] += values[..., -1]
        values = folded
    return values.sum(dim=-1)


@contextmanager
def _full_float32(device: torch.device) -> Iterator[None]:
    """Matrix products in true float32, whatever autocast or a trainer has asked for.

    `torch.set_float32_matmul_precision("medium")`, usual in training scripts, makes them bfloat16
    on CPUs and TF32 on GPUs, a thousand times beyond the error bound that `Scan` relies on.
    """
    with torch.autocast(device.type, enabled=False):
        if not hasattr(torch.backends.cuda.matmul, "fp32_precision"):  # torch before 2.9
            precision = torch.get_float32_matmul_precision()
            torch.set_float32_matmul_precision("highest")
            try:
                yield
            finally:
                torch.set_float32_matmul_precision(precision)
            return
        backends: tuple[Any, ...] = (
            torch.backends.mkldnn.matmul,  # type: ignore[attr-defined]  # unknown to its stubs
            torch.backends.cuda.matmul,
        )
        before = [backend.fp32_precision for backend in backends]
        for backend in backends:
            backend.fp32_precision = "ieee"
        try:
            yield
        finally:
            for backend, precision in zip(backends, before, strict=True):
                backend.fp32_precision = precision


def _read(vectors: Vectors, rows: slice | NDArray, device: torch.device) -> torch.Tensor:
    """Some rows of a table as float32 on `device`; a slice of a float32 tensor there is no copy."""
    part: Any
    if isinstance(vectors, torch.Tensor) and not isinstance(rows, slice):
        part = vectors[torch.from_numpy(rows).to(vectors.device)]
    else:
        part = vectors[rows]
    if isinstance(part, torch.Tensor):  # or what a table in several pieces gives
        return part.to(device, torch.float32)
    return torch.from_numpy(np.array(part, dtype=np.float32)).to(device)


def _checked_norms(vectors: torch.Tensor, what: str, first: int) -> torch.Tensor:
    """Norms (n,) float64 of vectors (n, H), refusing those that cannot be ranked."""
    norms = torch.linalg.vector_norm(vectors, dim=1, dtype=torch.float64)
    bad = (~(norms <= MAX_NORM)).nonzero()
    if len(bad):
        raise UserError(
            f"the {what} vector in row {first + int(bad[0])} holds NaN, infinity or a value beyond "
            f"{MAX_NORM:g}: it cannot be ranked"
        )
    return norms


def item_norms(item_vectors: Vectors, first: int = 0) -> torch.Tensor:
    """Norms (N,) of vectors (N, H), float32, on the device of a tensor, the CPU otherwise.

    For `top_items_by_vectors`, which then reads the table once a call in place of twice. Each is
    off by less than (H + 16) roundings of float32 to one.

    Args:
        item_vectors: (N, H), read as float32, a few MB at a time.
        first: row of the first vector, for messages.

    Raises:
        UserError: a vector that is not finite.
    """
    device = torch.device("cpu")
    if isinstance(item_vectors, torch.Tensor):
        device = item_vectors.device
    count = item_vectors.shape[0]
    norms = torch.empty(count, dtype=torch.float32, device=device)
    step = max(1, CHUNK_ELEMENTS // max(item_vectors.shape[1], 1))
    for start in range(0, count, step):
        part = slice(start, min(start + step, count))
        norms[part] = _norms32(_read(item_vectors, part, device), first + start)
    return norms


def bfloat16_units(item_vectors: Vectors) -> torch.Tensor:
    """Vectors (N, H) of length 1 in bfloat16, half the memory to read, where they lie; zeros stay.

    For `top_items_by_vectors`, which looks at them first. Read as float32, a few MB at a time.
    """
    device = torch.device("cpu")
    if isinstance(item_vectors, torch.Tensor):
        device = item_vectors.device
    count, hidden = item_vectors.shape
    units = torch.empty(count, hidden, dtype=torch.bfloat16, device=device)
    step = max(1, CHUNK_ELEMENTS // max(hidden, 1))
    for start in range(0, count, step):
        items = _read(item_vectors, slice(start, min(start + step, count)), device)
        units[start : start + step] = items / _norms32(items, start).clamp(min=MIN_NORM)[:, None]
    return units


def bfloat16_rounding(hidden: int) -> float:
    """Largest error of a cosine of two vectors (H) of length 1 that are rounded to bfloat16.

    Each number, of 8 significant bits, is off by 2^-8 of it at most, and so is the score, itself in
    bfloat16; the sums are in float32.
    """
    unit = 2.0**-8
    return (1 + unit) ** 3 * (1 + _rounding(2 * hidden, 2.0**-24)) - 1


def _norms32(vectors: torch.Tensor, first: int) -> torch.Tensor:
    """Norms (n,) float32 of vectors (n, H) float32, checked as by `_checked_norms`."""
    norms = torch.linalg.vector_norm(vectors, dim=1)
    if bool((norms <= MAX_SQUARED).all()):
        return norms
    return _checked_norms(vectors, "item", first).float()  # squares overflow: float64 decides


def _checked_users(user_vectors: Vectors, item_vectors: Vectors) -> torch.Tensor:
    users = torch.as_tensor(user_vectors)
    if users.ndim != 2 or item_vectors.ndim != 2 or users.shape[1] != item_vectors.shape[1]:
        raise UserError(
            f"user vectors have shape {tuple(users.shape)} and item vectors "
            f"{tuple(item_vectors.shape)}, expected (users, hidden) and (items, hidden)"
        )
    return users


def _user_blocks(num_users: int) -> list[slice]:
    return [slice(i, min(i + USER_BLOCK, num_users)) for i in range(0, num_users, USER_BLOCK)]
