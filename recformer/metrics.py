"""From scores to ranks, from ranks to figures: the one evaluator of the repository.

A model gives either scores over all items (`count_ranks`) or user and item vectors
(`rank_by_vectors`). Both answer with a `TargetRanks`: how many other items stand above a user's
target and how many are tied with it. The `Evaluator` keeps these counts, one row a user, and turns
them into figures as sums over users divided by their number, so that batch size, order and number
of processes cannot change a figure.

What is recommended (`top_items`, `top_items_by_vectors`) and ranks among a few sampled items
(`sample_negatives`, `count_ranks_among`, `rank_among_by_vectors`) follow the same scores.

Shapes: B users, N items, C items of a chunk or candidates of a user, H hidden size, P pairs (user,
item), K rank cut-offs, k items recommended.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import ArrayLike, NDArray

from recformer.files import UserError, atomic_write

TIES = ("expected", "pessimistic", "optimistic")

#: `rank_by_vectors` calls two items tied for a user when their scores differ by no more than this
#: times the norms of the user's and the target's vectors: one step of float32 at a cosine of 1.
#: Encoding one text in float32 in different batches was seen to move a cosine by 2e-8 in the median
#: and 2e-7 in a hundredth of the cases, so nearly all such pairs tie, as they should.
TIE_TOLERANCE = 2.0**-23

MIN_NORM = 1e-8  # least norm a vector is divided by, as in torch.nn.functional.cosine_similarity
MAX_NORM = 1e37  # beyond it products in float32 could overflow

USER_BLOCK = 1024  # users scored against one chunk of items at a time
CHUNK_ELEMENTS = 2**21  # of a chunk of items, and of users x items: 8 MB in float32
PAIR_ELEMENTS = 2**21  # of the pairs compared one by one at a time: 16 MB in float64
NEGATIVES_SEED = 0  # the same for all runs, which would else be ranked among different items
DENSE_SHARE = 1 / 32  # above this share of undecided items a matrix product beats single pairs

Pairs = tuple[ArrayLike, ArrayLike]
Vectors = torch.Tensor | NDArray[Any]


@dataclass(frozen=True)
class TargetRanks:
    """Where the target of each of B users stands among the candidates.

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
        _same_length("tied", len(self.tied), len(self.above))
        _same_length("num_candidates", len(self.num_candidates), len(self.above))
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
    """
    scores = _checked_scores(scores)
    device, (num_users, num_items) = scores.device, scores.shape
    target_ids = _ids(targets, "targets", num_items)
    _same_length("targets", len(target_ids), num_users)
    rows, cols, num_candidates = _not_compared(seen, target_ids, num_items)
    best = scores.gather(1, torch.from_numpy(target_ids).to(device)[:, None])  # (B, 1)
    pairs = torch.from_numpy(rows).to(device), torch.from_numpy(cols).to(device)
    above = scores > best  # (B, N)
    above[pairs] = False
    tied = scores == best
    tied[pairs] = False
    return TargetRanks(_to_numpy(above.sum(dim=1)), _to_numpy(tied.sum(dim=1)), num_candidates)


@torch.no_grad()
def rank_by_vectors(
    user_vectors: Vectors,
    item_vectors: Vectors,
    targets: ArrayLike,
    seen: Pairs | None = None,
    chunk_size: int | None = None,
    cosine: bool = True,
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
    rows, cols = rows[by_item], cols[by_item]

    above = torch.zeros(num_users, dtype=torch.int64, device=device)
    tied = torch.zeros_like(above)
    blocks = _user_blocks(num_users)
    with _full_float32(device):
        sides = [
            _UserSide.of(users[block], item_vectors, target_ids[block], block.start, cosine)
            for block in blocks
        ]
        for start in range(0, num_items, chunk_size):
            stop = min(start + chunk_size, num_items)
            items = _read(item_vectors, slice(start, stop), device)  # (C, H)
            norms = _checked_norms(items, "item", start)
            low, high = np.searchsorted(cols, (start, stop))
            for block, side in zip(blocks, sides, strict=True):
                pairs = _pairs_of(block, rows[low:high], cols[low:high] - start, device)
                more_above, more_tied = _compare(side, items, norms, pairs)
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
) -> TargetRanks:
    """Rank each user's target among a few items of that user's own, by the rules of
    `rank_by_vectors`.

    Args:
        user_vectors, item_vectors, targets, cosine: as in `rank_by_vectors`.
        candidates: (B, C) item ids, without the target and without repetition in a row.

    Raises:
        UserError: as `rank_by_vectors`, or candidates of another shape.
    """
    users = _checked_users(user_vectors, item_vectors)
    target_ids, ids = _checked_candidates(targets, candidates, len(users), item_vectors.shape[0])
    num_candidates = ids.shape[1]
    above = np.zeros(len(users), dtype=np.int64)
    tied = np.zeros_like(above)
    step = max(1, PAIR_ELEMENTS // max(num_candidates * users.shape[1], 1))  # users at a time
    for first in range(0, len(users), step):
        block = slice(first, first + step)
        side = _UserSide.of(users[block], item_vectors, target_ids[block], first, cosine)
        items = _read(item_vectors, ids[block].reshape(-1), users.device)  # (P, H)
        _checked_norms(items, "candidate's item", first * num_candidates)
        vectors = side.vectors.repeat_interleave(num_candidates, dim=0)
        apart = _pair_scores(vectors, items, cosine).reshape(-1, num_candidates)
        apart -= side.target_scores[:, None]
        tolerance = (side.scale * TIE_TOLERANCE)[:, None]
        above[block] = _to_numpy((apart > tolerance).sum(dim=1))
        tied[block] = _to_numpy((apart.abs() <= tolerance).sum(dim=1))
    return TargetRanks(above, tied, np.full_like(above, num_candidates + 1))


def count_ranks_among(scores: Vectors, targets: ArrayLike, candidates: ArrayLike) -> TargetRanks:
    """Rank each user's target among a few items of that user's own, by the rules of `count_ranks`.

    Args:
        scores, targets: as in `count_ranks`.
        candidates: (B, C) item ids, without the target and without repetition in a row.
    """
    scores = torch.as_tensor(scores)
    target_ids, ids = _checked_candidates(targets, candidates, *scores.shape)
    columns = np.concatenate([target_ids[:, None], ids], axis=1)  # (B, 1 + C)
    chosen = scores.gather(1, torch.from_numpy(columns).to(scores.device))
    return count_ranks(chosen, np.zeros_like(target_ids))


def sample_negatives(
    user_ids: ArrayLike,
    targets: ArrayLike,
    seen: Pairs,
    num_items: int,
    count: int,
    seed: int = NEGATIVES_SEED,
) -> NDArray[np.int64]:
    """Draw items that are neither a user's target nor in the user's history.

    The draw depends on seed, user, history and target alone: not on the batch, the process or the
    model, so that every model is ranked among the same items.

    Args:
        user_ids, targets: (B,).
        seen: (rows, cols), the items of the histories as in `count_ranks`.
        num_items: N.
        count: of items a user, all different and equally likely.
        seed: of the draws.

    Returns:
        int64 (B, count).

    Raises:
        UserError: a user has met so many items that fewer than `count` are left.
    """
    users, items = _int64(user_ids, "user_ids"), _ids(targets, "targets", num_items)
    rows, cols, num_left = _not_compared(seen, items, num_items)
    offsets = np.searchsorted(rows, np.arange(len(users) + 1))
    drawn = np.empty((len(users), count), dtype=np.int64)
    for row, user in enumerate(users):
        left = int(num_left[row]) - 1  # without the target
        if left < count:
            raise UserError(
                f"user {user} leaves {left} of {num_items} items to sample from, which is fewer "
                f"than {count}: ask for at most {left} sampled negatives"
            )
        places = np.random.default_rng([seed, user]).choice(left, count, replace=False)
        taken = cols[offsets[row] : offsets[row + 1]]  # ascending
        # the j-th item that is not taken comes after all taken ones with fewer than j + 1 before
        drawn[row] = places + np.searchsorted(taken - np.arange(len(taken)), places, side="right")
    return drawn


@torch.no_grad()
def top_items_by_vectors(
    user_vectors: Vectors,
    item_vectors: Vectors,
    k: int,
    seen: Pairs | None = None,
    chunk_size: int | None = None,
    cosine: bool = True,
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """The k items of highest similarity for each user.

    Ordered by exact scores (float64 sums of a fixed order); of items with equal scores the one
    with the lower id comes first. So the answer depends on the vectors alone, as that of
    `rank_by_vectors`, and memory is that of a few chunks.

    Args:
        user_vectors, item_vectors, chunk_size, cosine: as in `rank_by_vectors`.
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
    rows, cols = rows[by_item], cols[by_item]
    best = _Best(num_users, k)
    lengths = np.ones(num_users)
    step = max(1, PAIR_ELEMENTS // max(users.shape[1], 1))
    blocks = _user_blocks(num_users)
    with _full_float32(device):
        sides = [_of_length_one(users[block], block.start) for block in blocks]
        for start in range(0, num_items, chunk_size):
            stop = min(start + chunk_size, num_items)
            items = _read(item_vectors, slice(start, stop), device)  # (C, H)
            norms = _checked_norms(items, "item", start)
            low, high = np.searchsorted(cols, (start, stop))
            error = _rounding(items.shape[1], 2.0**-53) * (1.0 if cosine else float(norms.max()))
            for block, (vectors, length) in zip(blocks, sides, strict=True):
                if not cosine:
                    lengths[block] = _to_numpy(length)
                scores = vectors @ items.double().T  # (B, C)
                if cosine:
                    scores /= norms.clamp(min=MIN_NORM)
                pairs = _pairs_of(block, rows[low:high], cols[low:high] - start, device)
                scores[pairs] = -torch.inf
                row, col = _may_be_best(scores, k, best.least[block], 4 * error)  # (P,)
                exact = [
                    _pair_scores(vectors[r], items[c], cosine)
                    for r, c in zip(row.split(step), col.split(step), strict=True)
                ]
                best.offer(
                    _to_numpy(row) + block.start,
                    _to_numpy(col) + start,
                    _to_numpy(torch.cat(exact)),
                )
    return best.items, best.scores * lengths[:, None]


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
        """What an item must at least score to be among the best, (B,)."""
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


@dataclass(frozen=True)
class _UserSide:
    """What a block of users brings to every chunk of items.

    The length of a user's vector does not change the order of items, so users are of length 1 here
    and one error bound serves them all.
    """

    vectors: torch.Tensor  # (B, H) float64, of length 1
    vectors32: torch.Tensor  # the same in float32
    target_scores: torch.Tensor  # (B,) float64
    scale: torch.Tensor  # (B,) float64, norm of the target's vector; 1 with cosine
    cosine: bool

    @classmethod
    def of(
        cls, users: torch.Tensor, items: Vectors, targets: NDArray, first: int, cosine: bool
    ) -> _UserSide:
        vectors, _ = _of_length_one(users, first)
        target_vectors = _read(items, targets, users.device)
        _checked_norms(target_vectors, "target's item", first)
        scale = _ordered_norm(target_vectors.double())
        return cls(
            vectors=vectors,
            vectors32=vectors.float(),
            target_scores=_pair_scores(vectors, target_vectors, cosine),
            scale=torch.ones_like(scale) if cosine else scale,
            cosine=cosine,
        )


def _compare(
    side: _UserSide,
    items: torch.Tensor,
    norms: torch.Tensor,
    pairs: tuple[torch.Tensor, torch.Tensor],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Items of a chunk above and tied with the target of each user, two int64 (B,).

    items (C, H) float32, norms (C,) float64, pairs (rows, cols) that are not to be compared.
    """
    hidden = items.shape[1]
    tolerance = side.scale * TIE_TOLERANCE  # (B,)
    # no score, of this chunk or of the target, is larger than this; errors are relative to it
    bound = torch.ones_like(side.scale) if side.cosine else side.scale.clamp(min=norms.max())
    inverse = 1 / norms.clamp(min=MIN_NORM)

    scores = side.vectors32 @ items.T  # (B, C)
    if side.cosine:
        scores *= inverse.float()
    scores[pairs] = -torch.inf
    reach = tolerance + bound * _rounding(hidden, 2.0**-24)
    higher = scores > (side.target_scores + reach).float()[:, None]  # (B, C)
    undecided = scores >= (side.target_scores - reach).float()[:, None]
    undecided ^= higher
    above, near = _count(higher), _count(undecided)
    tied = torch.zeros_like(above)

    # A collapsed encoder, or thousands of equal items, leave most pairs undecided: a float64 matrix
    # product decides them all but those within 1e-13 of the tolerance.
    dense = (near > DENSE_SHARE * len(items)).nonzero()[:, 0]
    if len(dense):
        close, tol = undecided[dense], tolerance[dense, None]
        margin = (bound * _rounding(hidden, 2.0**-53))[dense, None]
        apart = side.vectors[dense] @ items.double().T
        if side.cosine:
            apart *= inverse
        apart -= side.target_scores[dense, None]
        above[dense] += _count(close & (apart > tol + margin))
        apart.abs_()
        tied[dense] += _count(close & (apart <= tol - margin))
        undecided[dense] = close & (apart > tol - margin) & (apart <= tol + margin)

    rows, cols = _where(undecided)  # (P,)
    step = max(1, PAIR_ELEMENTS // max(hidden, 1))
    for row, col in zip(rows.split(step), cols.split(step), strict=True):
        exact = _pair_scores(side.vectors[row], items[col], side.cosine) - side.target_scores[row]
        above.index_add_(0, row, (exact > tolerance[row]).long())
        tied.index_add_(0, row, (exact.abs() <= tolerance[row]).long())
    return above, tied


def _count(mask: torch.Tensor) -> torch.Tensor:
    """True values in each row of a mask (B, C), int64 (B,)."""
    if mask.device.type == "cpu":  # numpy counts booleans thirty times faster than torch sums them
        return torch.from_numpy(np.count_nonzero(mask.numpy(), axis=1))
    return mask.sum(dim=1)


def _where(mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows and columns (P,) of the true values of a mask (B, C)."""
    if mask.device.type == "cpu":
        flat = torch.from_numpy(np.flatnonzero(mask.numpy()))
    else:
        flat = mask.flatten().nonzero()[:, 0]
    return flat // mask.shape[1], flat % mask.shape[1]


def _rounding(length: int, unit: float) -> float:
    """Largest relative error of an inner product of `length` terms summed in any order.

    Higham's gamma_n = n u / (1 - n u), with 16 roundings to spare for the conversions and the
    subtraction around the product.
    """
    error = (length + 16) * unit
    return error / (1 - error)


def _pair_scores(users: torch.Tensor, items: torch.Tensor, cosine: bool) -> torch.Tensor:
    """Scores (P,) float64 of users (P, H) float64 with items (P, H), each in its own row.

    Only elementwise float64 operations: the same bits for a pair wherever and with whatever it is
    computed.
    """
    items = items.double()
    scores = _ordered_sum(users * items)
    return scores / _ordered_norm(items).clamp(min=MIN_NORM) if cosine else scores


def _of_length_one(users: torch.Tensor, first: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Vectors (B, H) float64 of length 1, and the lengths (B,) they had.

    `first` is the row of the first one, for messages.
    """
    users = users.to(torch.float32)
    _checked_norms(users, "user", first)
    vectors = users.double()
    lengths = _ordered_norm(vectors)
    tiny = torch.finfo(torch.float64).tiny  # a zero vector stays zero: all its items tie
    return vectors / lengths.clamp(min=tiny)[:, None], lengths


def _ordered_norm(vectors: torch.Tensor) -> torch.Tensor:
    return _ordered_sum(vectors * vectors).sqrt()


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
    on CPUs and TF32 on GPUs, a thousand times beyond the error bound that `_compare` relies on.
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
    if isinstance(vectors, torch.Tensor):
        index = rows if isinstance(rows, slice) else torch.from_numpy(rows).to(vectors.device)
        return vectors[index].to(device, torch.float32)
    return torch.from_numpy(np.array(vectors[rows], dtype=np.float32)).to(device)


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


def _checked_users(user_vectors: Vectors, item_vectors: Vectors) -> torch.Tensor:
    users = torch.as_tensor(user_vectors)
    if users.ndim != 2 or item_vectors.ndim != 2 or users.shape[1] != item_vectors.shape[1]:
        raise UserError(
            f"user vectors have shape {tuple(users.shape)} and item vectors "
            f"{tuple(item_vectors.shape)}, expected (users, hidden) and (items, hidden)"
        )
    return users


def _checked_chunk_size(chunk_size: int | None, users: torch.Tensor) -> int:
    if chunk_size is None:
        return max(1, CHUNK_ELEMENTS // max(users.shape[1], min(len(users), USER_BLOCK), 1))
    if chunk_size < 1:
        raise UserError(f"chunk_size is {chunk_size}, expected at least 1")
    return chunk_size


def _checked_scores(scores: Vectors) -> torch.Tensor:
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
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    target_ids, ids = _ids(targets, "targets", num_items), np.asarray(candidates)
    _same_length("targets", len(target_ids), num_users)
    if ids.ndim != 2 or len(ids) != num_users:
        raise UserError(f"candidates have shape {ids.shape}, expected ({num_users}, candidates)")
    return target_ids, _ids(ids.reshape(-1), "candidates", num_items).reshape(ids.shape)


def _user_blocks(num_users: int) -> list[slice]:
    return [slice(i, min(i + USER_BLOCK, num_users)) for i in range(0, num_users, USER_BLOCK)]


def _pairs_of(
    block: slice, rows: NDArray, cols: NDArray, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """The pairs of a block of users, rows counted from its first user."""
    mine = (rows >= block.start) & (rows < block.stop)
    return (
        torch.from_numpy(rows[mine] - block.start).to(device),
        torch.from_numpy(cols[mine]).to(device),
    )


def _seen_pairs(seen: Pairs | None, num_users: int, num_items: int) -> tuple[NDArray, NDArray]:
    """Checked pairs (rows, cols), int64."""
    if seen is None:
        return np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int64)
    rows = _ids(seen[0], "rows of seen", num_users)
    cols = _ids(seen[1], "cols of seen", num_items)
    _same_length("cols of seen", len(cols), len(rows))
    return rows, cols


def _not_compared(
    seen: Pairs | None, targets: NDArray, num_items: int
) -> tuple[NDArray, NDArray, NDArray]:
    """Pairs (rows, cols) not to be counted, the targets included, and candidates a user (B,)."""
    num_users = len(targets)
    rows, cols = np.arange(num_users), targets
    if seen is None:
        return rows, cols, np.full(num_users, num_items, dtype=np.int64)
    seen_rows, seen_cols = _seen_pairs(seen, num_users, num_items)
    all_rows, all_cols = np.concatenate([rows, seen_rows]), np.concatenate([cols, seen_cols])
    rows, cols = np.divmod(np.unique(all_rows * num_items + all_cols), max(num_items, 1))
    return rows, cols, num_items + 1 - np.bincount(rows, minlength=num_users)


def per_user_metrics(
    ranks: TargetRanks, ks: Sequence[int] = (10, 50), ties: str = "expected"
) -> dict[str, NDArray[np.float64]]:
    """Figures of every user, float64 (B,): `NDCG@k`, `Recall@k`, `MRR@k` for each k, `MRR`, `AUC`.

    There is one target a user, at position r (1-based): NDCG@k = 1 / log2(r + 1) and MRR@k = 1 / r
    up to k and 0 beyond, Recall@k = 1 up to k, MRR = 1 / r over the full ranking, AUC = 1 - (items
    above) / (candidates), as published.

    Ties: a target tied with m others stands at one of the positions above + 1 .. above + m + 1.
    "expected" is the exact mean over them all, equally likely; "pessimistic" takes the last and
    "optimistic" the first.

    Raises:
        UserError: `ties` is none of the three, or `ks` are not different positive integers.
    """
    _check_options(ks, ties)
    first, last = ranks.above, ranks.above + ranks.tied  # items before the target, least and most
    if ties == "pessimistic":
        first = last
    elif ties == "optimistic":
        last = first
    figures = {}
    for k in ks:
        figures[f"NDCG@{k}"] = _mean_gain(_discount, first, last, k)
        figures[f"Recall@{k}"] = np.clip(k - first, 0, last - first + 1) / (last - first + 1)
        figures[f"MRR@{k}"] = _mean_gain(_reciprocal, first, last, k)
    figures["MRR"] = _mean_gain(_reciprocal, first, last, None)
    figures["AUC"] = 1 - (first + last) / 2 / ranks.num_candidates
    return figures


def _discount(position: NDArray) -> NDArray[np.float64]:
    return 1 / np.log2(position + 1)


def _reciprocal(position: NDArray) -> NDArray[np.float64]:
    return 1 / position


def _mean_gain(
    gain: Callable[[NDArray], NDArray[np.float64]], first: NDArray, last: NDArray, k: int | None
) -> NDArray[np.float64]:
    """Mean of gain(r) over the positions r = first + 1 .. last + 1, where gain is 0 beyond k."""
    deepest = int(last.max(initial=0)) + 1
    k = deepest if k is None else min(k, deepest)
    sums = np.concatenate([[0.0], np.cumsum(gain(np.arange(1, k + 1)))])  # sums[j]: positions 1..j
    mean = (sums[np.minimum(last + 1, k)] - sums[np.minimum(first, k)]) / (last - first + 1)
    # without ties the gain itself, not a difference of sums
    return np.where(first == last, np.where(first < k, gain(first + 1), 0.0), mean)


def coverage(counts: NDArray[np.int64]) -> float:
    """Share of N items that are recommended to anybody; counts (N,) of their recommendations."""
    return int(np.count_nonzero(counts)) / len(counts)


def gini(counts: NDArray[np.int64]) -> float:
    """Gini coefficient of counts (N,): 0 where all N items are recommended equally often, 1 - 1/N
    where every recommendation is of one item."""
    total, number = int(counts.sum()), len(counts)
    places = np.arange(1, number + 1)
    return float((2 * places - number - 1) @ np.sort(counts)) / (number * total) if total else 0.0


class Evaluator:
    """Collects the rank of every user's target and computes figures over users.

    Rows are kept a user, 40 bytes each, and a user counts once: rows that come twice (the padding
    of a distributed sampler) are dropped by user id. Figures are sums over users in the order of
    their ids: the same to the last bit for any batch size, order and number of processes.

    Of what is recommended (`count_recommended`) it keeps how often each item is among the first k:
    no rows, so these users must not come twice.

    Args:
        ks: cut-offs of NDCG, Recall and MRR, and of what is recommended.
        ties: "expected" (mean over the positions of a tie), "pessimistic" or "optimistic".

    Raises:
        UserError: as in `per_user_metrics`.
    """

    COLUMNS = ("user_id", "target", "above", "tied", "num_candidates")

    def __init__(self, ks: Sequence[int] = (10, 50), ties: str = "expected") -> None:
        _check_options(ks, ties)
        self.ks = tuple(ks)
        self.ties = ties
        self._parts: list[NDArray[np.int64]] = []  # each (5, n), rows in the order of COLUMNS
        self._recommended: NDArray[np.int64] | None = None  # (K, N)

    def update(self, user_ids: ArrayLike, targets: ArrayLike, ranks: TargetRanks) -> None:
        """Add users: their ids (B,), the item ids of their targets (B,) and where these stand."""
        users, items = _int64(user_ids, "user_ids"), _int64(targets, "targets")
        _same_length("user_ids", len(users), len(ranks))
        _same_length("targets", len(items), len(ranks))
        self._parts.append(np.stack([users, items, ranks.above, ranks.tied, ranks.num_candidates]))

    def count_recommended(self, items: NDArray[np.int64], num_items: int) -> None:
        """Count what is recommended to users.

        Args:
            items: ids of the items, best first, int64 (B, max(ks)); -1 where there is none.
            num_items: N.
        """
        if items.shape[1:] != (max(self.ks),):
            raise UserError(f"items have shape {items.shape}, expected (users, {max(self.ks)})")
        first = [items[:, :k] for k in self.ks]
        counts = [np.bincount(part[part >= 0], minlength=num_items) for part in first]
        before = 0 if self._recommended is None else self._recommended
        self._recommended = before + np.stack(counts)

    def state(self) -> dict[str, NDArray[np.int64]]:
        """One row a user by ascending id: columns user_id, target, above, tied, num_candidates."""
        return dict(zip(self.COLUMNS, self._rows(), strict=True))

    def merge(self, state: Mapping[str, ArrayLike]) -> None:
        """Add the users of another evaluator's `state()`; users already here stay as they are."""
        ranks = TargetRanks(*(np.asarray(state[name]) for name in self.COLUMNS[2:]))
        self.update(state["user_id"], state["target"], ranks)

    def gather(self) -> None:
        """Merge the users of all processes into every process.

        All processes must call it, also those without users; where `torch.distributed` is not
        initialised it does nothing.
        """
        if not (dist.is_available() and dist.is_initialized()):
            return
        parts: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(parts, (self._rows(), self._recommended))
        # by process, so every process keeps the same row of a repeated user
        self._parts = [rows for rows, _ in parts]
        counted = [counts for _, counts in parts if counts is not None]
        self._recommended = np.sum(counted, axis=0) if counted else None

    def compute(self) -> dict[str, float]:
        """Means over users of `per_user_metrics`, with `tie_rate` (the share of users whose target
        is tied with another item) and `num_users`. In several processes call `gather` first.

        Where recommendations were counted also `Coverage@k`, the share of the catalogue that is
        recommended to anybody, and `Gini@k` over the catalogue.

        Raises:
            UserError: there are no users, or one user has two different targets.
        """
        ranks = TargetRanks(*self._rows()[2:])
        if not len(ranks):
            raise UserError("no users were ranked: there is nothing to compute figures from")
        figures = per_user_metrics(ranks, self.ks, self.ties)
        means: dict[str, float] = {name: float(x.sum()) / len(ranks) for name, x in figures.items()}
        means["tie_rate"] = int((ranks.tied > 0).sum()) / len(ranks)
        means["num_users"] = len(ranks)
        if self._recommended is not None:
            for k, counts in zip(self.ks, self._recommended, strict=True):
                means |= {f"Coverage@{k}": coverage(counts), f"Gini@{k}": gini(counts)}
        return means

    def write_parquet(self, path: str | os.PathLike) -> None:
        """Write one row a user: the columns of `state()` (int64) and `rank` (float64), the expected
        position above + 1 + tied / 2. The file appears whole or not at all.
        """
        import pyarrow as pa
        import pyarrow.parquet as pq

        columns: dict[str, NDArray[Any]] = dict(self.state())
        columns["rank"] = columns["above"] + 1 + columns["tied"] / 2
        with atomic_write(path, "wb") as handle:
            pq.write_table(pa.table(columns), handle)

    def _rows(self) -> NDArray[np.int64]:
        """All rows (5, users), each user once, by ascending user id."""
        parts = self._parts or [np.empty((5, 0), dtype=np.int64)]
        rows = np.concatenate(parts, axis=1)
        rows = rows[:, np.argsort(rows[0], kind="stable")]  # stable: the first row of a user stays
        again = np.concatenate([[False], rows[0, 1:] == rows[0, :-1]])[: rows.shape[1]]
        moved = (again[1:] & (rows[1, 1:] != rows[1, :-1])).nonzero()[0]
        if len(moved):
            user, one, other = rows[0, moved[0]], rows[1, moved[0]], rows[1, moved[0] + 1]
            raise UserError(
                f"user {user} has two targets, items {one} and {other}: an evaluator holds one "
                "split, one target a user"
            )
        self._parts = [rows[:, ~again]]
        return self._parts[0]


def _check_options(ks: Sequence[int], ties: str) -> None:
    if ties not in TIES:
        raise UserError(f"ties is {ties!r}, expected one of {', '.join(TIES)}")
    if not all(isinstance(k, int) and k > 0 for k in ks) or len(set(ks)) != len(ks):
        raise UserError(f"ks are {list(ks)}, expected different positive integers")


def _to_numpy(values: torch.Tensor) -> NDArray[Any]:
    return values.detach().cpu().numpy()


def _int64(values: ArrayLike, name: str) -> NDArray[np.int64]:
    array = _to_numpy(values) if isinstance(values, torch.Tensor) else np.asarray(values)
    if array.ndim != 1 or (array.size and not np.issubdtype(array.dtype, np.integer)):
        raise UserError(
            f"{name} have shape {array.shape} and dtype {array.dtype}, expected integers in one "
            "dimension"
        )
    return array.astype(np.int64)


def _ids(values: ArrayLike, name: str, count: int) -> NDArray[np.int64]:
    ids = _int64(values, name)
    if len(ids) and not (ids.min() >= 0 and ids.max() < count):
        raise UserError(
            f"{name} reach from {ids.min()} to {ids.max()}, expected ids from 0 to {count - 1}"
        )
    return ids


def _same_length(name: str, got: int, expected: int) -> None:
    if got != expected:
        raise UserError(f"{name} have length {got}, expected {expected}, one a user")
