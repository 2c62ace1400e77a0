"""The best items of each user, exactly."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from recformer.evaluation.additions import Additions, PairTerms
from recformer.evaluation.exact import (
    CHUNK_ELEMENTS,
    DENSE_SHARE,
    MIN_NORM,
    PAIR_ELEMENTS,
    USER_BLOCK,
    _checked_chunk_size,
    _checked_users,
    _count,
    _full_float32,
    _norms32,
    _pairs_of,
    _read,
    _rounding,
    _user_blocks,
    _where,
    of_length_one,
    pair_scores,
)
from recformer.evaluation.ranks import (
    Pairs,
    Vectors,
    _checked_scores,
    _same_length,
    _seen_pairs,
    _to_numpy,
)
from recformer.files import UserError

MANY_TIMES = 8  # k candidates a user, from which on they are looked at again


@torch.no_grad()
def top_items_by_vectors(
    user_vectors: Vectors,
    item_vectors: Vectors,
    k: int,
    seen: Pairs | None = None,
    chunk_size: int | None = None,
    cosine: bool = True,
    additions: Additions | None = None,
    offered: NDArray[np.bool_] | None = None,
    norms: Vectors | None = None,
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """The k items of highest similarity for each user.

    Ordered by exact scores (float64 sums of a fixed order); of items with equal scores the one
    with the lower id comes first. So the answer depends on the vectors alone, as that of
    `rank_by_vectors`, and memory is that of a few chunks. A float32 matrix product finds the items
    that can be among the best, its largest possible rounding error considered; they alone are
    scored in float64.

    Args:
        user_vectors, item_vectors, chunk_size, cosine, additions: as in `rank_by_vectors`; a table
            in pieces that says where they begin (`borders`) is read piece by piece.
        k: items a user, at least 1.
        seen: (rows, cols): item `cols[j]` is not recommended to the user in row `rows[j]`.
        offered: (N,) true for the items that may be recommended to anybody; None: all.
        norms: (N,) `item_norms` of the items, where many calls search the same ones.

    Returns:
        Item ids, best first, int64 (B, k), and their scores, float64 (B, k); -1 and -inf where a
        user has fewer than k candidates.

    Raises:
        UserError: as `rank_by_vectors`; `offered` or `norms` of another length than the items.
    """
    users = _checked_users(user_vectors, item_vectors)
    device, num_users, num_items = users.device, len(users), item_vectors.shape[0]
    for name, values in (("offered", offered), ("norms", norms)):
        if values is not None:
            _same_length(name, len(values), num_items, "an item")
    if chunk_size is None and norms is not None and _lies_ready(item_vectors, device):
        # Only scores take memory: few users see all items at once, and threads seldom wait.
        chunk_size = max(1, CHUNK_ELEMENTS // max(1, min(num_users, USER_BLOCK)))
    chunk_size = _checked_chunk_size(chunk_size, users)
    rows, cols = _seen_pairs(seen, num_users, num_items)
    terms = PairTerms.of(additions, num_users, num_items)
    apart = terms.without(rows, cols)  # scored exactly whatever the product says of them
    if offered is not None:
        apart = apart.where(offered[apart.cols])
    apart = apart.by_item()
    rows, cols = np.concatenate([rows, terms.rows]), np.concatenate([cols, terms.cols])
    by_item = np.argsort(cols, kind="stable")
    rows, cols = rows[by_item], cols[by_item]
    best = _Best(num_users, k)
    blocks = _user_blocks(num_users)
    with _full_float32(device):
        sides = [of_length_one(users[block], block.start) for block in blocks]
        for part in _parts(num_items, chunk_size, getattr(item_vectors, "borders", ())):
            start = part.start
            items = _read(item_vectors, part, device)  # (C, H)
            chunk = _Chunk(
                start,
                items,
                _norms32(items, start) if norms is None else _read(norms, part, device),
                cosine,
                None if offered is None else _hidden(offered[part], device),
            )
            low, high = np.searchsorted(cols, (part.start, part.stop))
            chunk_terms = apart.of_items(part.start, part.stop)
            for block, (vectors, lengths) in zip(blocks, sides, strict=True):
                pairs = _pairs_of(block, rows[low:high], cols[low:high] - start, device)
                row, col = chunk.candidates(vectors, pairs, k, best.least[block])
                values = _exact(vectors, items, row, col, cosine)
                if len(chunk_terms.rows):
                    own_row, own_col, term = chunk_terms.of_users(block, start, device)
                    own = _exact(vectors, items, own_row, own_col, cosine)
                    own += term / (1.0 if cosine else lengths[own_row])
                    values = torch.cat([values, own])
                    row, col = torch.cat([row, own_row]), torch.cat([col, own_col])
                if len(row):
                    users_of = _to_numpy(row) + block.start
                    best.offer(users_of, _to_numpy(col) + start, _to_numpy(values))
    if cosine or not num_users:
        return best.items, best.scores
    return best.items, best.scores * _to_numpy(torch.cat([each for _, each in sides]))[:, None]


def _lies_ready(items: Any, device: torch.device) -> bool:
    """Whether a slice of a table is no copy: float32 on the device."""
    return getattr(items, "dtype", None) == torch.float32 and items.device == device


def _parts(count: int, most: int, borders: Sequence[int]) -> Iterator[slice]:
    """Slices of at most so many items, none across a border of a table that lies in pieces."""
    for first, last in pairwise([0, *borders, count]):
        for start in range(first, last, most):
            yield slice(start, min(start + most, last))


@dataclass(frozen=True)
class _Chunk:
    """Some items that follow each other, compared with users.

    Attributes:
        start: id of the first.
        items: (C, H) float32.
        norms: (C,) float32.
        cosine: whether scores are divided by them.
        hidden: (C,) bool, items that are not offered; None: all are.
    """

    start: int
    items: torch.Tensor
    norms: torch.Tensor
    cosine: bool
    hidden: torch.Tensor | None

    def candidates(
        self,
        users: torch.Tensor,
        pairs: tuple[torch.Tensor, torch.Tensor],
        k: int,
        least: NDArray[np.float64],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Pairs (rows, cols) that may be among the k best of users (B, H), float64 of length 1.

        `pairs` are not to be compared; `least` (B,) is the exact score of each user's k-th best.
        """
        users32 = users.float()
        if len(users) == 1:  # read as it lies, at the speed of memory
            scores = torch.mv(self.items, users32[0])[None]
        else:
            scores = users32 @ self.items.T  # (B, C)
        largest = 1.0
        if self.cosine:
            scores *= self.norms.clamp(min=MIN_NORM).reciprocal()
        elif len(self.norms):
            largest = float(self.norms.max())
        self._hide(scores, pairs)
        # the rounding of the norms and of their product with the scores comes on top
        error = largest * _rounding(2 * self.items.shape[1], 2.0**-24)
        row, col = _may_be_best(scores, k, least, 2 * error)

        # A collapsed encoder, or thousands of equal items, leave most pairs undecided: a float64
        # matrix product leaves those that are equal.
        counts = torch.bincount(row, minlength=len(users))
        dense = (counts > max(DENSE_SHARE * len(self.items), MANY_TIMES * k)).nonzero()[:, 0]
        if len(dense):
            hidden = scores[dense] == -torch.inf
            scores = users[dense] @ self.items.double().T
            if self.cosine:
                norms = torch.linalg.vector_norm(self.items, dim=1, dtype=torch.float64)
                scores /= norms.clamp(min=MIN_NORM)
            scores.masked_fill_(hidden, -torch.inf)
            error = largest * _rounding(self.items.shape[1], 2.0**-53)
            numbers = least[_to_numpy(dense)]
            near_row, near_col = _may_be_best(scores, k, numbers, 4 * error)
            others = counts[row] <= max(DENSE_SHARE * len(self.items), MANY_TIMES * k)
            row = torch.cat([row[others], dense[near_row]])
            col = torch.cat([col[others], near_col])
        return row, col

    def _hide(self, scores: torch.Tensor, pairs: tuple[torch.Tensor, torch.Tensor]) -> None:
        if self.hidden is not None:
            scores.masked_fill_(self.hidden, -torch.inf)
        if len(pairs[0]):
            scores[pairs] = -torch.inf


def _hidden(offered: NDArray[np.bool_], device: torch.device) -> torch.Tensor | None:
    return None if offered.all() else torch.from_numpy(~offered).to(device)


def _exact(
    users: torch.Tensor, items: torch.Tensor, rows: torch.Tensor, cols: torch.Tensor, cosine: bool
) -> torch.Tensor:
    """Scores (P,) float64 of pairs, few at a time."""
    step = max(1, PAIR_ELEMENTS // max(users.shape[1], 1))
    parts = zip(rows.split(step), cols.split(step), strict=True)
    return torch.cat([pair_scores(users[row], items[col], cosine) for row, col in parts])


def top_items(
    scores: Vectors, k: int, seen: Pairs | None = None
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """The k items of highest score for each user; of equal scores the lower id comes first.

    Args:
        scores: (B, N), any real dtype; an item with -inf is never recommended.
        k, seen: as in `top_items_by_vectors`.

    Returns:
        As `top_items_by_vectors`.

    Raises:
        UserError: wrong shapes, ids out of range, or a NaN among the scores.
    """
    scores = _checked_scores(scores).double()
    rows, cols = _seen_pairs(seen, *scores.shape)
    scores = scores.index_put(
        (torch.from_numpy(rows).to(scores.device), torch.from_numpy(cols).to(scores.device)),
        torch.tensor(-torch.inf, dtype=scores.dtype, device=scores.device),
    )
    best = _Best(len(scores), k)
    row, col = _may_be_best(scores, k, best.least, 0.0)
    best.offer(_to_numpy(row), _to_numpy(col), _to_numpy(scores[row, col]))
    return best.items, best.scores


class _Best:
    """The k best items of each user among those offered so far.

    Attributes:
        items: int64 (B, k), best first, -1 where there is none.
        scores: float64 (B, k), -inf where there is none.
    """

    def __init__(self, num_users: int, k: int) -> None:
        if k < 1:
            raise UserError(f"k is {k}, expected at least one item a user")
        self.items = np.full((num_users, k), -1, dtype=np.int64)
        self.scores = np.full((num_users, k), -np.inf)

    @property
    def least(self) -> NDArray[np.float64]:
        """Least score that puts an item among the best, (B,)."""
        return self.scores[:, -1]

    def offer(self, rows: NDArray, items: NDArray, scores: NDArray) -> None:
        """Take the pairs (P,) that are better than what there is; none may be offered twice."""
        old_rows, places = (self.items >= 0).nonzero()
        rows = np.concatenate([old_rows, rows])
        items = np.concatenate([self.items[old_rows, places], items])
        scores = np.concatenate([self.scores[old_rows, places], scores])
        order = np.lexsort((items, -scores, rows))
        rows, items, scores = rows[order], items[order], scores[order]
        places = np.arange(len(rows)) - np.searchsorted(rows, rows)  # 0, 1, … within a user
        kept = places < self.items.shape[1]
        self.items[rows[kept], places[kept]] = items[kept]
        self.scores[rows[kept], places[kept]] = scores[kept]


def _may_be_best(
    scores: torch.Tensor, k: int, least: NDArray, margin: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Pairs (rows, cols) whose exact score may be among a user's k best.

    Scores (B, C) are off by half of `margin` at most; `least` (B,) is the k-th best so far.
    """
    if not scores.shape[1]:
        return _where(scores > 0)
    floor = torch.from_numpy(least).to(scores)
    known = bool((least > -np.inf).all())
    if known:  # nearly always nearly nothing is left
        mask = scores >= (floor - margin)[:, None]
        if int(_count(mask).sum()) <= MANY_TIMES * k * len(scores):
            return _where(mask)
    last = scores.topk(min(k, scores.shape[1]), dim=1).values[:, -1]
    floor = torch.maximum(last, floor) - margin
    return _where((scores >= floor[:, None]) & (scores > -torch.inf))
