"""Rows of a log of any form as frames, nothing in them judged yet but whether they are rows."""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import polars as pl

from recformer.files import UserError
from recformer.preparation import histories, json_lines
from recformer.preparation.amazon import ReviewColumns
from recformer.preparation.bad_lines import BadLines
from recformer.preparation.delimited import read_rows, regular_pieces
from recformer.preparation.forms import (
    RawFile,
    id_names,
    is_list,
    read_object,
    rows_of,
    scan_parquet,
    short,
    unreadable,
)
from recformer.preparation.histories import Example
from recformer.preparation.lines import escaped, text_lines

AT_ONCE = 1_000_000  # rows of a frame
EXTRA = "extra "  # before the names of further columns


@dataclass(frozen=True)
class LogFile:
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

    @property
    def in_one_piece(self) -> bool:
        """Whether the file can only be read as a whole, being made of whole histories."""
        return self.file.kind in ("histories", "object") or self.before is not None


def log_frames(
    source: LogFile,
    bad_lines: BadLines,
    rating: bool,
    event: bool,
    others: dict[str, str],
) -> Iterator[pl.DataFrame]:
    """Columns line, user, item and, where there are any, time, rating, event and `others`, one row
    an interaction, nothing judged yet; some hundred thousand rows at a time.

    Files of whole histories come as one.
    """
    file, wanted = source.file, wanted_columns(source, rating, event, others)
    if file.kind == "histories":
        yield _of_histories(_read_history_lines(file, bad_lines), file, bad_lines)
    elif file.kind == "object":
        yield _of_histories(_read_history_object(file, bad_lines), file, bad_lines)
    elif source.before is not None:
        yield _of_examples(source, bad_lines)
    elif file.kind == "json":
        for frame in _json_frames(source, wanted, bad_lines):
            yield _explode(frame, file, bad_lines)
    elif file.kind == "parquet":
        for frame in _parquet_frames(file, wanted):
            yield _explode(frame, file, bad_lines)
    else:
        lists = [name for name, column in wanted.items() if column in file.lists]
        for frame in _text_frames(file, wanted, bad_lines):
            yield _with_lists(frame, lists, file, bad_lines) if "item" in lists else frame


def wanted_columns(
    source: LogFile, rating: bool, event: bool, others: dict[str, str]
) -> dict[str, str]:
    """{name: column} of what is to be read."""
    columns = source.columns
    wanted = {"user": columns.user, "item": columns.item} | others
    if columns.time is not None:
        wanted["time"] = columns.time
    if rating and columns.rating is not None:
        wanted["rating"] = columns.rating
    if event and columns.event is not None:
        wanted["event"] = columns.event
    return wanted


def _with_lists(
    frame: pl.DataFrame, lists: list[str], file: RawFile, bad_lines: BadLines
) -> pl.DataFrame:
    for name in lists:
        values = [histories.split_list(value or "") for value in frame[name]]
        texts = [None if own is None else [str(value) for value in own] for own in values]
        frame = frame.with_columns(pl.Series(name, texts, dtype=pl.List(pl.String)))
    frame = refuse(frame, pl.col("item").is_null(), "no list of items", file, bad_lines)
    return _explode(frame, file, bad_lines)


def _text_frames(
    file: RawFile, wanted: dict[str, str], bad_lines: BadLines
) -> Iterator[pl.DataFrame]:
    """Columns of a file of lines, as text."""
    places = {name: file.names.index(column) for name, column in wanted.items()}
    regular = _regular_frames(file, places)
    if regular is not None:
        yield from regular
        return
    numbers: list[int] = []
    values: dict[str, list[str]] = {name: [] for name in places}
    any_row = False
    for own_numbers, rows in rows_of(file, bad_lines):
        numbers += own_numbers
        for name, place in places.items():
            values[name] += [row[place] for row in rows]
        if len(numbers) >= AT_ONCE:
            yield _frame_of_texts(numbers, values)
            any_row, numbers, values = True, [], {name: [] for name in places}
    if numbers:
        yield _frame_of_texts(numbers, values)
    elif not any_row:
        raise UserError(
            f"{file.path} is empty but for its header, expected interactions{bad_lines.why()}"
        )


def _frame_of_texts(numbers: Sequence[int], values: dict[str, list[str]]) -> pl.DataFrame:
    columns = {name: pl.Series(own, dtype=pl.String) for name, own in values.items()}
    return pl.DataFrame({"line": pl.Series(numbers, dtype=pl.Int64)} | columns)


def _regular_frames(file: RawFile, places: dict[str, int]) -> Iterator[pl.DataFrame] | None:
    """Columns of a file in which nothing needs judging, by Polars; None: it is none."""
    separator, width = file.layout.separator, len(file.names)
    if file.kind not in ("csv", "tsv", "atomic") or file.encoding is not None:
        return None
    if len(separator.encode()) > 1 or separator == " " or width < 2:
        return None
    pieces = regular_pieces(file.path, file.layout, width)
    return None if pieces is None else _parsed(pieces, file, places)


def _parsed(
    pieces: Iterator[tuple[bytes, np.ndarray]], file: RawFile, places: dict[str, int]
) -> Iterator[pl.DataFrame]:
    is_first = file.has_header
    for data, starts in pieces:
        frame = _parsed_piece(data, starts, file, places)
        if is_first:
            is_first, frame = False, frame.slice(1)
        yield from frame.iter_slices(AT_ONCE)


def _parsed_piece(
    data: bytes, starts: np.ndarray, file: RawFile, places: dict[str, int]
) -> pl.DataFrame:
    with suppress(pl.exceptions.PolarsError):
        table = pl.read_csv(
            data,
            has_header=False,
            separator=file.layout.separator,
            quote_char='"',
            infer_schema=False,
            new_columns=[str(place) for place in range(len(file.names))],
        )
        if len(table) == len(starts):
            columns = [pl.col(str(place)).alias(name) for name, place in places.items()]
            return table.select(columns).insert_column(0, pl.Series("line", starts))
    lines = io.StringIO(data.decode(), newline="\n")  # Polars sees it otherwise: csv decides
    found = list(read_rows(lines, file.layout, lambda *_: None, len(file.names)))
    rows = [row for _, own in found for row in own]
    values = {name: [row[place] for row in rows] for name, place in places.items()}
    first = int(starts[0]) - 1
    return _frame_of_texts([first + number for own, _ in found for number in own], values)


def _parquet_frames(file: RawFile, wanted: dict[str, str]) -> Iterator[pl.DataFrame]:
    table = scan_parquet(file.path)
    columns = parquet_columns(file, table.collect_schema(), wanted)
    try:
        number = table.select(pl.len()).collect().item()
        for start in range(0, max(number, 1), AT_ONCE):
            part = table.slice(start, AT_ONCE).select(columns)
            yield part.with_row_index("line", offset=start + 1).collect()
    except (pl.exceptions.PolarsError, OSError) as error:
        raise unreadable(file.path, error) from error


def parquet_columns(file: RawFile, schema: pl.Schema, wanted: dict[str, str]) -> list[pl.Expr]:
    """Columns of a table with types: ids as text, times as numbers.

    Args:
        file: for messages.
        schema: of the table.
        wanted: {name: column}.
    """
    columns = []
    for name, column in wanted.items():
        value = pl.col(column)
        if name in ("user", "item", "event", "owner"):
            value = id_names(value, schema[column], file, column)
        elif schema[column].is_temporal():
            value = _moments(value, schema[column])
        columns.append(value.alias(name))
    return columns


def _moments(value: pl.Expr, type_: Any) -> pl.Expr:
    """Dates and times as microseconds since 1970; as nanoseconds where the file counts these."""
    unit: Literal["ns", "us"] = (
        "ns" if isinstance(type_, pl.Datetime) and type_.time_unit == "ns" else "us"
    )
    return value.cast(pl.Datetime(unit)).dt.epoch(unit)


def _json_frames(
    source: LogFile, wanted: dict[str, str], bad_lines: BadLines
) -> Iterator[pl.DataFrame]:
    """Lines of JSON of which each has its items as a list."""
    types: dict[str, Any] = {"line": pl.Int64} | dict.fromkeys(wanted, pl.String)
    types |= {name: pl.List(pl.String) for name in ("item", "time", "rating") if name in wanted}
    found: dict[str, list[Any]] = {name: [] for name in types}
    size = 0
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
        size += len(names)
        if size >= AT_ONCE:
            yield pl.DataFrame(found, schema=types)
            found, size = {name: [] for name in types}, 0
    yield pl.DataFrame(found, schema=types)


def _explode(frame: pl.DataFrame, file: RawFile, bad_lines: BadLines) -> pl.DataFrame:
    """One row an interaction, where a row is a list of them."""
    lists = [name for name, type_ in frame.schema.items() if is_list(type_)]
    if "item" not in lists:  # then a further column may hold lists, one an interaction
        lists = [name for name in lists if not name.startswith(EXTRA)]
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
        frame = refuse(frame, wrong_length, reason, file, bad_lines)
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


def _of_examples(source: LogFile, bad_lines: BadLines) -> pl.DataFrame:
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


def _example_rows(source: LogFile, bad_lines: BadLines) -> Iterator[tuple[int, Any, Any, Any]]:
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


def refuse(
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
