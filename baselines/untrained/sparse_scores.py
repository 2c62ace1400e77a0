"""Ranks and best items of scores that are zero for most items, without writing the zeros out.

The answers are those of `count_ranks` and `top_items` for the same scores as a full matrix.

Shapes: B users, N items, E entries of a row, P pairs (user, item), k items recommended.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy import sparse  # type: ignore[import-untyped]

from recformer.evaluation.ranks import Pairs, TargetRanks, check_length, checked_ids, checked_pairs
from recformer.files import UserError


def count_sparse_ranks(
    scores: sparse.csr_array, targets: NDArray[np.int64], seen: Pairs | None = None
) -> TargetRanks:
    """Rank each user's target by a row of scores.

    Args:
        scores: (B, N) float64; what has no entry scores 0. No entry stands twice.
        targets: item id of each user's target, (B,).
        seen: as in `count_ranks`.

    Raises:
        UserError: ids out of range.
    """
    num_users, num_items = scores.shape
    ids = checked_ids(targets, "targets", num_items)
    check_length("targets", len(ids), num_users)
    rows = _Rows(scores, seen)
    above, tied, candidates = np.zeros((3, num_users), np.int64)
    for row, target in enumerate(ids.tolist()):
        items, values, out = rows.of(row)
        mine = values[items == target]
        score = mine[0] if len(mine) else 0.0
        others = out[out != target]
        left = rows.marked(items, np.append(others, target))
        kept = values[~left]
        implied = num_items - 1 - len(others) - len(kept)  # other candidates without an entry
        candidates[row] = num_items - len(others)
        above[row] = np.count_nonzero(kept > score) + (implied if score < 0 else 0)
        tied[row] = np.count_nonzero(kept == score) + (implied if score == 0 else 0)
    return TargetRanks(above, tied, candidates)


def top_sparse_items(
    scores: sparse.csr_array, k: int, seen: Pairs | None = None
) -> NDArray[np.int64]:
    """The k items of highest score for each user; of equal scores the lower id comes first.

    Args:
        scores: as in `count_sparse_ranks`.
        k: items a user, at least 1.
        seen: as in `top_items`.

    Returns:
        Item ids, best first, int64 (B, k); -1 where a user has fewer than k candidates.
    """
    if k < 1:
        raise UserError(f"k is {k}, expected at least one item a user")
    num_users, num_items = scores.shape
    rows = _Rows(scores, seen)
    best = np.full((num_users, k), -1, np.int64)
    for row in range(num_users):
        items, values, out = rows.of(row)
        kept = ~rows.marked(items, out)
        items, values = items[kept], values[kept]
        first = _largest(items[values > 0], values[values > 0], k)
        if len(first) < k:  # then those of score 0, then the negative ones
            other = np.concatenate([items[values != 0], out])
            zeros = _lowest_missing(other, k - len(first), num_items)
            negative = _largest(items[values < 0], values[values < 0], k - len(first) - len(zeros))
            first = np.concatenate([first, zeros, negative])
        best[row, : len(first)] = first
    return best


def scaled_entries(scores: sparse.csr_array, pairs: Pairs, factor: float) -> sparse.csr_array:
    """Scores of which those of pairs (rows, items) are multiplied by a factor."""
    rows = _Rows(scores, pairs)
    data = scores.data.copy()
    for row in range(scores.shape[0]):
        items, _, mine = rows.of(row)
        start = scores.indptr[row]
        data[start : start + len(items)][rows.marked(items, mine)] *= factor
    return sparse.csr_array((data, scores.indices, scores.indptr), scores.shape)


class _Rows:
    """Rows of scores with the items that pairs name for each."""

    def __init__(self, scores: sparse.csr_array, pairs: Pairs | None) -> None:
        self._scores = scores
        rows, items = checked_pairs(pairs, *scores.shape)
        keys = np.unique(rows * scores.shape[1] + items)
        rows, self._items = np.divmod(keys, max(scores.shape[1], 1))
        self._starts = np.searchsorted(rows, np.arange(scores.shape[0] + 1))
        self._flags = np.zeros(scores.shape[1], bool)

    def of(self, row: int) -> tuple[NDArray, NDArray, NDArray]:
        """Items and values (E,) of a row, and the items of its pairs, each once, ascending."""
        part = slice(*self._scores.indptr[row : row + 2])
        named = self._items[self._starts[row] : self._starts[row + 1]]
        return self._scores.indices[part], self._scores.data[part], named

    def marked(self, items: NDArray, wanted: NDArray) -> NDArray[np.bool_]:
        """Which of the items (E,) are wanted."""
        self._flags[wanted] = True
        found = self._flags[items]
        self._flags[wanted] = False
        return found


def _largest(items: NDArray, values: NDArray, k: int) -> NDArray:
    """The k items of the largest values, best first, of equal ones the lower id."""
    if 0 < k < len(values):
        least = np.partition(values, len(values) - k)[len(values) - k]
        items, values = items[values >= least], values[values >= least]
    return items[np.lexsort((items, -values))][:k]


def _lowest_missing(items: NDArray, count: int, below: int) -> NDArray[np.int64]:
    """The lowest ids, at most `count`, that are not among the items."""
    room = min(below, count + len(items))
    free = np.ones(room, bool)
    free[items[items < room]] = False
    return np.flatnonzero(free)[:count]
