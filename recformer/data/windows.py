"""A processed folder seen from one moment: train up to window t, judged on window t + 1.

What `--split windows` of the preparation leaves: dataset.json lists the windows, and
interactions.parquet has two more columns, window int32 and role int8 (`NO_TARGET`, `VAL_TARGET`,
`TEST_TARGET`), and context bool where sessions begin with earlier ones. Items are numbered in the
order of their first interaction, so that those known at a moment are the ids below a number.

Shapes: M interactions, R sequences (rows), W windows, E evaluation examples.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from recformer.data.processed import (
    DATASET_FILE,
    EvalExamples,
    ProcessedFolder,
    Sequences,
    join_splits,
    read_columns,
)
from recformer.data.texts import attribute_counts
from recformer.files import UserError, sha256_of

NO_TARGET, VAL_TARGET, TEST_TARGET = 0, 1, 2
SPLIT_NAME = "windows"


@dataclass(frozen=True, eq=False)
class WindowView(ProcessedFolder):
    """Knowledge at the end of window t, and the questions of window t + 1.

    The model has ids for what window t + 1 offers, the first `num_items`; of those from
    `num_trained_items` on nothing is known yet: nobody met them up to window t.

    An example is a target: `user_ids` of `eval_examples` are places of interactions in the whole
    folder, so that the ranks of all windows go into one table.

    Attributes:
        window: t + 1, the window that is judged.
        num_trained_items: items met up to window t.
        fresh: rows with own interactions in window t, int64: what is trained on where weights go
            on.
        incremental: train on these rows alone.
        offsets: int64 (R+1,), the places of every row's interactions in the whole folder.
        examples: by split.
        whole: the folder.
        when: the window of every interaction of the folder.
        hash: of the windows, see `Windows.hash`.
    """

    window: int
    num_trained_items: int
    fresh: np.ndarray
    incremental: bool
    offsets: np.ndarray
    examples: dict[str, EvalExamples]
    whole: ProcessedFolder
    when: np.ndarray
    hash: str

    @property
    def train_users(self) -> np.ndarray:
        users = super().train_users
        return np.intersect1d(users, self.fresh) if self.incremental else users

    def interaction_offsets(self) -> np.ndarray:
        return self.offsets

    def eval_examples(self, split: Literal["val", "test"]) -> EvalExamples:
        return self.examples[split]

    def row_of(self, places: np.ndarray) -> np.ndarray:
        """The sequence that each place of an interaction is in, int64."""
        return np.searchsorted(self.offsets, places, side="right") - 1


@dataclass(frozen=True, eq=False)
class Windows:
    """The windows of a processed folder.

    Attributes:
        folder: the folder.
        joined: its sequences, all parts one after the other.
        windows, roles, context: of every interaction.
        about: what dataset.json says of each window.
    """

    folder: ProcessedFolder
    joined: Sequences
    windows: np.ndarray
    roles: np.ndarray
    context: np.ndarray
    about: list[dict[str, Any]]

    @classmethod
    def of(cls, folder: ProcessedFolder) -> Windows | None:
        """The windows of a folder; None where it was split otherwise.

        Raises:
            UserError: interactions.parquet is missing or belongs to other sequences.
        """
        split = (folder.dataset or {}).get("split")
        if not isinstance(split, dict) or split.get("name") != SPLIT_NAME:
            return None
        columns = read_columns(folder, ["window", "role", "context"])
        if columns is None:
            raise UserError(
                f"{folder.path} has no interactions.parquet, which says what belongs to which "
                f"window: process the data again"
            )
        joined = join_splits(folder.train, folder.val, folder.test)
        windows, roles, context = (columns[name].to_numpy() for name in columns)
        _check_about(folder, joined.items, windows, split["windows"])
        same_row = joined.rows[1:] == joined.rows[:-1]
        if (np.diff(windows)[same_row] < 0).any():
            raise UserError(f"{folder.path}: a sequence goes back in time: process the data again")
        return cls(folder, joined, windows, roles, context, split["windows"])

    def __len__(self) -> int:
        """W."""
        return len(self.about)

    @property
    def hash(self) -> str:
        """Content hash of what is asked when, of which the folder's split hash knows nothing."""
        parts = (self.windows.astype("<i4"), self.roles.astype("i1"), self.context.astype("i1"))
        return sha256_of(*(part.tobytes() for part in parts))

    def view(self, window: int, incremental: bool = False) -> WindowView:
        """The folder with everything before `window` to train on, judged on `window`.

        Args:
            window: from 1.
            incremental: train on the rows of the window before alone; the rest was trained on.
        """
        if not 0 < window < len(self):
            raise ValueError(f"window {window}, expected from 1 to {len(self) - 1}")
        folder, joined = self.folder, self.joined
        before, rows = self.windows < window, joined.rows
        own_before = np.zeros(len(joined), dtype=bool)
        own_before[rows[before & ~self.context]] = True
        trained = before & own_before[rows]
        fresh = np.unique(rows[(self.windows == window - 1) & ~self.context])
        known = int(self.about[window]["items_known"])
        train = Sequences.from_rows(rows[trained], joined.items[trained], len(joined))
        examples = {
            "val": self._examples(window, VAL_TARGET),
            "test": self._examples(window, TEST_TARGET),
        }
        held = {
            name: Sequences.from_rows(
                rows[found.user_ids], joined.items[found.user_ids], len(joined)
            )
            for name, found in examples.items()
        }
        return WindowView(
            path=folder.path,
            train=train,
            val=held["val"],
            test=held["test"],
            num_users=len(joined),
            num_items=known,
            items=folder.items[:known],
            asins=folder.asins[:known],
            split_hash=sha256_of(folder.split_hash, f"window {window}"),
            num_without_metadata=int((attribute_counts(folder.items[:known]) == 0).sum()),
            dataset=folder.dataset,
            window=window,
            num_trained_items=int(self.about[window - 1]["items_known"]),
            fresh=fresh,
            incremental=incremental,
            offsets=joined.offsets,
            examples=examples,
            whole=folder,
            when=self.windows,
            hash=self.hash,
        )

    def _examples(self, window: int, role: int) -> EvalExamples:
        """Every target of a window and role, with all before it in its row."""
        joined = self.joined
        places = np.flatnonzero((self.windows == window) & (self.roles == role))
        begins = joined.offsets[joined.rows[places]]
        lengths = places - begins
        offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        within = np.arange(offsets[-1]) - np.repeat(offsets[:-1], lengths)
        histories = Sequences(offsets, joined.items[np.repeat(begins, lengths) + within])
        targets = joined.items[places].astype(np.int64)
        return EvalExamples(places, histories, targets, 0, begins)


def _check_about(
    folder: ProcessedFolder, items: np.ndarray, windows: np.ndarray, about: list[dict[str, Any]]
) -> None:
    """Refuse a dataset.json that says something else of the windows than the interactions do."""
    most = np.full(len(about), -1, dtype=np.int64)
    if windows.min() >= 0 and windows.max() < len(about):
        np.maximum.at(most, windows, items)
    known = np.maximum.accumulate(most) + 1  # items are numbered as they appeared
    if known.tolist() != [int(window["items_known"]) for window in about]:
        raise UserError(
            f"{folder.path / DATASET_FILE} has other windows than interactions.parquet: process "
            "the data again"
        )
