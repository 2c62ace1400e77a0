"""From interactions to histories to splits.

Sorting and grouping are Polars', so that millions of rows take seconds; only data preparation
imports this module.

Shapes: M interactions, U users, N items.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b
from typing import Any

import numpy as np
import polars as pl

from recformer.data.processed import Sequences
from recformer.files import UserError


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
    user_names: list[str]
    item_names: list[str]
    has_times: bool = True
    first_unknown: str | None = None
    owners: np.ndarray | None = None
    extra: pl.DataFrame | None = None

    def __len__(self) -> int:
        return len(self.users)

    def frame(self) -> pl.DataFrame:
        """Columns user, item, time, one row an interaction."""
        return pl.DataFrame({"user": self.users, "item": self.items, "time": self.times})

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
    """

    sequences: Sequences
    user_names: list[str]
    item_names: list[str]
    counts: dict[str, int]
    times: np.ndarray | None = None
    owners: np.ndarray | None = None
    extra: pl.DataFrame | None = None
    context: np.ndarray | None = None


def count_duplicates(interactions: Interactions) -> int:
    """Interactions that repeat an earlier one: same user, item and time."""
    return len(interactions) - interactions.frame().n_unique() if len(interactions) else 0


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
    enough = counts >= min_interactions
    kept = enough.copy()
    if user_sample_rate < 1.0:
        candidates = np.flatnonzero(enough)
        names = [interactions.user_names[user] for user in candidates]
        kept[candidates] = sample_users(names, user_sample_rate, seed)
    over_maximum = 0
    if max_users is not None and kept.sum() > max_users:
        candidates = np.flatnonzero(kept)
        names = [interactions.user_names[user] for user in candidates]
        over_maximum = len(candidates) - max_users
        kept[candidates] = draw_names(names, max_users, seed)

    user_ids = np.cumsum(kept, dtype=np.int64) - 1  # of the users kept; the others are filtered out
    frame = interactions.frame()
    if interactions.extra is not None:
        frame = frame.hstack(interactions.extra)
    frame = frame.filter(pl.Series(kept[interactions.users], dtype=pl.Boolean))
    by_user = frame.sort("user", maintain_order=True)
    met = by_user["item"].unique(maintain_order=True).to_numpy()
    item_ids = np.empty(len(interactions.item_names), dtype=np.int32)
    item_ids[met] = np.arange(len(met), dtype=np.int32)

    by_time = by_user.sort("user", "time", maintain_order=True)
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
        user_names=[interactions.user_names[user] for user in kept_users],
        item_names=[interactions.item_names[item] for item in met],
        counts={
            "users": len(counts),
            "users_with_too_few_interactions": int((~enough).sum()),
            "users_not_sampled": int((enough & ~kept).sum()) - over_maximum,
            **({} if max_users is None else {"users_over_max_users": over_maximum}),
            "users_kept": len(kept_users),
            "interactions_kept": len(by_time),
        },
        times=by_time["time"].to_numpy() if interactions.has_times else None,
        owners=owners,
        extra=None if interactions.extra is None else by_time.select(interactions.extra.columns),
    )


def sample_users(names: Sequence[str], rate: float, seed: int) -> np.ndarray:
    """Users that a sample of about `rate` of them keeps, bool (len(names),).

    A user is drawn by a hash of the seed and its name: the same seed draws the same users whatever
    else is in the file, in every category, and a smaller rate draws some of a larger rate's.
    """
    return _draws(names, seed) < rate


def draw_names(names: Sequence[str], number: int, seed: int) -> np.ndarray:
    """Names that a seeded draw of exactly `number` of them keeps, bool (len(names),).

    All of them where there are no more. Drawn by hash like `sample_users`, so that neither order
    nor the other names matter.
    """
    chosen = np.zeros(len(names), dtype=bool)
    chosen[np.argsort(_draws(names, seed), kind="stable")[:number]] = True
    return chosen


def _draws(names: Sequence[str], seed: int) -> np.ndarray:
    """A number from 0 to 1 for every name, float64."""
    key = str(seed).encode()
    draws = (
        int.from_bytes(blake2b(name.encode(), digest_size=8, key=key).digest(), "big") / 2**64
        for name in names
    )
    return np.fromiter(draws, dtype=np.float64, count=len(names))


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
    counts = {}
    kept = np.arange(len(interactions))
    if deduplicate:
        frame = interactions.frame().with_row_index("place")
        frame = frame.unique(["user", "item", "time"], keep="first", maintain_order=True)
        kept = frame["place"].to_numpy().astype(np.int64)
        counts["duplicates_removed"] = len(interactions) - len(kept)
    if drop_consecutive_repeats:
        counts["consecutive_repeats_removed"] = 0
    if k_core > 1:
        counts["interactions_outside_k_core"] = 0
    before = None
    while len(kept) != before:
        before = len(kept)
        if drop_consecutive_repeats:
            kept = _first_of_repeats(interactions, kept)
            counts["consecutive_repeats_removed"] += before - len(kept)
        if k_core > 1:
            with_small = len(kept)
            kept = _k_core(interactions, kept, k_core)
            counts["interactions_outside_k_core"] += with_small - len(kept)
    return interactions.take(kept), counts


def _first_of_repeats(interactions: Interactions, kept: np.ndarray) -> np.ndarray:
    users, items, times = (
        column[kept] for column in (interactions.users, interactions.items, interactions.times)
    )
    order = np.lexsort((times, users))  # stable: at equal times the order of the source
    users, items = users[order], items[order]
    repeats = np.zeros(len(kept), dtype=bool)
    repeats[order[1:]] = (users[1:] == users[:-1]) & (items[1:] == items[:-1])
    return kept[~repeats]


def _k_core(interactions: Interactions, kept: np.ndarray, k: int) -> np.ndarray:
    while True:
        users, items = interactions.users[kept], interactions.items[kept]
        enough = (np.bincount(users)[users] >= k) & (np.bincount(items)[items] >= k)
        if enough.all():
            return kept
        kept = kept[enough]


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

    def sequences(self, histories: Sequences) -> tuple[Sequences, Sequences, Sequences]:
        """train, val, test with one row a user each."""
        rows = histories.rows
        train, val, test = (
            Sequences.from_rows(
                rows[self.parts == part], histories.items[self.parts == part], len(histories)
            )
            for part in (TRAIN, VAL, TEST)
        )
        return train, val, test


def split_leave_one_out(
    histories: Histories, *, val_users: int | None = None, val_seed: int = 42
) -> Split:
    """The last item of a history to test, the one before to validation, the rest to train.

    A history of fewer than three items goes to train alone.

    Args:
        histories: U users.
        val_users: only a seeded draw of this many users validates; the item before the last of the
            others stays in train (gSASRec, RecSys 2023, section 5.1). None: every user validates.
        val_seed: of the draw.
    """
    sequences = histories.sequences
    lengths = sequences.lengths
    from_end = _from_end(sequences)
    long_enough = lengths >= 3
    validates = long_enough.copy()
    about: dict[str, Any] = {"name": "leave_one_out"}
    if val_users is not None:
        candidates = np.flatnonzero(long_enough)
        names = [histories.user_names[user] for user in candidates]
        validates[candidates] = draw_names(names, val_users, val_seed)
        about |= {"val_users": val_users, "val_seed": val_seed}
    parts = np.full(len(sequences.items), TRAIN, dtype=np.int8)
    parts[np.repeat(validates, lengths) & (from_end == 2)] = VAL
    parts[np.repeat(long_enough, lengths) & (from_end == 1)] = TEST
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
    test_cut = _cut(times, test_quantile, "--test_quantile")
    before = times < test_cut
    val_cut = _cut(times[before], val_quantile, "--val_quantile")
    parts = np.full(len(times), TEST, dtype=np.int8)
    parts[before] = VAL
    parts[times < val_cut] = TRAIN
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


def hold_out_items(histories: Histories, split: Split, *, share: float, seed: int) -> Split:
    """Keep a seeded draw of items out of training and make them targets of val and test.

    Cold items leave every training sequence. The rest goes by what was split before:

    Leave-one-out: a user with cold items is tested on the last of them; what comes later is left
    out, what lies between it and the cold item before it is history of the test only. That earlier
    cold item is the validation target, where there is none the item before the last. Of the users
    with a single cold item and something after it, a seeded half validates on it instead and is
    tested on their last item. Users who do not validate (`val_users`) are tested only.

    Temporal: a user's items after a cut end at the last cold one, where there is one.

    Args:
        histories: U users, N items.
        split: leave-one-out or temporal.
        share: of the N items, rounded, at least one.
        seed: of the draws of items and users.

    Raises:
        UserError: nothing is left to train on.
    """
    sequences = histories.sequences
    number = max(1, round(share * len(histories.item_names)))
    is_cold = draw_names(histories.item_names, number, seed)
    cold = is_cold[sequences.items]
    rows, places = sequences.rows, np.arange(len(sequences.items))
    parts = split.parts.copy()

    if split.about["name"] == "temporal":
        for part in (VAL, TEST):
            members = parts == part
            last = _last_place(places, rows, members & cold, len(sequences))[rows]
            parts[members & (last >= 0) & (places > last)] = DROPPED
    else:
        validates = np.zeros(len(sequences), dtype=bool)
        validates[rows[split.parts == VAL]] = True
        may_validate = validates if "val_users" in split.about else np.ones_like(validates)
        last = _last_place(places, rows, cold, len(sequences))
        earlier = _last_place(places, rows, cold & (places < last[rows]), len(sequences))
        ends = sequences.offsets[1:] - 1
        heads = np.zeros(len(sequences), dtype=bool)
        single = np.flatnonzero((last >= 0) & (earlier < 0) & (last < ends) & may_validate)
        # Half of the largest draw, not 0.5: where users were sampled by the same seed, the lowest
        # draws are all that is left.
        draws = _draws(histories.user_names, seed)
        heads[single] = draws[single] < draws[may_validate].max(initial=0) / 2

        # Where the test target and the validation target stand; -1: there is none.
        test_at = np.where(heads, ends, last)
        val_at = np.where(heads, last, earlier)
        warm_before = _last_place(places, rows, ~cold & (places < last[rows]), len(sequences))
        num_warm = np.bincount(rows[~cold & (places < last[rows])], minlength=len(sequences))
        val_at = np.where((val_at < 0) & (num_warm >= 2), warm_before, val_at)
        val_at = np.where(may_validate, val_at, -1)

        touched = (last >= 0)[rows]
        first_test = np.where(val_at >= 0, val_at + 1, test_at)
        new = np.full(len(parts), TRAIN, dtype=np.int8)
        new[places >= first_test[rows]] = TEST
        new[places == val_at[rows]] = VAL
        new[places > test_at[rows]] = DROPPED
        parts = np.where(touched, new, parts)

    cold_in_train = cold & (parts == TRAIN)
    parts[cold_in_train] = DROPPED
    if not (parts == TRAIN).any():
        raise UserError(
            f"--cold_items {share} leaves nothing to train on: name a smaller share of the items"
        )
    is_target = np.zeros(len(histories.item_names), dtype=bool)
    for part in (VAL, TEST):
        targets = _last_place(places, rows, parts == part, len(sequences))
        is_target[sequences.items[targets[targets >= 0]]] = True
    return Split(
        parts,
        {
            **split.about,
            "cold_items": share,
            "cold_seed": seed,
            "num_cold_items": number,
            "cold_items_that_are_targets": int((is_cold & is_target).sum()),
            "cold_interactions_taken_out_of_train": int(cold_in_train.sum()),
            "interactions_dropped": int((parts == DROPPED).sum()),
        },
    )


def _from_end(sequences: Sequences) -> np.ndarray:
    """1 for the last item of a row, 2 for the one before, …"""
    return np.repeat(sequences.offsets[1:], sequences.lengths) - np.arange(len(sequences.items))


def _last_place(
    places: np.ndarray, rows: np.ndarray, chosen: np.ndarray, num_rows: int
) -> np.ndarray:
    """The last chosen place of every row, -1 where none is chosen."""
    last = np.full(num_rows, -1, dtype=np.int64)
    last[rows[chosen]] = places[chosen]  # places ascend: the last one stays
    return last


def _cut(times: np.ndarray, quantile: float, flag: str) -> int:
    place = min(int(quantile * len(times)), len(times) - 1)
    cut = int(np.partition(times, place)[place])
    if cut == times.min():
        raise UserError(
            f"{flag} {quantile} leaves nothing before the cut at time {cut}: too many interactions "
            f"share one time, expected a larger share or data with real times"
        )
    return cut
