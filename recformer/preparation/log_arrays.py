"""Interactions and histories as arrays, in memory or in files, gone through piece by piece.

A piece has all of some users. In memory there is one, of all users; of what lies in files there are
as many as memory asks for, and every rule is applied to one after the other.

Shapes: M interactions, U users, N items.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import polars as pl

from recformer.data.sequences import Sequences

_BINS = 1 << 16


@dataclass
class Scratch:
    """Arrays in files of a folder, for what does not fit into memory.

    Attributes:
        folder: of the files.
        rows: interactions that are held in memory at once.
    """

    folder: Path
    rows: int
    _made: int = 0

    def array(self, length: int, dtype: str) -> np.ndarray:
        """A new array of zeros in a file."""
        self._made += 1
        if not length:
            return np.zeros(0, dtype)
        path = self.folder / f"array-{self._made}.bin"
        with open(path, "wb") as handle:
            # Room is taken now: of a full disk, a mapping would hear by a signal that kills.
            os.posix_fallocate(handle.fileno(), 0, length * np.dtype(dtype).itemsize)
        mapped = np.memmap(path, dtype, mode="r+", shape=(length,))  # type: ignore[call-overload]
        return np.asarray(mapped)


class LogPiece(NamedTuple):
    """Interactions of some users, in the order of the source.

    Attributes:
        where: their places in the log.
        users: int32, from 0: the first of them is `first_user` of the log.
        items: int32.
        times: int64.
        first_user, num_users: of the log's users.
    """

    where: slice
    users: np.ndarray
    items: np.ndarray
    times: np.ndarray
    first_user: int
    num_users: int


@dataclass(frozen=True, eq=False)
class Interactions:
    """Users, items and times of interactions, in the order of the source.

    Attributes:
        users: int32 (M,), places in `user_names`.
        items: int32 (M,), places in `item_names`.
        times: int64 (M,), in whatever unit the source has.
        user_names, item_names: names in the order in which they first appear.
        has_times: False where the source gives the order alone; `times` are zeros then.
        first_unknown: the first item of the source that is not known, for messages.
        owners: int32 (M,), the user of each interaction where `users` are sessions, -1 where the
            source names none; None: not asked for.
        extra: further columns of the source, M rows, as they stand there; None: none were asked
            for.
    """

    users: np.ndarray
    items: np.ndarray
    times: np.ndarray
    user_names: Sequence[str]
    item_names: list[str]
    has_times: bool = True
    first_unknown: str | None = None
    owners: np.ndarray | None = None
    extra: pl.DataFrame | None = None

    def __len__(self) -> int:
        return len(self.users)

    def pieces(self) -> Iterator[LogPiece]:
        """One piece."""
        yield LogPiece(
            slice(0, len(self)), self.users, self.items, self.times, 0, len(self.user_names)
        )

    def empty(self, dtype: str) -> np.ndarray:
        """An array of zeros, one an interaction."""
        return np.zeros(len(self), dtype)

    def take(self, kept: np.ndarray) -> Interactions:
        """Those at some places, int64, in that order; codes stay as they are."""
        return replace(
            self,
            users=self.users[kept],
            items=self.items[kept],
            times=self.times[kept],
            owners=None if self.owners is None else self.owners[kept],
            extra=None if self.extra is None else self.extra[kept],
        )


class HistoryPiece(NamedTuple):
    """Histories of some users.

    Attributes:
        users: their places among all users.
        entries: the places of their interactions in `Histories.sequences.items`.
        sequences: a row a user.
        times: int64, one an entry; None where the source has none.
    """

    users: slice
    entries: slice
    sequences: Sequences
    times: np.ndarray | None


@dataclass(frozen=True, eq=False)
class Histories:
    """The items of every user kept, oldest first.

    Attributes:
        sequences: U rows of item ids.
        user_names: in user id order: the order of each user's first interaction.
        item_names: in item id order: as met when going through the users one after the other, each
            user's interactions in the order of the source, before sorting by time.
        counts: users and interactions left out, and why.
        times: int64, of every entry of `sequences.items`; None where the source has none.
        owners: int32 (U,), the user of each sequence where sequences are sessions; None: unknown.
        extra: further columns, a row an entry of `sequences.items`; None: none were asked for.
        context: bool, of every entry of `sequences.items`: it belongs to an earlier session of the
            same user; None: none does.
        texts: of what lies in files, in place of `extra`: {column: (place of the text of every
            entry among all texts, int32; the texts)}.
        scratch: where the arrays lie, and more may be put; None: in memory.
    """

    sequences: Sequences
    user_names: Sequence[str]
    item_names: list[str]
    counts: dict[str, int]
    times: np.ndarray | None = None
    owners: np.ndarray | None = None
    extra: pl.DataFrame | None = None
    context: np.ndarray | None = None
    texts: dict[str, tuple[np.ndarray, pl.Series]] = field(default_factory=dict)
    scratch: Scratch | None = None

    def pieces(self) -> Iterator[HistoryPiece]:
        """All histories: at once, or as many as memory may hold."""
        offsets = self.sequences.offsets
        for start, stop in cut(offsets, None if self.scratch is None else self.scratch.rows):
            entries = slice(int(offsets[start]), int(offsets[stop]))
            yield HistoryPiece(
                slice(start, stop),
                entries,
                Sequences(
                    offsets[start : stop + 1] - offsets[start], self.sequences.items[entries]
                ),
                None if self.times is None else self.times[entries],
            )

    def array(self, length: int, dtype: str) -> np.ndarray:
        """A new array of zeros, where the others are."""
        return (
            np.zeros(length, dtype) if self.scratch is None else self.scratch.array(length, dtype)
        )


def cut(offsets: np.ndarray, rows: int | None) -> Iterator[tuple[int, int]]:
    """Users `start` to `stop` that have together as many interactions as fit, each of them whole.

    Args:
        offsets: int64 (U+1,), of the interactions of each user.
        rows: that fit; None: all of them. A user with more is a piece alone.
    """
    start, users = 0, len(offsets) - 1
    while start < users:
        stop = users
        if rows is not None:
            stop = int(np.searchsorted(offsets, offsets[start] + rows, side="right")) - 1
            stop = min(max(stop, start + 1), users)
        yield start, stop
        start = stop


def value_at(pieces: Callable[[], Iterable[np.ndarray]], place: int, held: int) -> int:
    """The value at a place of what all pieces would be if they were one and sorted.

    The range that it lies in is cut into bins until what is left in one can be sorted.

    Args:
        pieces: gives int64 arrays, the same ones whenever it is called.
        place: from 0.
        held: values that may be sorted at once.
    """
    first, last = _extremes(pieces())
    while first < last:
        inside = sum(int(((own >= first) & (own <= last)).sum()) for own in pieces())
        if inside <= held:
            chosen = [own[(own >= first) & (own <= last)] for own in pieces()]
            return int(np.partition(np.concatenate(chosen), place)[place])
        width = (last - first) // _BINS + 1
        counts = np.zeros(_BINS + 1, dtype=np.int64)
        for own in pieces():
            chosen_here = own[(own >= first) & (own <= last)]
            # Unsigned: times may lie as far apart as 64 bits allow.
            bins = (chosen_here.view(np.uint64) - np.uint64(first % 2**64)) // np.uint64(width)
            counts += np.bincount(bins.astype(np.int64), minlength=_BINS + 1)
        before = np.cumsum(counts)
        chosen_bin = int(np.searchsorted(before, place, side="right"))
        place -= int(before[chosen_bin] - counts[chosen_bin])
        first, last = first + chosen_bin * width, min(last, first + (chosen_bin + 1) * width - 1)
    return first


def _extremes(pieces: Iterable[np.ndarray]) -> tuple[int, int]:
    found = [(int(own.min()), int(own.max())) for own in pieces if len(own)]
    return min(low for low, _ in found), max(high for _, high in found)
