"""Batches cut by their tokens instead of the number of their sequences.

Shapes: P examples, N items.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from recformer.config import RecformerConfig
from recformer.data.collators import target_position
from recformer.data.items import TokenizedItems
from recformer.data.sequences import Sequences

# Examples that are sorted by length together, in batches' worth: enough to find equals in length,
# few enough to leave the order random.
GROUPED_BATCHES = 64


def cut_by_tokens(
    tokens: np.ndarray, budget: int, world: int, generator: np.random.Generator | None
) -> Iterator[np.ndarray]:
    """Batches of examples of similar length, of at most `budget` tokens for each of the processes.

    Process r takes every `world`-th example from r on. An example of more tokens than the budget is
    alone in its share.

    Args:
        tokens: (P,) of the examples, in the order in which they are to be trained on.
        budget: tokens of a batch's share of a process.
        world: processes; every batch has a multiple of so many examples, some of the last ones are
            left out.
        generator: of the order of batches; None: as they come.

    Yields:
        Places in `tokens`, int64, shortest first.
    """
    window = max(world, int(GROUPED_BATCHES * budget * world / tokens.mean()))
    rest = np.empty(0, dtype=np.int64)  # places that did not fill a batch
    for start in range(0, len(tokens), window):
        places = np.concatenate([rest, np.arange(start, min(start + window, len(tokens)))])
        places = places[np.argsort(tokens[places], kind="stable")]
        # The last process has the longest of every `world` neighbours.
        ends = np.cumsum(tokens[places[world - 1 :: world]])
        batches, begin = [], 0
        while begin < len(ends):
            before = ends[begin - 1] if begin else 0
            stop = max(begin + 1, int(np.searchsorted(ends, before + budget, side="right")))
            is_last = start + window >= len(tokens)
            if stop >= len(ends) and not is_last:
                break
            batches.append(places[begin * world : stop * world])
            begin = stop
        rest = places[begin * world :]
        numbers = range(len(batches)) if generator is None else generator.permutation(len(batches))
        for number in numbers:
            yield batches[number]


class HistoryTokens:
    """Tokens of the training histories that `RecformerTrainCollator` makes.

    Args:
        sequences: a row a user.
        users: int64, the rows to train on, of two items and more.
        store: the N items.
        config: `max_item_embeddings` and `max_token_num` are read.
    """

    def __init__(
        self,
        sequences: Sequences,
        users: np.ndarray,
        store: TokenizedItems,
        config: RecformerConfig,
    ) -> None:
        self._offsets, self._users = sequences.offsets, users
        self._ends = np.concatenate([[0], np.cumsum(store.lengths[sequences.items])])
        self._max_items, self._most = config.max_item_embeddings - 1, config.max_token_num

    def __call__(self, rows: np.ndarray, seeds: np.ndarray) -> np.ndarray:
        """Tokens, (P,) int64, of the histories of `users[rows]` whose targets seeds (P,) draw."""
        users = self._users[rows]
        first = self._offsets[users]
        counts = self._offsets[users + 1] - first
        drawn = map(target_position, counts.tolist(), seeds.tolist())
        target = first + np.fromiter(drawn, np.int64, len(rows))
        oldest = np.maximum(first, target - self._max_items)
        return np.minimum(self._ends[target] - self._ends[oldest] + 1, self._most)
