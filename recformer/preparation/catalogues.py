"""Items and their text out of a raw file of any form."""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from recformer.files import UserError
from recformer.preparation import amazon, json_lines
from recformer.preparation.bad_lines import BadLines
from recformer.preparation.forms import (
    RawFile,
    id_names,
    read_object,
    rows_of,
    scan_parquet,
    short,
    unreadable,
    without_fraction,
)
from recformer.preparation.histories import item_name
from recformer.preparation.splits import Histories
from recformer.preparation.text import clean_text

LISTED = "attributes"  # of an item that has nothing but a list of them


@dataclass(frozen=True)
class ItemSource:
    """A file of items whose first lines have been looked at.

    Attributes:
        file: the file.
        key: column of the item ids.
        attributes: {name in the item's sentence: column}, in the order of the sentence.
    """

    file: RawFile
    key: str
    attributes: dict[str, str]

    @property
    def path(self) -> Path:
        """The file."""
        return self.file.path

    def read(
        self, *, clean: bool, bad_lines: BadLines, only: Container[str] | None = None
    ) -> tuple[dict[str, dict[str, str]], dict[str, int]]:
        """The text of every item and counts; see `amazon.read_metadata`."""
        rows = None if self.file.kind == "json" else _item_rows(self, bad_lines)
        return amazon.read_metadata(
            [self.path],
            self.attributes,
            clean=clean,
            bad_lines=bad_lines,
            only=only,
            key=self.key,
            rows=rows,
            encoding=self.file.encoding,
        )

    def read_columns(self, names: Sequence[str], bad_lines: BadLines) -> dict[str, dict[str, Any]]:
        """Columns as they stand: {column: {item: value}}; of an item's several rows the first.

        Raises:
            UserError: as `read`.
        """
        rows: Iterable[tuple[Any, ...]]
        if self.file.kind == "json":
            rows = (
                (item_name(row.get(self.key)), *(row.get(name) for name in names))
                for _, row in json_lines.read_objects(
                    self.path, bad_lines, [self.key, *names], self.file.encoding
                )
            )
        else:
            rows = _item_rows(replace(self, attributes={name: name for name in names}), bad_lines)
        found: dict[str, dict[str, Any]] = {name: {} for name in names}
        for key, *values in rows:
            if key is not None:
                for own, value in zip(found.values(), values, strict=True):
                    own.setdefault(key, value)
        return found


def text_of_log(
    histories: Histories, attributes: Mapping[str, str], clean: bool
) -> dict[str, dict[str, str]]:
    """The text of every item where the interactions are all there is: the first that has one.

    Args:
        histories: whose `extra` has the columns.
        attributes: {name in the item's sentence: column}.
        clean: see `text.clean_text`.
    """
    products: dict[str, dict[str, str]] = {name: {} for name in histories.item_names}
    for name, column in attributes.items():
        known = np.zeros(len(products), dtype=bool)
        for piece in histories.pieces():
            items = piece.sequences.items
            frame = pl.DataFrame({"item": items, "text": _texts(histories, column, piece.entries)})
            frame = frame.filter(pl.Series(~known[items]) & (pl.col("text") != ""))
            frame = frame.unique("item", keep="first", maintain_order=True)
            known[frame["item"].to_numpy()] = True
            for item, text in frame.iter_rows():
                own = clean_text(text) if clean else text
                if own:
                    products[histories.item_names[item]][name] = own
    return products


def as_text(values: pl.Series) -> pl.Series:
    """What a further column says of items, empty where it says nothing."""
    if isinstance(values.dtype, pl.List | pl.Array):
        values = values.cast(pl.List(pl.String)).list.join(" ")
    return values.cast(pl.String).str.strip_chars().fill_null("")


def _texts(histories: Histories, column: str, entries: slice) -> pl.Series:
    if histories.extra is not None:
        return as_text(histories.extra[column][entries])
    places, texts = histories.texts[column]
    return texts.gather(pl.Series(places[entries]))


def _item_rows(source: ItemSource, bad_lines: BadLines) -> Iterator[tuple[Any, ...]]:
    """`(key, value of the first attribute, …)` of every row; a value may be a list."""
    file = source.file
    if file.kind == "object":
        return _object_rows(source)
    columns = [source.key, *source.attributes.values()]
    if file.kind == "parquet":
        table = scan_parquet(file.path)
        key = id_names(pl.col(source.key), table.collect_schema()[source.key], file, source.key)
        values = [pl.col(column).alias(f"value {place}") for place, column in enumerate(columns)]
        try:
            frame = table.select(key.alias("key"), *values[1:]).collect()
        except (pl.exceptions.PolarsError, OSError) as error:
            raise unreadable(file.path, error) from error
        found = [(number, *row) for number, row in enumerate(frame.iter_rows(), 1)]
    else:
        places = [file.names.index(column) for column in columns]
        found = [
            (number, *(row[place] or None for place in places))
            for numbers, rows in rows_of(file, bad_lines)
            for number, row in zip(numbers, rows)
        ]
    kept = []
    for number, *row in found:
        if row[0]:
            kept.append(row)
        elif file.kind == "parquet" or any(row):
            bad_lines.add(file.path, number, f"no {source.key}", what=file.what)
    if not kept:
        raise UserError(
            f"{file.path} has no usable {file.what} beside its header, expected items"
            f"{bad_lines.why()}"
        )
    keys = without_fraction(pl.Series([row[0] for row in kept], dtype=pl.String))
    return ((key, *row[1:]) for key, row in zip(keys, kept))


def _object_rows(source: ItemSource) -> Iterator[tuple[Any, ...]]:
    for key, value in read_object(source.file).items():
        row = {LISTED: value} if isinstance(value, list) else value
        if not isinstance(row, dict):
            raise UserError(
                f"{source.path} has {short(value)} of {key!r}, expected {{attribute: text}}"
            )
        values = (json_lines.mend_text(row.get(column)) for column in source.attributes.values())
        yield (item_name(key) or "", *values)
