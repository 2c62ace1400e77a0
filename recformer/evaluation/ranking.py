"""From scores to ranks, from ranks to figures: the one evaluator of the repository.

A model gives either scores over all items (`count_ranks`) or user and item vectors
(`rank_by_vectors`). Both answer with a `TargetRanks`: how many other items stand above a user's
target and how many are tied with it. The `Evaluator` keeps these counts, one row a user, and turns
them into figures as sums over users divided by their number, so that batch size, order and number
of processes cannot change a figure.

What is recommended (`top_items`, `top_items_by_vectors`, with ranks `rank_and_top_items`) and ranks
among a few sampled items (`sample_unseen`, `count_ranks_among`, `rank_among_by_vectors`) follow the
same scores.

Shapes: B users, N items, C items of a chunk or candidates of a user, H hidden size, P pairs (user,
item), K rank cut-offs, k items recommended.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from recformer.evaluation.additions import Additions, PairTerms
from recformer.evaluation.exact import (
    DENSE_SHARE,
    PAIR_ELEMENTS,
    TIE_TOLERANCE,
    _checked_norms,
    _checked_users,
    _ordered_norm,
    _read,
    _where,
    of_length_one,
    pair_scores,
)
from recformer.evaluation.ranks import (
    Pairs,
    TargetRanks,
    Vectors,
    _checked_candidates,
    _to_numpy,
    check_length,
    checked_ids,
    not_compared,
)
from recformer.evaluation.scan import Chunk, Scan, Scores
from recformer.evaluation.top_items import BestItems


@torch.no_grad()
def rank_by_vectors(
    user_vectors: Vectors,
    item_vectors: Vectors,
    targets: ArrayLike,
    seen: Pairs | None = None,
    chunk_size: int | None = None,
    cosine: bool = True,
    additions: Additions | None = None,
) -> TargetRanks:
    """Rank each user's target among all items by the similarity of vectors (paper, section 2.2.4).

    The answer depends on the vectors alone, not on batch or chunk size, order of users or items,
    number of threads or device. A float32 matrix product decides the pairs (user, item) that are
    further from the target's score than the largest possible rounding error; the others are
    compared in float64 by sums of a fixed order. Two items tie when their scores differ by no more
    than `TIE_TOLERANCE` times the norms of the user's and the target's vectors (times 1 with
    `cosine`): identical vectors always tie, and float32 encodings of one text that differ by
    rounding nearly always.

    Memory beyond the arguments is that of a few chunks, whatever N: about 100 MB and the users.
    Items are converted chunk by chunk, so a memory-mapped table is read once and never held. Every
    call passes over the whole table: many users in one call are much faster than few in many.

    Args:
        user_vectors: (B, H), any floating dtype, read as float32. The work is done on their device.
        item_vectors: (N, H), a tensor on any device or an array or `numpy.memmap`, read as float32.
        targets: item id of each user's target, integers (B,).
        seen: as in `count_ranks`.
        chunk_size: items a chunk; by default as many as make 8 MB.
        cosine: rank by cosine similarity (vectors need not be normalised; a norm below 1e-8 counts
            as 1e-8); otherwise by the dot product.
        additions: (rows, items, values): the cosine (or product) of item `items[j]` and the user in
            row `rows[j]` is raised by `values[j]`, a finite number, before anything is compared.
            Values of a pair that repeats are summed. These pairs are compared in float64, so the
            answer stays as exact as without them; the tolerance of a tie does not change.

    Raises:
        UserError: wrong shapes, ids out of range, a vector that is not finite, `chunk_size` < 1.

    Examples:
        >>> items = torch.tensor([[1.0, 0.0], [1.0, 1.0], [0.0, 1.0], [0.0, 2.0]])
        >>> user = torch.tensor([[1.0, 0.1]])
        >>> ranks = rank_by_vectors(user, items, targets=[2])
        >>> ranks.above.tolist(), ranks.tied.tolist()  # by cosine item 3 is as near as item 2
        ([2], [1])
        >>> rank_by_vectors(user, items, targets=[2], cosine=False).above.tolist()
        [3]
    """
    scan = Scan(user_vectors, item_vectors, seen, chunk_size, cosine, additions)
    ranks = _RankCounter(scan, targets, seen)
    scan.run([ranks])
    return ranks.result()


@torch.no_grad()
def rank_and_top_items(
    user_vectors: Vectors,
    item_vectors: Vectors,
    targets: ArrayLike,
    k: int,
    seen: Pairs | None = None,
    chunk_size: int | None = None,
    cosine: bool = True,
    additions: Additions | None = None,
) -> tuple[TargetRanks, NDArray[np.int64]]:
    """The answers of `rank_by_vectors` and `top_items_by_vectors` (its items), from one product.

    Arguments and errors as theirs.
    """
    scan = Scan(user_vectors, item_vectors, seen, chunk_size, cosine, additions)
    ranks, best = _RankCounter(scan, targets, seen), BestItems(scan, k)
    scan.run([ranks, best])
    return ranks.result(), best.items


class _RankCounter:
    """Counts the items above each user's target and those tied with it."""

    def __init__(self, scan: Scan, targets: ArrayLike, seen: Pairs | None) -> None:
        ids = checked_ids(targets, "targets", scan.num_items)
        check_length("targets", len(ids), scan.num_users)
        rows, cols, self._num_candidates = not_compared(seen, ids, scan.num_items)
        self._scan, self._ids = scan, ids
        self._targets = torch.from_numpy(ids).to(scan.device)
        self._scores = scan.exact(np.arange(len(ids)), ids)  # (B,) of the targets
        self._scale = torch.ones_like(self._scores)
        if not scan.cosine:
            self._scale = _ordered_norm(_read(scan.items, ids, scan.device).double())
        self._tolerance = self._scale * TIE_TOLERANCE
        self._above = torch.zeros(len(ids), dtype=torch.int64, device=scan.device)
        self._tied = torch.zeros_like(self._above)
        others = scan.terms.without(rows, cols)
        self._pending = [(others.rows, others.cols)]  # to be compared exactly
        self._count = len(others.rows)

    def look(self, block: slice, scores: Scores, chunk: Chunk) -> None:
        """Count what float32 decides, remember what it does not."""
        targets, tolerance = self._scores[block], self._tolerance[block]
        # no score, of this chunk or of the target, is larger than this; errors are relative to it
        bound = self._scale[block].clamp(min=chunk.largest)
        bound = torch.maximum(bound, targets.abs())  # a term may be larger
        reach = tolerance + bound * chunk.rounding
        high, low = ((targets + far).float()[:, None] for far in (reach, -reach))  # (b, 1)
        row, first, some = scores.reaching(low)  # some (P, W)
        if not len(row):
            return
        spare = torch.empty_like(some)  # sums of booleans are slow
        above = torch.gt(some, high[row], out=spare).sum(dim=1).long()
        near = torch.ge(some, low[row], out=spare).sum(dim=1).long() - above
        self._above[block].index_add_(0, row, above)
        own = self._targets[block] - chunk.start

        # A collapsed encoder, or thousands of equal items, leave most pairs undecided: a float64
        # matrix product decides them all but those within 1e-13 of the tolerance.
        counts = torch.zeros_like(own).index_add_(0, row, near)
        crowded = counts > DENSE_SHARE * len(chunk.items)
        left = ((near > 0) & ~crowded[row]).nonzero()[:, 0]
        row, first, some = row[left], first[left], some[left]
        place, col = _where((some >= low[row]) & (some <= high[row]))
        row, col = row[place], first[place] + col
        others = col != own[row]
        row, col = row[others], col[others]
        users = crowded.nonzero()[:, 0]
        if len(users):
            tol = tolerance[users, None]
            margin = (bound[users] * chunk.double_rounding)[:, None]
            apart = chunk.double(self._scan.vectors[block][users]) - targets[users, None]
            some = scores.all[users]
            unsure = (some >= low[users]) & (some <= high[users])  # (n, C)
            unsure &= torch.arange(len(chunk.items), device=own.device) != own[users, None]
            self._above[block].index_add_(0, users, (unsure & (apart > tol + margin)).sum(dim=1))
            apart.abs_()
            self._tied[block].index_add_(0, users, (unsure & (apart <= tol - margin)).sum(dim=1))
            dense, dense_col = _where(unsure & (apart > tol - margin) & (apart <= tol + margin))
            row, col = torch.cat([row, users[dense]]), torch.cat([col, dense_col])

        self._pending.append((_to_numpy(row) + block.start, _to_numpy(col) + chunk.start))
        self._count += len(row)
        if self._count * chunk.items.shape[1] > PAIR_ELEMENTS:
            self.close()

    def close(self) -> None:
        """Compare the remembered pairs exactly."""
        rows, cols = (np.concatenate(side) for side in zip(*self._pending, strict=True))
        self._pending, self._count = [(rows[:0], cols[:0])], 0
        users = torch.from_numpy(rows).to(self._scan.device)
        apart = self._scan.exact(rows, cols) - self._scores[users]
        tolerance = self._tolerance[users]
        self._above.index_add_(0, users, (apart > tolerance).long())
        self._tied.index_add_(0, users, (apart.abs() <= tolerance).long())

    def result(self) -> TargetRanks:
        """The ranks, after the last item."""
        return TargetRanks(_to_numpy(self._above), _to_numpy(self._tied), self._num_candidates)


@torch.no_grad()
def rank_among_by_vectors(
    user_vectors: Vectors,
    item_vectors: Vectors,
    targets: ArrayLike,
    candidates: ArrayLike,
    cosine: bool = True,
    additions: Additions | None = None,
) -> TargetRanks:
    """Rank each user's target among a few items of that user's own, by the rules of
    `rank_by_vectors`.

    Args:
        user_vectors, item_vectors, targets, cosine, additions: as in `rank_by_vectors`.
        candidates: (B, C) item ids; the target and repetitions in a row do not count.

    Raises:
        UserError: as `rank_by_vectors`, or candidates of another shape.
    """
    users = _checked_users(user_vectors, item_vectors)
    target_ids, ids, counts = _checked_candidates(
        targets, candidates, len(users), item_vectors.shape[0]
    )
    num_candidates = ids.shape[1]
    terms = PairTerms.of(additions, len(users), item_vectors.shape[0])
    target_terms = terms.at(np.arange(len(users)), target_ids)
    above = np.zeros(len(users), dtype=np.int64)
    tied = np.zeros_like(above)
    step = max(1, PAIR_ELEMENTS // max(num_candidates * users.shape[1], 1))  # users at a time
    for first in range(0, len(users), step):
        block = slice(first, first + step)
        vectors, lengths = of_length_one(users[block], first)
        if cosine:
            lengths = torch.ones_like(lengths)
        own = _read(item_vectors, target_ids[block], users.device)
        _checked_norms(own, "target's item", first)
        scale = torch.ones_like(lengths) if cosine else _ordered_norm(own.double())
        targets_of = pair_scores(vectors, own, cosine)
        targets_of += torch.from_numpy(target_terms[block]).to(users.device) / lengths
        rows = np.arange(len(users))[block].repeat(num_candidates)
        added = torch.from_numpy(terms.at(rows, ids[block].reshape(-1))).to(users.device)
        items = _read(item_vectors, ids[block].reshape(-1), users.device)  # (P, H)
        _checked_norms(items, "candidate's item", first * num_candidates)
        apart = pair_scores(vectors.repeat_interleave(num_candidates, dim=0), items, cosine)
        apart += added / lengths.repeat_interleave(num_candidates)
        apart = apart.reshape(-1, num_candidates) - targets_of[:, None]
        tolerance = (scale * TIE_TOLERANCE)[:, None]
        counted = torch.from_numpy(counts[block]).to(users.device)
        above[block] = _to_numpy(((apart > tolerance) & counted).sum(dim=1))
        tied[block] = _to_numpy(((apart.abs() <= tolerance) & counted).sum(dim=1))
    return TargetRanks(above, tied, counts.sum(axis=1) + 1)
