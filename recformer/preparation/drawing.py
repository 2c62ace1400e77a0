"""Draws by name: the same seed draws the same users and items, whatever else is in a file."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from hashlib import blake2b

import numpy as np


def draws_of(names: Iterable[str], seed: int) -> np.ndarray:
    """A number from 0 to 1 for every name, float64."""
    key = str(seed).encode()
    draws = (
        int.from_bytes(blake2b(name.encode(), digest_size=8, key=key).digest(), "big") / 2**64
        for name in names
    )
    return np.fromiter(draws, dtype=np.float64)


def sample_users(names: Iterable[str], rate: float, seed: int) -> np.ndarray:
    """Users that a sample of about `rate` of them keeps, bool (len(names),).

    A user is drawn by a hash of the seed and its name: the same seed draws the same users whatever
    else is in the file, in every category, and a smaller rate draws some of a larger rate's.
    """
    return draws_of(names, seed) < rate


def draw_names(names: Iterable[str], number: int, seed: int) -> np.ndarray:
    """Names that a seeded draw of exactly `number` of them keeps, bool (len(names),).

    All of them where there are no more. Drawn by hash like `sample_users`, so that neither order
    nor the other names matter.
    """
    draws = draws_of(names, seed)
    chosen = np.zeros(len(draws), dtype=bool)
    chosen[np.argsort(draws, kind="stable")[:number]] = True
    return chosen


def choose_users(
    names: Sequence[str],
    interactions: np.ndarray,
    *,
    min_interactions: int,
    user_sample_rate: float,
    seed: int,
    max_users: int | None,
) -> tuple[np.ndarray, dict[str, int]]:
    """Users that a preparation keeps, bool (U,), and counts of the others.

    Args:
        names: U users.
        interactions: of each, int64 (U,).
        min_interactions, user_sample_rate, seed, max_users: see `build_histories`.
    """
    enough = interactions >= min_interactions
    kept = enough.copy()
    if user_sample_rate < 1.0:
        kept[enough] = sample_users(chosen_names(names, enough), user_sample_rate, seed)
    over_maximum = 0
    if max_users is not None and kept.sum() > max_users:
        candidates = np.flatnonzero(kept)
        over_maximum = len(candidates) - max_users
        kept[candidates] = draw_names(chosen_names(names, kept), max_users, seed)
    return kept, {
        "users": len(interactions),
        "users_with_too_few_interactions": int((~enough).sum()),
        "users_not_sampled": int((enough & ~kept).sum()) - over_maximum,
        **({} if max_users is None else {"users_over_max_users": over_maximum}),
        "users_kept": int(kept.sum()),
        "interactions_kept": int(interactions[kept].sum()),
    }


def chosen_names(names: Iterable[str], chosen: np.ndarray) -> Iterable[str]:
    """Names where `chosen` is true, one at a time."""
    return (name for name, own in zip(names, chosen.tolist(), strict=True) if own)
