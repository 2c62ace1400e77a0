"""Filters and split of a preparation, and its histories."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from recformer.files import UserError, naming, partial_folder
from recformer.preparation.bad_lines import BadLines
from recformer.preparation.filters import count_duplicates, kept_of
from recformer.preparation.held_out import hold_out_items
from recformer.preparation.in_files import histories_in_files
from recformer.preparation.log_arrays import Histories, Interactions, Scratch
from recformer.preparation.sessions import check_owners, split_at_gaps, with_previous_sessions
from recformer.preparation.spark import spooled_by_spark
from recformer.preparation.splits import (
    Split,
    build_histories,
    split_leave_one_out,
    split_temporal,
)
from recformer.preparation.spool import LogInFiles, spooled
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
        val_users, val_seed, val_draw: of leave-one-out; None: all validate.
        window, targets, min_window_sequences: of windows.
    """

    split: Literal["leave_one_out", "temporal", "windows"] = "leave_one_out"
    test_quantile: float = 0.9
    val_quantile: float = 0.9
    cold_items: float | None = None
    val_users: int | None = None
    val_seed: int = 42
    val_draw: str = "names"
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
            split = split_leave_one_out(
                histories,
                val_users=self.val_users,
                val_seed=self.val_seed,
                val_draw=self.val_draw,
            )
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
    products: Collection[str] | None,
    bad_lines: BadLines,
    filters: Filters,
    *,
    min_interactions: int,
    user_sample_rate: float,
    seed: int,
    sessions: SessionOptions = NO_SESSIONS,
    extra: Sequence[str] = (),
    scratch: Scratch | None = None,
    table: Any = None,
) -> tuple[Histories, dict[str, int], dict[str, int]]:
    """Histories of a source, counts of its interactions, and of what the filters left out.

    Args:
        source, items, products, bad_lines, filters, sessions, extra: what to read, and how.
        min_interactions, user_sample_rate, seed: see `build_histories`.
        scratch: where interactions go that do not fit into memory; None: they fit.
        table: of Spark, see `spark.open_lake`; None: the source is read here.
    """
    batches = source.batches(
        products,
        bad_lines,
        filters.min_rating,
        filters.events,
        owners=sessions.previous > 0 and sessions.gap is None,
        extra=extra,
    )
    log: Interactions | LogInFiles
    if scratch is None:
        log, counts = source.collected(batches)
        _check_any(log, counts, source, items, products, filters.min_rating)
        if sessions.previous and not log.has_times:
            raise UserError(
                f"--previous_sessions needs times, {source.path} has none: name their column with "
                f"--time_column"
            )
        if sessions.gap is not None:
            log = split_at_gaps(log, sessions.gap)
        elif sessions.previous:
            counts["sessions_of_several_users"] = check_owners(log)
    else:
        if table is None:
            log, counts = spooled(batches, scratch, sessions.gap)
        else:
            assert isinstance(products, dict)
            log, counts = spooled_by_spark(
                table,
                source,
                list(products),
                bad_lines,
                filters.min_rating,
                filters.events,
                scratch,
            )
        _check_any(log, counts, source, items, products, filters.min_rating)
    counts["duplicate_reviews"] = count_duplicates(log)
    kept, filtered = kept_of(
        log,
        deduplicate=filters.deduplicate,
        drop_consecutive_repeats=filters.drop_consecutive_repeats,
        k_core=filters.k_core,
    )
    chosen: dict[str, Any] = {
        "min_interactions": min_interactions,
        "user_sample_rate": user_sample_rate,
        "seed": seed,
        "max_users": filters.max_users,
    }
    if isinstance(log, LogInFiles):
        histories, single = histories_in_files(log, kept, **chosen)
    else:
        log = log if kept is None else log.take(np.flatnonzero(kept))
        histories = build_histories(log, **chosen)
        single = int((np.bincount(log.users, minlength=1) == 1).sum())
    if not len(histories.user_names):
        left_out = "".join(f", {number} {name}" for name, number in filtered.items())
        raise UserError(
            f"no user is left of {histories.counts['users']} in {source.path}: "
            f"{histories.counts['users_with_too_few_interactions']} have fewer than "
            f"{min_interactions} reviews of known products (--min_interactions), "
            f"{histories.counts['users_not_sampled']} were not sampled (--user_sample_rate)"
            f"{left_out}"
        )
    if sessions.asked:
        histories.counts["sessions_of_one_event"] = single
    if sessions.previous:
        histories = with_previous_sessions(histories, sessions.previous)
    return histories, counts, filtered


def _check_any(
    log: Interactions | LogInFiles,
    counts: Mapping[str, int],
    source: InteractionSource,
    items: ItemSource | None,
    products: Collection[str] | None,
    min_rating: float | None,
) -> None:
    """Refuse a log of which no interaction is left."""
    if len(log):
        return
    below = counts.get("reviews_below_min_rating", 0)
    names = ""
    if log.first_unknown is not None:
        own = next(iter(products), "") if isinstance(products, dict) else ""
        names = f" (an id of the former is {log.first_unknown!r}, of the latter {own!r})"
    raise UserError(
        f"none of the {counts['reviews']} reviews in {source.path} is of a product in "
        f"{source.path if items is None else items.path}"
        + (f" and rated {min_rating} or better ({below} below)" if below else "")
        + f"{names}: expected two files of the same category"
    )


# Bytes that an interaction takes while it is sorted, filtered and split, of what is held at once;
# and the share of the memory that this may be, beside the names of users and items.
_BYTES_A_ROW, _SHARE = 150, 0.2
_LEAST_MEMORY = 10**9


@contextmanager
def scratch_beside(output: Path, memory: int | None) -> Iterator[Scratch | None]:
    """Where interactions go that do not fit into memory, for as long as the block runs.

    Args:
        output: folder that is to be written.
        memory: bytes; None: everything is held in memory.
    """
    if memory is None:
        yield None
        return
    output.mkdir(parents=True, exist_ok=True)
    with naming(output), partial_folder(output / "log") as folder:
        yield Scratch(folder, int(memory * _SHARE / _BYTES_A_ROW))


def check_in_files(
    memory: int | None,
    source: InteractionSource,
    options: SplitOptions = SplitOptions(),
    sessions: SessionOptions = NO_SESSIONS,
    features: Sequence[Any] = (),
    by_spark: bool = False,
) -> None:
    """Refuse what can only be done where all interactions are in memory, or are read here.

    Raises:
        UserError: says what.
    """
    if memory is None:
        return
    if memory < _LEAST_MEMORY:
        raise UserError(f"--memory: got {memory / 1e9:.2f}GB, expected 1GB or more")
    wrong = [
        *(["--split windows"] if options.split == "windows" else []),
        *(["--previous_sessions"] if sessions.previous else []),
        *(["--features"] if features else []),
        *(["--session_gap"] if by_spark and sessions.gap is not None else []),
    ]
    if wrong:
        raise UserError(
            f"{', '.join(wrong)}: needs all interactions in memory at once, leave out "
            f"{'--engine spark' if by_spark else '--memory'}"
        )
    if by_spark and source.file.lists & set(vars(source.columns).values()):
        raise UserError(f"{source.path} has lists of items, expected an interaction a row")
    if source.in_one_piece:
        raise UserError(
            f"--memory: {source.path} is a file of whole histories, which is read at once: leave "
            f"--memory out, or convert it to a log of interactions, such as Parquet"
        )


def writable_folder(path: str | os.PathLike) -> Path:
    """A folder or a path that may become one; found out before any long work."""
    folder = Path(path)
    nearest = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    if not nearest.is_dir():
        raise UserError(f"cannot write to {folder}: {nearest} is a file, expected a folder")
    if not os.access(nearest, os.W_OK):
        raise UserError(f"cannot write to {folder}: no permission to write in {nearest}")
    return folder
