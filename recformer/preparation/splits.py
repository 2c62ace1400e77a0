"""From interactions to histories to splits.

Sorting and grouping are Polars', so that millions of rows take seconds; only data preparation
imports this module.

Shapes: M interactions, U users, N items.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl

from recformer.data.sequences import Sequences, offsets_of
from recformer.files import UserError
from recformer.preparation.drawing import choose_users, chosen_names, draw_names, sample_users
from recformer.preparation.log_arrays import Histories, Interactions, value_at

__all__ = [
    "DROPPED",
    "TEST",
    "TRAIN",
    "VAL",
    "Histories",
    "Interactions",
    "Split",
    "build_histories",
    "draw_names",
    "in_order",
    "sample_users",
    "split_leave_one_out",
    "split_temporal",
]


def build_histories(
    interactions: Interactions,
    *,
    min_interactions: int = 1,
    user_sample_rate: float = 1.0,
    seed: int = 0,
    max_users: int | None = None,
) -> Histories:
    """Users with enough interactions, their items sorted by time.

    The sort is stable: at equal times the order of the source stands.

    Args:
        interactions: M interactions.
        min_interactions: users with fewer are left out.
        user_sample_rate: share of these users to keep, see `sample_users`.
        seed: of the sample.
        max_users: at most this many of these users, those of the lowest draws.
    """
    counts = np.bincount(interactions.users, minlength=len(interactions.user_names))
    kept, left_out = choose_users(
        interactions.user_names,
        counts,
        min_interactions=min_interactions,
        user_sample_rate=user_sample_rate,
        seed=seed,
        max_users=max_users,
    )
    user_ids = np.cumsum(kept, dtype=np.int64) - 1  # of the users kept; the others are filtered out
    frame = pl.DataFrame(
        {"user": interactions.users, "item": interactions.items, "time": interactions.times}
    )
    if interactions.extra is not None:
        frame = frame.hstack(interactions.extra)
    frame = frame.filter(pl.Series(kept[interactions.users], dtype=pl.Boolean))
    met, by_time = in_order(frame)
    item_ids = np.empty(len(interactions.item_names), dtype=np.int32)
    item_ids[met] = np.arange(len(met), dtype=np.int32)

    kept_users = np.flatnonzero(kept)
    owners = None
    if interactions.owners is not None:
        owners = np.empty(len(counts), dtype=np.int32)
        owners[interactions.users[::-1]] = interactions.owners[::-1]  # the first one stays
        owners = owners[kept_users]
    return Histories(
        sequences=Sequences.from_rows(
            user_ids[by_time["user"].to_numpy()],
            item_ids[by_time["item"].to_numpy()],
            len(kept_users),
        ),
        user_names=list(chosen_names(interactions.user_names, kept)),
        item_names=[interactions.item_names[item] for item in met],
        counts=left_out,
        times=by_time["time"].to_numpy() if interactions.has_times else None,
        owners=owners,
        extra=None if interactions.extra is None else by_time.select(interactions.extra.columns),
    )


def in_order(frame: pl.DataFrame) -> tuple[np.ndarray, pl.DataFrame]:
    """Interactions by user and time.

    Args:
        frame: columns user, item, time and any others, in the order of the source.

    Returns:
        The items in the order in which they get their ids: as met when going through the users one
        after the other, each user's interactions in the order of the source. And the rows by user
        and time; at equal times the order of the source stands.
    """
    by_user = frame.sort("user", maintain_order=True)
    met = by_user["item"].unique(maintain_order=True).to_numpy()
    return met, by_user.sort("user", "time", maintain_order=True)


# The part of every interaction of `Histories.sequences.items`, int8.
DROPPED, TRAIN, VAL, TEST = -1, 0, 1, 2


@dataclass(frozen=True, eq=False)
class Split:
    """Part of each interaction: train, val, test or none.

    Every interaction has one part, so that none can be both tested on and trained on. Within a user
    train stands before val and val before test.

    Attributes:
        parts: int8, of every entry of `sequences.items`: DROPPED, TRAIN, VAL or TEST.
        about: name and parameters, what they came to and counts, for dataset.json.
    """

    parts: np.ndarray
    about: dict[str, Any]

    def sequences(self, histories: Histories) -> tuple[Sequences, Sequences, Sequences]:
        """train, val, test with one row a user each."""
        lengths = np.zeros((3, len(histories.sequences)), dtype=np.int64)
        for piece in histories.pieces():
            rows, parts = piece.sequences.rows, self.parts[piece.entries]
            for part in (TRAIN, VAL, TEST):
                found = np.bincount(rows[parts == part], minlength=len(piece.sequences))
                lengths[part, piece.users] = found
        offsets = [offsets_of(own) for own in lengths]
        items = [histories.array(int(own[-1]), "int32") for own in offsets]
        for piece in histories.pieces():
            parts = self.parts[piece.entries]
            for part in (TRAIN, VAL, TEST):
                begin, end = offsets[part][[piece.users.start, piece.users.stop]]
                items[part][begin:end] = piece.sequences.items[parts == part]
        train, val, test = map(Sequences, offsets, items)
        return train, val, test

    def kept(self, histories: Histories, values: np.ndarray) -> np.ndarray:
        """Of values, one an interaction, those that are in a part."""
        number = sum(
            int((self.parts[piece.entries] != DROPPED).sum()) for piece in histories.pieces()
        )
        kept = histories.array(number, values.dtype.str)
        done = 0
        for piece in histories.pieces():
            own = values[piece.entries][self.parts[piece.entries] != DROPPED]
            kept[done : done + len(own)] = own
            done += len(own)
        return kept


def split_leave_one_out(
    histories: Histories,
    *,
    val_users: int | None = None,
    val_seed: int = 42,
    val_draw: str = "names",
) -> Split:
    """The last item of a history to test, the one before to validation, the rest to train.

    A history of fewer than three items goes to train alone.

    Args:
        histories: U users.
        val_users: only a seeded draw of this many users validates; the item before the last of the
            others stays in train (gSASRec, RecSys 2023, section 5.1). None: every user validates.
        val_seed: of the draw.
        val_draw: "names", exactly so many, by their names alone; or "places", the published
            `numpy.random.RandomState(val_seed).choice(U, val_users)` of places in the order of the
            users, which draws some of them twice: they count once.
    """
    lengths = histories.sequences.lengths
    long_enough = lengths >= 3
    validates = long_enough.copy()
    about: dict[str, Any] = {"name": "leave_one_out"}
    if val_users is not None:
        about |= {"val_users": val_users, "val_seed": val_seed}
        if val_draw == "places":
            places = np.random.RandomState(val_seed).choice(len(lengths), val_users)
            validates &= np.isin(np.arange(len(lengths)), places)
            about["val_draw"] = val_draw
        else:
            names = chosen_names(histories.user_names, long_enough)
            validates[long_enough] = draw_names(names, val_users, val_seed)
    parts = histories.array(int(lengths.sum()), "int8")
    for piece in histories.pieces():
        own_lengths, from_end = piece.sequences.lengths, _from_end(piece.sequences)
        own = np.full(len(from_end), TRAIN, dtype=np.int8)
        own[np.repeat(validates[piece.users], own_lengths) & (from_end == 2)] = VAL
        own[np.repeat(long_enough[piece.users], own_lengths) & (from_end == 1)] = TEST
        parts[piece.entries] = own
    return Split(parts, about)


def split_temporal(
    histories: Histories, *, test_quantile: float = 0.9, val_quantile: float = 0.9
) -> Split:
    """One cut in time for all users: test from the cut on, train and validation before it.

    The cut is the time of the first interaction past `test_quantile` of all of them; the
    validation cut is found the same way among those before the test cut. Interactions of one time
    stay on one side. A user's last item after a cut is the target, the others are its history.

    Raises:
        UserError: the source has no times, or nothing is left on one side of a cut.
    """
    times = histories.times
    if times is None:
        raise UserError(
            "--split temporal needs times, the interactions have none: name their column with "
            "--time_column, or split leave_one_out"
        )
    test_cut = _cut(histories, len(times), test_quantile, "--test_quantile")
    before = sum(int((own < test_cut).sum()) for own in _times(histories))
    val_cut = _cut(histories, before, val_quantile, "--val_quantile")
    parts = histories.array(len(times), "int8")
    for piece in histories.pieces():
        assert piece.times is not None
        own = np.full(len(piece.times), TEST, dtype=np.int8)
        own[piece.times < test_cut] = VAL
        own[piece.times < val_cut] = TRAIN
        parts[piece.entries] = own
    return Split(
        parts,
        {
            "name": "temporal",
            "test_quantile": test_quantile,
            "val_quantile": val_quantile,
            "val_cut": val_cut,
            "test_cut": test_cut,
        },
    )


def _from_end(sequences: Sequences) -> np.ndarray:
    """1 for the last item of a row, 2 for the one before, …"""
    return np.repeat(sequences.offsets[1:], sequences.lengths) - np.arange(len(sequences.items))


def _times(histories: Histories) -> Iterator[np.ndarray]:
    for piece in histories.pieces():
        assert piece.times is not None
        yield piece.times


def _cut(histories: Histories, number: int, quantile: float, flag: str) -> int:
    """The time past a share of the earliest `number` of all times."""
    place = min(int(quantile * number), number - 1)
    held = len(histories.sequences.items) if histories.scratch is None else histories.scratch.rows
    cut = value_at(lambda: _times(histories), place, held)
    if cut == min(int(own.min()) for own in _times(histories) if len(own)):
        raise UserError(
            f"{flag} {quantile} leaves nothing before the cut at time {cut}: too many interactions "
            f"share one time, expected a larger share or data with real times"
        )
    return cut
