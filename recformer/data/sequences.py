"""Rows of item ids laid end to end: the form that histories and splits have in memory.

Shapes: U users (rows).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain

import numpy as np


@dataclass(frozen=True, eq=False)
class Sequences:
    """One list of item ids a user, all laid end to end.

    Attributes:
        offsets: int64 (U+1,); row u is `items[offsets[u]:offsets[u + 1]]`.
        items: int32 (offsets[-1],) item ids, oldest first within a row.
    """

    offsets: np.ndarray
    items: np.ndarray

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, row: int) -> np.ndarray:
        """Item ids of one row, int32, a view."""
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} of {len(self)}")
        return self.items[self.offsets[row] : self.offsets[row + 1]]

    def between(self, start: int, stop: int) -> Sequences:
        """Rows `start` to `stop`, a view."""
        offsets = self.offsets[start : stop + 1]
        return Sequences(offsets - offsets[0], self.items[offsets[0] : offsets[-1]])

    @property
    def lengths(self) -> np.ndarray:
        """Items a row, int64 (U,)."""
        return np.diff(self.offsets)

    @property
    def rows(self) -> np.ndarray:
        """Row of every item, int64 (offsets[-1],)."""
        return np.repeat(np.arange(len(self), dtype=np.int64), self.lengths)

    @classmethod
    def from_lists(cls, lists: Sequence[Sequence[int]]) -> Sequences:
        """Build from one list of item ids a row."""
        lengths = np.fromiter(map(len, lists), dtype=np.int64, count=len(lists))
        total = int(lengths.sum())
        items = np.fromiter(chain.from_iterable(lists), dtype=np.int32, count=total)
        return cls(offsets_of(lengths), items)

    @classmethod
    def from_rows(cls, rows: np.ndarray, items: np.ndarray, num_rows: int) -> Sequences:
        """Group `items` by `rows` (both (M,)); within a row the given order is kept."""
        lengths = np.bincount(rows, minlength=num_rows).astype(np.int64)
        items = np.asarray(items)
        if len(rows) and (np.diff(rows) < 0).any():
            items = items[np.argsort(rows, kind="stable")]
        return cls(offsets_of(lengths), items.astype(np.int32, copy=False))


def offsets_of(lengths: np.ndarray) -> np.ndarray:
    """Where each of some rows begins, and where the last one ends, int64 (U+1,)."""
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths, dtype=np.int64)])


def join_splits(*parts: Sequences) -> Sequences:
    """Every user's items of all the parts, one part after the other.

    Args:
        parts: all with one row a user.
    """
    lengths = [part.lengths for part in parts]
    offsets = offsets_of(np.sum(lengths, axis=0))
    items = np.empty(int(offsets[-1]), dtype=np.int32)
    begins = offsets[:-1].copy()
    for part, own in zip(parts, lengths, strict=True):
        # Every item moves as far as its row does.
        items[np.repeat(begins - part.offsets[:-1], own) + np.arange(len(part.items))] = part.items
        begins += own
    return Sequences(offsets, items)


class HistoryRows(Sequences):
    """Histories that lie in several parts, put together when they are asked for.

    Row e is everything of user `users[e]` in all the parts, one part after the other, but the last
    item. Lengths and single rows are read from the parts, which may be mapped files; `offsets` and
    `items` of all rows are laid out once somebody wants them.

    Args:
        parts: all with one row a user.
        users: int64 (E,), ascending, with two items or more in all the parts together and one or
            more in the last part.
    """

    def __init__(self, parts: Sequence[Sequences], users: np.ndarray) -> None:
        # A frozen dataclass: its fields are properties here.
        object.__setattr__(self, "parts", tuple(parts))
        object.__setattr__(self, "users", users)

    parts: tuple[Sequences, ...]
    users: np.ndarray

    def __len__(self) -> int:
        return len(self.users)

    def __getitem__(self, row: int) -> np.ndarray:
        """Item ids of one row, int32; a view where they lie in one part."""
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} of {len(self)}")
        user = int(self.users[row])
        *before, last = (part[user] for part in self.parts)
        pieces = [piece for piece in (*before, last[:-1]) if len(piece)]
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)

    def between(self, start: int, stop: int) -> HistoryRows:
        """Rows `start` to `stop`, a view."""
        return HistoryRows(self.parts, self.users[start:stop])

    @property
    def lengths(self) -> np.ndarray:
        """Items a row, int64 (E,)."""
        return np.sum([_lengths(part, self.users) for part in self.parts], axis=0) - 1

    @cached_property
    def offsets(self) -> np.ndarray:  # type: ignore[override]
        """int64 (E+1,)."""
        return offsets_of(self.lengths)

    @cached_property
    def items(self) -> np.ndarray:  # type: ignore[override]
        """int32 (offsets[-1],), of all rows, in memory of their own."""
        *before, last = self.parts
        chosen = [_rows(part, self.users, less=0) for part in before]
        return join_splits(*chosen, _rows(last, self.users, less=1)).items


def _lengths(part: Sequences, rows: np.ndarray) -> np.ndarray:
    """Items of some rows, int64 (E,), without a look at the others."""
    return part.offsets[rows + 1] - part.offsets[rows]


def _rows(part: Sequences, rows: np.ndarray, *, less: int) -> Sequences:
    """Some rows, each without its `less` last items."""
    lengths = _lengths(part, rows) - less
    offsets = offsets_of(lengths)
    places = np.repeat(part.offsets[rows] - offsets[:-1], lengths) + np.arange(offsets[-1])
    return Sequences(offsets, part.items[places])
