"""Popularity: everyone is offered the same items, those bought most often in training."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from baselines.settings import PopularitySettings
from baselines.untrained.base import Scores, Untrained, UntrainedUsers
from recformer.data.processed import ProcessedFolder, Sequences
from recformer.evaluation.ranks import TargetRanks, not_compared


class Popularity(Untrained):
    """Items in the order of their number of training interactions, which are ordered once.

    Args:
        folder: the data.
        settings: there are none.

    Attributes:
        counts: int64 (N,) interactions of every item in `folder.train`.
    """

    def __init__(self, folder: ProcessedFolder, settings: PopularitySettings | None = None) -> None:
        super().__init__(folder)
        self.counts = np.bincount(folder.train.items, minlength=folder.num_items)
        self._order = np.argsort(-self.counts, kind="stable")  # of equal counts the lower id first
        self._ascending = np.sort(self.counts)

    def scores(self, histories: Sequences) -> Scores:
        """Number of training interactions, the same for everyone; equal counts tie."""
        counts = torch.from_numpy(self.counts)
        return lambda chunk: counts.expand(chunk.stop - chunk.start, -1)

    def rank(self, users: UntrainedUsers, targets: Tensor, filter_seen: bool) -> TargetRanks:
        items = targets.cpu().numpy()
        mine = self.counts[items]
        least, most = (np.searchsorted(self._ascending, mine, side) for side in ("left", "right"))
        above, tied = len(self.counts) - most, most - least
        rows, cols, candidates = not_compared(
            users.seen if filter_seen else None, items, len(self.counts)
        )
        left_out, size = self.counts[cols], len(items)  # the targets among them
        above = above - np.bincount(rows[left_out > mine[rows]], minlength=size)
        tied = tied - np.bincount(rows[left_out == mine[rows]], minlength=size)
        return TargetRanks(above, tied, candidates)

    def recommend(self, users: UntrainedUsers, k: int, filter_seen: bool) -> NDArray[np.int64]:
        best = np.full((len(users.histories), k), -1, np.int64)
        for row in range(len(best)):
            seen = users.histories[row] if filter_seen else users.histories[row][:0]
            first = self._order[: k + len(seen)]
            first = first[~np.isin(first, seen)][:k]
            best[row, : len(first)] = first
        return best

    def rank_and_recommend(
        self, users: UntrainedUsers, targets: Tensor, k: int, filter_seen: bool
    ) -> tuple[TargetRanks, NDArray[np.int64]]:
        return self.rank(users, targets, filter_seen), self.recommend(users, k, filter_seen)
