"""The processed folder: the contract between data and every model.

    train.json      {user id: [item id, …]}   oldest first
    val.json        {user id: [item id, …]}   the last is the target, earlier ones are history only
    test.json       {user id: [item id, …]}   the same; leave-one-out is the case of one item
    umap.json       {reviewer id: user id}    not needed for reading
    smap.json       {asin: item id}           0-based, no gaps
    meta_data.json  {asin: {attribute: text}} may hold more products than smap.json
    dataset.json    parameters, counts and split hash of our own scripts; not needed for reading
    interactions.parquet
                    user_id int32, item_id int32, timestamp int64 in the unit of the source (null
                    where it has none): one row an interaction of the three splits, users in the
                    order of their ids, each user's train, val and test one after the other; for
                    audits, not needed for reading; with --split windows also what belongs to
                    which window, see `recformer.data.windows`, and with --features their
                    values; those of items stand in item_features.parquet, a row an item id

Any model trains from such a folder and any data source may write one. Folders of the published
scripts circulate without dataset.json and read unchanged. Standard library and numpy only: training
must need neither polars nor msgspec.

Shapes: U users (rows), N items, E evaluation examples.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np

from recformer.files import UserError, atomic_write, read_json, sha256_of

TRAIN_FILE = "train.json"
VAL_FILE = "val.json"
TEST_FILE = "test.json"
USER_FILE = "umap.json"
ITEM_FILE = "smap.json"
META_FILE = "meta_data.json"
DATASET_FILE = "dataset.json"
INTERACTION_FILE = "interactions.parquet"
ITEM_FEATURES_FILE = "item_features.parquet"


# User ids may have gaps, as published folders do; an id that is larger by far is a mistake, and
# would take memory for all users below it.
MOST_USERS_WITHOUT_ROW = 10_000_000


@dataclass(frozen=True, eq=False)
class Sequences:
    """One list of item ids a user, all laid end to end.

    Attributes:
        offsets: int64 (U+1,); row u is `items[offsets[u]:offsets[u + 1]]`.
        items: int32 (offsets[-1],) item ids, oldest first within a row.
    """

    offsets: np.ndarray
    items: np.ndarray

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, row: int) -> np.ndarray:
        """Item ids of one row, int32, a view."""
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} of {len(self)}")
        return self.items[self.offsets[row] : self.offsets[row + 1]]

    @property
    def lengths(self) -> np.ndarray:
        """Items a row, int64 (U,)."""
        return np.diff(self.offsets)

    @property
    def rows(self) -> np.ndarray:
        """Row of every item, int64 (offsets[-1],)."""
        return np.repeat(np.arange(len(self), dtype=np.int64), self.lengths)

    @classmethod
    def from_lists(cls, lists: Sequence[Sequence[int]]) -> Sequences:
        """Build from one list of item ids a row."""
        lengths = np.fromiter(map(len, lists), dtype=np.int64, count=len(lists))
        total = int(lengths.sum())
        items = np.fromiter(chain.from_iterable(lists), dtype=np.int32, count=total)
        return cls(_offsets(lengths), items)

    @classmethod
    def from_rows(cls, rows: np.ndarray, items: np.ndarray, num_rows: int) -> Sequences:
        """Group `items` by `rows` (both (M,)); within a row the given order is kept."""
        order = np.argsort(rows, kind="stable")
        lengths = np.bincount(rows, minlength=num_rows).astype(np.int64)
        return cls(_offsets(lengths), np.asarray(items)[order].astype(np.int32))


def _offsets(lengths: np.ndarray) -> np.ndarray:
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths, dtype=np.int64)])


@dataclass(frozen=True, eq=False)
class EvalExamples:
    """Evaluation examples: a user, the history, and the item to be ranked.

    Attributes:
        user_ids: int64 (E,), ascending.
        histories: E rows, every item before the target, oldest first, none of them empty.
        targets: int64 (E,) item ids.
        num_without_history: users left out because nothing stands before their target.
        starts: int64 (E,), where each history begins among the folder's interactions, see
            `ProcessedFolder.interaction_offsets`; None: not known.
    """

    user_ids: np.ndarray
    histories: Sequences
    targets: np.ndarray
    num_without_history: int
    starts: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.user_ids)


@dataclass(frozen=True, eq=False)
class ProcessedFolder:
    """A processed folder in memory.

    Attributes:
        path: the folder.
        train, val, test: row = user id, an absent user is an empty row; all three have U rows.
        num_users: U, the highest user id of the three splits plus one.
        num_items: N, the entries of the item map.
        items: attributes of every item in item id order; `{}` where there is no metadata.
        asins: the key of every item in item id order.
        split_hash: content hash of the split, see `split_hash`.
        num_without_metadata: items whose `items` entry is empty.
        dataset: dataset.json where there is one.
    """

    path: Path
    train: Sequences
    val: Sequences
    test: Sequences
    num_users: int
    num_items: int
    items: list[dict[str, str]]
    asins: list[str]
    split_hash: str
    num_without_metadata: int
    dataset: dict[str, Any] | None

    @classmethod
    def load(
        cls,
        path: str | os.PathLike,
        train_file: str = TRAIN_FILE,
        dev_file: str = VAL_FILE,
        test_file: str = TEST_FILE,
        item2id_file: str = ITEM_FILE,
        meta_file: str = META_FILE,
    ) -> ProcessedFolder:
        """Read and check a folder.

        Raises:
            FileNotFoundError: the folder or one of the five files is missing.
            UserError: a file is empty, not JSON, of another shape, or names an item id outside the
                item map; or dataset.json was written for another split than the one found.
        """
        folder = Path(path)
        names = (train_file, dev_file, test_file, item2id_file, meta_file)
        _require_files(folder, names)

        asins = _read_item_map(folder / item2id_file)
        splits = [_read_split(folder / name, len(asins)) for name in names[:3]]
        if not splits[0]:
            raise UserError(f"{folder / train_file} holds no user, expected {{user id: [item id]}}")
        num_users = 1 + max(max(split, default=-1) for split in splits)
        filled = max(map(len, splits))
        if num_users > MOST_USERS_WITHOUT_ROW + 10 * filled:
            raise UserError(
                f"{folder} has the user id {num_users - 1:,} among {filled:,} users: expected ids "
                f"from 0 on without large gaps, a row is kept for every one; number the users anew"
            )
        train, val, test = (
            Sequences.from_lists([split.get(user, ()) for user in range(num_users)])
            for split in splits
        )
        items = _read_items(folder / meta_file, asins)
        digest = split_hash(train, val, test, asins)

        dataset = None
        if (folder / DATASET_FILE).is_file():
            dataset = _expect_object(folder / DATASET_FILE, read_json(folder / DATASET_FILE))
            ours = names[:4] == (TRAIN_FILE, VAL_FILE, TEST_FILE, ITEM_FILE)
            if ours and dataset.get("split_hash", digest) != digest:
                # Also what an interrupted rewrite of the folder leaves: dataset.json comes last.
                raise UserError(
                    f"{folder} does not hold the split that its {DATASET_FILE} describes (split "
                    f"hash {digest[:12]}, expected {str(dataset['split_hash'])[:12]}): files were "
                    f"exchanged or only partly rewritten. Process the data again, or remove "
                    f"{DATASET_FILE} if the change is meant"
                )
        return cls(
            path=folder,
            train=train,
            val=val,
            test=test,
            num_users=num_users,
            num_items=len(asins),
            items=items,
            asins=asins,
            split_hash=digest,
            num_without_metadata=sum(not item for item in items),
            dataset=dataset,
        )

    def interaction_offsets(self) -> np.ndarray:
        """Place where the interactions of each user begin in interactions.parquet, int64 (U+1,); a
        training sequence and every history are the first ones of their user."""
        return _offsets(self.train.lengths + self.val.lengths + self.test.lengths)

    @property
    def train_users(self) -> np.ndarray:
        """Rows to train on, int64: those with two items or more."""
        return np.flatnonzero(self.train.lengths >= 2)

    def eval_examples(self, split: Literal["val", "test"]) -> EvalExamples:
        """The evaluation examples of a split: one a user that has a target in it.

        The target is the last item of the user's row. Its history is everything before it: train
        and the earlier items of `val` for "val"; train, `val` and the earlier items of `test` for
        "test". Users with an empty history are left out and counted.
        """
        if split not in ("val", "test"):
            raise ValueError(f"split is {split!r}, expected 'val' or 'test'")
        held_out = self.val if split == "val" else self.test
        parts = [self.train, held_out] if split == "val" else [self.train, self.val, held_out]

        has_target = held_out.lengths > 0
        everything = Sequences.from_rows(
            np.concatenate([part.rows for part in parts]),
            np.concatenate([part.items for part in parts]),
            self.num_users,
        )
        history_lengths = everything.lengths - has_target  # all but the target, which is last
        users = np.flatnonzero(has_target & (history_lengths > 0))
        last = everything.offsets[users + 1] - 1

        # Items of the chosen users, less the last of each.
        in_history = np.repeat(has_target & (history_lengths > 0), everything.lengths)
        in_history[last] = False
        histories = Sequences(_offsets(history_lengths[users]), everything.items[in_history])
        return EvalExamples(
            user_ids=users,
            histories=histories,
            targets=everything.items[last].astype(np.int64),
            num_without_history=int(has_target.sum()) - len(users),
            starts=self.interaction_offsets()[users],
        )


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
    parts: list[bytes | str] = []
    for sequences in (train, val, test):
        users = np.flatnonzero(sequences.lengths)
        parts.append(users.astype("<i8").tobytes())
        parts.append(sequences.lengths[users].astype("<i8").tobytes())
        parts.append(sequences.items.astype("<i4").tobytes())
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
        json.dump(about, staged(DATASET_FILE), ensure_ascii=False, indent=2)
        if item_columns:
            _write_table(
                stack.enter_context(atomic_write(folder / ITEM_FEATURES_FILE, "wb")), item_columns
            )
        interactions = stack.enter_context(atomic_write(folder / INTERACTION_FILE, "wb"))
        _write_interactions(interactions, join_splits(train, val, test), times, columns or {})
        write_mapping(staged(META_FILE), meta.items())
        write_mapping(staged(ITEM_FILE), ((asin, item) for item, asin in enumerate(asins)))
        write_mapping(staged(USER_FILE), ((name, user) for user, name in enumerate(user_names)))
        for name, part in ((TEST_FILE, test), (VAL_FILE, val), (TRAIN_FILE, train)):
            filled = np.flatnonzero(part.lengths).tolist()
            rows = ((str(user), part[user].tolist()) for user in filled)
            write_mapping(staged(name), rows)
    return about


def join_splits(*parts: Sequences) -> Sequences:
    """Every user's items of all the parts, one part after the other.

    Args:
        parts: all with one row a user.
    """
    return Sequences.from_rows(
        np.concatenate([part.rows for part in parts]),
        np.concatenate([part.items for part in parts]),
        len(parts[0]),
    )


def read_times(data: ProcessedFolder) -> np.ndarray | None:
    """Times of `join_splits(data.train, data.val, data.test)`, int64, in the source's unit.

    Returns:
        None where the folder has no interactions.parquet or its source had no times.

    Raises:
        UserError: the file cannot be read or belongs to other sequences than the folder's.
    """
    columns = read_columns(data, ["timestamp"])
    if columns is None or columns["timestamp"].null_count:
        return None
    return columns["timestamp"].to_numpy()


def read_columns(data: ProcessedFolder, names: Sequence[str]) -> dict[str, Any] | None:
    """Columns of interactions.parquet, one value an item of `join_splits(train, val, test)`.

    Args:
        data: the folder that the file lies in.
        names: of the columns.

    Returns:
        {name: pyarrow's column}; None where the folder has no interactions.parquet.

    Raises:
        UserError: the file cannot be read, lacks a column or belongs to other sequences than the
            folder's.
    """
    import pyarrow.parquet as pq
    from pyarrow import ArrowException

    path = data.path / INTERACTION_FILE
    if not path.is_file():
        return None
    try:
        missing = [name for name in names if name not in pq.read_schema(path).names]
        if missing:
            raise UserError(f"{path} has no column {missing[0]!r}: process the data again")
        chosen = ["user_id", "item_id", *names]
        table = pq.read_table(path, columns=chosen, page_checksum_verification=True)
    except (ArrowException, OSError) as error:
        raise UserError(
            f"{path} cannot be read ({error}): process the data again, or delete the file to go "
            f"on without times"
        ) from error
    joined = join_splits(data.train, data.val, data.test)
    if not (
        np.array_equal(table["user_id"].to_numpy(), joined.rows)
        and np.array_equal(table["item_id"].to_numpy(), joined.items)
    ):
        raise UserError(
            f"{path} was written for other sequences than those of the folder: process the data "
            f"again, or delete the file to go on without times"
        )
    return {name: table[name] for name in names}


def _write_interactions(
    handle: IO[bytes], joined: Sequences, times: np.ndarray | None, columns: Mapping[str, Any]
) -> None:
    # Imported here: only data preparation writes, and training needs no parquet.
    import pyarrow as pa

    if times is not None and len(times) != len(joined.items):
        raise ValueError(f"got {len(times)} times for {len(joined.items)} interactions")
    missing = pa.nulls(len(joined.items), pa.int64())
    table = {
        "user_id": joined.rows.astype(np.int32),
        "item_id": joined.items,
        "timestamp": missing if times is None else times.astype(np.int64),
    }
    _write_table(handle, table | dict(columns))


def _write_table(handle: IO[bytes], columns: Mapping[str, Any]) -> None:
    """Arrays of numpy, pyarrow or Polars as Parquet."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    arrays = {
        name: values.to_arrow() if hasattr(values, "to_arrow") else pa.array(values)
        for name, values in columns.items()
    }
    pq.write_table(pa.table(arrays), handle, compression="zstd", write_page_checksum=True)


def write_mapping(handle: IO[str], entries: Iterable[tuple[str, Any]]) -> None:
    """Write a JSON object entry by entry, one a line: millions of entries need no second copy."""
    encode = json.JSONEncoder(ensure_ascii=False).encode
    border = "{\n"
    for key, value in entries:
        handle.write(f"{border}{encode(key)}: {encode(value)}")
        border = ",\n"
    handle.write("{}\n" if border == "{\n" else "\n}\n")


def _require_files(folder: Path, names: Sequence[str]) -> None:
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not a folder, expected a processed data set")
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise FileNotFoundError(
            f"{folder} lacks {', '.join(missing)}: expected a processed data set as "
            f"finetune_data/process.py writes it"
        )


def _expect_object(path: Path, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise UserError(f"{path} holds a {type(value).__name__}, expected a JSON object")
    return value


def _read_item_map(path: Path) -> list[str]:
    """Item keys in item id order; the ids must be 0 … N-1, each once."""
    smap = _expect_object(path, read_json(path))
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


def _read_split(path: Path, num_items: int) -> dict[int, list[int]]:
    """{user id: item ids}, every id checked."""
    split: dict[int, list[int]] = {}
    for key, row in _expect_object(path, read_json(path)).items():
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
        user = int(key) if len(key) < 20 else 10**20
        if user in split:
            raise UserError(f"{path} has user {user} twice, once as {key!r}: which is meant?")
        split[user] = row
    return split


def _read_items(path: Path, asins: Sequence[str]) -> list[dict[str, str]]:
    """Attributes in item id order. Null is absent, numbers are their text."""
    meta = _expect_object(path, read_json(path))
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
