"""Session kNN: items of the training sequences that are most like a history. Nothing is trained.

    S-KNN    sim(s, n) = |s and n| / sqrt(|s| |n|), the cosine of the sets of items
             (Jannach and Ludewig, RecSys 2017; Ludewig and Jannach, UMUAI 2018, section 3.3)
    V-SKNN   sim(s, n) = sum over the items of both of w_i, w_i = place of i in s / length of s, so
             that the newest item has weight 1 (the same, "vector multiplication" with linear decay)

    score(i, s) = sum over the k nearest n that hold i of sim(s, n)

The published code compares a history with a sample of the newest sessions that share an item with
it, to be fast; products of sparse matrices compare all. A user's own training sequence is one of
them: it adds to the scores of its own items alone.

Shapes: B users, C of a chunk, S training sequences, N items.
"""

from __future__ import annotations

from functools import cached_property

import numpy as np
from scipy import sparse  # type: ignore[import-untyped]
from sklearn.preprocessing import normalize

from baselines.settings import SknnSettings
from baselines.untrained.base import Scores, Untrained
from recformer.data.processed import ProcessedFolder, Sequences


class SessionNeighbours(Untrained):
    """Items of the nearest training sequences.

    Args:
        folder: the data.
        settings: `neighbours`, k.
        weighted: V-SKNN in place of S-KNN.
    """

    def __init__(
        self,
        folder: ProcessedFolder,
        settings: SknnSettings | None = None,
        weighted: bool = False,
    ) -> None:
        super().__init__(folder)
        self.neighbours = (settings or SknnSettings()).neighbours
        self.weighted = weighted
        self.sessions = item_sets(folder.train, folder.num_items)

    def scores(self, histories: Sequences) -> Scores:
        """Sums of similarities; 0 for an item of no neighbour. Items of the same neighbours tie."""
        if self.weighted:
            users = linear_weights(histories, self.folder.num_items)
        else:
            users = normalize(item_sets(histories, self.folder.num_items))

        def scores(chunk: slice) -> sparse.csr_matrix:
            return largest(users[chunk] @ self._by_item, self.neighbours) @ self.sessions

        return scores

    @cached_property
    def _by_item(self) -> sparse.csr_matrix:
        """Sessions that histories are multiplied with, (N, S)."""
        return (self.sessions if self.weighted else normalize(self.sessions)).T.tocsr()


def item_sets(sequences: Sequences, num_items: int) -> sparse.csr_matrix:
    """1 where a sequence holds an item, float64 (S, N)."""
    return _latest(sequences, np.ones(len(sequences.items)), num_items)


def linear_weights(histories: Sequences, num_items: int) -> sparse.csr_matrix:
    """Place of each item, counted from 1, over the history's length, float64 (B, N).

    An item that stands there several times has its newest place.
    """
    places = np.arange(len(histories.items)) - histories.offsets[histories.rows] + 1
    return _latest(histories, places / histories.lengths[histories.rows], num_items)


def _latest(sequences: Sequences, values: np.ndarray, num_items: int) -> sparse.csr_matrix:
    """A matrix of the value of each item's newest place."""
    keys = sequences.rows * num_items + sequences.items
    keys, newest = np.unique(keys[::-1], return_index=True)
    rows, items = np.divmod(keys, num_items)
    shape = (len(sequences), num_items)
    return sparse.csr_matrix((values[::-1][newest], (rows, items)), shape)


def largest(matrix: sparse.csr_matrix, count: int) -> sparse.csr_matrix:
    """The `count` largest entries of every row, of equal ones those of lower columns."""
    entries = matrix.tocoo()
    order = np.lexsort((entries.col, -entries.data, entries.row))
    rows = entries.row[order]
    places = np.arange(len(rows)) - np.searchsorted(rows, rows)  # in its row
    kept = order[places < count]
    values = (entries.data[kept], (entries.row[kept], entries.col[kept]))
    return sparse.csr_matrix(values, matrix.shape)
