"""Features of interactions and items beside the item id, as the processed folder keeps them.

    dataset.json            "features": a list of `Feature`
    interactions.parquet    a column "feature NAME" for every feature of interactions
    item_features.parquet   a column "feature NAME" for every feature of items, a row an item id;
                            "told NAME" beside what the log told: in which window it first did,
                            or by which part (0 training, 1 validation, 2 the test, 3 none)

Values stand there as they were read: numbers float64, categories and lists of categories as text,
null where there is none. What a model makes of them (`Encoded`) is fitted to what it may know: a
category that training did not meet is unknown, and means and deviations are training's. What the
log told of an item only after training is missing, unless the item itself is new.

Shapes: V values (interactions of the folder, or items), C categories.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

from recformer.data.processed import (
    ITEM_FEATURES_FILE,
    ProcessedFolder,
    read_columns,
)
from recformer.data.processed_files import check_table
from recformer.data.windows import SPLIT_NAME, WindowView
from recformer.files import UserError

KINDS = ("float", "cat", "list")
MISSING, UNKNOWN = 0, 1  # rows of a table of categories; the known ones follow

# Standard deviations from the mean: a number that lies farther off is taken to lie there.
FARTHEST = 1e4

Of = Literal["item", "interaction"]


@dataclass(frozen=True)
class Feature:
    """A feature of a processed folder.

    Attributes:
        name: as it was asked for.
        kind: "float", "cat" or "list" (of categories).
        of: "item", the same whoever meets it; or "interaction".
        distinct: different values; of lists, of their members.
        missing: values that are not there, of items or interactions.
    """

    name: str
    kind: str
    of: Of
    distinct: int
    missing: int

    @property
    def column(self) -> str:
        """Its column in the file."""
        return f"feature {self.name}"

    @property
    def told_column(self) -> str:
        """Column beside it that says when the log told an item's value."""
        return f"told {self.name}"

    def as_dict(self) -> dict[str, Any]:
        """As dataset.json has it."""
        return asdict(self)


@dataclass(frozen=True, eq=False)
class Encoded:
    """A feature as a model reads it.

    Attributes:
        feature: which one.
        values: float32 (V,) standardised numbers, 0 where missing; or int64 rows of a table of
            `num_rows` categories, (V,) of "cat" and one after the other of "list".
        present: bool (V,), of "float".
        offsets: int64 (V+1,), of "list".
        num_rows: of the table, `MISSING` and `UNKNOWN` included; 0 of "float".
    """

    feature: Feature
    values: np.ndarray
    present: np.ndarray | None = None
    offsets: np.ndarray | None = None
    num_rows: int = 0

    def content(self) -> list[bytes]:
        """All that a model reads of it, to be hashed."""
        arrays = [a for a in (self.values, self.present, self.offsets) if a is not None]
        names = f"{self.feature.name} {self.feature.kind} {self.feature.of} {self.num_rows}"
        return [names.encode(), *(array.tobytes() for array in arrays)]


def features_of(folder: ProcessedFolder) -> list[Feature]:
    """The declaration in dataset.json."""
    return [Feature(**entry) for entry in (folder.dataset or {}).get("features", [])]


def encode_features(folder: ProcessedFolder) -> dict[Of, list[Encoded]]:
    """The features of a folder, or of a window's view of it, fitted to its training part alone.

    Items are those of the folder or view; interactions those of the whole folder, in the order of
    interactions.parquet. Of a view's, those after the end of its window are read by nothing.

    Raises:
        UserError: the folder has no features, or its files do not belong together.
    """
    features = features_of(folder)
    if not features:
        raise UserError(
            f"{folder.path} has no features: process the data with --features NAME:TYPE …"
        )
    whole = folder.whole if isinstance(folder, WindowView) else folder
    found: dict[Of, list[Encoded]] = {"item": [], "interaction": []}
    own = [feature for feature in features if feature.of == "interaction"]
    if own:
        columns = read_columns(whole, [feature.column for feature in own])
        if columns is None:
            raise UserError(f"{folder.path} has no interactions.parquet: process the data again")
        if isinstance(folder, WindowView):
            when, known = folder.when, folder.when < folder.window
        else:
            known = _trained(folder)
            when = np.zeros(len(known), dtype=np.int64)
        for feature in own:
            found["interaction"].append(_encode(feature, columns[feature.column], known, when))
    own = [feature for feature in features if feature.of == "item"]
    if own:
        table = _item_columns(whole, own)
        met = np.zeros(folder.num_items, dtype=bool)
        met[folder.train.items] = True
        now, last = _now(folder)
        for feature in own:
            column = table[feature.column].slice(0, folder.num_items)
            known = met
            if feature.told_column in table.column_names:  # it is the log that told it
                told = table[feature.told_column].slice(0, folder.num_items).fill_null(0).to_numpy()
                column = _without(column, (told > last) | (met & (told >= now)))
                known = met & (told < now)
            found["item"].append(_encode(feature, column, known, np.zeros(len(met), np.int64)))
    return found


def _now(folder: ProcessedFolder) -> tuple[int, int]:
    """What training knows was told before the first of these moments; until the second, included,
    what is new may be told (see the module's "told NAME")."""
    if isinstance(folder, WindowView):
        return folder.window, folder.window
    split = (folder.dataset or {}).get("split", {})
    if split.get("name") == SPLIT_NAME:  # its files are those of the last window
        return len(split["windows"]) - 1, len(split["windows"]) - 1
    return 1, 2


def _without(column: Any, hidden: np.ndarray) -> Any:
    """A column of pyarrow whose values at some places, bool (V,), are missing."""
    import pyarrow as pa
    import pyarrow.compute as pc

    column = column.combine_chunks() if hasattr(column, "combine_chunks") else column
    return pc.if_else(pa.array(hidden), pa.scalar(None, column.type), column)


def _trained(folder: ProcessedFolder) -> np.ndarray:
    """Mask of the interactions of the joined splits that training knows, bool."""
    offsets = folder.interaction_offsets()
    lengths = np.diff(offsets)
    within = np.arange(offsets[-1]) - np.repeat(offsets[:-1], lengths)
    return within < np.repeat(folder.train.lengths, lengths)


def _item_columns(whole: ProcessedFolder, features: Sequence[Feature]) -> Any:
    """The table of some features of items."""
    import pyarrow.parquet as pq
    from pyarrow import ArrowException

    path = whole.path / ITEM_FEATURES_FILE
    if path.is_file():
        check_table(path, whole.dataset)
    try:
        there = set(pq.read_schema(path).names)  # earlier folders do not say when a log told what
        names = [one.column for one in features]
        names += [one.told_column for one in features if one.told_column in there]
        table = pq.read_table(path, columns=names, page_checksum_verification=True)
    except (ArrowException, OSError) as error:
        raise UserError(f"{path} cannot be read ({error}): process the data again") from error
    if table.num_rows != whole.num_items or table.num_columns != len(names):
        raise UserError(f"{path} belongs to another folder: process the data again")
    return table


def _encode(feature: Feature, column: Any, known: np.ndarray, when: np.ndarray) -> Encoded:
    """A column of pyarrow; `known` says which of its values training may look at, bool (V,), and
    `when` orders them, so that a later view knows the same categories first."""
    if feature.kind == "float":
        values = column.to_numpy(zero_copy_only=False).astype(np.float64)  # null becomes NaN
        present = np.isfinite(values)
        seen = values[present & known]
        mean, deviation = (float(seen.mean()), float(seen.std())) if len(seen) else (0.0, 1.0)
        scaled = np.where(present, (values - mean) / (deviation or 1.0), 0.0)
        scaled = scaled.clip(-FARTHEST, FARTHEST)
        return Encoded(feature, scaled.astype(np.float32), present)
    if feature.kind == "cat":
        rows, count = _rows(column, known, when)
        return Encoded(feature, rows, num_rows=count)
    column = column.combine_chunks() if hasattr(column, "combine_chunks") else column
    lengths = column.value_lengths().fill_null(0).to_numpy(zero_copy_only=False).astype(np.int64)
    members = column.flatten()
    rows, count = _rows(members, np.repeat(known, lengths), np.repeat(when, lengths))
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    return Encoded(feature, rows, offsets=offsets, num_rows=count)


def _rows(column: Any, known: np.ndarray, when: np.ndarray) -> tuple[np.ndarray, int]:
    """Rows of a table of categories, those that training met in the order in which it met them."""
    encoded = column.dictionary_encode()
    encoded = encoded.combine_chunks() if hasattr(encoded, "combine_chunks") else encoded
    if hasattr(encoded, "num_chunks"):  # some versions leave one chunk
        encoded = encoded.chunk(0)
    codes = encoded.indices.fill_null(-1).to_numpy(zero_copy_only=False).astype(np.int64)
    number = len(encoded.dictionary)
    chosen = np.flatnonzero(known & (codes >= 0))
    chosen = chosen[np.argsort(when[chosen], kind="stable")]
    met, first = np.unique(codes[chosen], return_index=True)
    table = np.full(number + 1, UNKNOWN, dtype=np.int64)
    table[met[np.argsort(first, kind="stable")]] = np.arange(len(met)) + UNKNOWN + 1
    table[-1] = MISSING  # where codes are -1
    return table[codes], len(met) + UNKNOWN + 1
