"""From scores to ranks, from ranks to figures: the one evaluator of the repository.

A model gives either scores over all items (`count_ranks`) or user and item vectors
(`rank_by_vectors`). Both answer with a `TargetRanks`: how many other items stand above a user's
target and how many are tied with it. The `Evaluator` keeps these counts, one row a user, and turns
them into figures as sums over users divided by their number, so that batch size, order and number
of processes cannot change a figure.

Shapes: B users, N items, C items of a chunk, H hidden size, P pairs (user, item), K rank cut-offs.
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
    scores = torch.as_tensor(scores)
    if scores.ndim != 2:
        raise UserError(f"scores have shape {tuple(scores.shape)}, expected (users, items)")
    device, (num_users, num_items) = scores.device, scores.shape
    target_ids = _ids(targets, "targets", num_items)
    _same_length("targets", len(target_ids), num_users)
    rows, cols, num_candidates = _not_compared(seen, target_ids, num_items)
    if scores.is_floating_point():
        bad = scores.isnan().any(dim=1).nonzero()
        if len(bad):
            raise UserError(f"the scores of row {int(bad[0])} hold NaN: they cannot be ranked")
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
    users = torch.as_tensor(user_vectors)
    if users.ndim != 2 or item_vectors.ndim != 2 or users.shape[1] != item_vectors.shape[1]:
        raise UserError(
            f"user vectors have shape {tuple(users.shape)} and item vectors "
            f"{tuple(item_vectors.shape)}, expected (users, hidden) and (items, hidden)"
        )
    device, (num_users, hidden) = users.device, users.shape
    num_items = item_vectors.shape[0]
    target_ids = _ids(targets, "targets", num_items)
    _same_length("targets", len(target_ids), num_users)
    if chunk_size is None:
        chunk_size = max(1, CHUNK_ELEMENTS // max(hidden, min(num_users, USER_BLOCK), 1))
    elif chunk_size < 1:
        raise UserError(f"chunk_size is {chunk_size}, expected at least 1")
    rows, cols, num_candidates = _not_compared(seen, target_ids, num_items)
    by_item = np.argsort(cols, kind="stable")  # the pairs of a chunk become one slice
    rows, cols = rows[by_item], cols[by_item]

    above = torch.zeros(num_users, dtype=torch.int64, device=device)
    tied = torch.zeros_like(above)
    blocks = [slice(i, min(i + USER_BLOCK, num_users)) for i in range(0, num_users, USER_BLOCK)]
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
                mine = (rows[low:high] >= block.start) & (rows[low:high] < block.stop)
                pairs = (
                    torch.from_numpy(rows[low:high][mine] - block.start).to(device),
                    torch.from_numpy(cols[low:high][mine] - start).to(device),
                )
                more_above, more_tied = _compare(side, items, norms, pairs)
                above[block] += more_above
                tied[block] += more_tied
    return TargetRanks(_to_numpy(above), _to_numpy(tied), num_candidates)


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
        users = users.to(torch.float32)
        _checked_norms(users, "user", first)
        vectors = users.double()
        tiny = torch.finfo(torch.float64).tiny  # a zero vector stays zero: all its items tie
        vectors = vectors / _ordered_norm(vectors).clamp(min=tiny)[:, None]
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


def _not_compared(
    seen: Pairs | None, targets: NDArray, num_items: int
) -> tuple[NDArray, NDArray, NDArray]:
    """Pairs (rows, cols) not to be counted, the targets included, and candidates a user (B,)."""
    num_users = len(targets)
    rows, cols = np.arange(num_users), targets
    if seen is None:
        return rows, cols, np.full(num_users, num_items, dtype=np.int64)
    seen_rows = _ids(seen[0], "rows of seen", num_users)
    seen_cols = _ids(seen[1], "cols of seen", num_items)
    _same_length("cols of seen", len(seen_cols), len(seen_rows))
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


class Evaluator:
    """Collects the rank of every user's target and computes figures over users.

    Rows are kept a user, 40 bytes each, and a user counts once: rows that come twice (the padding
    of a distributed sampler) are dropped by user id. Figures are sums over users in the order of
    their ids: the same to the last bit for any batch size, order and number of processes.

    Args:
        ks: cut-offs of NDCG, Recall and MRR.
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

    def update(self, user_ids: ArrayLike, targets: ArrayLike, ranks: TargetRanks) -> None:
        """Add users: their ids (B,), the item ids of their targets (B,) and where these stand."""
        users, items = _int64(user_ids, "user_ids"), _int64(targets, "targets")
        _same_length("user_ids", len(users), len(ranks))
        _same_length("targets", len(items), len(ranks))
        self._parts.append(np.stack([users, items, ranks.above, ranks.tied, ranks.num_candidates]))

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
        dist.all_gather_object(parts, self._rows())
        self._parts = parts  # by process, so every process keeps the same row of a repeated user

    def compute(self) -> dict[str, float]:
        """Means over users of `per_user_metrics`, with `tie_rate` (the share of users whose target
        is tied with another item) and `num_users`. In several processes call `gather` first.

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
