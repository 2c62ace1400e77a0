"""Forms of raw files: recognised from names and first lines; columns and rows.

    CSV, TSV, RecBole's atomic files, text with any separator    rows by `delimited`
    `user item` a line (SASRec), `user item item …` (S3-Rec)     words
    Parquet, a file or a folder of them                          Polars
    JSON Lines, an array of objects, Python literals             `json_lines`
    one JSON object {id: …}                                      read whole

All but Parquet may be gzipped. The form is taken from the file name, else from the first lines.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import polars as pl

from recformer.files import UserError
from recformer.preparation import json_lines
from recformer.preparation.bad_lines import BadLines
from recformer.preparation.columns import ITEMS, SESSIONS, USERS, Columns, plain
from recformer.preparation.delimited import Layout, read_rows
from recformer.preparation.lines import (
    byte_lines,
    check_file,
    first_lines,
    other_encoding,
    text_lines,
)
from recformer.preparation.times import parse_time

Kind = Literal["json", "object", "csv", "tsv", "atomic", "sasrec", "histories", "parquet"]

_KINDS: dict[str, Kind] = {
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
    ".json": "json",
    ".jsonl": "json",
    ".ndjson": "json",
    ".inter": "atomic",
    ".item": "atomic",
}

FEW_NAMES = 12  # named in a message
LOOK_AT = 20  # lines

WHOLE_FLOAT = re.compile(r"-?\d+\.0+", re.ASCII)


@dataclass(frozen=True)
class RawFile:
    """A file whose first lines have been looked at.

    Attributes:
        path: a file, or a folder of Parquet files.
        kind: what it is.
        names: of its columns, without the types of atomic files; "1", "2", … where there is no
            header.
        lists: names of the columns that are lists by their type.
        layout: how its lines are cut; only of CSV, TSV, atomic files and pairs.
        has_header: whether its first line names the columns.
        encoding: as the user named it.
    """

    path: Path
    kind: Kind
    names: list[str]
    lists: frozenset[str] = frozenset()
    layout: Layout = field(default_factory=lambda: Layout(","))
    has_header: bool = True
    encoding: str | None = None

    @property
    def what(self) -> str:
        """Word for a place in the file: line, row or entry."""
        return "row" if self.kind == "parquet" else "line"

    def few_names(self) -> str:
        """The columns, for a message."""
        more = len(self.names) - FEW_NAMES
        shown = ", ".join(self.names[:FEW_NAMES])
        return f"{shown} and {more:,} more" if more > 0 else shown


def open_file(path: Path, columns: Columns) -> RawFile:
    """Recognise the form and the columns of a file from its first lines.

    Raises:
        UserError: it is empty or damaged, holds something else than rows, or cannot be told.
    """
    encoding = None
    if columns.encoding is not None and path.is_file():
        encoding = other_encoding(path, columns.encoding)
    kind, layout = _kind(path, columns.separator, encoding)
    if kind == "parquet":
        schema = scan_parquet(path).collect_schema()
        lists = frozenset(name for name, type_ in schema.items() if is_list(type_))
        return RawFile(path, kind, list(schema), lists)
    if kind == "json":
        rows = json_lines.first_rows(path, encoding)
        names = list(dict.fromkeys(name for row in rows for name in row))
        lists = frozenset(
            name for row in rows for name, value in row.items() if isinstance(value, list)
        )
        return RawFile(path, kind, names, lists, encoding=encoding)
    if kind in ("object", "histories"):
        return RawFile(path, kind, [], encoding=encoding)
    if kind == "sasrec":
        first = first_lines(path, 1, encoding)[0].split()
        header = plain(first[0]) in (*USERS, *SESSIONS) and plain(first[1]) in ITEMS
        return RawFile(path, kind, ["user", "item"], frozenset(), layout, header, encoding)
    names, lists, has_header = _header(path, kind, layout, encoding)
    return RawFile(path, kind, names, lists, layout, has_header, encoding)


def _kind(path: Path, separator: str | None, encoding: str | None) -> tuple[Kind, Layout]:
    if path.is_dir():
        _parquet_files(path)
        return "parquet", Layout(",")
    suffix = Path(path.name.removesuffix(".gz")).suffix.lower()
    by_name = _KINDS.get(suffix)
    with open(path, "rb") as raw:
        is_parquet = raw.read(4) == b"PAR1"
    if is_parquet or (by_name == "parquet" and path.stat().st_size):
        return "parquet", Layout(",")
    check_file(path)
    lines = first_lines(path, LOOK_AT, encoding)
    begins = lines[0].lstrip()[:1]
    if by_name not in (None, "json") and begins == "{":
        raise UserError(f"{path} is named {suffix} and holds JSON lines: rename it to .jsonl")
    if by_name == "json" or (by_name is None and begins in ("{", "[")):
        if begins not in ("{", "["):
            raise UserError(
                f"{path} is named {suffix} and begins with {lines[0][:40]!r}, expected JSON: one "
                f"object a line, or one array of objects"
            )
        return ("object" if _is_object(path, lines, encoding) else "json"), Layout(",")
    # White space is in the titles of any CSV; between its columns stands something else.
    if separator == " " and by_name is None and len(lines[0].split()) > 1:
        return "csv", Layout(" ", "never")
    if separator and separator != " " and separator in lines[0]:
        return "csv", Layout(separator, "maybe" if separator == "\t" else "always")
    if by_name == "atomic" or (by_name is None and ":token" in lines[0]):
        return "atomic", Layout("\t", "maybe")
    if by_name is None and all(len(line.split()) == 2 and "," not in line for line in lines):
        return "sasrec", Layout(" ", "never")
    if by_name == "tsv" or (by_name is None and "\t" in lines[0]):
        return "tsv", Layout("\t", "maybe")
    if by_name == "csv" or (by_name is None and "," in lines[0]):
        return "csv", Layout(",")
    if _are_histories(path, lines, encoding):
        return "histories", Layout(" ", "never")
    raise UserError(
        f"{path}: cannot tell what it is from {lines[0][:60]!r}; expected CSV, TSV, Parquet, JSON "
        f"Lines, RecBole's atomic files, `user item` or `user item item …` a line, or the "
        f"separator of its columns with --separator"
    )


def _is_object(path: Path, lines: Sequence[str], encoding: str | None) -> bool:
    """Whether a file that begins with `{` is one object {id: …} rather than an object a line."""
    first_line = lines[0].encode("utf-8", "surrogateescape")
    if lines[0].lstrip()[:1] == "[" or json_lines.is_literal(first_line):
        return False
    try:
        first = json.loads(lines[0])
    except (ValueError, RecursionError):
        # Laid out over several lines, or a broken first line, which is named when it is read.
        return lines[0].strip() == "{" or (len(lines) > 1 and lines[0].rstrip()[-1:] in ",[{")
    return (
        len(lines) == 1
        and isinstance(first, dict)
        and len(first) > 0
        and all(isinstance(value, list | dict) for value in first.values())
    )


def _are_histories(path: Path, lines: Sequence[str], encoding: str | None) -> bool:
    """Whether lines of words are `user item item …`; a table has as many words on every line."""
    number = len(lines[0].split())
    if number < 2:
        return False
    return any(
        len(line.split()) != number
        for line in text_lines(path, encoding, progress=False)
        if line.strip()
    )


def _header(
    path: Path, kind: Kind, layout: Layout, encoding: str | None
) -> tuple[list[str], frozenset[str], bool]:
    lines = text_lines(path, encoding, progress=False)
    broken: dict[int, str] = {}
    found = [
        (number, row)
        for numbers, rows in read_rows(islice(lines, 50), layout, broken.__setitem__)
        for number, row in zip(numbers, rows)
        if any(row)
    ]
    lines.close()
    earliest = min(broken, default=0)
    if broken and (not found or earliest < found[0][0]):
        raise UserError(
            f"{path}, line {earliest}: {broken[earliest]}, expected the names of the columns"
        )
    if not found:
        raise UserError(f"{path}, line 1: expected the names of the columns, got no row")
    first, second = found[0][1], found[1][1] if len(found) > 1 else []
    names = [name.strip() for name in first]
    if len(names) == 1:
        other = next((sign for sign in (";", "|", "\t", ",") if sign in names[0]), None)
        raise UserError(
            f"{path} has the one column {names[0][:60]!r}"
            + (f": name its separator, as in --separator '{other}'" if other else "")
            + ("" if other else ", expected columns of users or texts beside that of the items")
        )
    if kind == "atomic":
        untyped = [name for name in names if ":" not in name]
        if untyped:
            raise UserError(
                f"{path} has the header {', '.join(names)}, expected name:type as in RecBole's "
                f"atomic files (user_id:token)"
            )
        typed = [name.rpartition(":") for name in names]
        lists = frozenset(name for name, _, kind_ in typed if kind_.endswith("_seq"))
        names = [name for name, _, _ in typed]
    else:
        # As Python writes them: `['a', 'b']`.
        values = zip(names, second)
        lists = frozenset(name for name, value in values if value[:1] == "[" and value[-1:] == "]")
        in_order = names == [str(place) for place in range(len(names))]  # as pandas writes them
        if not in_order and any(map(_is_value, names)):
            return [str(place + 1) for place in range(len(names))], frozenset(), False
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise UserError(
            f"{path} has {len(twice)} names of columns twice ({', '.join(map(repr, twice[:3]))}): "
            f"which of the two is meant, it does not say"
        )
    return names, lists, True


def _is_value(text: str) -> bool:
    """Whether a field of a first line is a number or a date, which no column is called."""
    return parse_time(text) is not None


# --- what it holds --------------------------------------------------------------------------------


def rows_of(file: RawFile, bad_lines: BadLines) -> Iterator[tuple[list[int], list[list[str]]]]:
    """Numbers of lines, and rows, of a file of lines; without its header."""
    width = len(file.names)

    def note(number: int, reason: str) -> None:
        bad_lines.add(file.path, number, reason)

    is_first = file.has_header
    lines = text_lines(file.path, file.encoding)
    for numbers, rows in read_rows(lines, file.layout, note, width):
        if is_first:
            is_first = False
            numbers, rows = numbers[1:], rows[1:]
        yield numbers, rows


def read_object(file: RawFile) -> dict[str, Any]:
    """A file that is one JSON object; no key stands twice in it."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        row = dict(pairs)
        if len(row) < len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            raise UserError(
                f"{file.path} has the key {twice!r} twice: which of the two is meant, it does not "
                f"say"
            )
        return row

    data = b"".join(byte_lines(file.path, file.encoding, progress=False))
    try:
        value = json.loads(data.decode("utf-8-sig"), object_pairs_hook=unique)
    except UserError:
        raise
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"{file.path} is not valid JSON ({error or 'nested too deep'}): expected one object a "
            f"line, or one object {{id: …}}"
        ) from None
    if not isinstance(value, dict) or not value:
        raise UserError(f"{file.path} holds {short(value)}, expected an object {{id: …}}")
    return value


def scan_parquet(path: Path) -> pl.LazyFrame:
    try:
        if path.is_dir():
            table = pl.scan_parquet(_parquet_files(path), glob=False, hive_partitioning=True)
        else:
            table = pl.scan_parquet(path, glob=False, hive_partitioning=False)
        table.collect_schema()  # a damaged file shows itself here
        return table
    except (pl.exceptions.PolarsError, OSError) as error:
        raise unreadable(path, error) from error


def _parquet_files(path: Path) -> list[Path]:
    """The files of a folder, also of one that is partitioned; what begins with _ or . is none."""
    found = sorted(
        file
        for file in path.rglob("*.parquet")
        if not any(part.startswith(("_", ".")) for part in file.relative_to(path).parts)
    )
    if not found:
        raise UserError(f"{path} is a folder without .parquet files, expected a file")
    return found


def unreadable(path: Path, error: Exception) -> UserError:
    reason = str(error).strip().partition("\n")[0]
    return UserError(f"{path} cannot be read as parquet ({reason}): mend it or name it rightly")


# --- ids ------------------------------------------------------------------------------------------


def is_list(type_: Any) -> bool:
    return isinstance(type_, pl.List | pl.Array)


def id_names(value: pl.Expr, type_: Any, file: RawFile, column: str) -> pl.Expr:
    """Ids of any type as text: whole numbers lose their fraction."""
    if is_list(type_):
        value = value.arr.to_list() if isinstance(type_, pl.Array) else value
        return value.list.eval(id_names(pl.element(), type_.inner, file, column))
    if isinstance(type_, pl.Struct | pl.Object):
        raise UserError(f"{file.path}: {column!r} is a column of records, expected ids")
    if type_.is_float() or type_.is_decimal():
        number = value.cast(pl.Float64)
        whole = (number == number.floor()) & (number.abs() < 2**53)
        return (
            pl.when(whole)
            .then(number.cast(pl.Int64, strict=False).cast(pl.String))
            .otherwise(value.cast(pl.String))
        )
    return value.cast(pl.String)


def without_fraction(names: pl.Series) -> pl.Series:
    """Ids without `.0` where all have it: whole numbers beside a missing value, as pandas writes
    them."""
    if not len(names) or not WHOLE_FLOAT.fullmatch(names[0]):
        return names
    distinct = names.unique()
    if not distinct.str.contains(f"^{WHOLE_FLOAT.pattern}$").all():
        return names
    return names.str.replace(r"\.0+$", "")


def short(value: Any) -> str:
    try:
        return json.dumps(value, ensure_ascii=False)[:60]
    except (ValueError, RecursionError):
        return f"a {type(value).__name__}"
