"""The catalogue as one reader sees it: rows of names and vectors that no change takes away.

Shapes: N items, H hidden, K rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

FIRST_BLOCK = 256  # rows of the first block of added items; each further block is twice as long


class Rows:
    """Rows of tables laid end to end, read in parts: never copied as a whole.

    Args:
        tables: (N0, …), (N1, …), …, on one device.
        rows: ascending rows of them all to keep; None keeps all.

    Attributes:
        borders: where tables after the first begin: a slice across one of them is a copy.
        dtype: of all tables, None where they differ or a slice is a copy anyway.
    """

    def __init__(self, tables: Sequence[Tensor], rows: NDArray[np.int64] | None = None) -> None:
        self.tables, self.rows = tables, rows
        self.starts = np.cumsum([0, *map(len, tables)])
        total = int(self.starts[-1]) if rows is None else len(rows)
        self.shape = (total, *tables[0].shape[1:])
        self.ndim = len(self.shape)
        self.device = tables[0].device
        dtypes = {table.dtype for table in tables}
        self.dtype = dtypes.pop() if rows is None and len(dtypes) == 1 else None
        self.borders = self.starts[1:-1].tolist() if rows is None else []

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, part: slice | NDArray[np.int64]) -> Tensor:
        if not isinstance(part, slice):
            return self._at(part if self.rows is None else self.rows[part])
        start, stop, _ = part.indices(self.shape[0])
        pieces = []
        for table, first in zip(self.tables, self.starts.tolist(), strict=False):
            if self.rows is None:
                piece = table[max(start - first, 0) : max(stop - first, 0)]
            else:
                borders = np.searchsorted(self.rows, (first, first + len(table)))
                low, high = borders.clip(min=start, max=stop)
                index = torch.from_numpy(self.rows[low:high] - first)
                piece = table[index.to(table.device)]
            if len(piece):
                pieces.append(piece)
        return pieces[0] if len(pieces) == 1 else torch.cat([*pieces, self.tables[0][:0]])

    def _at(self, rows: NDArray[np.int64]) -> Tensor:
        """Any rows of the tables, in their order."""
        order = np.argsort(rows, kind="stable")
        borders = np.searchsorted(rows[order], self.starts)
        index = torch.from_numpy(rows[order]).to(self.device)
        pieces = [
            table[index[low:high] - first]
            for table, first, low, high in zip(
                self.tables, self.starts.tolist(), borders, borders[1:], strict=False
            )
        ]
        place = np.empty_like(order)
        place[order] = np.arange(len(order))
        return torch.cat(pieces)[torch.from_numpy(place).to(self.device)]


class Blocks:
    """Rows (…, H) of one dtype that are added one after the other, in blocks that never move.

    A block is twice as long as the one before, so there are few, and nothing is copied when they
    grow. Rows are written once, behind what a reader sees.
    """

    def __init__(self, like: Tensor) -> None:
        self._like = like  # its width, dtype and device
        self._blocks: list[Tensor] = []
        self._filled = 0  # rows of the last block

    def append(self, rows: Tensor) -> None:
        """Add rows (K, H)."""
        while len(rows):
            last = self._blocks[-1] if self._blocks else self._like[:0]
            room = len(last) - self._filled
            if not room:
                size = max(2 * len(last), FIRST_BLOCK)
                width = self._like.shape[1:]
                new = torch.empty(size, *width, dtype=self._like.dtype, device=self._like.device)
                self._blocks.append(new)
                self._filled = 0
                continue
            taken = rows[:room]
            last[self._filled : self._filled + len(taken)] = taken
            self._filled += len(taken)
            rows = rows[room:]

    def tables(self) -> tuple[Tensor, ...]:
        """The filled rows, one table for each block."""
        if not self._blocks:
            return ()
        return (*self._blocks[:-1], self._blocks[-1][: self._filled])


@dataclass(frozen=True, eq=False)
class View:
    """The catalogue as one reader sees it, from beginning to end of a request.

    Rows are added, never taken away or used again: an item whose text changes gets another row.

    Attributes:
        names: of every row, in the order in which ties fall; longer by what came after this view.
        tables: vectors of the rows: of the model's item table, of the products beyond it that
            were there when it was loaded, and of what has been added since.
        norms: lengths of these vectors, float32, a table of them a table.
        units: these vectors with length 1 in bfloat16, for a quicker search; None: none are kept.
        gone: rows, ascending, that are no longer offered.
    """

    names: Sequence[str]
    tables: tuple[Tensor, ...]
    norms: tuple[Tensor, ...]
    units: tuple[Tensor, ...] | None
    gone: NDArray[np.int64]

    def __len__(self) -> int:
        return sum(map(len, self.tables))

    def at(self, rows: NDArray[np.int64]) -> Tensor:
        """(K, H) float32 vectors of any rows, in their order."""
        return Rows(self.tables)[rows].float()


@dataclass(frozen=True, eq=False)
class Offered:
    """Rows of a view that a request may be answered with.

    Attributes:
        only: these, ascending; None: all but `out`.
        out: ascending rows that are not offered; empty where `only` says all.
    """

    only: NDArray[np.int64] | None
    out: NDArray[np.int64]

    def mask(self, count: int) -> NDArray[np.bool_]:
        """(count,) true for the rows that are offered."""
        mask = np.full(count, self.only is None)
        if self.only is None:
            mask[self.out] = False
        else:
            mask[self.only] = True
        return mask


def places_among(
    rows: NDArray[np.int64], wanted: NDArray[np.int64]
) -> tuple[NDArray[np.bool_], NDArray[np.int64]]:
    """Mask of the rows that stand in the ascending `rows`, and their places there."""
    if not len(rows):
        return np.zeros(len(wanted), bool), np.zeros(len(wanted), np.int64)
    places = np.searchsorted(rows, wanted).clip(max=len(rows) - 1)
    return rows[places] == wanted, places
