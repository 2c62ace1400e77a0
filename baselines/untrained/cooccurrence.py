"""Item co-occurrence: items that followed, in training, the items a user had last.

The score of an item is the sum over the history's items of decay^age times how often it came after
that item in a training sequence, the more the sooner (1 / distance, at most `WINDOW` steps apart),
divided by the root of how often that item occurs, so that popular items do not speak for all.

Shapes: E evaluation examples, N items.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
from scipy import sparse  # type: ignore[import-untyped]

from baselines.settings import CooccurrenceSettings
from baselines.untrained.base import (
    Scores,
    checked_history_factor,
    evaluate,
    rank_in_chunks,
    scale_history,
)
from baselines.untrained.text_neighbours import history_weights
from recformer.data.processed import EvalExamples, ProcessedFolder
from recformer.evaluation.ranks import TargetRanks
from recformer.files import UserError

WINDOW = 5  # steps between two items of a sequence that still count as together


class Cooccurrence:
    """Items by how often they followed the history's items.

    Args:
        folder: the data.
        decay: weight of an item against the next newer one, from 0 (the last item alone) to 1.
        history_factor: scores of items of the history are multiplied by it.

    Attributes:
        follows: sparse (N, N) float64; row = the earlier item, column = the later one.

    Raises:
        UserError: `decay` or `history_factor` is out of range.
    """

    def __init__(
        self,
        folder: ProcessedFolder,
        decay: float = CooccurrenceSettings.decay,
        history_factor: float = CooccurrenceSettings.history_factor,
    ) -> None:
        self.history_factor = checked_history_factor(history_factor)
        if not 0 <= decay <= 1:
            raise UserError(f"decay is {decay}, expected a weight from 0 to 1")
        self.folder = folder
        self.decay = decay
        train, size = folder.train, (folder.num_items, folder.num_items)
        rows = train.rows
        follows = sparse.csr_array(size, dtype=np.float64)
        for distance in range(1, WINDOW + 1):
            together = rows[distance:] == rows[:-distance]  # of the same user
            first = train.items[:-distance][together]
            second = train.items[distance:][together]
            weights = np.full(len(first), 1 / distance)
            follows = follows + sparse.coo_array((weights, (first, second)), shape=size).tocsr()
        counts = np.bincount(train.items, minlength=folder.num_items)
        self.follows = sparse.diags_array(1 / np.sqrt(np.maximum(counts, 1))).tocsr() @ follows

    def scores(self, examples: EvalExamples) -> Scores:
        """Scores of all items by how often they followed the histories."""
        users = history_weights(examples.histories, self.folder.num_items, self.decay)

        def scores(chunk: slice) -> np.ndarray:
            return (users[chunk] @ self.follows).toarray()

        return scale_history(scores, examples, self.history_factor)

    def rank(self, examples: EvalExamples, filter_seen: bool = False) -> TargetRanks:
        """Place the target of every example; items that never followed tie at 0."""
        return rank_in_chunks(examples, self.folder.num_items, filter_seen, self.scores(examples))

    def evaluate(self, split: Literal["val", "test"] = "test", **options: Any) -> dict[str, float]:
        """Figures of a split; `options` as in `baselines.untrained.base.evaluate`."""
        return evaluate(self, split, **options).compute()
