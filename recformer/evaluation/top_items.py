"""The best items of each user, exactly."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from recformer.evaluation.additions import Additions
from recformer.evaluation.exact import DENSE_SHARE, _count, _where
from recformer.evaluation.ranks import Pairs, Vectors, _checked_scores, _to_numpy, checked_pairs
from recformer.evaluation.scan import Chunk, Scan, Scores
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
    units: Vectors | None = None,
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
        units: (N, H) `bfloat16_units` of the items, with `norms`: for cosines on the CPU a quicker
            first look for few users, where the processor multiplies in bfloat16. The answer is the
            same.

    Returns:
        Item ids, best first, int64 (B, k), and their scores, float64 (B, k); -1 and -inf where a
        user has fewer than k candidates.

    Raises:
        UserError: as `rank_by_vectors`; `offered`, `norms` or `units` of another length than the
            items.

    Examples:
        >>> table = torch.tensor([[0.0, 1.0], [3.0, 4.0], [1.0, 0.0]])
        >>> items, scores = top_items_by_vectors(torch.tensor([[2.0, 0.0]]), table, k=2)
        >>> items.tolist(), scores.round(4).tolist()
        ([[2, 1]], [[1.0, 0.6]])
    """
    scan = Scan(
        user_vectors, item_vectors, seen, chunk_size, cosine, additions, offered, norms, units
    )
    best = BestItems(scan, k)
    scan.run([best])
    return best.items, best.scores * _to_numpy(scan.lengths)[:, None]


class BestItems:
    """Keeps the k best items of each user.

    Attributes:
        items, scores: as in `BestSoFar`, after the last item; scores of users of length 1.
    """

    def __init__(self, scan: Scan, k: int) -> None:
        self._scan, self._k = scan, k
        best = BestSoFar(scan.num_users, k)
        self.items, self.scores = best.items, best.scores
        self._blocks = {block.start: _Candidates(scan, block, k) for block in scan.blocks}

    def look(self, block: slice, scores: Scores, chunk: Chunk) -> None:
        """Remember the items that can be among the best."""
        mine, k = self._blocks[block.start], self._k
        least = torch.from_numpy(mine.least).to(scores.all.device)  # (b,) float64
        floor = (least - chunk.error).float()
        if not mine.known:
            floor = torch.maximum(floor, _kth(scores.all, k) - 2 * chunk.error)
        row, col, values = _at_least(scores, floor)
        if not len(row):
            return
        if len(row) > MANY_TIMES * k * len(scores.all):
            floor = torch.maximum(floor, _kth(scores.all, k) - 2 * chunk.error)
            row, col, values = _at_least(scores, floor)
        values = values.double()
        error = torch.full_like(values, chunk.error)

        # A collapsed encoder, or thousands of equal items, leave most pairs undecided: a float64
        # matrix product leaves those that are equal.
        for product, off in chunk.finer():
            counts = torch.bincount(row, minlength=len(scores.all))
            crowded = counts > max(DENSE_SHARE * len(chunk.items), MANY_TIMES * k)
            dense = crowded.nonzero()[:, 0]
            if not len(dense):
                break
            exact = product(self._scan.vectors[block][dense])
            exact.masked_fill_(scores.all[dense] == -torch.inf, -torch.inf)
            near = torch.maximum(least[dense] - off, _kth(exact, k) - 2 * off).to(exact.dtype)
            dense_row, dense_col, found = _at_least(Scores.of(exact), near)
            kept = ~crowded[row]
            row, col = (torch.cat([row[kept], dense[dense_row]]), torch.cat([col[kept], dense_col]))
            found = found.double()
            error = torch.cat([error[kept], torch.full_like(found, off)])
            values = torch.cat([values[kept], found])
        mine.add(_to_numpy(row), _to_numpy(col) + chunk.start, _to_numpy(values), _to_numpy(error))

    def close(self) -> None:
        """Order the candidates exactly."""
        for block in self._scan.blocks:
            best = self._blocks[block.start].best()
            self.items[block], self.scores[block] = best.items, best.scores


class _Candidates:
    """Items that can be among the k best of a block of users, with bounds of their scores.

    Attributes:
        least: (b,) float64, no more than the exact score of each user's k-th best item so far; -inf
            where there are fewer.
        known: whether all of them are above -inf.
    """

    def __init__(self, scan: Scan, block: slice, k: int) -> None:
        self._scan, self._first, self._k = scan, block.start, k
        size = block.stop - block.start
        self.least = np.full(size, -np.inf)
        self.known = False
        mine = (scan.apart.rows >= block.start) & (scan.apart.rows < block.stop)
        rows, items = scan.apart.rows[mine], scan.apart.cols[mine]
        # a term puts a pair beyond what its product says: it is scored exactly
        scores = _to_numpy(scan.exact(rows, items))
        self._parts = [(rows - block.start, items, scores, scores)]
        self._new = 0

    def add(self, rows: NDArray, items: NDArray, scores: NDArray, error: NDArray) -> None:
        """Take pairs (P,) whose scores are off by no more than `error` (P,)."""
        self._parts.append((rows, items, scores - error, scores + error))
        self._new += len(rows)
        if self._new >= self._k * len(self.least):
            self._prune()

    def _prune(self) -> None:
        """Let go what cannot be among the best."""
        rows, items, low, high = (np.concatenate(side) for side in zip(*self._parts, strict=True))
        order = np.lexsort((-low, rows))
        ordered = rows[order]
        starts = np.searchsorted(ordered, np.arange(len(self.least)))
        ends = np.append(starts[1:], len(ordered))
        full = np.flatnonzero(ends - starts >= self._k)
        now = low[order[starts[full] + self._k - 1]]
        self.least[full] = np.maximum(self.least[full], now)
        self.known = len(full) == len(self.least)
        kept = high >= self.least[rows]
        parts = rows[kept], items[kept], low[kept], high[kept]
        if kept.sum() > MANY_TIMES * self._k * len(self.least):  # as good as equal
            best = self._exactly(*parts[:2])
            rows, places = (best.items >= 0).nonzero()
            scores = best.scores[rows, places]
            parts = rows, best.items[rows, places], scores, scores
            self.least = np.maximum(self.least, best.least)
        self._parts, self._new = [parts], 0

    def _exactly(self, rows: NDArray, items: NDArray) -> BestSoFar:
        best = BestSoFar(len(self.least), self._k)
        best.offer(rows, items, _to_numpy(self._scan.exact(rows + self._first, items)))
        return best

    def best(self) -> BestSoFar:
        """The best of all that were added, exactly."""
        self._prune()
        return self._exactly(*self._parts[0][:2])


def _kth(scores: torch.Tensor, k: int) -> torch.Tensor:
    """The k-th best of scores (n, C), or the worst of fewer, (n,)."""
    return scores.topk(min(k, scores.shape[1]), dim=1).values[:, -1]


def _at_least(
    scores: Scores, floor: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Pairs (rows, cols) of scores (n, C) that reach a floor (n,), and their scores; never -inf."""
    floor = floor.clamp(min=torch.finfo(scores.all.dtype).min)
    row, first, some = scores.reaching(floor[:, None])
    place, col = _where(some >= floor[row, None])
    return row[place], first[place] + col, some[place, col]


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
    rows, cols = checked_pairs(seen, *scores.shape)
    scores = scores.index_put(
        (torch.from_numpy(rows).to(scores.device), torch.from_numpy(cols).to(scores.device)),
        torch.tensor(-torch.inf, dtype=scores.dtype, device=scores.device),
    )
    best = BestSoFar(len(scores), k)
    row, col = _may_be_best(scores, k, best.least, 0.0)
    best.offer(_to_numpy(row), _to_numpy(col), _to_numpy(scores[row, col]))
    return best.items, best.scores


class BestSoFar:
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
