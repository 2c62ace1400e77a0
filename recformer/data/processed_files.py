"""The files of a processed folder: read and checked, written whole or not at all.

`recformer.data.processed` says what they hold.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from itertools import chain, pairwise
from pathlib import Path
from typing import IO, Any

import numpy as np

from recformer.data.processed_store import remove_stores
from recformer.data.sequences import Sequences, join_splits, offsets_of
from recformer.files import UserError, atomic_write, file_crc32, read_json, sha256_of

TRAIN_FILE = "train.json"
VAL_FILE = "val.json"
TEST_FILE = "test.json"
USER_FILE = "umap.json"
ITEM_FILE = "smap.json"
META_FILE = "meta_data.json"
DATASET_FILE = "dataset.json"
INTERACTION_FILE = "interactions.parquet"
ITEM_FEATURES_FILE = "item_features.parquet"
CHECKSUMS = "checksums"  # in dataset.json: CRC-32 of the Parquet files by name

# Those that make up a folder; the others are for people and audits.
READ_FILES = (TRAIN_FILE, VAL_FILE, TEST_FILE, ITEM_FILE, META_FILE)

_ROWS = 1 << 20  # of a group of Parquet
_USERS_AT_ONCE = 1 << 16


def split_hash(
    train: Sequences, val: Sequences, test: Sequences, smap: Sequence[str] | Mapping[str, int]
) -> str:
    """Content hash of a split: which user has which items, in which order and part.

    Args:
        train, val, test: row = user id. Empty rows count like absent ones.
        smap: item keys in item id order, or {key: item id}.

    Returns:
        Hex SHA-256. Results are comparable only where it agrees.
    """
    asins = sorted(smap, key=smap.__getitem__) if isinstance(smap, Mapping) else smap
    parts: list[np.ndarray | str] = []
    for sequences in (train, val, test):
        lengths = sequences.lengths
        users = np.flatnonzero(lengths)
        parts.append(users.astype("<i8", copy=False))
        parts.append(lengths[users].astype("<i8", copy=False))
        parts.append(sequences.items.astype("<i4", copy=False))
    parts.append(json.dumps(list(asins)))
    return sha256_of(*parts)


def write_processed(
    folder: str | os.PathLike,
    *,
    train: Sequences,
    val: Sequences,
    test: Sequences,
    user_names: Sequence[str],
    asins: Sequence[str],
    meta: Mapping[str, Mapping[str, str]],
    dataset: Mapping[str, Any],
    times: np.ndarray | None = None,
    columns: Mapping[str, Any] | None = None,
    item_columns: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Write a processed folder; no file appears before all of them are written.

    Args:
        folder: created where missing; files of these names are replaced.
        train, val, test: row = user id; empty rows are not written.
        user_names: the source's name of every user, in user id order.
        asins: the source's key of every item, in item id order.
        meta: {asin: {attribute: text}}, attributes in the order of the item's sentence.
        dataset: parameters and counts for dataset.json; the sizes and the split hash are added.
        times: int64, one an interaction, in the order of interactions.parquet (see above); None
            where the source has no times.
        columns: further columns of interactions.parquet, arrays in its order.
        item_columns: columns of item_features.parquet, arrays in item id order.

    Returns:
        What dataset.json holds.
    """
    about = {
        **dataset,
        "num_users": len(user_names),
        "num_items": len(asins),
        "num_interactions": sum(len(part.items) for part in (train, val, test)),
        "split_hash": split_hash(train, val, test, asins),
    }
    folder = Path(folder)
    with ExitStack() as stack:

        def staged(name: str) -> IO[str]:
            return stack.enter_context(atomic_write(folder / name))

        # Left in reverse order: dataset.json is the last to take its name, so that a rewrite
        # killed between two renames does not pass for a whole one.
        described = staged(DATASET_FILE)
        tables = {}
        if item_columns:
            features = stack.enter_context(atomic_write(folder / ITEM_FEATURES_FILE, "wb"))
            _write_tables(features, iter([_table(item_columns)]))
            tables[ITEM_FEATURES_FILE] = features
        interactions = stack.enter_context(atomic_write(folder / INTERACTION_FILE, "wb"))
        _write_interactions(interactions, (train, val, test), times, columns or {})
        tables[INTERACTION_FILE] = interactions
        for handle in tables.values():
            handle.flush()
        about[CHECKSUMS] = {name: file_crc32(handle.name) for name, handle in tables.items()}
        json.dump(about, described, ensure_ascii=False, indent=2)
        write_mapping(staged(META_FILE), meta.items())
        for name, own in ((ITEM_FILE, asins), (USER_FILE, user_names)):
            write_mapping(staged(name), ((key, code) for code, key in enumerate(own)), str)
        for name, part in ((TEST_FILE, test), (VAL_FILE, val), (TRAIN_FILE, train)):
            write_mapping(staged(name), _split_rows(part), str)
    remove_stores(folder)  # of what stood here before
    return about


def _split_rows(part: Sequences) -> Iterator[tuple[str, list[int]]]:
    """User id and items of every row that has any."""
    for start in range(0, len(part), _USERS_AT_ONCE):
        own = part.between(start, min(start + _USERS_AT_ONCE, len(part)))
        items, borders = own.items.tolist(), own.offsets.tolist()
        for user, (begin, end) in enumerate(pairwise(borders), start):
            if end > begin:
                yield str(user), items[begin:end]


def check_table(path: Path, dataset: Mapping[str, Any] | None) -> None:
    """Compare a Parquet file of a folder with the checksum in its dataset.json, if there is one.

    Pages have checksums of their own; what says which of them is a column's, and how many rows
    there are, has none.

    Raises:
        UserError: it is damaged, or of another preparation.
    """
    expected = (dataset or {}).get(CHECKSUMS, {}).get(path.name)
    if expected is not None and file_crc32(path) != expected:
        raise UserError(
            f"{path} is damaged or of another preparation: its checksum is another than "
            f"{DATASET_FILE} says; process the data again"
        )


def _write_interactions(
    handle: IO[bytes],
    parts: Sequence[Sequences],
    times: np.ndarray | None,
    columns: Mapping[str, Any],
) -> None:
    """Every user's items of all the parts, users one after the other.

    What is in memory at once does not depend on how many there are.
    """
    # Imported here: only data preparation writes, and training needs no parquet.
    import pyarrow as pa

    offsets = offsets_of(np.sum([part.lengths for part in parts], axis=0))
    if times is not None and len(times) != offsets[-1]:
        raise ValueError(f"got {len(times)} times for {offsets[-1]} interactions")
    starts = [0]
    while not starts[1:] or starts[-1] < len(offsets) - 1:
        fits = np.searchsorted(offsets, offsets[starts[-1]] + _ROWS, side="right") - 1
        starts.append(min(max(int(fits), starts[-1] + 1), len(offsets) - 1))

    def tables() -> Iterator[Any]:
        for start, stop in pairwise(starts):
            joined = join_splits(*(part.between(start, stop) for part in parts))
            where = slice(int(offsets[start]), int(offsets[stop]))
            missing = pa.nulls(len(joined.items), pa.int64())
            own = {
                "user_id": (joined.rows + start).astype(np.int32),
                "item_id": joined.items,
                "timestamp": missing if times is None else times[where].astype(np.int64),
                **{name: values[where] for name, values in columns.items()},
            }
            yield _table(own)

    _write_tables(handle, tables())


def _write_tables(handle: IO[bytes], tables: Iterator[Any]) -> None:
    """Tables one after the other as Parquet, whose groups of rows do not show where one ended."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    first = next(tables)
    held = first.slice(0, 0)
    options: dict[str, Any] = {"compression": "zstd", "write_page_checksum": True}
    with pq.ParquetWriter(handle, first.schema, **options) as writer:
        for table in chain([first], tables):
            held = pa.concat_tables([held, table])
            while len(held) > _ROWS:
                writer.write_table(held.slice(0, _ROWS).combine_chunks())
                held = held.slice(_ROWS)
        writer.write_table(held.combine_chunks())


def _table(columns: Mapping[str, Any]) -> Any:
    """Arrays of numpy, pyarrow or Polars as a table."""
    import pyarrow as pa

    arrays = {
        name: values.to_arrow() if hasattr(values, "to_arrow") else pa.array(values)
        for name, values in columns.items()
    }
    return pa.table(arrays)


_encode = json.JSONEncoder(ensure_ascii=False).encode


def write_mapping(
    handle: IO[str],
    entries: Iterable[tuple[str, Any]],
    as_json: Callable[[Any], str] = _encode,
) -> None:
    """Write a JSON object entry by entry, one a line: millions of entries need no second copy.

    Args:
        handle: of the file.
        entries: keys and values.
        as_json: of a value; `str` writes numbers, and lists of numbers, as a JSON encoder does and
            in a quarter to a half of its time.
    """
    border = "{\n"
    for key, value in entries:
        handle.write(f"{border}{_encode(key)}: {as_json(value)}")
        border = ",\n"
    handle.write("{}\n" if border == "{\n" else "\n}\n")


def expect_object(path: Path, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise UserError(f"{path} holds a {type(value).__name__}, expected a JSON object")
    return value


def read_item_map(path: Path) -> list[str]:
    """Item keys in item id order; the ids must be 0 … N-1, each once."""
    smap = expect_object(path, read_json(path))
    if not smap:
        raise UserError(f"{path} holds no item, expected {{asin: item id}}")
    asins: list[str | None] = [None] * len(smap)
    for asin, item in smap.items():
        if type(item) is not int or not 0 <= item < len(smap):
            raise UserError(
                f"{path} maps {asin!r} to {item!r}; with {len(smap)} items expected an item id "
                f"from 0 to {len(smap) - 1}"
            )
        if asins[item] is not None:
            raise UserError(f"{path} gives item id {item} to both {asins[item]!r} and {asin!r}")
        asins[item] = asin
    return [asin for asin in asins if asin is not None]  # as many ids as items: none is left out


def read_split(path: Path, num_items: int) -> tuple[np.ndarray, Sequences]:
    """User ids, int64 ascending, and a row of item ids for each; every id checked."""
    split: dict[int, list[int]] = {}
    for key, row in expect_object(path, read_json(path)).items():
        if not (key.isascii() and key.isdigit()):
            raise UserError(f"{path} has the user {key!r}, expected a user id (0, 1, …)")
        if not isinstance(row, list) or not set(map(type, row)) <= {int}:
            shown = json.dumps(row)[:60]
            raise UserError(f"{path}: user {key} has {shown}, expected a list of item ids")
        if row and (min(row) < 0 or max(row) >= num_items):
            wrong = min(row) if min(row) < 0 else max(row)
            raise UserError(
                f"{path}: user {key} has item id {wrong}; the item map has ids 0 to {num_items - 1}"
            )
        user = int(key) if len(key) < 19 else 10**18
        if user in split:
            raise UserError(f"{path} has user {user} twice, once as {key!r}: which is meant?")
        split[user] = row
    users = np.fromiter(split, np.int64, len(split))
    sequences = Sequences.from_lists(list(split.values()))
    if (np.diff(users) < 0).any():
        users = np.sort(users)
        sequences = Sequences.from_lists([split[user] for user in users.tolist()])
    return users, sequences


def with_row_each(users: np.ndarray, sequences: Sequences, num_users: int) -> Sequences:
    """One row a user id below `num_users`, of which those that are not among `users` are empty."""
    lengths = np.zeros(num_users, np.int64)
    lengths[users] = sequences.lengths
    return Sequences(offsets_of(lengths), sequences.items)


def read_items(path: Path, asins: Sequence[str]) -> list[dict[str, str]]:
    """Attributes in item id order. Null is absent, numbers are their text."""
    meta = expect_object(path, read_json(path))
    items = []
    for asin in asins:
        attributes = meta.get(asin, {})
        if not isinstance(attributes, dict):
            shown = json.dumps(attributes)[:60]
            raise UserError(f"{path}: {asin} has {shown}, expected {{attribute: text}}")
        item = {}
        for name, value in attributes.items():
            if isinstance(value, str):
                item[name] = value
            elif isinstance(value, int | float) and not isinstance(value, bool):
                item[name] = str(value)
            elif value is not None:
                shown = json.dumps(value)[:60]
                raise UserError(f"{path}: {asin} has {shown} as its {name!r}, expected text")
        items.append(item)
    return items
