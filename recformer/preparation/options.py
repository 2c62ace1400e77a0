"""Filters and split of a preparation, and its histories."""

from __future__ import annotations

import os
from collections.abc import Container, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from recformer.files import UserError
from recformer.preparation.bad_lines import BadLines
from recformer.preparation.sessions import check_owners, split_at_gaps, with_previous_sessions
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
from recformer.preparation.tables import Columns, InteractionSource, ItemSource
from recformer.preparation.windows import Windowed, split_windows


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
class SessionOptions:
    """Rules that make sequences sessions, see `recformer.preparation.sessions`.

    Attributes:
        gap: seconds of a pause that ends a session; None: sequences are those of the source.
        previous: a session begins with the items of so many earlier ones of the same user.
        named: a column of the source names the sessions.
    """

    gap: int | None = None
    previous: int = 0
    named: bool = False

    @property
    def asked(self) -> bool:
        """Whether a sequence is a session."""
        return self.named or self.gap is not None

    def asked_for(self) -> dict[str, Any]:
        """The options that were given, for dataset.json."""
        found = {"session_gap_seconds": self.gap, "previous_sessions": self.previous or None}
        return {name: value for name, value in found.items() if value is not None}


NO_SESSIONS = SessionOptions()


@dataclass(frozen=True)
class SplitOptions:
    """Options of a split, see `recformer.preparation.splits`.

    Attributes:
        split: name of the split.
        test_quantile, val_quantile: of the temporal split.
        cold_items: share of the items to hold out; None: none.
        val_users, val_seed: of leave-one-out; None: all validate.
        window, targets, min_window_sequences: of windows.
    """

    split: Literal["leave_one_out", "temporal", "windows"] = "leave_one_out"
    test_quantile: float = 0.9
    val_quantile: float = 0.9
    cold_items: float | None = None
    val_users: int | None = None
    val_seed: int = 42
    window: int | None = None
    targets: str = "every"
    min_window_sequences: int = 10

    def apply(self, histories: Histories, seed: int) -> Split | Windowed:
        """Split the histories; `seed` draws the cold items, and who validates of a window."""
        if self.split == "windows":
            assert self.window is not None  # the flags saw to it
            return split_windows(
                histories,
                self.window,
                targets=self.targets,
                min_sequences=self.min_window_sequences,
                seed=seed,
            )
        if self.split == "temporal":
            split = split_temporal(
                histories, test_quantile=self.test_quantile, val_quantile=self.val_quantile
            )
        else:
            split = split_leave_one_out(histories, val_users=self.val_users, val_seed=self.val_seed)
        if self.cold_items is not None:
            split = hold_out_items(histories, split, share=self.cold_items, seed=seed)
        return split


DEFAULT_COLUMNS, DEFAULT_FILTERS, DEFAULT_SPLIT = Columns(), Filters(), SplitOptions()


def shared_parameters(
    clean: bool,
    min_interactions: int,
    user_sample_rate: float,
    seed: int,
    skip_bad_lines: bool,
    filters: Filters,
    columns: Columns,
) -> dict[str, Any]:
    """Parameters of every preparation from raw files, as dataset.json records them."""
    return {
        "clean": clean,
        "min_interactions": min_interactions,
        "user_sample_rate": user_sample_rate,
        "seed": seed,
        "skip_bad_lines": skip_bad_lines,
        **filters.asked_for(),
        **({"columns": columns.named()} if columns.named() else {}),
    }


def read_histories(
    source: InteractionSource,
    items: ItemSource | None,
    products: Container[str],
    bad_lines: BadLines,
    filters: Filters,
    *,
    min_interactions: int,
    user_sample_rate: float,
    seed: int,
    sessions: SessionOptions = NO_SESSIONS,
    extra: Sequence[str] = (),
) -> tuple[Histories, dict[str, int], dict[str, int]]:
    """Histories of a source, counts of its interactions, and of what the filters left out."""
    interactions, counts = source.read(
        products,
        bad_lines,
        filters.min_rating,
        filters.events,
        owners=sessions.previous > 0 and sessions.gap is None,
        extra=extra,
    )
    if not len(interactions):
        below = counts.get("reviews_below_min_rating", 0)
        names = ""
        if interactions.first_unknown is not None:
            own = next(iter(products), "") if isinstance(products, dict) else ""
            names = (
                f" (an id of the former is {interactions.first_unknown!r}, of the latter {own!r})"
            )
        where = source.path if items is None else items.path
        raise UserError(
            f"none of the {counts['reviews']} reviews in {source.path} is of a product in "
            f"{where}"
            + (f" and rated {filters.min_rating} or better ({below} below)" if below else "")
            + f"{names}: expected two files of the same category"
        )
    if sessions.previous and not interactions.has_times:
        raise UserError(
            f"--previous_sessions needs times, {source.path} has none: name their column with "
            f"--time_column"
        )
    if sessions.gap is not None:
        interactions = split_at_gaps(interactions, sessions.gap)
    elif sessions.previous:
        counts["sessions_of_several_users"] = check_owners(interactions)
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
    if sessions.asked:
        single = np.bincount(np.bincount(interactions.users, minlength=1), minlength=2)[1]
        histories.counts["sessions_of_one_event"] = int(single)
    if sessions.previous:
        histories = with_previous_sessions(histories, sessions.previous)
    return histories, counts, filtered


def writable_folder(path: str | os.PathLike) -> Path:
    """A folder or a path that may become one; found out before any long work."""
    folder = Path(path)
    nearest = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    if not nearest.is_dir():
        raise UserError(f"cannot write to {folder}: {nearest} is a file, expected a folder")
    if not os.access(nearest, os.W_OK):
        raise UserError(f"cannot write to {folder}: no permission to write in {nearest}")
    return folder
