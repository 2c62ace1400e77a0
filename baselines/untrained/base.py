"""The base of untrained baselines: reads users, ranks and recommends.

Shapes: B users, C of them at a time, N items, K candidates of a user.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import sparse  # type: ignore[import-untyped]
from torch import Tensor, nn

from baselines.sequence.collators import ItemSequences
from baselines.untrained.sparse_scores import (
    count_sparse_ranks,
    scaled_entries,
    top_sparse_items,
)
from recformer.data.processed import ProcessedFolder, Sequences
from recformer.evaluation.ranks import Pairs, TargetRanks, count_ranks, count_ranks_among
from recformer.evaluation.recommender import Recommender, joined_pairs
from recformer.evaluation.top_items import top_items

SCORES_AT_A_TIME = 2**23  # users x items: 64 MB in float64

# A slice of the users -> their scores (C, N), an array, a tensor, or sparse where most are 0.
Scores = Callable[[slice], Any]


@dataclass(frozen=True)
class UntrainedUsers:
    """Users that an untrained baseline has read.

    Attributes:
        histories: B rows of item ids, oldest first.
        seen: (rows, items), every item of the histories.
    """

    histories: Sequences
    seen: Pairs


class Untrained(nn.Module, Recommender[ItemSequences, UntrainedUsers]):
    """A recommender without weights; a subclass brings `scores`.

    Args:
        folder: the data that the scores are taken from.
        history_factor: scores of items of the user's history are multiplied by it.
    """

    def __init__(self, folder: ProcessedFolder, history_factor: float = 1.0) -> None:
        super().__init__()
        self.folder = folder
        self.history_factor = history_factor
        # Lightning asks every module for a device and an optimizer for something.
        self.nothing = nn.Parameter(torch.zeros(0), requires_grad=False)

    @abstractmethod
    def scores(self, histories: Sequences) -> Scores:
        """Scores of all items for each history, a slice of them at a time."""

    def read(self, history: ItemSequences, seen: Pairs) -> UntrainedUsers:
        items = history.items.cpu().numpy().astype(np.int32)
        return UntrainedUsers(Sequences(history.offsets.cpu().numpy(), items), seen)

    def join(self, parts: Iterable[UntrainedUsers]) -> UntrainedUsers:
        parts = list(parts)
        lengths = np.concatenate([part.histories.lengths for part in parts])
        starts = np.cumsum([0, *(len(part.histories) for part in parts)])
        items = np.concatenate([part.histories.items for part in parts])
        offsets = np.append(0, np.cumsum(lengths))
        seen = joined_pairs([part.seen for part in parts], starts)
        return UntrainedUsers(Sequences(offsets, items), seen)

    def rank(self, users: UntrainedUsers, targets: Tensor, filter_seen: bool) -> TargetRanks:
        return self._asked(users, filter_seen, targets)[0]

    def recommend(self, users: UntrainedUsers, k: int, filter_seen: bool) -> NDArray[np.int64]:
        return self._asked(users, filter_seen, k=k)[1]

    def rank_and_recommend(
        self, users: UntrainedUsers, targets: Tensor, k: int, filter_seen: bool
    ) -> tuple[TargetRanks, NDArray[np.int64]]:
        return self._asked(users, filter_seen, targets, k)

    def rank_among(
        self, users: UntrainedUsers, targets: Tensor, candidates: NDArray[np.int64]
    ) -> TargetRanks:
        items = targets.cpu().numpy()
        return joined_ranks(
            [
                count_ranks_among(
                    values.toarray() if sparse.issparse(values) else values,
                    items[chunk],
                    candidates[chunk],
                )
                for chunk, values in self._scored(users.histories)
            ]
        )

    def _asked(
        self,
        users: UntrainedUsers,
        filter_seen: bool,
        targets: Tensor | None = None,
        k: int | None = None,
    ) -> tuple[TargetRanks, NDArray[np.int64]]:
        """Ranks of the targets, if any, and the k best items, from scores made once."""
        items = None if targets is None else targets.cpu().numpy()
        ranks, best = [], []
        for chunk, values in self._scored(users.histories):
            seen = seen_pairs(users.histories, chunk) if filter_seen else None
            thin = sparse.issparse(values)
            if items is not None:
                count = count_sparse_ranks if thin else count_ranks
                ranks.append(count(values, items[chunk], seen))
            if k is not None:
                best.append(
                    top_sparse_items(values, k, seen) if thin else top_items(values, k, seen)[0]
                )
        return joined_ranks(ranks), np.concatenate(best or [np.empty((0, k or 0), np.int64)])

    def _scored(self, histories: Sequences) -> Iterator[tuple[slice, Any]]:
        """Slices of the users with their scores."""
        scores = self.scores(histories)
        size = max(1, SCORES_AT_A_TIME // self.folder.num_items)
        for start in range(0, len(histories), size):
            chunk = slice(start, min(start + size, len(histories)))
            yield chunk, scores(chunk)

    def scaled(self, scores: Scores, histories: Sequences) -> Scores:
        """Scores of which those of items of the user's history are multiplied by `history_factor`.

        An item of the history is most like the history, yet seldom bought again. The history term
        of `finetune --method head` learns this; untrained models get one factor.
        """
        if self.history_factor == 1:
            return scores

        def scaled(chunk: slice) -> Any:
            values = scores(chunk)
            if sparse.issparse(values):
                return scaled_entries(values, seen_pairs(histories, chunk), self.history_factor)
            rows, items = np.unique(np.stack(seen_pairs(histories, chunk)), axis=1)
            values[rows, items] *= self.history_factor
            return values

        return scaled


def joined_ranks(parts: Iterable[TargetRanks]) -> TargetRanks:
    """Ranks of all users, one part after the other."""
    parts = list(parts)
    return TargetRanks(
        *(
            np.concatenate([getattr(part, name) for part in parts] or [np.empty(0, np.int64)])
            for name in ("above", "tied", "num_candidates")
        )
    )


def seen_pairs(histories: Sequences, chunk: slice) -> tuple[np.ndarray, np.ndarray]:
    """(row within the chunk, item id) of every item in a slice of the histories."""
    offsets = histories.offsets[chunk.start : chunk.stop + 1]
    rows = np.repeat(np.arange(len(offsets) - 1), np.diff(offsets))
    return rows, histories.items[offsets[0] : offsets[-1]].astype(np.int64)
