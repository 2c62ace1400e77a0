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
scripts circulate without dataset.json and read unchanged. Training must need neither polars nor
msgspec to read one. Of a large folder a copy in mapped files is kept, see
`recformer.data.processed_store`.

Shapes: U users (rows), N items, E evaluation examples.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from recformer.data.processed_files import (
    DATASET_FILE,
    INTERACTION_FILE,
    ITEM_FEATURES_FILE,
    ITEM_FILE,
    META_FILE,
    READ_FILES,
    TEST_FILE,
    TRAIN_FILE,
    USER_FILE,
    VAL_FILE,
    check_table,
    expect_object,
    read_item_map,
    read_items,
    read_split,
    split_hash,
    with_row_each,
    write_mapping,
    write_processed,
)
from recformer.data.processed_store import Content, open_or_build
from recformer.data.sequences import HistoryRows, Sequences, join_splits, offsets_of
from recformer.data.texts import attribute_counts
from recformer.files import UserError, read_json

__all__ = [
    "DATASET_FILE",
    "INTERACTION_FILE",
    "ITEM_FEATURES_FILE",
    "ITEM_FILE",
    "META_FILE",
    "READ_FILES",
    "TEST_FILE",
    "TRAIN_FILE",
    "USER_FILE",
    "VAL_FILE",
    "EvalExamples",
    "ProcessedFolder",
    "Sequences",
    "join_splits",
    "read_columns",
    "read_times",
    "split_hash",
    "write_mapping",
    "write_processed",
]

# User ids may have gaps, as published folders do; an id that is larger by far is a mistake, and
# would take memory for all users below it.
MOST_USERS_WITHOUT_ROW = 10_000_000


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
        items: attributes of every item in item id order; `{}` where there is no metadata. Of a
            large folder these and `asins` are `recformer.data.texts`, decoded when asked for.
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
    items: Sequence[dict[str, str]]
    asins: Sequence[str]
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

        Examples:
            >>> folder = ProcessedFolder.load("finetune_data/MyShop")
            >>> folder.num_users, folder.num_items
            (80, 48)
            >>> row = folder.asins.index("tent-4")
            >>> folder.items[row]
            {'title': 'white tent number 4', 'brand': 'Borex', 'category': 'Camping'}
            >>> examples = folder.eval_examples("test")  # one a user: a history and what came next
            >>> len(examples), len(examples.histories[0])
            (80, 6)
        """
        folder = Path(path)
        names = (train_file, dev_file, test_file, item2id_file, meta_file)
        _require_files(folder, names)

        content = open_or_build(folder, names, lambda: _read(folder, names))
        dataset = None
        if (folder / DATASET_FILE).is_file():
            dataset = expect_object(folder / DATASET_FILE, read_json(folder / DATASET_FILE))
            ours = names[:4] == READ_FILES[:4]
            digest = content.split_hash
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
            train=content.train,
            val=content.val,
            test=content.test,
            num_users=len(content.train),
            num_items=len(content.asins),
            items=content.items,
            asins=content.asins,
            split_hash=content.split_hash,
            num_without_metadata=int((attribute_counts(content.items) == 0).sum()),
            dataset=dataset,
        )

    def interaction_offsets(self) -> np.ndarray:
        """Place where the interactions of each user begin in interactions.parquet, int64 (U+1,); a
        training sequence and every history are the first ones of their user."""
        return offsets_of(self.train.lengths + self.val.lengths + self.test.lengths)

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

        in_parts = [part.lengths for part in parts]
        has_target = in_parts[-1] > 0
        users = np.flatnonzero(has_target & (np.sum(in_parts, axis=0) > 1))
        return EvalExamples(
            user_ids=users,
            histories=HistoryRows(parts, users),
            targets=held_out.items[held_out.offsets[users + 1] - 1].astype(np.int64),
            num_without_history=int(has_target.sum()) - len(users),
            starts=self.interaction_offsets()[users],
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
    check_table(path, data.dataset)
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


def _read(folder: Path, names: Sequence[str]) -> Content:
    """The five files, read and checked; one at a time, so that no two are held as lists."""
    asins = read_item_map(folder / names[3])
    splits = [read_split(folder / name, len(asins)) for name in names[:3]]
    if not len(splits[0][0]):
        raise UserError(f"{folder / names[0]} holds no user, expected {{user id: [item id]}}")
    num_users = 1 + max(int(users[-1]) if len(users) else -1 for users, _ in splits)
    filled = max(len(users) for users, _ in splits)
    if num_users > MOST_USERS_WITHOUT_ROW + 10 * filled:
        raise UserError(
            f"{folder} has the user id {num_users - 1:,} among {filled:,} users: expected ids "
            f"from 0 on without large gaps, a row is kept for every one; number the users anew"
        )
    train, val, test = (with_row_each(users, rows, num_users) for users, rows in splits)
    digest = split_hash(train, val, test, asins)
    return Content(train, val, test, asins, read_items(folder / names[4], asins), digest)


def _require_files(folder: Path, names: Sequence[str]) -> None:
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not a folder, expected a processed data set")
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise FileNotFoundError(
            f"{folder} lacks {', '.join(missing)}: expected a processed data set as "
            f"finetune_data/process.py writes it"
        )
