"""Interactions of a log in batches: each row judged by one set of rules, whoever reads them.

A preparation in memory lays the batches end to end; one that is larger than memory writes them
down. What is left out, what is refused and what is said of it is the same.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from copy import deepcopy
from functools import cached_property

import polars as pl

from recformer.files import UserError
from recformer.preparation import log_frames
from recformer.preparation.amazon import KnownReviews, too_large_time
from recformer.preparation.bad_lines import BadLines
from recformer.preparation.forms import FEW_NAMES, WHOLE_FLOAT
from recformer.preparation.log_frames import EXTRA, LogFile, refuse
from recformer.preparation.times import NO_TIME, Fractions, in_unit, parse_time

Frames = Callable[[dict[str, str]], Iterator[pl.DataFrame]]  # of {name: column}


class ReadAgainError(Exception):
    """What was read so far is to be thrown away: begin anew, by what is known by now."""


class Batches:
    """The interactions of a log, in its order.

    A batch has the columns user and item (names), whole and billionths (of its times, zeros where
    the log has none), `owner` where it is asked for, and "extra NAME" for every further column.

    Args:
        source: the log.
        known: items that count; None: all.
        bad_lines: what to do with lines that cannot be used.
        min_rating: leave out what is rated lower.
        events: leave out what is of another type; none: all count.
        owner: column of the users of sessions, to be kept; None: not.
        extra: further columns to keep as they stand.
        frames: gives the rows in place of the file, to one of several who judge them; what only all
            of them together can tell is then left to who asked them.

    Attributes:
        counts: interactions and those left out, for dataset.json; complete after the last batch.
        fractions: of the times; complete after the last batch.
        first_unknown: the first item that is not known.
        num_rows: looked at.
    """

    def __init__(
        self,
        source: LogFile,
        known: Collection[str] | None,
        bad_lines: BadLines,
        min_rating: float | None = None,
        events: Sequence[str] = (),
        owner: str | None = None,
        extra: Sequence[str] = (),
        frames: Frames | None = None,
    ) -> None:
        self.frames = frames
        self.source, self.bad_lines = source, bad_lines
        self.known, self.min_rating, self.events = known, min_rating, events
        self._others = {f"{EXTRA}{name}": name for name in extra}
        if owner is not None:
            self._others["owner"] = owner
        self._bad_before = deepcopy(bad_lines)
        self._exponent: int | None = None  # of the times' unit, where some do not fit it
        self._begin()

    @property
    def of_reviews(self) -> bool:
        """Whether a line is an object of JSON, and one interaction."""
        file = self.source.file
        is_list = self.source.columns.item in file.lists
        return file.kind == "json" and not is_list and self.source.before is None

    @cached_property
    def known_names(self) -> pl.Enum:
        """`known` as a table in native code, in its order."""
        return pl.Enum(pl.Series(list(self.known or ()), dtype=pl.String))

    def _begin(self) -> None:
        self.counts: dict[str, int] = {}
        self.fractions = Fractions()
        self.first_unknown: str | None = None
        self.num_rows = 0

    def __iter__(self) -> Iterator[pl.DataFrame]:
        """Batches; some may be empty.

        Raises:
            ReadAgainError: after the last one, where times with fractions need a closer look.
            UserError: the file is damaged or has no usable line, or `bad_lines` refuses one.
        """
        self._begin()
        if self.of_reviews:
            yield from self._of_reviews()
        else:
            yield from self._of_frames()
        if self.frames is None and self._exponent is None and not self.fractions.all_fit():
            self._exponent = self.fractions.exponent()
            vars(self.bad_lines).update(vars(deepcopy(self._bad_before)))
            raise ReadAgainError

    def _of_reviews(self) -> Iterator[pl.DataFrame]:
        reviews = KnownReviews(
            self.source.path,
            self.known,
            self.bad_lines,
            columns=self.source.columns,
            min_rating=self.min_rating,
            events=frozenset(self.events) if self.events else None,
            encoding=self.source.file.encoding,
        )
        types = {"user": pl.String, "item": pl.String, "whole": pl.Int64, "billionths": pl.Int64}
        rows: list[tuple[str, str, int, int]] = []
        for review in reviews:
            rows.append((review.reviewerID, review.asin, review.unixReviewTime, review.billionths))
            if len(rows) >= log_frames.AT_ONCE:
                yield self._timed(pl.DataFrame(rows, schema=types, orient="row"))
                rows = []
        yield self._timed(pl.DataFrame(rows, schema=types, orient="row"))
        self.counts = reviews.counts()
        self.first_unknown = reviews.first_unknown

    def _timed(self, frame: pl.DataFrame) -> pl.DataFrame:
        wholes, billionths = frame["whole"].to_numpy(), frame["billionths"].to_numpy()
        self.fractions.add(wholes, billionths)
        if self._exponent is not None:
            too_large = in_unit(wholes, billionths, self._exponent)[1]
            if too_large.any():
                raise too_large_time(self.source.path, wholes[too_large][0])
        return frame

    def _frames(self, bad_lines: BadLines) -> Iterator[pl.DataFrame]:
        """Rows that have all they need, but for times and ratings that are none."""
        file, columns = self.source.file, self.source.columns
        rating, event = self.min_rating is not None, bool(self.events)
        wanted = log_frames.wanted_columns(self.source, rating, event, self._others)
        frames = (
            log_frames.log_frames(self.source, bad_lines, rating, event, self._others)
            if self.frames is None
            else self.frames(wanted)
        )
        for frame in frames:
            if file.kind in ("csv", "tsv"):  # spreadsheets write blank lines as `,,,`
                texts = [name for name, type_ in frame.schema.items() if type_ == pl.String]
                texts = [name for name in texts if not name.startswith(EXTRA)]
                frame = frame.filter(
                    ~pl.all_horizontal((pl.col(name) == "").fill_null(True) for name in texts)
                )
            self.num_rows += len(frame)
            needed = [name for name in ("user", "item", "time", "rating") if name in frame.columns]
            for column in needed:
                missing = pl.col(column).is_null()
                if frame.schema[column] == pl.String:
                    missing |= pl.col(column).str.strip_chars() == ""
                sasrec = file.kind == "sasrec"
                reason = "expected `user item`" if sasrec else f"no {getattr(columns, column)}"
                frame = refuse(frame, missing, reason, file, bad_lines)
            yield frame

    def _of_frames(self) -> Iterator[pl.DataFrame]:
        file, columns, bad_lines = self.source.file, self.source.columns, self.bad_lines
        self.num_rows = 0
        whole_numbers: dict[str, bool] | None = None  # names of which all end in `.0`
        usable = chosen = unknown = below = 0
        events: dict[str | None, None] = {}
        for frame in self._frames(bad_lines):
            if whole_numbers is None and len(frame) and self.frames is None:
                whole_numbers = self._whole_numbers(frame)
            for column, strip in (whole_numbers or {}).items():
                if strip:
                    frame = frame.with_columns(pl.col(column).str.replace(r"\.0+$", ""))
            frame = self._with_moments(frame)
            if self.min_rating is not None:
                rating = pl.col("rating")
                if frame.schema["rating"] == pl.String:
                    rating = rating.str.strip_chars()
                number = rating.cast(pl.Float64, strict=False).fill_nan(None)
                reason, is_none = f"{columns.rating} is no number", pl.col("number").is_null()
                frame = frame.with_columns(number=number)
                frame = refuse(frame, is_none, reason, file, bad_lines, "rating")
            usable += len(frame)
            if self.events:
                if not chosen:
                    found = frame["event"].unique(maintain_order=True).to_list()
                    events |= dict.fromkeys(found[:FEW_NAMES])
                frame = frame.filter(pl.col("event").is_in(list(self.events)))
                chosen += len(frame)
            usable_before = len(frame)
            frame = self._fitting(frame)
            usable -= usable_before - len(frame)
            is_known = self._is_known(frame["item"])
            unknown += len(frame) - int(is_known.sum())
            frame = frame.filter(is_known)
            if self.min_rating is not None:
                rated = frame.filter(pl.col("number") >= self.min_rating)
                below += len(frame) - len(rated)
                frame = rated
            kept = ["user", "item", "whole", "billionths", *self._others]
            yield frame.select(kept)
        if self.frames is None:
            self._check(usable, chosen, list(events))
        self.counts = {"reviews": usable}
        if self.events:
            self.counts["reviews_of_other_events"] = usable - chosen
        self.counts["reviews_of_unknown_products"] = unknown
        if self.min_rating is not None:
            self.counts["reviews_below_min_rating"] = below

    def _check(self, usable: int, chosen: int, events: Sequence[str | None]) -> None:
        """Refuse a file of which nothing is left."""
        file, why = self.source.file, self.bad_lines.why()
        if not self.num_rows:
            but = " but for its header" if file.kind in ("csv", "tsv", "atomic") else ""
            raise UserError(f"{file.path} is empty{but}, expected interactions{why}")
        if self.events and usable and not chosen:
            raise UserError(
                f"{file.path}: no {self.source.columns.event} is {' or '.join(self.events)} "
                f"(--events), found: {', '.join(map(repr, events[:FEW_NAMES]))}"
            )
        if not usable:
            raise UserError(f"{file.path}: none of its {self.num_rows} {file.what}s is usable{why}")

    def _whole_numbers(self, first: pl.DataFrame) -> dict[str, bool]:
        """Whether all users, and all items, are whole numbers with `.0`, as pandas writes them
        beside a missing value. Where the first is not, there is nothing to look for."""
        found = {
            name: WHOLE_FLOAT.fullmatch(first[name][0]) is not None for name in ("user", "item")
        }
        if not any(found.values()):
            return found
        num_rows = self.num_rows
        for frame in self._frames(BadLines(skip=True)):
            for name in found:
                whole = frame[name].unique().str.contains(f"^{WHOLE_FLOAT.pattern}$")
                found[name] &= bool(whole.all())
            if not any(found.values()):
                break
        self.num_rows = num_rows
        return found

    def _with_moments(self, frame: pl.DataFrame) -> pl.DataFrame:
        """With columns whole and billionths; what has no time is refused."""
        columns = self.source.columns
        if columns.time is None:
            zero = pl.lit(0, pl.Int64)
            return frame.with_columns(whole=zero, billionths=zero)
        reason, no_time = f"{columns.time} {NO_TIME}", pl.col("whole").is_null()
        frame = _with_times(frame)
        return refuse(frame, no_time, reason, self.source.file, self.bad_lines, "time")

    def _fitting(self, frame: pl.DataFrame) -> pl.DataFrame:
        """Without times that are too large for the unit of the others, each of them refused."""
        wholes, billionths = frame["whole"].to_numpy(), frame["billionths"].to_numpy()
        self.fractions.add(wholes, billionths)
        if self._exponent is None:
            return frame
        too_large = in_unit(wholes, billionths, self._exponent)[1]
        reason = f"{self.source.columns.time} is too large for the fractions that others have"
        return refuse(
            frame.with_columns(too_large=too_large),
            pl.col("too_large"),
            reason,
            self.source.file,
            self.bad_lines,
            "time",
        )

    def _is_known(self, items: pl.Series) -> pl.Series:
        if self.known is None:
            return pl.repeat(True, len(items), eager=True)
        is_known = items.cast(self.known_names, strict=False).is_not_null()
        if self.first_unknown is None and not is_known.all():
            self.first_unknown = items.filter(~is_known)[0]
        return is_known


def _with_times(frame: pl.DataFrame) -> pl.DataFrame:
    """With columns whole and billionths, null where there is no time; see `times.parse_time`."""
    values = frame["time"]
    if values.dtype.is_float():
        whole = values.is_finite() & (values == values.floor())
        number = pl.select(pl.when(whole).then(values)).to_series().cast(pl.Int64, strict=False)
    elif values.dtype.is_integer() or values.dtype == pl.String:
        # In numbers of up to 18 figures there is nothing to judge.
        number = values.cast(pl.Int64, strict=False)
    else:
        number = pl.Series([None] * len(values), dtype=pl.Int64)
    texts = values.cast(pl.String)
    odd = texts.filter(number.is_null() & texts.is_not_null()).unique().to_list()
    parsed = {text: time for text in odd if (time := parse_time(text)) is not None}
    if not parsed:
        return frame.with_columns(whole=number, billionths=pl.lit(0, pl.Int64))
    parts = [
        texts.replace_strict(list(parsed), list(part), default=None, return_dtype=pl.Int64)
        for part in zip(*parsed.values())
    ]
    return frame.with_columns(whole=pl.coalesce(number, parts[0]), billionths=parts[1].fill_null(0))
