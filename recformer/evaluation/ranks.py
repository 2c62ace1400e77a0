"""Ranks of targets: how many items stand above each, and how many are tied with it."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from recformer.files import UserError

if TYPE_CHECKING:  # what reads figures of finished runs need not wait for torch
    import torch

Pairs = tuple[ArrayLike, ArrayLike]

Vectors: TypeAlias = "torch.Tensor | NDArray[Any]"


@dataclass(frozen=True)
class TargetRanks:
    """Ranks of the targets of B users among their candidates.

    Attributes:
        above: other candidates with a higher score, int64 (B,).
        tied: other candidates with the same score, int64 (B,).
        num_candidates: items ranked for this user, the target among them, int64 (B,).

    Raises:
        UserError: lengths differ, a count is negative, or above + tied + 1 exceeds num_candidates.
    """

    above: NDArray[np.int64]
    tied: NDArray[np.int64]
    num_candidates: NDArray[np.int64]

    def __post_init__(self) -> None:
        for name in ("above", "tied", "num_candidates"):
            object.__setattr__(self, name, _int64(getattr(self, name), name))
        check_length("tied", len(self.tied), len(self.above))
        check_length("num_candidates", len(self.num_candidates), len(self.above))
        negative = (self.above < 0) | (self.tied < 0)
        wrong = (negative | (self.above + self.tied >= self.num_candidates)).nonzero()[0]
        if len(wrong):
            row = wrong[0]
            raise UserError(
                f"row {row} has {self.above[row]} items above and {self.tied[row]} tied of "
                f"{self.num_candidates[row]} candidates, expected counts of 0 or more that leave "
                "room for the target"
            )

    def __len__(self) -> int:
        return len(self.above)


def columns_checksum(columns: Mapping[str, NDArray[Any]]) -> str:
    """CRC-32 of names and values, which tells a file that lost rows from a whole one."""
    crc32 = 0
    for name, values in columns.items():
        crc32 = zlib.crc32(np.ascontiguousarray(values).data, zlib.crc32(name.encode(), crc32))
    return str(crc32)


def count_ranks(scores: Vectors, targets: ArrayLike, seen: Pairs | None = None) -> TargetRanks:
    """Rank each user's target by a full row of scores.

    Scores are compared as they are: items tie when their scores are equal. A matrix product may
    give two identical items scores that differ in the last bit, depending on their columns and on
    the batch size, so a model that scores by vectors uses `rank_by_vectors` instead.

    Args:
        scores: (B, N), any real dtype; higher is better. Infinities are compared like any number.
        targets: item id of each user's target, integers (B,).
        seen: (rows, cols), two integer arrays of equal length: item `cols[j]` is no candidate of
            the user in row `rows[j]` (filter_seen). Pairs may repeat; the target always stays.

    Raises:
        UserError: wrong shapes, ids out of range, or a NaN among the scores.

    Examples:
        >>> ranks = count_ranks([[0.9, 0.5, 0.5, 0.1]], targets=[2])
        >>> ranks.above.tolist(), ranks.tied.tolist()  # item 0 stands above, item 1 is tied
        ([1], [1])
        >>> count_ranks([[0.9, 0.5, 0.5, 0.1]], targets=[2], seen=([0], [0])).above.tolist()
        [0]
    """
    import torch

    scores = _checked_scores(scores)
    device, (num_users, num_items) = scores.device, scores.shape
    target_ids = checked_ids(targets, "targets", num_items)
    check_length("targets", len(target_ids), num_users)
    rows, cols, num_candidates = not_compared(seen, target_ids, num_items)
    best = scores.gather(1, torch.from_numpy(target_ids).to(device)[:, None])  # (B, 1)
    pairs = torch.from_numpy(rows).to(device), torch.from_numpy(cols).to(device)
    above = scores > best  # (B, N)
    above[pairs] = False
    tied = scores == best
    tied[pairs] = False
    return TargetRanks(_to_numpy(above.sum(dim=1)), _to_numpy(tied.sum(dim=1)), num_candidates)


def count_ranks_among(scores: Vectors, targets: ArrayLike, candidates: ArrayLike) -> TargetRanks:
    """Rank each user's target among a few items of that user's own, by the rules of `count_ranks`.

    Args:
        scores, targets: as in `count_ranks`.
        candidates: (B, C) item ids; the target and repetitions in a row do not count.
    """
    import torch

    scores = torch.as_tensor(scores)
    target_ids, ids, counts = _checked_candidates(targets, candidates, *scores.shape)
    columns = np.concatenate([target_ids[:, None], ids], axis=1)  # (B, 1 + C)
    chosen = scores.gather(1, torch.from_numpy(columns).to(scores.device))
    rows, cols = np.nonzero(~counts)
    return count_ranks(chosen, np.zeros_like(target_ids), (rows, cols + 1))


def _checked_scores(scores: Vectors) -> torch.Tensor:
    import torch

    scores = torch.as_tensor(scores)
    if scores.ndim != 2:
        raise UserError(f"scores have shape {tuple(scores.shape)}, expected (users, items)")
    if scores.is_floating_point():
        bad = scores.isnan().any(dim=1).nonzero()
        if len(bad):
            raise UserError(f"the scores of row {int(bad[0])} hold NaN: they cannot be ranked")
    return scores


def _checked_candidates(
    targets: ArrayLike, candidates: ArrayLike, num_users: int, num_items: int
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.bool_]]:
    """Targets (B,), candidates (B, C), and which of these count: no target, no repetition."""
    target_ids, ids = checked_ids(targets, "targets", num_items), np.asarray(candidates)
    check_length("targets", len(target_ids), num_users)
    if ids.ndim != 2 or len(ids) != num_users:
        raise UserError(f"candidates have shape {ids.shape}, expected ({num_users}, candidates)")
    ids = checked_ids(ids.reshape(-1), "candidates", num_items).reshape(ids.shape)
    order = np.argsort(ids, axis=1, kind="stable")
    ordered = np.take_along_axis(ids, order, axis=1)
    again = np.zeros(ids.shape, bool)
    np.put_along_axis(again, order[:, 1:], ordered[:, 1:] == ordered[:, :-1], axis=1)
    return target_ids, ids, ~again & (ids != target_ids[:, None])


def checked_pairs(seen: Pairs | None, num_users: int, num_items: int) -> tuple[NDArray, NDArray]:
    """Checked pairs (rows, cols), int64."""
    if seen is None:
        return np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int64)
    rows = checked_ids(seen[0], "rows of seen", num_users)
    cols = checked_ids(seen[1], "cols of seen", num_items)
    check_length("cols of seen", len(cols), len(rows))
    return rows, cols


def not_compared(
    seen: Pairs | None, targets: NDArray, num_items: int
) -> tuple[NDArray, NDArray, NDArray]:
    """Pairs (rows, cols) not to be counted, the targets included, and candidates a user (B,)."""
    num_users = len(targets)
    rows, cols = np.arange(num_users), targets
    if seen is None:
        return rows, cols, np.full(num_users, num_items, dtype=np.int64)
    seen_rows, seen_cols = checked_pairs(seen, num_users, num_items)
    all_rows, all_cols = np.concatenate([rows, seen_rows]), np.concatenate([cols, seen_cols])
    rows, cols = np.divmod(np.unique(all_rows * num_items + all_cols), max(num_items, 1))
    return rows, cols, num_items + 1 - np.bincount(rows, minlength=num_users)


def _to_numpy(values: torch.Tensor) -> NDArray[Any]:
    return values.detach().cpu().numpy()


def _int64(values: ArrayLike, name: str) -> NDArray[np.int64]:
    array = np.asarray(values.cpu() if hasattr(values, "cpu") else values)
    if array.ndim != 1 or (array.size and not np.issubdtype(array.dtype, np.integer)):
        raise UserError(
            f"{name} have shape {array.shape} and dtype {array.dtype}, expected integers in one "
            "dimension"
        )
    return array.astype(np.int64)


def checked_ids(values: ArrayLike, name: str, count: int) -> NDArray[np.int64]:
    """Ids from 0 to `count` - 1 in one dimension, int64; UserError for anything else."""
    ids = _int64(values, name)
    if len(ids) and not (ids.min() >= 0 and ids.max() < count):
        raise UserError(
            f"{name} reach from {ids.min()} to {ids.max()}, expected ids from 0 to {count - 1}"
        )
    return ids


def check_length(name: str, got: int, expected: int, each: str = "a user") -> None:
    """UserError where `name`, one `each`, are not as many as expected."""
    if got != expected:
        raise UserError(f"{name} have length {got}, expected {expected}, one {each}")
