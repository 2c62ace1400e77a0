"""The base of untrained baselines: reads users, ranks and recommends.

Shapes: B users, C of them at a time, N items, K candidates of a user.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from baselines.sequence.collators import ItemSequences
from recformer.data.processed import ProcessedFolder, Sequences
from recformer.evaluation.ranks import Pairs, TargetRanks, count_ranks, count_ranks_among
from recformer.evaluation.recommender import Recommender
from recformer.evaluation.top_items import top_items

SCORES_AT_A_TIME = 2**23  # users x items: 64 MB in float64

# A slice of the users -> their scores (C, N).
Scores = Callable[[slice], np.ndarray | torch.Tensor]


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

    def rank(self, users: UntrainedUsers, targets: Tensor, filter_seen: bool) -> TargetRanks:
        histories, scores = users.histories, self.scores(users.histories)
        items = targets.cpu().numpy()
        size = max(1, SCORES_AT_A_TIME // self.folder.num_items)
        parts = []
        for start in range(0, len(histories), size):
            chunk = slice(start, min(start + size, len(histories)))
            seen = seen_pairs(histories, chunk) if filter_seen else None
            parts.append(count_ranks(scores(chunk), items[chunk], seen))
        return TargetRanks(
            *(
                np.concatenate([getattr(part, name) for part in parts] or [np.empty(0, np.int64)])
                for name in ("above", "tied", "num_candidates")
            )
        )

    def recommend(self, users: UntrainedUsers, k: int, filter_seen: bool) -> NDArray[np.int64]:
        return top_items(self._all_scores(users), k, users.seen if filter_seen else None)[0]

    def rank_among(
        self, users: UntrainedUsers, targets: Tensor, candidates: NDArray[np.int64]
    ) -> TargetRanks:
        return count_ranks_among(self._all_scores(users), targets, candidates)

    def _all_scores(self, users: UntrainedUsers) -> Tensor:
        return torch.as_tensor(self.scores(users.histories)(slice(0, len(users.histories))))

    def scaled(self, scores: Scores, histories: Sequences) -> Scores:
        """Scores of which those of items of the user's history are multiplied by `history_factor`.

        An item of the history is most like the history, yet seldom bought again. The history term
        of `finetune --method head` learns this; untrained models get one factor.
        """
        if self.history_factor == 1:
            return scores

        def scaled(chunk: slice) -> np.ndarray | torch.Tensor:
            values = scores(chunk)
            rows, items = np.unique(np.stack(seen_pairs(histories, chunk)), axis=1)
            values[rows, items] *= self.history_factor
            return values

        return scaled


def seen_pairs(histories: Sequences, chunk: slice) -> tuple[np.ndarray, np.ndarray]:
    """(row within the chunk, item id) of every item in a slice of the histories."""
    offsets = histories.offsets[chunk.start : chunk.stop + 1]
    rows = np.repeat(np.arange(len(offsets) - 1), np.diff(offsets))
    return rows, histories.items[offsets[0] : offsets[-1]].astype(np.int64)
