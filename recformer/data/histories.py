"""Histories as lists of item ids with ages, for models that read items one by one.

Shapes: P histories, W items of all histories end to end, U distinct items of all histories.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from recformer.data.batches import Batch, EvalBatch, TrainBatch
from recformer.data.collators import EvalExample, TrainExample, eval_batch


@dataclass(frozen=True)
class Histories(Batch):
    """The newest items of some histories.

    Attributes:
        items: (W,) int64 item ids, newest first within a history.
        ages: (W,) int64, 0 for the newest item of a history.
        offsets: (P + 1,) int64; history p is `items[offsets[p]:offsets[p + 1]]`.
        rows, distinct, newest: (U,) int64: history `rows[j]` holds the item `distinct[j]`, the
            newest time at age `newest[j]`.
    """

    items: Tensor
    ages: Tensor
    offsets: Tensor
    rows: Tensor
    distinct: Tensor
    newest: Tensor

    def __len__(self) -> int:
        return len(self.offsets) - 1


def histories_of(sequences: Sequence[np.ndarray], max_history: int) -> Histories:
    """The newest `max_history` items of sequences of item ids, oldest first each."""
    return prefixes_of(sequences, [np.array([len(each)]) for each in sequences], max_history)


def prefixes_of(
    sequences: Sequence[np.ndarray], ends: Sequence[np.ndarray], max_history: int
) -> Histories:
    """The newest `max_history` items before each of some places of sequences.

    Args:
        sequences: arrays of item ids, oldest first.
        ends: of each sequence, the places (at least 1) before which a history ends.
        max_history: items read of a history.
    """
    sizes = np.array([len(sequence) for sequence in sequences], dtype=np.int64)
    starts = np.cumsum(sizes) - sizes
    flat = np.concatenate([np.asarray(s, dtype=np.int64) for s in sequences])
    lengths = np.concatenate(ends).astype(np.int64)  # (P,)
    first = np.repeat(starts, [len(each) for each in ends])  # (P,) where its sequence begins
    counts = np.minimum(lengths, max_history)
    offsets = np.append(0, np.cumsum(counts))
    ages = np.arange(offsets[-1]) - np.repeat(offsets[:-1], counts)
    items = flat[np.repeat(first + lengths - 1, counts) - ages]
    owner = np.repeat(np.arange(len(counts)), counts)
    # Newest first, so the first time that a pair is met is the newest one.
    pairs = owner * (int(flat.max()) + 1) + items
    _, place = np.unique(pairs, return_index=True)
    arrays = (items, ages, offsets, owner[place], items[place], ages[place])
    return Histories(*map(torch.from_numpy, arrays))


class NextItemCollator:
    """Training batches: each of a user's newest items is a label behind the items before it.

    Args:
        max_history: items read of a history, and labels of a user.
    """

    def __init__(self, max_history: int) -> None:
        self.max_history = max_history

    def __call__(self, examples: Sequence[TrainExample]) -> TrainBatch[Histories]:
        sequences = [example.items for example in examples]
        ends = [np.arange(max(1, len(s) - self.max_history), len(s)) for s in sequences]
        labels = np.concatenate([s[e] for s, e in zip(sequences, ends, strict=True)])
        histories = prefixes_of(sequences, ends, self.max_history)
        return TrainBatch(torch.from_numpy(labels.astype(np.int64)), histories)


class HistoryEvalCollator:
    """Evaluation batches whose histories are lists of item ids.

    Args:
        max_history: items read of a history.
    """

    def __init__(self, max_history: int) -> None:
        self.max_history = max_history

    def __call__(self, examples: Sequence[EvalExample]) -> EvalBatch[Histories]:
        histories = histories_of([example.items for example in examples], self.max_history)
        return eval_batch(examples, histories)
