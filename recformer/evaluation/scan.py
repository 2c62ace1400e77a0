"""Users passed over a table of item vectors, once, whatever is asked of their scores.

A matrix product gives the scores of a block of users and a chunk of items to every reader, in
float32 or of vectors in bfloat16, with the largest error that they can have. What a reader cannot
decide from them it has computed exactly, pair by pair. So ranks and recommendations cost one
product together, and are exact.

Shapes: B users, b of a block, N items, C of a chunk, H hidden size, P pairs (user, item).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from recformer import products
from recformer.evaluation.additions import Additions, PairTerms
from recformer.evaluation.exact import (
    CHUNK_ELEMENTS,
    MIN_NORM,
    PAIR_ELEMENTS,
    USER_BLOCK,
    _checked_norms,
    _checked_users,
    _flat,
    _full_float32,
    _read,
    _rounding,
    _user_blocks,
    bfloat16_rounding,
    of_length_one,
    pair_scores,
)
from recformer.evaluation.ranks import Pairs, Vectors, check_length, checked_pairs
from recformer.files import UserError

STRETCH = 64  # neighbouring items of which only the best is looked at first
MANY_STRETCHES = 1 / 4  # of all: to copy them would cost more than to read all
ROUND = STRETCH  # chunks are multiples of it, which suits kernels too
DEVICE_CHUNKS = 32  # of the CPU's in one of a GPU, where starting a kernel costs more than memory
MANY_ITEMS = 2**11  # of a chunk, from which on compiling a product for them pays
MOST_ITEMS = 2**24  # of a chunk: up to here float32 counts exactly


@dataclass(frozen=True)
class Chunk:
    """Some items that follow each other.

    Attributes:
        start: id of the first.
        items: (C, H) float32.
        largest: of their scores for users of length 1.
        rounding: largest error of a score that readers are shown, relative to `largest`.
        cosine: whether scores are divided by the norms of the items.
        factors: (C,) float32 that make scores cosines, where those shown are of `bfloat16_units`.
    """

    start: int
    items: torch.Tensor
    largest: float
    rounding: float
    cosine: bool
    factors: torch.Tensor | None = None

    @property
    def error(self) -> float:
        """Largest distance of a score that is shown from the exact one."""
        return self.largest * self.rounding

    @property
    def double_rounding(self) -> float:
        """As `rounding`, of the scores of `double`."""
        return _rounding(self.items.shape[1], 2.0**-53)

    def finer(self) -> list[tuple[Callable[[torch.Tensor], torch.Tensor], float]]:
        """Products of users (n, H) float64 with less error than the scores shown, and the error."""
        double = self.double, self.largest * self.double_rounding
        if self.factors is None:
            return [double]
        return [(self._single, self.largest * _rounding(2 * self.items.shape[1], 2.0**-24)), double]

    def _single(self, users: torch.Tensor) -> torch.Tensor:
        """Cosines (n, C) float32 of users (n, H)."""
        assert self.factors is not None
        return (users.float() @ self.items.T) * self.factors

    def double(self, users: torch.Tensor) -> torch.Tensor:
        """Scores (n, C) of users (n, H), both float64; of the items a few MB at a time."""
        scores = users.new_empty(len(users), len(self.items))
        step = max(1, CHUNK_ELEMENTS // max(self.items.shape[1], 1))
        for start in range(0, len(self.items), step):
            items = self.items[start : start + step]
            part = users @ items.double().T
            if self.cosine:
                norms = torch.linalg.vector_norm(items, dim=1, dtype=torch.float64)
                part /= norms.clamp(min=MIN_NORM)
            scores[:, start : start + step] = part
        return scores


@dataclass(frozen=True)
class Scores:
    """Scores in stretches of neighbouring items, of which readers look at the best first.

    Most stretches hold nothing that a reader wants, so scores are gone through once, for the best
    of each stretch, whatever the number of readers.

    Attributes:
        all: (n, C).
        best: (n, S) of each stretch; S x W = C.
    """

    all: torch.Tensor
    best: torch.Tensor

    @classmethod
    def of(cls, scores: torch.Tensor) -> Scores:
        """Scores (n, C) with the best of each stretch."""
        count = scores.shape[1]
        width = STRETCH if count % STRETCH == 0 else count
        return cls(scores, scores.view(len(scores), -1, width).amax(dim=2))

    def reaching(self, floor: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Stretches whose best score reaches a floor (n, 1); where they are many, whole rows.

        Returns:
            Rows (P,), ids of first items (P,) counted from the chunk's, and scores (P, W).
        """
        count = self.best.shape[1]
        place = _flat(self.best >= floor)
        if len(place) > MANY_STRETCHES * self.best.numel():
            row = torch.arange(len(self.all), device=self.all.device)
            return row, torch.zeros_like(row), self.all
        row = place // count
        scores = self.all.view(self.best.numel(), -1)
        return row, (place - row * count) * scores.shape[1], scores.index_select(0, place)


class Reader(Protocol):
    """What looks at scores: it counts them, or keeps the best."""

    def look(self, block: slice, scores: Scores, chunk: Chunk) -> None:
        """Take the scores of a block of users and a chunk of items.

        Args:
            block: of the users.
            scores: (b, C) float32, off by `chunk.error` at most; -inf for pairs that are hidden,
                and for those with a term. Not to be changed.
            chunk: the items.
        """

    def close(self) -> None:
        """All items have been looked at."""


class Scan:
    """Users and a table of items, checked.

    The length of a user's vector does not change the order of items, so users are of length 1 here
    and one error bound serves them all; terms of dot products are divided by it.

    Args:
        user_vectors, item_vectors, chunk_size, cosine, additions: as in `rank_by_vectors`; a table
            in pieces that says where they begin (`borders`) is read piece by piece.
        seen: pairs (rows, cols) that are hidden.
        offered: (N,) false for items that are hidden from everybody; None: none is.
        norms: (N,) `item_norms` of the items, None: computed.
        units: (N, H) `bfloat16_units` of the items, whose products readers are shown in place of
            those of the items. Needs `norms`; used for cosines, on the CPU, which sums in float32.

    Attributes:
        vectors: (B, H) float64, of length 1.
        lengths: (B,) float64, by which terms are divided; 1 with `cosine`.
        terms: of the pairs that have one, hidden ones included.
        apart: those terms that are not of hidden pairs.
        device: of the users, where the work is done.

    Raises:
        UserError: as `rank_by_vectors`; `offered` or `norms` of another length than the items.
    """

    def __init__(
        self,
        user_vectors: Vectors,
        item_vectors: Vectors,
        seen: Pairs | None = None,
        chunk_size: int | None = None,
        cosine: bool = True,
        additions: Additions | None = None,
        offered: NDArray[np.bool_] | None = None,
        norms: Vectors | None = None,
        units: Vectors | None = None,
    ) -> None:
        users = _checked_users(user_vectors, item_vectors)
        self.device = users.device
        self.num_users, self.num_items = len(users), int(item_vectors.shape[0])
        for name, values in (("offered", offered), ("norms", norms), ("units", units)):
            if values is not None:
                check_length(name, len(values), self.num_items, "an item")
        self.items, self.cosine = item_vectors, cosine
        if units is not None and norms is None:
            raise UserError("units are given without norms, expected both")
        self._offered, self._norms = offered, norms
        self._units = units if cosine and self.device.type == "cpu" else None
        self._chunk_size = self._checked_chunk_size(chunk_size, users.shape[1])
        rows, cols = checked_pairs(seen, self.num_users, self.num_items)
        self.terms = PairTerms.of(additions, self.num_users, self.num_items)
        self.apart = self.terms.without(rows, cols)
        if offered is not None:
            self.apart = self.apart.where(offered[self.apart.cols])
        self._hidden = np.append(rows, self.terms.rows), np.append(cols, self.terms.cols)
        self.blocks = _user_blocks(self.num_users)
        with _full_float32(self.device):
            parts = [of_length_one(users[block], block.start) for block in self.blocks]
        empty = users[:0].double()
        self.vectors = torch.cat([vectors for vectors, _ in parts] or [empty])
        self.lengths = torch.cat([lengths for _, lengths in parts] or [empty[:, 0]])
        if cosine:
            self.lengths = torch.ones_like(self.lengths)

    def _checked_chunk_size(self, chunk_size: int | None, hidden: int) -> int:
        if chunk_size is not None:
            if chunk_size < 1:
                raise UserError(f"chunk_size is {chunk_size}, expected at least 1")
            return min(chunk_size, MOST_ITEMS)
        width = max(1, min(self.num_users, USER_BLOCK))
        ready = getattr(self.items, "dtype", None) == torch.float32
        if not (self._norms is not None and ready and self.items.device == self.device):
            width = max(width, hidden)
        # Else only scores take memory: few users see all items at once, and threads seldom wait.
        elements = CHUNK_ELEMENTS * (1 if self.device.type == "cpu" else DEVICE_CHUNKS)
        items = elements // width
        return max(1, items - items % ROUND)

    def run(self, readers: Sequence[Reader]) -> None:
        """Pass over the table once and show the scores to the readers."""
        hidden = int(self.items.shape[1])
        many = self.num_users > hidden  # then it costs less to scale items than scores
        parts = list(_parts(self.num_items, self._chunk_size, getattr(self.items, "borders", ())))
        starts = np.array([part.start for part in parts] + [self.num_items])
        hiding = [_Hidden.of(*self._hidden, block, starts, self.device) for block in self.blocks]
        users = self.vectors.float()
        size = self._chunk_size * min(self.num_users, USER_BLOCK)
        scored = torch.empty(size, device=self.device)
        with _full_float32(self.device):
            for number, part in enumerate(parts):
                chunk, factors = self._chunk(part)
                items = chunk.items
                if factors is not None and many:
                    items, factors = items * factors[:, None], None
                left_out = self._left_out(part)
                for block, pairs in zip(self.blocks, hiding, strict=True):
                    shape = (block.stop - block.start, len(items))
                    scores = scored[: shape[0] * shape[1]].view(shape)
                    if self._units is not None:
                        units: Any = self._units[part]
                        rounded = users[block].to(units.dtype)
                        if len(users) == 1:  # half the time of a product with a matrix
                            scores[0] = torch.mv(units, rounded[0])
                        else:
                            scores.copy_((units @ rounded.T).T)
                    else:
                        _multiply(users[block], items, scores)
                    if factors is not None:
                        scores *= factors
                    if left_out is not None:
                        scores.masked_fill_(left_out, -torch.inf)
                    pairs.hide(scores, number, part.start)
                    looked_at = Scores.of(scores)
                    for reader in readers:
                        reader.look(block, looked_at, chunk)
            for reader in readers:
                reader.close()

    def _chunk(self, part: slice) -> tuple[Chunk, torch.Tensor | None]:
        """Some items, and the factors (C,) float32 that make their scores cosines."""
        items = _read(self.items, part, self.device)
        hidden = items.shape[1]
        if self._units is not None:
            assert self._norms is not None
            own = _read(self._norms, part, self.device).clamp(min=MIN_NORM).reciprocal()
            return Chunk(part.start, items, 1.0, bfloat16_rounding(hidden), True, own), None
        if self._norms is None:
            norms = _checked_norms(items, "item", part.start)
            rounding = _rounding(hidden, 2.0**-24)
        else:  # whose rounding comes on top
            norms = _read(self._norms, part, self.device)
            rounding = _rounding(2 * hidden, 2.0**-24)
        largest = 1.0 if self.cosine else float(norms.max())
        factors = norms.clamp(min=MIN_NORM).reciprocal().float() if self.cosine else None
        return Chunk(part.start, items, largest, rounding, self.cosine), factors

    def _left_out(self, part: slice) -> torch.Tensor | None:
        """(C,) true for the items that are not offered."""
        if self._offered is None or self._offered[part].all():
            return None
        return torch.from_numpy(~self._offered[part]).to(self.device)

    def exact(self, rows: NDArray[np.int64], cols: NDArray[np.int64]) -> torch.Tensor:
        """Scores (P,) float64 of pairs with their terms, for users of length 1.

        The same bits for a pair whatever it is computed with.
        """
        users = torch.from_numpy(rows).to(self.device)
        step = max(1, PAIR_ELEMENTS // max(self.vectors.shape[1], 1))
        parts = [
            pair_scores(
                self.vectors[users[start : start + step]],
                _read(self.items, cols[start : start + step], self.device),
                self.cosine,
            )
            for start in range(0, len(rows), step)
        ]
        scores = torch.cat(parts or [self.lengths[:0]])
        terms = torch.from_numpy(self.terms.at(rows, cols)).to(self.device)
        return scores + terms / self.lengths[users]


def _multiply(users: torch.Tensor, items: torch.Tensor, scores: torch.Tensor) -> None:
    """Products of users (b, H) and items (C, H) into scores (b, C)."""
    many = len(items) >= MANY_ITEMS and users.device.type == "cpu"
    if many and products.torch_is_slow():
        products.mm(users, items.T, out=scores)
    elif len(users) == 1:  # read as it lies, at the speed of memory
        torch.mv(items, users[0], out=scores[0])
    else:
        torch.mm(users, items.T, out=scores)


@dataclass(frozen=True)
class _Hidden:
    """Pairs of a block of users whose scores are not shown.

    Attributes:
        rows, cols: (P,) int64 sorted by item, rows counted from the block's first user.
        places: where the pairs of each chunk begin, and where those of the last end.
    """

    rows: torch.Tensor
    cols: torch.Tensor
    places: list[int]

    @classmethod
    def of(
        cls, rows: NDArray, cols: NDArray, block: slice, starts: NDArray, device: torch.device
    ) -> _Hidden:
        mine = np.flatnonzero((rows >= block.start) & (rows < block.stop))
        mine = mine[np.argsort(cols[mine], kind="stable")]
        places = np.searchsorted(cols[mine], starts).tolist()
        return cls(
            torch.from_numpy(rows[mine] - block.start).to(device),
            torch.from_numpy(cols[mine]).to(device),
            places,
        )

    def hide(self, scores: torch.Tensor, chunk: int, start: int) -> None:
        """Write -inf to the pairs of a chunk that begins with item `start`."""
        low, high = self.places[chunk : chunk + 2]
        if low < high:
            scores[self.rows[low:high], self.cols[low:high] - start] = -torch.inf


def _parts(count: int, most: int, borders: Sequence[int]) -> Iterator[slice]:
    """Slices of at most so many items, none across a border of a table that lies in pieces."""
    for first, last in pairwise([0, *borders, count]):
        for start in range(first, last, most):
            yield slice(start, min(start + most, last))
