"""Interactions out of a raw file of any form."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np
import polars as pl

from recformer.files import UserError
from recformer.preparation import amazon
from recformer.preparation.bad_lines import BadLines
from recformer.preparation.batches import Batches, ReadAgainError
from recformer.preparation.log_frames import EXTRA, LogFile
from recformer.preparation.names import Names
from recformer.preparation.splits import Interactions
from recformer.preparation.times import in_unit


class InteractionSource(LogFile):
    """A file of interactions, to be read."""

    def read(
        self,
        known: Collection[str] | None,
        bad_lines: BadLines,
        min_rating: float | None = None,
        events: Sequence[str] = (),
        *,
        owners: bool = False,
        extra: Sequence[str] = (),
    ) -> tuple[Interactions, dict[str, int]]:
        """The interactions with known items, in file order, and counts; see `read_interactions`.

        Takes 16 bytes an interaction beside the names of users and items and further columns.

        Args:
            known: items that count; None: all.
            bad_lines: what to do with lines that cannot be used.
            min_rating: leave out what is rated lower.
            events: leave out what is of another type; none: all count.
            owners: read the users of sessions too.
            extra: further columns to keep as they stand.

        Raises:
            UserError: as `batches`.
        """
        return self.collected(
            self.batches(known, bad_lines, min_rating, events, owners=owners, extra=extra)
        )

    def collected(self, batches: Batches) -> tuple[Interactions, dict[str, int]]:
        """All batches as arrays, and counts."""
        if batches.of_reviews:
            return amazon.read_interactions(
                self.path,
                batches.known,
                batches.bad_lines,
                columns=self.columns,
                min_rating=batches.min_rating,
                events=frozenset(batches.events) if batches.events else None,
                encoding=self.file.encoding,
            )
        while True:
            try:
                return _laid_end_to_end(batches)
            except ReadAgainError:
                pass

    def batches(
        self,
        known: Collection[str] | None,
        bad_lines: BadLines,
        min_rating: float | None = None,
        events: Sequence[str] = (),
        *,
        owners: bool = False,
        extra: Sequence[str] = (),
    ) -> Batches:
        """The same a batch at a time.

        Raises:
            UserError: the file is damaged or has no usable line, `bad_lines` refuses one, or a
                minimum, types of events, owners or further columns are asked for and there is no
                column of them.
        """
        if min_rating is not None and self.columns.rating is None:
            raise UserError(
                f"--min_rating needs ratings, {self.path} has no column that is known to hold "
                f"them: name it with --rating_column"
            )
        if events and self.columns.event is None:
            raise UserError(
                f"--events needs types of events, {self.path} has no column that is known to hold "
                f"them: name it with --event_column"
            )
        if owners and self.owner is None:
            raise UserError(
                f"--previous_sessions needs the users of the sessions, {self.path} has no column "
                f"that is known to hold them: name it with --user_column"
            )
        others = [*([self.owner] if owners and self.owner is not None else []), *extra]
        if others and self.file.kind not in ("csv", "tsv", "atomic", "parquet"):
            raise UserError(
                f"{self.path}: further columns ({', '.join(others)}) are read from CSV, TSV, "
                f"Parquet and RecBole's atomic files, not from this form: convert it to one of them"
            )
        if others and self.before is not None:
            raise UserError(
                f"{self.path}: {', '.join(others)} would be of the last item of a line alone, and "
                f"histories are joined from {self.before!r}: give the log that it was made from"
            )
        wrong = [name for name in others if name not in self.file.names]
        if wrong:
            raise UserError(
                f"{self.path} has no column {wrong[0]!r}, found: {self.file.few_names()}"
            )
        owner = self.owner if owners else None
        return Batches(self, known, bad_lines, min_rating, events, owner, extra)


def _laid_end_to_end(batches: Batches) -> tuple[Interactions, dict[str, int]]:
    """All batches as arrays.

    Raises:
        ReadAgainError: as `Batches`.
    """
    users, items, owners = Names(), Names(), Names()
    parts: dict[str, list[np.ndarray]] = {
        name: [] for name in ("users", "items", "whole", "billionths", "owners")
    }
    extra: list[pl.DataFrame] = []
    for frame in batches:
        parts["users"].append(users.codes(frame["user"]))
        parts["items"].append(items.codes(frame["item"]))
        parts["whole"].append(frame["whole"].to_numpy())
        own = frame["billionths"].to_numpy()
        if not own.any():  # a view of one zero
            own = np.broadcast_to(np.int64(0), len(frame))
        parts["billionths"].append(own)
        if "owner" in frame.columns:
            names = frame["owner"].fill_null("").str.strip_chars()
            parts["owners"].append(np.where(names == "", np.int32(-1), owners.codes(names)))
        columns = [name for name in frame.columns if name.startswith(EXTRA)]
        if columns:
            extra.append(frame.select(pl.col(name).alias(name[len(EXTRA) :]) for name in columns))
    exponent = batches.fractions.exponent()
    times = [
        in_unit(whole, billionths, exponent)[0] if exponent else whole
        for whole, billionths in zip(parts["whole"], parts["billionths"], strict=True)
    ]
    none = np.empty(0, np.int32)
    return (
        Interactions(
            np.concatenate([none, *parts["users"]]),
            np.concatenate([none, *parts["items"]]),
            np.concatenate([np.empty(0, np.int64), *times]),
            users.names,
            items.names,
            batches.source.columns.time is not None,
            batches.first_unknown,
            np.concatenate(parts["owners"]) if parts["owners"] else None,
            pl.concat(extra) if extra else None,
        ),
        batches.counts,
    )
