"""From scores to ranks, from ranks to figures: the one evaluator of the repository.

A model gives either scores over all items (`count_ranks`) or user and item vectors
(`rank_by_vectors`). Both answer with a `TargetRanks`: how many other items stand above a user's
target and how many are tied with it. The `Evaluator` keeps these counts, one row a user, and turns
them into figures as sums over users divided by their number, so that batch size, order and number
of processes cannot change a figure.

What is recommended (`top_items`, `top_items_by_vectors`) and ranks among a few sampled items
(`sample_unseen`, `count_ranks_among`, `rank_among_by_vectors`) follow the same scores.

Shapes: B users, N items, C items of a chunk or candidates of a user, H hidden size, P pairs (user,
item), K rank cut-offs, k items recommended.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import ArrayLike

from recformer.evaluation.additions import Additions, PairTerms
from recformer.evaluation.exact import (
    PAIR_ELEMENTS,
    TIE_TOLERANCE,
    _checked_chunk_size,
    _checked_norms,
    _checked_users,
    _compare,
    _full_float32,
    _pairs_of,
    _read,
    _user_blocks,
    _UserSide,
    pair_scores,
)
from recformer.evaluation.ranks import (
    Pairs,
    TargetRanks,
    Vectors,
    _checked_candidates,
    _ids,
    _not_compared,
    _same_length,
    _to_numpy,
)


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
    """
    users = _checked_users(user_vectors, item_vectors)
    device, num_users, num_items = users.device, len(users), item_vectors.shape[0]
    target_ids = _ids(targets, "targets", num_items)
    _same_length("targets", len(target_ids), num_users)
    chunk_size = _checked_chunk_size(chunk_size, users)
    rows, cols, num_candidates = _not_compared(seen, target_ids, num_items)
    by_item = np.argsort(cols, kind="stable")  # the pairs of a chunk become one slice
    terms = PairTerms.of(additions, num_users, num_items)
    target_terms = terms.at(np.arange(num_users), target_ids)
    terms = terms.without(rows, cols).by_item()
    rows, cols = rows[by_item], cols[by_item]

    above = torch.zeros(num_users, dtype=torch.int64, device=device)
    tied = torch.zeros_like(above)
    blocks = _user_blocks(num_users)
    with _full_float32(device):
        sides = [
            _UserSide.of(
                users[block],
                item_vectors,
                target_ids[block],
                target_terms[block],
                block.start,
                cosine,
            )
            for block in blocks
        ]
        for start in range(0, num_items, chunk_size):
            stop = min(start + chunk_size, num_items)
            items = _read(item_vectors, slice(start, stop), device)  # (C, H)
            norms = _checked_norms(items, "item", start)
            low, high = np.searchsorted(cols, (start, stop))
            chunk_terms = terms.of_items(start, stop)
            for block, side in zip(blocks, sides, strict=True):
                pairs = _pairs_of(block, rows[low:high], cols[low:high] - start, device)
                added = chunk_terms.of_users(block, start, device)
                more_above, more_tied = _compare(side, items, norms, pairs, added)
                above[block] += more_above
                tied[block] += more_tied
    return TargetRanks(_to_numpy(above), _to_numpy(tied), num_candidates)


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
        side = _UserSide.of(
            users[block], item_vectors, target_ids[block], target_terms[block], first, cosine
        )
        rows = np.arange(len(users))[block].repeat(num_candidates)
        added = torch.from_numpy(terms.at(rows, ids[block].reshape(-1))).to(users.device)
        items = _read(item_vectors, ids[block].reshape(-1), users.device)  # (P, H)
        _checked_norms(items, "candidate's item", first * num_candidates)
        vectors = side.vectors.repeat_interleave(num_candidates, dim=0)
        apart = pair_scores(vectors, items, cosine)
        apart += added / side.lengths.repeat_interleave(num_candidates)
        apart = apart.reshape(-1, num_candidates)
        apart -= side.target_scores[:, None]
        tolerance = (side.scale * TIE_TOLERANCE)[:, None]
        counted = torch.from_numpy(counts[block]).to(users.device)
        above[block] = _to_numpy(((apart > tolerance) & counted).sum(dim=1))
        tied[block] = _to_numpy(((apart.abs() <= tolerance) & counted).sum(dim=1))
    return TargetRanks(above, tied, counts.sum(axis=1) + 1)
