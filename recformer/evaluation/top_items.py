"""The best items of each user, exactly."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from recformer.evaluation.additions import Additions, PairTerms
from recformer.evaluation.exact import (
    MIN_NORM,
    PAIR_ELEMENTS,
    _checked_chunk_size,
    _checked_norms,
    _checked_users,
    _full_float32,
    _of_length_one,
    _pair_scores,
    _pairs_of,
    _read,
    _rounding,
    _user_blocks,
    _where,
)
from recformer.evaluation.ranks import Pairs, Vectors, _checked_scores, _seen_pairs, _to_numpy
from recformer.files import UserError


@torch.no_grad()
def top_items_by_vectors(
    user_vectors: Vectors,
    item_vectors: Vectors,
    k: int,
    seen: Pairs | None = None,
    chunk_size: int | None = None,
    cosine: bool = True,
    additions: Additions | None = None,
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """The k items of highest similarity for each user.

    Ordered by exact scores (float64 sums of a fixed order); of items with equal scores the one
    with the lower id comes first. So the answer depends on the vectors alone, as that of
    `rank_by_vectors`, and memory is that of a few chunks.

    Args:
        user_vectors, item_vectors, chunk_size, cosine, additions: as in `rank_by_vectors`.
        k: items a user, at least 1.
        seen: (rows, cols): item `cols[j]` is not recommended to the user in row `rows[j]`.

    Returns:
        Item ids, best first, int64 (B, k), and their scores, float64 (B, k); -1 and -inf where a
        user has fewer than k candidates.

    Raises:
        UserError: as `rank_by_vectors`.
    """
    users = _checked_users(user_vectors, item_vectors)
    device, num_users, num_items = users.device, len(users), item_vectors.shape[0]
    chunk_size = _checked_chunk_size(chunk_size, users)
    rows, cols = _seen_pairs(seen, num_users, num_items)
    by_item = np.argsort(cols, kind="stable")
    terms = PairTerms.of(additions, num_users, num_items)
    offered = terms.without(rows, cols).by_item()
    rows, cols = rows[by_item], cols[by_item]
    best = _Best(num_users, k)
    lengths = torch.ones(num_users, dtype=torch.float64, device=device)
    step = max(1, PAIR_ELEMENTS // max(users.shape[1], 1))

    def exact(
        vectors: torch.Tensor, items: torch.Tensor, row: torch.Tensor, col: torch.Tensor
    ) -> torch.Tensor:
        """Scores (P,) of pairs, few at a time."""
        parts = zip(row.split(step), col.split(step), strict=True)
        return torch.cat([_pair_scores(vectors[r], items[c], cosine) for r, c in parts])

    blocks = _user_blocks(num_users)
    with _full_float32(device):
        sides = []
        for block in blocks:
            vectors, length = _of_length_one(users[block], block.start)
            sides.append(vectors)
            if not cosine:
                lengths[block] = length
        for start in range(0, num_items, chunk_size):
            stop = min(start + chunk_size, num_items)
            items = _read(item_vectors, slice(start, stop), device)  # (C, H)
            norms = _checked_norms(items, "item", start)
            low, high = np.searchsorted(cols, (start, stop))
            error = _rounding(items.shape[1], 2.0**-53) * (1.0 if cosine else float(norms.max()))
            chunk_terms = offered.of_items(start, stop)
            for block, vectors in zip(blocks, sides, strict=True):
                length = lengths[block]
                scores = vectors @ items.double().T  # (B, C)
                if cosine:
                    scores /= norms.clamp(min=MIN_NORM)
                pairs = _pairs_of(block, rows[low:high], cols[low:high] - start, device)
                scores[pairs] = -torch.inf
                row, col, term = chunk_terms.of_users(block, start, device)
                # exact, so that no addition, however large, makes the margin wider
                scores[row, col] = exact(vectors, items, row, col) + term / length[row]
                row, col = _may_be_best(scores, k, best.least[block], 4 * error)  # (P,)
                users_of, items_of = _to_numpy(row) + block.start, _to_numpy(col) + start
                term = torch.from_numpy(terms.at(users_of, items_of)).to(device)
                values = exact(vectors, items, row, col) + term / length[row]
                best.offer(users_of, items_of, _to_numpy(values))
    return best.items, best.scores * _to_numpy(lengths)[:, None]


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
    last = scores.topk(min(k, scores.shape[1]), dim=1).values[:, -1]
    floor = torch.maximum(last, torch.from_numpy(least).to(last)) - margin
    return _where((scores >= floor[:, None]) & (scores > -torch.inf))
