"""Item co-occurrence: items that followed, in training, the items a user had last.

The score of an item is the sum over the history's items of decay^age times how often it came after
that item in a training sequence, the more the sooner (1 / distance, at most `WINDOW` steps apart),
divided by the root of how often that item occurs, so that popular items do not speak for all.

Shapes: B users, C of them at a time, N items.
"""

from __future__ import annotations

import numpy as np
from scipy import sparse  # type: ignore[import-untyped]

from baselines.settings import CooccurrenceSettings
from baselines.untrained.base import Scores, Untrained
from baselines.untrained.text_neighbours import history_weights
from recformer.data.processed import ProcessedFolder, Sequences

WINDOW = 5  # steps between two items of a sequence that still count as together


class Cooccurrence(Untrained):
    """Items by how often they followed the history's items.

    Args:
        folder: the data.
        settings: `decay` and `history_factor`.

    Attributes:
        follows: sparse (N, N) float64; row = the earlier item, column = the later one.
    """

    def __init__(
        self, folder: ProcessedFolder, settings: CooccurrenceSettings | None = None
    ) -> None:
        settings = settings or CooccurrenceSettings()
        super().__init__(folder, settings.history_factor)
        self.decay = settings.decay
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

    def scores(self, histories: Sequences) -> Scores:
        """Scores of all items by how often they followed the histories; 0 for those that never did.

        Items of equal scores tie.
        """
        users = history_weights(histories, self.folder.num_items, self.decay)

        return self.scaled(lambda chunk: users[chunk] @ self.follows, histories)
