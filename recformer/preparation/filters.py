"""Interactions that a preparation leaves out: duplicates, repeats, and what is outside a k-core."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import numpy as np
import polars as pl

from recformer.preparation.log_arrays import Interactions, LogPiece


class Log(Protocol):
    """Interactions that can be gone through by users: in memory, or in files."""

    @property
    def item_names(self) -> list[str]:
        """Names of the items' codes."""

    def pieces(self) -> Iterator[LogPiece]:
        """All interactions, whole users at a time."""

    def empty(self, dtype: str) -> np.ndarray:
        """An array of zeros, one an interaction."""


def count_duplicates(log: Log) -> int:
    """Interactions that repeat an earlier one: same user, item and time."""
    return sum(
        len(piece.users) - _frame(piece).n_unique() for piece in log.pieces() if len(piece.users)
    )


def filter_interactions(
    interactions: Interactions,
    *,
    deduplicate: bool = False,
    drop_consecutive_repeats: bool = False,
    k_core: int = 0,
) -> tuple[Interactions, dict[str, int]]:
    """Leave interactions out, in the order of the arguments.

    Args:
        interactions: M interactions.
        deduplicate: keep the first of those with the same user, item and time; where the source
            has no times, of those with the same user and item.
        drop_consecutive_repeats: where a user, in order of time, meets the same item several times
            running, keep the first.
        k_core: leave out users and items with fewer interactions than this, again and again until
            none is left; 0 and 1 leave all in. What it leaves out may bring repeats together:
            where both are asked for, both go on until neither finds anything.

    Returns:
        What is left, with the codes of users and items as they were, and how many interactions
        each step that was asked for left out.
    """
    kept, counts = kept_of(
        interactions,
        deduplicate=deduplicate,
        drop_consecutive_repeats=drop_consecutive_repeats,
        k_core=k_core,
    )
    if kept is None:
        return interactions, counts
    return interactions.take(np.flatnonzero(kept)), counts


def kept_of(
    log: Log, *, deduplicate: bool, drop_consecutive_repeats: bool, k_core: int
) -> tuple[np.ndarray | None, dict[str, int]]:
    """Which interactions stay, bool (M,), and how many each step left out; None: all stay.

    The arguments are those of `filter_interactions`.
    """
    counts: dict[str, int] = {}
    if not (deduplicate or drop_consecutive_repeats or k_core > 1):
        return None, counts
    kept = log.empty("bool")
    kept[:] = True
    if deduplicate:
        counts["duplicates_removed"] = 0
        for piece in log.pieces():
            frame = _frame(piece).with_row_index("place")
            frame = frame.unique(["user", "item", "time"], keep="first")
            kept[piece.where] = False
            kept[piece.where][frame["place"].to_numpy()] = True
            counts["duplicates_removed"] += len(piece.users) - len(frame)
    if drop_consecutive_repeats:
        counts["consecutive_repeats_removed"] = 0
    if k_core > 1:
        counts["interactions_outside_k_core"] = 0
    found = 1
    while found:
        found = 0
        if drop_consecutive_repeats:
            repeats = _drop_repeats(log, kept)
            counts["consecutive_repeats_removed"] += repeats
            found += repeats
        if k_core > 1:
            outside = _keep_core(log, kept, k_core)
            counts["interactions_outside_k_core"] += outside
            found += outside
    return kept, counts


def _frame(piece: LogPiece) -> pl.DataFrame:
    return pl.DataFrame({"user": piece.users, "item": piece.items, "time": piece.times})


def _drop_repeats(log: Log, kept: np.ndarray) -> int:
    """Leave out what repeats the item before it; number of these."""
    number = 0
    for piece in log.pieces():
        places = np.flatnonzero(kept[piece.where])
        users, items, times = (column[places] for column in (piece.users, piece.items, piece.times))
        order = np.lexsort((times, users))  # stable: at equal times the order of the source
        users, items = users[order], items[order]
        repeats = order[1:][(users[1:] == users[:-1]) & (items[1:] == items[:-1])]
        kept[piece.where][places[repeats]] = False
        number += len(repeats)
    return number


def _keep_core(log: Log, kept: np.ndarray, k: int) -> int:
    """Leave out users and items with fewer than k interactions until none is left; number of
    interactions left out."""
    number = 0
    while True:
        of_items = np.zeros(len(log.item_names), dtype=np.int64)
        for piece in log.pieces():
            of_items += np.bincount(piece.items[kept[piece.where]], minlength=len(of_items))
        found = 0
        for piece in log.pieces():
            own = kept[piece.where]  # a view
            of_users = np.bincount(piece.users[own], minlength=piece.num_users)
            small = own & ((of_users[piece.users] < k) | (of_items[piece.items] < k))
            own[small] = False
            found += int(small.sum())
        if not found:
            return number
        number += found
