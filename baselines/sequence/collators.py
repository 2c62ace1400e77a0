"""Batches of item id sequences, laid end to end, and the collators of the training objectives.

Shapes: B sequences, T items of all sequences, P predictions, L longest sequence, N items.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from recformer.data.batches import Batch, EvalBatch, TrainBatch
from recformer.data.collators import EvalExample, TrainExample, eval_batch


@dataclass(frozen=True)
class ItemSequences(Batch):
    """Sequences of item ids, and the places in them that something is predicted at.

    Attributes:
        items: int64 (T,), oldest first; N (the number of items) stands for a hidden item.
        offsets: int64 (B+1,); sequence b is `items[offsets[b]:offsets[b + 1]]`.
        predict: int64 (P,), places in `items` whose hidden state predicts an item.
        features: what is known of each place beside its item, tensors (T, ...); None: nothing.
        order: int64 (T,), who sees whom where items are predicted in a random order, see
            `baselines.sequence.permuted`; None: no such order.
    """

    items: Tensor
    offsets: Tensor
    predict: Tensor
    features: tuple[Tensor, ...] | None = None
    order: Tensor | None = None

    @classmethod
    def of(
        cls,
        items: np.ndarray,
        offsets: np.ndarray,
        predict: np.ndarray,
        interactions: np.ndarray | None = None,
    ) -> ItemSequences:
        """From arrays; `interactions` int64 (T,), which of the folder's each item is, -1 where it
        is none, become the one feature of a place (`baselines.sequence.features`)."""
        features = None if interactions is None else (torch.from_numpy(interactions),)
        return cls(
            torch.from_numpy(items), torch.from_numpy(offsets), torch.from_numpy(predict), features
        )


def lay_out(sequences: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Sequences end to end: items int64 (T,) and offsets int64 (B+1,)."""
    offsets = np.cumsum([0, *map(len, sequences)])
    return np.concatenate(sequences).astype(np.int64), offsets


def newest_interactions(example: TrainExample | EvalExample, count: int) -> np.ndarray:
    """Places of an example's newest `count` items among the folder's interactions, int64."""
    end = example.start + len(example.items)
    return np.arange(end - min(count, len(example.items)), end)


def places(offsets: Tensor, count: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Place of each item.

    Args:
        offsets: (B+1,) of the sequences.
        count: T, where it is known: else the host waits for it.

    Returns:
        row (T,) its sequence, column (T,) its 0-based place there, and lengths (B,).
    """
    lengths = offsets.diff()
    row = torch.repeat_interleave(lengths, output_size=count)
    column = torch.arange(len(row), device=offsets.device) - offsets[row]
    return row, column, lengths


def met_before(sequences: ItemSequences) -> tuple[Tensor, Tensor]:
    """Items that stand in a sequence up to the place of a prediction, each once.

    Returns:
        (rows, items), both int64 (U,): prediction `rows[j]` knows the item `items[j]`.
    """
    _, column, _ = places(sequences.offsets, len(sequences.items))
    counts = column[sequences.predict] + 1  # (P,)
    rows = torch.repeat_interleave(counts)
    back = torch.arange(len(rows), device=rows.device) - (counts.cumsum(0) - counts)[rows]
    items = sequences.items[sequences.predict[rows] - back]
    size = int(items.max()) + 1
    pairs = torch.unique(rows * size + items)
    return pairs // size, pairs % size


class CausalCollator:
    """Every item but the first is predicted from the ones before it (SASRec, section III).

    Args:
        max_length: newest items read.
    """

    def __init__(self, max_length: int) -> None:
        self.max_length = max_length

    def __call__(self, examples: Sequence[TrainExample]) -> TrainBatch[ItemSequences]:
        newest = [example.items[-(self.max_length + 1) :] for example in examples]
        items, offsets = lay_out([sequence[:-1] for sequence in newest])
        labels, _ = lay_out([sequence[1:] for sequence in newest])
        own, _ = lay_out([newest_interactions(e, self.max_length + 1)[:-1] for e in examples])
        history = ItemSequences.of(items, offsets, np.arange(len(items)), own)
        return TrainBatch(torch.from_numpy(labels), history)


class MaskedCollator:
    """Some items are hidden and predicted from both sides (BERT4Rec, section 3.6).

    Each item is hidden with `mask_probability`, at least one of a sequence; where none was drawn
    that is the last one, which evaluation asks for. Which ones depends on the example's seed alone.

    Args:
        max_length: newest items read.
        num_items: N, the id of a hidden item.
        mask_probability: share of hidden items.
    """

    def __init__(self, max_length: int, num_items: int, mask_probability: float) -> None:
        self.max_length = max_length
        self.num_items = num_items
        self.mask_probability = mask_probability

    def __call__(self, examples: Sequence[TrainExample]) -> TrainBatch[ItemSequences]:
        items, offsets = lay_out([example.items[-self.max_length :] for example in examples])
        hidden = np.zeros(len(items), dtype=bool)
        for (start, stop), example in zip(pairwise(offsets), examples, strict=True):
            draws = np.random.default_rng(example.seed).random(stop - start)
            hidden[start:stop] = draws < self.mask_probability
            hidden[stop - 1] |= not hidden[start:stop].any()
        labels = items[hidden]
        items[hidden] = self.num_items
        own, _ = lay_out([newest_interactions(e, self.max_length) for e in examples])
        history = ItemSequences.of(items, offsets, np.flatnonzero(hidden), own)
        return TrainBatch(torch.from_numpy(labels), history)


class PermutedCollator:
    """Spans of items are predicted in a random order (XLNet, section 2.3; `permuted.py`).

    From the oldest item on, a span of 1 to `max_span` items is drawn, at a random place of a
    stretch that is 1 / `mask_probability` times as long; then the next stretch begins. Where no
    span falls into the sequence the last item is predicted, which evaluation asks for. Draws depend
    on the example's seed alone.

    Args:
        max_length: newest items read.
        mask_probability: share of predicted items.
        max_span: longest span.
    """

    def __init__(self, max_length: int, mask_probability: float, max_span: int) -> None:
        self.max_length = max_length
        self.mask_probability = mask_probability
        self.max_span = max_span

    def __call__(self, examples: Sequence[TrainExample]) -> TrainBatch[ItemSequences]:
        items, offsets = lay_out([example.items[-self.max_length :] for example in examples])
        order = np.zeros(len(items), dtype=np.int64)
        for (start, stop), example in zip(pairwise(offsets), examples, strict=True):
            generator = np.random.default_rng(example.seed)
            predicted = self._spans(stop - start, generator)
            order[start + predicted] = generator.permutation(len(predicted)) + 1
        predict = np.flatnonzero(order)
        labels = torch.from_numpy(items[predict])
        own, _ = lay_out([newest_interactions(e, self.max_length) for e in examples])
        history = ItemSequences.of(items, offsets, predict, own)
        return TrainBatch(labels, replace(history, order=torch.from_numpy(order)))

    def _spans(self, length: int, generator: np.random.Generator) -> np.ndarray:
        predicted = np.zeros(length, dtype=bool)
        begin = 0
        while begin < length:
            span = int(generator.integers(1, self.max_span + 1))
            stretch = int(span / self.mask_probability)
            first = begin + int(generator.integers(stretch - span + 1))
            predicted[first : first + span] = True
            begin += stretch
        predicted[-1] |= not predicted.any()
        return np.flatnonzero(predicted)


class ItemHistoryCollator:
    """Evaluation batches: histories whose last place predicts the target.

    Args:
        max_length: newest items read.
        hidden_item: id put after the history, for models that fill in hidden items; then one item
            less of the history is read.
    """

    def __init__(self, max_length: int, hidden_item: int | None = None) -> None:
        self.max_length = max_length
        self.hidden_item = hidden_item

    def __call__(self, examples: Sequence[EvalExample]) -> EvalBatch[ItemSequences]:
        length, hidden = self.max_length, self.hidden_item
        histories = [example.items[-length:] for example in examples]
        found = [newest_interactions(example, length) for example in examples]
        if hidden is not None:
            histories = [np.append(history, hidden)[-length:] for history in histories]
            found = [np.append(places, -1)[-length:] for places in found]
        items, offsets = lay_out(histories)
        own, _ = lay_out(found)
        return eval_batch(examples, ItemSequences.of(items, offsets, offsets[1:] - 1, own))
