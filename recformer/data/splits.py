"""From interactions to histories to splits.

Sorting and grouping are Polars', so that millions of rows take seconds; only data preparation
imports this module.

Shapes: M interactions, U users, N items.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b

import numpy as np
import polars as pl

from recformer.data.processed import Sequences


@dataclass(frozen=True, eq=False)
class Interactions:
    """Who met what and when, in the order of the source.

    Attributes:
        users: int32 (M,), places in `user_names`.
        items: int32 (M,), places in `item_names`.
        times: int64 (M,), in whatever unit the source has.
        user_names, item_names: names in the order in which they first appear.
    """

    users: np.ndarray
    items: np.ndarray
    times: np.ndarray
    user_names: list[str]
    item_names: list[str]

    def __len__(self) -> int:
        return len(self.users)

    def frame(self) -> pl.DataFrame:
        """Columns user, item, time, one row an interaction."""
        return pl.DataFrame({"user": self.users, "item": self.items, "time": self.times})


@dataclass(frozen=True, eq=False)
class Histories:
    """The items of every user kept, oldest first.

    Attributes:
        sequences: U rows of item ids.
        user_names: in user id order: the order of each user's first interaction.
        item_names: in item id order: as met when going through the users one after the other, each
            user's interactions in the order of the source, before sorting by time.
        counts: users and interactions left out, and why.
    """

    sequences: Sequences
    user_names: list[str]
    item_names: list[str]
    counts: dict[str, int]


def count_duplicates(interactions: Interactions) -> int:
    """Interactions that repeat an earlier one: same user, item and time."""
    return len(interactions) - interactions.frame().n_unique() if len(interactions) else 0


def build_histories(
    interactions: Interactions,
    *,
    min_interactions: int = 1,
    user_sample_rate: float = 1.0,
    seed: int = 0,
) -> Histories:
    """Users with enough interactions, their items sorted by time.

    The sort is stable: at equal times the order of the source stands.

    Args:
        interactions: M interactions.
        min_interactions: users with fewer are left out.
        user_sample_rate: share of these users to keep, see `sample_users`.
        seed: of the sample.
    """
    counts = np.bincount(interactions.users, minlength=len(interactions.user_names))
    enough = counts >= min_interactions
    kept = enough.copy()
    if user_sample_rate < 1.0:
        candidates = np.flatnonzero(enough)
        names = [interactions.user_names[user] for user in candidates]
        kept[candidates] = sample_users(names, user_sample_rate, seed)

    user_ids = np.cumsum(kept, dtype=np.int64) - 1  # of the users kept; the others are filtered out
    frame = interactions.frame().filter(pl.Series(kept[interactions.users], dtype=pl.Boolean))
    by_user = frame.sort("user", maintain_order=True)
    met = by_user["item"].unique(maintain_order=True).to_numpy()
    item_ids = np.empty(len(interactions.item_names), dtype=np.int32)
    item_ids[met] = np.arange(len(met), dtype=np.int32)

    by_time = by_user.sort("user", "time", maintain_order=True)
    kept_users = np.flatnonzero(kept)
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
            "users_not_sampled": int((enough & ~kept).sum()),
            "users_kept": len(kept_users),
            "interactions_kept": len(by_time),
        },
    )


def sample_users(names: Sequence[str], rate: float, seed: int) -> np.ndarray:
    """Which users a sample of about `rate` of them keeps, bool (len(names),).

    A user is drawn by a hash of the seed and its name: the same seed draws the same users whatever
    else is in the file, in every category, and a smaller rate draws some of a larger rate's.
    """
    key = str(seed).encode()
    draws = (
        int.from_bytes(blake2b(name.encode(), digest_size=8, key=key).digest(), "big")
        for name in names
    )
    return np.fromiter((draw < rate * 2**64 for draw in draws), dtype=bool, count=len(names))


def leave_one_out(histories: Sequences) -> tuple[Sequences, Sequences, Sequences]:
    """Split every history: the last item to test, the one before to validation, the rest to train.

    A history of fewer than three items goes to train alone.

    Returns:
        train, val, test with one row a user each.
    """
    lengths = histories.lengths
    from_end = np.repeat(histories.offsets[1:], lengths) - np.arange(len(histories.items))
    held_out = np.repeat(lengths >= 3, lengths)
    parts = (~held_out | (from_end > 2), held_out & (from_end == 2), held_out & (from_end == 1))
    rows = histories.rows
    train, val, test = (
        Sequences.from_rows(rows[part], histories.items[part], len(histories)) for part in parts
    )
    return train, val, test
