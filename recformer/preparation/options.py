"""Filters and split of a preparation, and its histories."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from recformer.files import UserError
from recformer.preparation.bad_lines import BadLines
from recformer.preparation.splits import (
    Histories,
    Split,
    build_histories,
    count_duplicates,
    filter_interactions,
    hold_out_items,
    split_leave_one_out,
    split_temporal,
)
from recformer.preparation.tables import InteractionSource, ItemSource


@dataclass(frozen=True)
class Filters:
    """Filters beside the least number of interactions of a user.

    Attributes:
        min_rating: interactions rated lower.
        events: interactions of other types than these; none: all types stay.
        deduplicate, drop_consecutive_repeats, k_core: see `filter_interactions`.
        max_users: users beyond this many, by a seeded draw.
    """

    min_rating: float | None = None
    events: tuple[str, ...] = ()
    deduplicate: bool = False
    drop_consecutive_repeats: bool = False
    k_core: int = 0
    max_users: int | None = None

    def asked_for(self) -> dict[str, Any]:
        """The filters that are switched on, for dataset.json."""
        return {
            name: value for name, value in vars(self).items() if value not in (None, False, 0, ())
        }


@dataclass(frozen=True)
class SplitOptions:
    """Options of a split, see `recformer.preparation.splits`.

    Attributes:
        split: name of the split.
        test_quantile, val_quantile: of the temporal split.
        cold_items: share of the items to hold out; None: none.
        val_users, val_seed: of leave-one-out; None: all validate.
    """

    split: Literal["leave_one_out", "temporal"] = "leave_one_out"
    test_quantile: float = 0.9
    val_quantile: float = 0.9
    cold_items: float | None = None
    val_users: int | None = None
    val_seed: int = 42

    def apply(self, histories: Histories, seed: int) -> Split:
        """Split the histories; `seed` draws the cold items."""
        if self.split == "temporal":
            split = split_temporal(
                histories, test_quantile=self.test_quantile, val_quantile=self.val_quantile
            )
        else:
            split = split_leave_one_out(histories, val_users=self.val_users, val_seed=self.val_seed)
        if self.cold_items is not None:
            split = hold_out_items(histories, split, share=self.cold_items, seed=seed)
        return split


def _histories(
    source: InteractionSource,
    items: ItemSource,
    products: dict[str, dict[str, str]],
    bad_lines: BadLines,
    filters: Filters,
    *,
    min_interactions: int,
    user_sample_rate: float,
    seed: int,
) -> tuple[Histories, dict[str, int], dict[str, int]]:
    """Histories of a source, counts of its interactions, and of what the filters left out."""
    interactions, counts = source.read(products, bad_lines, filters.min_rating, filters.events)
    if not len(interactions):
        below = counts.get("reviews_below_min_rating", 0)
        names = ""
        if interactions.first_unknown is not None:
            own = next(iter(products), "")
            names = (
                f" (an id of the former is {interactions.first_unknown!r}, of the latter {own!r})"
            )
        raise UserError(
            f"none of the {counts['reviews']} reviews in {source.path} is of a product in "
            f"{items.path}"
            + (f" and rated {filters.min_rating} or better ({below} below)" if below else "")
            + f"{names}: expected two files of the same category"
        )
    counts["duplicate_reviews"] = count_duplicates(interactions)
    interactions, filtered = filter_interactions(
        interactions,
        deduplicate=filters.deduplicate,
        drop_consecutive_repeats=filters.drop_consecutive_repeats,
        k_core=filters.k_core,
    )
    histories = build_histories(
        interactions,
        min_interactions=min_interactions,
        user_sample_rate=user_sample_rate,
        seed=seed,
        max_users=filters.max_users,
    )
    if not histories.user_names:
        left_out = "".join(f", {number} {name}" for name, number in filtered.items())
        raise UserError(
            f"no user is left of {histories.counts['users']} in {source.path}: "
            f"{histories.counts['users_with_too_few_interactions']} have fewer than "
            f"{min_interactions} reviews of known products (--min_interactions), "
            f"{histories.counts['users_not_sampled']} were not sampled (--user_sample_rate)"
            f"{left_out}"
        )
    return histories, counts, filtered


def _writable_folder(path: str | os.PathLike) -> Path:
    """A folder or a path that may become one; found out before any long work."""
    folder = Path(path)
    nearest = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    if not nearest.is_dir():
        raise UserError(f"cannot write to {folder}: {nearest} is a file, expected a folder")
    if not os.access(nearest, os.W_OK):
        raise UserError(f"cannot write to {folder}: no permission to write in {nearest}")
    return folder
