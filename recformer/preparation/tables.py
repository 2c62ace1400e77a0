"""Interactions and items out of plain files: what a file is, and which of its columns is what.

    CSV, TSV, Parquet, RecBole's atomic files, the SASRec text format    read here, by Polars
    JSON Lines: Amazon 2014, 2018, 2023 and any other                    read by `amazon`, by line

All but Parquet may be gzipped. What a file is, its name says or else its first line. Columns are
named by flags or recognised by the names that public data sets give them.
"""

from __future__ import annotations

import gzip
import os
import zlib
from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

import numpy as np
import polars as pl

from recformer.files import UserError
from recformer.preparation import amazon
from recformer.preparation.amazon import BadLines, ReviewColumns
from recformer.preparation.splits import Interactions

Kind = Literal["json", "csv", "tsv", "atomic", "sasrec", "parquet"]

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

# Names that public data sets use, the most telling first: of `parent_asin` and `asin` the former.
_USER_NAMES = ("user_id", "reviewerID", "user", "userId", "uid", "customer_id", "visitorid")
_ITEM_NAMES = (
    "parent_asin",
    "asin",
    "item_id",
    "item",
    "itemId",
    "movieId",
    "movie_id",
    "product_id",
    "itemid",
)
_TIME_NAMES = ("unixReviewTime", "timestamp", "time", "unix_time", "ts")
_RATING_NAMES = ("overall", "rating", "ratings", "score", "stars")

# Attributes where --attributes is not given: {name in the item's sentence: column}. The names are
# those of the pretrained model, so that other years' items read alike.
_AMAZON_2018 = {"title": "title", "brand": "brand", "category": "category"}
_AMAZON_2014 = {"title": "title", "brand": "brand", "category": "categories"}
_AMAZON_2023 = {"title": "title", "brand": "store", "category": "categories"}


@dataclass(frozen=True)
class Columns:
    """Columns that the user named; None: recognise by name.

    Attributes:
        user, item, time, rating: of the interactions.
        item_key: of the items, what `item` holds.
    """

    user: str | None = None
    item: str | None = None
    time: str | None = None
    rating: str | None = None
    item_key: str | None = None

    def named(self) -> dict[str, str]:
        """Those that were named, for dataset.json."""
        values = ((column.name, getattr(self, column.name)) for column in fields(self))
        return {name: value for name, value in values if value is not None}


@dataclass(frozen=True)
class InteractionSource:
    """A file of interactions whose first lines have been looked at."""

    path: Path
    kind: Kind
    columns: ReviewColumns

    def read(
        self, known: Container[str], bad_lines: BadLines, min_rating: float | None = None
    ) -> tuple[Interactions, dict[str, int]]:
        """The interactions with known items, in file order, and counts; see `read_interactions`.

        Raises:
            UserError: the file is damaged or has no usable line, `bad_lines` refuses one, or a
                minimum is asked for and there is no column of ratings.
        """
        if min_rating is not None and self.columns.rating is None:
            raise UserError(
                f"--min_rating needs ratings, {self.path} has no column that is known to hold "
                f"them: name it with --rating_column"
            )
        if self.kind == "json":
            return amazon.read_interactions(
                self.path, known, bad_lines, columns=self.columns, min_rating=min_rating
            )
        return _table_interactions(self, known, bad_lines, min_rating)


@dataclass(frozen=True)
class ItemSource:
    """A file of items whose first lines have been looked at.

    Attributes:
        key: column of the item ids.
        attributes: {name in the item's sentence: column}, in the order of the sentence.
    """

    path: Path
    kind: Kind
    key: str
    attributes: dict[str, str]

    def read(
        self, *, clean: bool, bad_lines: BadLines, only: Container[str] | None = None
    ) -> tuple[dict[str, dict[str, str]], dict[str, int]]:
        """The text of every item and counts; see `amazon.read_metadata`."""
        rows = None if self.kind == "json" else _table_items(self, bad_lines)
        return amazon.read_metadata(
            [self.path],
            self.attributes,
            clean=clean,
            bad_lines=bad_lines,
            only=only,
            key=self.key,
            rows=rows,
        )


def open_sources(
    interactions: str | os.PathLike,
    items: str | os.PathLike,
    columns: Columns,
    attributes: Sequence[str] | None,
) -> tuple[InteractionSource, ItemSource]:
    """Look at the first lines of two files: what they are and where what stands.

    Args:
        interactions, items: the files.
        columns: columns that the user named.
        attributes: `column` or `name=column` each; None: those of Amazon's files where it is one,
            otherwise every column but the item's id.

    Raises:
        FileNotFoundError: a file is missing; both are named where both are.
        UserError: a file is empty, damaged, swapped for the other or lacks a column; the columns
            found are listed.
    """
    paths = [Path(interactions), Path(items)]
    missing = [str(path) for path in paths if not path.is_file()]
    if missing:
        raise FileNotFoundError(f"no such file: {', '.join(missing)}")
    kinds = [_kind(path) for path in paths]
    # Where the user says what is what, there is nothing to guess: a catalogue may name its users.
    amazon.check_raw_files(
        paths[:1] if kinds[0] == "json" and columns.user is None else [],
        paths[1:] if kinds[1] == "json" and columns.item_key is None else [],
    )
    return (
        _interaction_source(paths[0], kinds[0], columns),
        _item_source(paths[1], kinds[1], columns.item_key, attributes),
    )


def _interaction_source(path: Path, kind: Kind, columns: Columns) -> InteractionSource:
    found = _columns(path, kind)

    def find(flag: str, named: str | None, known: Sequence[str], needed: bool) -> str | None:
        return _find(path, found, flag, named, known, needed)

    user = find("--user_column", columns.user, _USER_NAMES, True)
    item = find("--item_column", columns.item, _ITEM_NAMES, True)
    time = find("--time_column", columns.time, _TIME_NAMES, False)
    rating = find("--rating_column", columns.rating, _RATING_NAMES, False)
    assert user is not None, "needed ones are found or refused"
    assert item is not None
    chosen = [name for name in (user, item, time, rating) if name is not None]
    if len(set(chosen)) < len(chosen):
        raise UserError(f"{path}: one column is to be two things, got {', '.join(chosen)}")
    return InteractionSource(path, kind, ReviewColumns(user, item, time, rating))


def _item_source(
    path: Path, kind: Kind, key: str | None, attributes: Sequence[str] | None
) -> ItemSource:
    if kind == "sasrec":
        raise UserError(
            f"{path} has no columns with names, expected items as CSV, TSV, Parquet, JSON Lines or "
            f"a RecBole .item file"
        )
    found = _columns(path, kind)
    key_column = _find(path, found, "--item_key_column", key, _ITEM_NAMES, True)
    assert key_column is not None
    if attributes is not None:
        pairs = [entry.partition("=") for entry in attributes]
        chosen = {name: column or name for name, _, column in pairs}
        # A line of JSON need not have every field: what no line has among the first is no mistake.
        wrong = [] if kind == "json" else [c for c in chosen.values() if c not in found]
        if wrong:
            raise UserError(
                f"{path} has no column {', '.join(map(repr, wrong))} (--attributes), found: "
                f"{', '.join(found)}"
            )
    elif kind == "json":
        if key_column == "parent_asin":
            chosen = _AMAZON_2023
        elif key_column == "asin":
            old = "categories" in found and "category" not in found
            chosen = _AMAZON_2014 if old else _AMAZON_2018
        else:
            chosen = {name: name for name in found if name != key_column}
    else:
        chosen = {name: name for name in found if name != key_column}
    if not chosen:
        raise UserError(f"{path} has no column beside {key_column!r}, expected text of the items")
    return ItemSource(path, kind, key_column, dict(chosen))


def _find(
    path: Path,
    found: Sequence[str],
    flag: str,
    named: str | None,
    known: Sequence[str],
    needed: bool,
) -> str | None:
    if named is not None:
        if named not in found:
            raise UserError(f"{path} has no column {named!r} ({flag}), found: {', '.join(found)}")
        return named
    column = next((name for name in known if name in found), None)
    if column is None and needed:
        raise UserError(
            f"{path}: none of the columns {', '.join(found)} is known as "
            f"{known[0]!r}, {known[1]!r}, …: name the right one with {flag}"
        )
    return column


def _kind(path: Path) -> Kind:
    suffix = Path(path.name.removesuffix(".gz")).suffix.lower()
    if path.stat().st_size == 0:
        raise UserError(f"{path} is empty, expected interactions or items")
    by_name = _KINDS.get(suffix)
    if by_name is not None:
        if by_name not in ("json", "parquet") and _first_lines(path, 1)[0].startswith(b"{"):
            raise UserError(f"{path} is named {suffix} and holds JSON lines: rename it to .jsonl")
        return by_name
    lines = _first_lines(path, 20)
    if lines[0].startswith(b"PAR1"):
        return "parquet"
    if lines[0].lstrip(b"\xef\xbb\xbf \t").startswith(b"{"):
        return "json"
    if b":token" in lines[0]:
        return "atomic"
    if all(len(line.split()) == 2 and b"," not in line for line in lines):
        return "sasrec"
    if b"\t" in lines[0]:
        return "tsv"
    if b"," in lines[0]:
        return "csv"
    raise UserError(
        f"{path}: cannot tell what it is from {lines[0][:60].decode(errors='replace')!r}; expected "
        f"CSV, TSV, Parquet, JSON Lines, RecBole's atomic files or `user item` a line"
    )


def _first_lines(path: Path, number: int) -> list[bytes]:
    with open(path, "rb") as raw:
        packed = raw.read(2) == b"\x1f\x8b"
    try:
        with gzip.open(path) if packed else open(path, "rb") as handle:
            # A file without line breaks is not read to its end.
            lines = [handle.readline(1_000_000).strip(b"\r\n") for _ in range(number)]
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(
            f"{path} is cut off or damaged ({error}): expected a whole gzip file, fetch it again"
        ) from error
    lines = [line for line in lines if line.strip()]
    if not lines:
        raise UserError(f"{path} is empty, expected interactions or items")
    return lines


def _columns(path: Path, kind: Kind) -> list[str]:
    if kind == "json":
        return amazon.first_keys(path)
    return list(_scan(path, kind).collect_schema())


def _scan(path: Path, kind: Kind) -> pl.LazyFrame:
    """The table with every column as text, except Parquet's own types; nothing is read yet."""
    try:
        if kind == "parquet":
            table = pl.scan_parquet(path)
            table.collect_schema()  # a damaged file shows itself here
            return table
        if kind == "sasrec":
            lines = pl.scan_csv(
                path,
                has_header=False,
                separator="\x01",  # stands in no line: a line is one column
                quote_char=None,
                infer_schema=False,
                new_columns=["line"],
            )
            groups = pl.col("line").str.extract_groups(r"^\s*(?<user>\S+)\s+(?<item>\S+)\s*$")
            return lines.select(groups).unnest("line")
        # Atomic files and TSV quote nothing; what looks like a quote is text.
        table = pl.scan_csv(
            path,
            separator="," if kind == "csv" else "\t",
            quote_char='"' if kind == "csv" else None,
            infer_schema=False,
        )
        if kind == "atomic":
            names = list(table.collect_schema())
            untyped = [name for name in names if ":" not in name]
            if untyped:
                raise UserError(
                    f"{path} has the header {', '.join(names)}, expected name:type as in RecBole's "
                    f"atomic files (user_id:token)"
                )
            table = table.rename({name: name.rpartition(":")[0] for name in names})
        return table
    except (pl.exceptions.PolarsError, OSError) as error:
        raise _unreadable(path, kind, error) from error


def _collect(path: Path, kind: Kind, table: pl.LazyFrame) -> pl.DataFrame:
    try:
        return table.collect()
    except (pl.exceptions.PolarsError, OSError) as error:
        raise _unreadable(path, kind, error) from error


def _unreadable(path: Path, kind: Kind, error: Exception) -> UserError:
    reason = str(error).strip().partition("\n")[0]
    return UserError(f"{path} cannot be read as {kind} ({reason}): mend it or name it rightly")


def _number(column: str, as_type: Any) -> pl.Expr:
    """A number out of text or a number, null out of anything else; of a whole one the fraction is
    cut off (`881250949.0`)."""
    value = pl.col(column)
    if as_type == pl.Int64:
        # Through float only where it must: nanoseconds do not fit a float's 53 bits.
        return pl.coalesce(
            value.cast(pl.Int64, strict=False),
            value.cast(pl.Float64, strict=False).cast(pl.Int64, strict=False),
        )
    number = value.cast(as_type, strict=False)
    return pl.when(number.is_nan()).then(None).otherwise(number)


def _refuse(
    frame: pl.DataFrame, wrong: pl.Expr, reason: str, source: Any, bad_lines: BadLines
) -> pl.DataFrame:
    """Without the rows that are wrong, each noted with its line."""
    header = 0 if source.kind in ("sasrec", "parquet") else 1
    for line in frame.filter(wrong)["line_number"]:
        bad_lines.add(source.path, line + header + 1, reason)
    return frame.filter(~wrong)


def _table_interactions(
    source: InteractionSource,
    known: Container[str],
    bad_lines: BadLines,
    min_rating: float | None,
) -> tuple[Interactions, dict[str, int]]:
    columns = source.columns
    wanted = {
        "user": pl.col(columns.user).cast(pl.String),
        "item": pl.col(columns.item).cast(pl.String),
    }
    if columns.time is not None:
        wanted["time"] = _time(source, columns.time)
    if min_rating is not None and columns.rating is not None:
        wanted["rating"] = _number(columns.rating, pl.Float64)
    frame = _collect(
        source.path,
        source.kind,
        _scan(source.path, source.kind).select(**wanted).with_row_index("line_number"),
    )
    if frame.is_empty():
        raise UserError(f"{source.path} is empty but for its header, expected interactions")
    for column in ("user", "item"):
        wrong = pl.col(column).is_null() | (pl.col(column) == "")
        if source.kind == "sasrec":
            frame = _refuse(frame, wrong, "expected `user item`", source, bad_lines)
        else:
            frame = _refuse(frame, wrong, f"no {getattr(columns, column)}", source, bad_lines)
    for column in ("time", "rating"):
        if column in frame.columns:
            reason = f"{getattr(columns, column)} is missing or no number"
            frame = _refuse(frame, pl.col(column).is_null(), reason, source, bad_lines)
    if frame.is_empty():
        raise UserError(f"{source.path}: none of its lines is usable")

    counts = {"reviews": len(frame)}
    # Every name is looked up once: there are far fewer items than interactions.
    names = frame["item"].unique()
    frame_known = frame.filter(pl.col("item").is_in([name for name in names if name in known]))
    counts["reviews_of_unknown_products"] = len(frame) - len(frame_known)
    if "rating" in frame.columns:
        rated = frame_known.filter(pl.col("rating") >= min_rating)
        counts["reviews_below_min_rating"] = len(frame_known) - len(rated)
        frame_known = rated
    users, user_names = _codes(frame_known["user"])
    items, item_names = _codes(frame_known["item"])
    times = np.zeros(len(users), np.int64)
    if columns.time is not None:
        times = frame_known["time"].to_numpy()
    return (
        Interactions(users, items, times, user_names, item_names, columns.time is not None),
        counts,
    )


def _time(source: InteractionSource, column: str) -> pl.Expr:
    if source.kind == "parquet":
        kind = pl.scan_parquet(source.path).collect_schema()[column]
        if kind.is_temporal():
            return pl.col(column).cast(pl.Datetime("us")).dt.epoch("us")
    return _number(column, pl.Int64)


def _codes(column: pl.Series) -> tuple[np.ndarray, list[str]]:
    """Places in the names, int32, and the names in the order in which they first appear."""
    names = column.unique(maintain_order=True)
    return column.cast(pl.Enum(names)).to_physical().to_numpy().astype(np.int32), names.to_list()


def _table_items(source: ItemSource, bad_lines: BadLines) -> Iterator[tuple[Any, ...]]:
    """`(key, value of the first attribute, …)` of every row; a value may be a list."""
    table = _scan(source.path, source.kind).select(
        pl.col(source.key).cast(pl.String).alias("key"),
        *(
            pl.col(column).alias(f"value_{i}")
            for i, column in enumerate(source.attributes.values())
        ),
    )
    frame = _collect(source.path, source.kind, table.with_row_index("line_number"))
    wrong = pl.col("key").is_null() | (pl.col("key") == "")
    frame = _refuse(frame, wrong, f"no {source.key}", source, bad_lines)
    if frame.is_empty():
        raise UserError(f"{source.path} has no usable line beside its header, expected items")
    return frame.drop("line_number").iter_rows()
