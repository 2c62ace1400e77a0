"""Interactions out of a raw file of any form."""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import polars as pl

from recformer.files import UserError
from recformer.preparation import amazon, histories, json_lines
from recformer.preparation.amazon import ReviewColumns
from recformer.preparation.bad_lines import BadLines
from recformer.preparation.delimited import row_starts
from recformer.preparation.forms import (
    FEW_NAMES,
    RawFile,
    id_names,
    is_list,
    read_object,
    rows_of,
    scan_parquet,
    short,
    unreadable,
    without_fraction,
)
from recformer.preparation.histories import Example
from recformer.preparation.lines import escaped, text_lines
from recformer.preparation.splits import Interactions
from recformer.preparation.times import NO_TIME, in_one_unit, parse_time


@dataclass(frozen=True)
class InteractionSource:
    """A file of interactions whose first lines have been looked at.

    Attributes:
        file: the file.
        columns: what stands where.
        before: column of the items that came before the one in `columns.item`, where a line is an
            example to train on.
        owner: column of the users, where `columns.user` holds sessions; None: there is none.
    """

    file: RawFile
    columns: ReviewColumns
    before: str | None = None
    owner: str | None = None

    @property
    def path(self) -> Path:
        """The file."""
        return self.file.path

    def read(
        self,
        known: Container[str],
        bad_lines: BadLines,
        min_rating: float | None = None,
        events: Sequence[str] = (),
        *,
        owners: bool = False,
        extra: Sequence[str] = (),
    ) -> tuple[Interactions, dict[str, int]]:
        """The interactions with known items, in file order, and counts; see `read_interactions`.

        Args:
            known: items that count.
            bad_lines: what to do with lines that cannot be used.
            min_rating: leave out what is rated lower.
            events: leave out what is of another type; none: all count.
            owners: read the users of sessions too.
            extra: further columns to keep as they stand.

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
        is_list = self.columns.item in self.file.lists
        others = [self.owner] if owners and self.owner is not None else []
        others += extra
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
        if self.file.kind == "json" and not is_list and self.before is None:
            return amazon.read_interactions(
                self.path,
                known,
                bad_lines,
                columns=self.columns,
                min_rating=min_rating,
                events=frozenset(events) if events else None,
                encoding=self.file.encoding,
            )
        wanted = {f"{_EXTRA}{name}": name for name in extra}
        if owners and self.owner is not None:
            wanted["owner"] = self.owner
        frame = _log_frame(self, bad_lines, min_rating is not None, bool(events), wanted)
        return _interactions(frame, self, known, bad_lines, min_rating, events)


_EXTRA = "extra "  # before the names of further columns


def _log_frame(
    source: InteractionSource,
    bad_lines: BadLines,
    rating: bool,
    event: bool,
    others: dict[str, str],
) -> pl.DataFrame:
    """Columns line, user, item and, where there are any, time, rating, event and `others`, one row
    an interaction, nothing judged yet."""
    file, columns = source.file, source.columns
    wanted = {"user": columns.user, "item": columns.item} | others
    if columns.time is not None:
        wanted["time"] = columns.time
    if rating and columns.rating is not None:
        wanted["rating"] = columns.rating
    if event and columns.event is not None:
        wanted["event"] = columns.event
    if file.kind == "histories":
        return _of_histories(_read_history_lines(file, bad_lines), file, bad_lines)
    if file.kind == "object":
        return _of_histories(_read_history_object(file, bad_lines), file, bad_lines)
    if source.before is not None:
        return _of_examples(source, bad_lines)
    if file.kind == "json":
        return _explode(_json_frame(source, wanted, bad_lines), file, bad_lines)
    if file.kind == "parquet":
        return _explode(_parquet_frame(file, wanted), file, bad_lines)
    frame = _text_frame(file, wanted, bad_lines)
    lists = [name for name, column in wanted.items() if column in file.lists]
    if "item" not in lists:
        return frame
    for name in lists:
        values = [histories.split_list(value or "") for value in frame[name]]
        texts = [None if own is None else [str(value) for value in own] for own in values]
        frame = frame.with_columns(pl.Series(name, texts, dtype=pl.List(pl.String)))
    frame = _refuse(frame, pl.col("item").is_null(), "no list of items", file, bad_lines)
    return _explode(frame, file, bad_lines)


def _text_frame(file: RawFile, wanted: dict[str, str], bad_lines: BadLines) -> pl.DataFrame:
    """Columns of a file of lines, as text."""
    places = [file.names.index(column) for column in wanted.values()]
    frame = _regular_frame(file, dict(zip(wanted, places)))
    if frame is not None:
        return frame
    parts = [
        pl.DataFrame(
            {"line": pl.Series(numbers, dtype=pl.Int64)}
            | {
                name: pl.Series(values[place], dtype=pl.String)
                for name, place in zip(wanted, places)
            }
        )
        for numbers, rows in rows_of(file, bad_lines)
        if (values := list(zip(*rows)))
    ]
    if not parts:
        raise UserError(
            f"{file.path} is empty but for its header, expected interactions{bad_lines.why()}"
        )
    return pl.concat(parts, rechunk=True)


def _regular_frame(file: RawFile, places: dict[str, int]) -> pl.DataFrame | None:
    """Columns of a file in which nothing needs judging, by Polars; None: it is none."""
    separator, width = file.layout.separator, len(file.names)
    if file.kind not in ("csv", "tsv", "atomic") or file.encoding is not None:
        return None
    if len(separator.encode()) > 1 or separator == " " or width < 2:
        return None
    starts = row_starts(file.path, file.layout, width)
    if starts is None:
        return None
    starts = starts[1:] if file.has_header else starts
    table = pl.scan_csv(
        file.path,
        glob=False,
        has_header=file.has_header,
        separator=separator,
        quote_char='"',
        infer_schema=False,
        with_column_names=lambda names: [str(place) for place in range(len(names))],
    )
    columns = [pl.col(str(place)).alias(name) for name, place in places.items()]
    try:
        frame = table.select(columns).collect()
    except pl.exceptions.PolarsError:
        return None  # bytes that are not UTF-8: the reader that knows lines says where
    return frame.insert_column(0, pl.Series("line", starts)) if len(frame) == len(starts) else None


def _parquet_frame(file: RawFile, wanted: dict[str, str]) -> pl.DataFrame:
    table = scan_parquet(file.path)
    schema = table.collect_schema()
    columns = []
    for name, column in wanted.items():
        value = pl.col(column)
        if name in ("user", "item", "event", "owner"):
            value = id_names(value, schema[column], file, column)
        elif schema[column].is_temporal():
            value = _moments(value, schema[column])
        columns.append(value.alias(name))
    try:
        return table.select(columns).with_row_index("line", offset=1).collect()
    except (pl.exceptions.PolarsError, OSError) as error:
        raise unreadable(file.path, error) from error


def _moments(value: pl.Expr, type_: Any) -> pl.Expr:
    """Dates and times as microseconds since 1970; as nanoseconds where the file counts these."""
    unit: Literal["ns", "us"] = (
        "ns" if isinstance(type_, pl.Datetime) and type_.time_unit == "ns" else "us"
    )
    return value.cast(pl.Datetime(unit)).dt.epoch(unit)


def _json_frame(
    source: InteractionSource, wanted: dict[str, str], bad_lines: BadLines
) -> pl.DataFrame:
    """Lines of JSON of which each has its items as a list."""
    found: dict[str, list[Any]] = {"line": [], **{name: [] for name in wanted}}
    lines = json_lines.read_objects(source.path, bad_lines, wanted.values(), source.file.encoding)
    for number, row in lines:
        items = row.get(source.columns.item)
        names = [histories.item_name(item) for item in items] if isinstance(items, list) else [None]
        if None in names:
            bad_lines.add(source.path, number, f"{source.columns.item} is no list of ids", items)
            continue
        found["line"].append(number)
        for name, column in wanted.items():
            value: Any = names if name == "item" else row.get(column)
            if name in ("time", "rating"):
                values = value if isinstance(value, list) else [value] * len(names)
                value = [None if each is None else str(each) for each in values]
            elif name != "item":
                value = histories.item_name(value)
            found[name].append(value)
    types: dict[str, Any] = dict.fromkeys(wanted, pl.String) | {"line": pl.Int64}
    types |= {name: pl.List(pl.String) for name in ("item", "time", "rating") if name in wanted}
    return pl.DataFrame(found, schema={name: types[name] for name in found})


def _explode(frame: pl.DataFrame, file: RawFile, bad_lines: BadLines) -> pl.DataFrame:
    """One row an interaction, where a row is a list of them."""
    lists = [name for name, type_ in frame.schema.items() if is_list(type_)]
    if "item" not in lists:  # then a further column may hold lists, one an interaction
        lists = [name for name in lists if not name.startswith(_EXTRA)]
    if not lists:
        return frame
    if "item" not in lists or "user" in lists:
        wrong = lists[0]
        raise UserError(
            f"{file.path}: the column of {wrong}s holds lists, that of "
            f"{'items' if wrong != 'item' else 'users'} must then be one of "
            f"{'lists too' if wrong != 'user' else 'ids'}: name another with --{wrong}_column"
        )
    frame = frame.with_columns(
        pl.col(name).arr.to_list() for name in lists if isinstance(frame.schema[name], pl.Array)
    )
    lengths = [pl.col(name).list.len() for name in lists]
    for name, length in zip(lists[1:], lengths[1:]):
        reason = f"its lists of items and of {name}s are not of one length"
        wrong_length = (length != lengths[0]) | pl.col(name).is_null()
        frame = _refuse(frame, wrong_length, reason, file, bad_lines)
    return frame.filter(lengths[0] > 0).explode(lists)


def _of_histories(
    found: Iterable[tuple[int, str, list[str]]], file: RawFile, bad_lines: BadLines
) -> pl.DataFrame:
    """Rows of whole histories; a user has one."""
    first: dict[str, int] = {}
    numbers, users, items = [], [], []
    for number, user, own in found:
        if user in first:
            reason = "a second history of its user"
            bad_lines.add(file.path, number, reason, user)
            continue
        first[user] = number
        numbers += [number] * len(own)
        users += [user] * len(own)
        items += own
    return pl.DataFrame(
        {"line": numbers, "user": users, "item": items},
        schema={"line": pl.Int64, "user": pl.String, "item": pl.String},
    )


def _read_history_lines(file: RawFile, bad_lines: BadLines) -> Iterator[tuple[int, str, list[str]]]:
    for number, line in enumerate(text_lines(file.path, file.encoding), 1):
        words = line.split()
        if escaped(line):
            bad_lines.add(file.path, number, "bytes that are not in the file's encoding")
        elif len(words) == 1:
            bad_lines.add(file.path, number, "a user without items")
        elif words:
            yield number, words[0], words[1:]


def _read_history_object(
    file: RawFile, bad_lines: BadLines
) -> Iterator[tuple[int, str, list[str]]]:
    for number, (key, own) in enumerate(read_object(file).items(), 1):
        user = histories.item_name(key)
        if not isinstance(own, list):
            raise UserError(
                f"{file.path} has {short(own)} of {user!r}, expected the interactions of every "
                f"user as {{user: [item, …]}}: are the two files swapped?"
            )
        names = [histories.item_name(item) for item in own]
        if user is None or None in names:
            reason = "a user without a name" if user is None else "an item that is no id"
            wrong = None if user is None else own[names.index(None)]
            bad_lines.add(file.path, number, reason, wrong, what="entry")
            continue
        yield number, user, [name for name in names if name is not None]


def _of_examples(source: InteractionSource, bad_lines: BadLines) -> pl.DataFrame:
    """Histories joined from the examples that were cut from them, a user's lines in any order."""
    file = source.file
    examples: dict[str, list[Example]] = {}
    for number, user, before, item in _example_rows(source, bad_lines):
        user_name, target = histories.item_name(user), histories.item_name(item)
        own = histories.split_list(before if before is not None else "")
        names = None if own is None else [histories.item_name(each) for each in own]
        if user_name is None or target is None:
            what = source.columns.user if user_name is None else source.columns.item
            bad_lines.add(file.path, number, f"no {what}", what=file.what)
        elif names is None or None in names:
            reason = f"{source.before} is no list of ids"
            bad_lines.add(file.path, number, reason, before, what=file.what)
        else:
            history = [name for name in names if name is not None]
            examples.setdefault(user_name, []).append(Example(number, history, target))
    found: list[tuple[int, str, list[str]]] = []
    for number, user, whole in histories.rebuild_all(examples):
        if whole is None:
            bad_lines.add(file.path, number, histories.NOT_ONE_HISTORY, user, what=file.what)
        else:
            found.append((number, user, whole))
    return _of_histories(found, file, bad_lines)


def _example_rows(
    source: InteractionSource, bad_lines: BadLines
) -> Iterator[tuple[int, Any, Any, Any]]:
    """Line, user, what came before, item."""
    file, columns = source.file, (source.columns.user, source.before or "", source.columns.item)
    if file.kind == "json":
        for number, row in json_lines.read_objects(file.path, bad_lines, columns, file.encoding):
            user, before, item = (row.get(column) for column in columns)
            yield number, user, before, item
    elif file.kind == "parquet":
        try:
            frame = scan_parquet(file.path).select(columns).collect()
        except (pl.exceptions.PolarsError, OSError) as error:
            raise unreadable(file.path, error) from error
        for number, (user, before, item) in enumerate(frame.iter_rows(), 1):
            yield number, user, before, item
    else:
        places = [file.names.index(column) for column in columns]
        for numbers, rows in rows_of(file, bad_lines):
            for number, fields in zip(numbers, rows):
                user, before, item = (fields[place] for place in places)
                yield number, user, before, item


def _interactions(
    frame: pl.DataFrame,
    source: InteractionSource,
    known: Container[str],
    bad_lines: BadLines,
    min_rating: float | None,
    events: Sequence[str],
) -> tuple[Interactions, dict[str, int]]:
    """Interactions out of the rows of `_log_frame`, each of which is checked."""
    file, columns = source.file, source.columns
    texts = [name for name, type_ in frame.schema.items() if type_ == pl.String]
    texts = [name for name in texts if not name.startswith(_EXTRA)]
    if file.kind in ("csv", "tsv"):  # spreadsheets write blank lines as `,,,`
        frame = frame.filter(
            ~pl.all_horizontal((pl.col(name) == "").fill_null(True) for name in texts)
        )
    if frame.is_empty():
        but = " but for its header" if file.kind in ("csv", "tsv", "atomic") else ""
        raise UserError(f"{file.path} is empty{but}, expected interactions{bad_lines.why()}")
    num_before = len(frame)
    for column in [name for name in ("user", "item", "time", "rating") if name in frame.columns]:
        missing = pl.col(column).is_null()
        if frame.schema[column] == pl.String:
            missing |= pl.col(column).str.strip_chars() == ""
        sasrec = file.kind == "sasrec"
        reason = "expected `user item`" if sasrec else f"no {getattr(columns, column)}"
        frame = _refuse(frame, missing, reason, file, bad_lines)
    frame = frame.with_columns(without_fraction(frame[column]) for column in ("user", "item"))
    if columns.time is not None:
        reason = f"{columns.time} {NO_TIME}"
        no_time = pl.col("whole").is_null()
        frame = _refuse(_with_times(frame), no_time, reason, file, bad_lines, "time")
    if min_rating is not None:
        rating = pl.col("rating")
        if frame.schema["rating"] == pl.String:
            rating = rating.str.strip_chars()
        frame = frame.with_columns(number=rating.cast(pl.Float64, strict=False).fill_nan(None))
        reason = f"{columns.rating} is no number"
        frame = _refuse(frame, pl.col("number").is_null(), reason, file, bad_lines, "rating")
    counts = {"reviews": len(frame)}
    if events:
        found = frame["event"].unique(maintain_order=True).to_list()
        chosen = frame.filter(pl.col("event").is_in(list(events)))
        counts["reviews_of_other_events"] = len(frame) - len(chosen)
        if chosen.is_empty() and len(frame):
            shown = ", ".join(map(repr, found[:FEW_NAMES]))
            raise UserError(
                f"{file.path}: no {columns.event} is {' or '.join(events)} (--events), found: "
                f"{shown}"
            )
        frame = chosen
    times = np.zeros(len(frame), np.int64)
    if columns.time is not None and len(frame):
        times, too_large = in_one_unit(frame["whole"].to_numpy(), frame["billionths"].to_numpy())
        frame = frame.with_columns(moment=times, too_large=too_large)
        reason = f"{columns.time} is too large for the fractions that others have"
        frame = _refuse(frame, pl.col("too_large"), reason, file, bad_lines, "time")
        counts["reviews"] -= len(times) - len(frame)
        times = frame["moment"].to_numpy()
    if frame.is_empty():
        raise UserError(
            f"{file.path}: none of its {num_before} {file.what}s is usable{bad_lines.why()}"
        )

    # Every name is looked up once: there are far fewer items than interactions.
    names = frame["item"].unique(maintain_order=True).to_list()
    is_known = frame["item"].is_in([name for name in names if name in known])
    first_unknown = next((name for name in names if name not in known), None)
    frame = frame.with_columns(times=times).filter(is_known)
    counts["reviews_of_unknown_products"] = len(is_known) - len(frame)
    if min_rating is not None:
        rated = frame.filter(pl.col("number") >= min_rating)
        counts["reviews_below_min_rating"] = len(frame) - len(rated)
        frame = rated
    users, user_names = _codes(frame["user"])
    items, item_names = _codes(frame["item"])
    has_times = columns.time is not None
    moments = frame["times"].to_numpy()
    extra = [name for name in frame.columns if name.startswith(_EXTRA)]
    return (
        Interactions(
            users,
            items,
            moments,
            user_names,
            item_names,
            has_times,
            first_unknown,
            _owners(frame["owner"]) if "owner" in frame.columns else None,
            frame.select(pl.col(name).alias(name[len(_EXTRA) :]) for name in extra)
            if extra
            else None,
        ),
        counts,
    )


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


def _refuse(
    frame: pl.DataFrame,
    wrong: pl.Expr,
    reason: str,
    file: RawFile,
    bad_lines: BadLines,
    shown: str | None = None,
) -> pl.DataFrame:
    """Without the rows that are wrong, each noted with its line and what stands there."""
    columns = ["line", shown or "line"]
    for number, got in frame.filter(wrong).select(pl.col("line"), got=columns[1]).iter_rows():
        got = got if shown and got not in (None, "") else None
        bad_lines.add(file.path, number, reason, got, what=file.what)
    return frame.filter(~wrong)


def _owners(names: pl.Series) -> np.ndarray:
    """Codes of users, int32; -1 where none is named."""
    known = names.fill_null("").str.strip_chars()
    return np.where(known == "", np.int32(-1), _codes(known)[0])


def _codes(column: pl.Series) -> tuple[np.ndarray, list[str]]:
    """Places in the names, int32, and the names in the order in which they first appear."""
    names = column.unique(maintain_order=True)
    return column.cast(pl.Enum(names)).to_physical().to_numpy().astype(np.int32), names.to_list()
