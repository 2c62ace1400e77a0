"""Batches of item id sequences, laid end to end, and the collators of both training objectives.

A batch is a dict of tensors:

    items     (T,)   item ids, oldest first; N (the number of items) stands for a masked item
    offsets   (B+1,) sequence b is items[offsets[b]:offsets[b + 1]]
    predict   (P,)   places in `items` whose hidden state predicts an item
    labels    (P,)   the items to be predicted there

Shapes: B sequences, T items of all sequences, P predictions, L longest sequence, N items.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from recformer.data.collators import EvalExample, TrainExample, eval_fields


def lay_out(sequences: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Sequences end to end: items int64 (T,) and offsets int64 (B+1,)."""
    offsets = np.cumsum([0, *map(len, sequences)])
    return np.concatenate(sequences).astype(np.int64), offsets


def places(offsets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Where each item stands.

    Returns:
        row (T,) its sequence, column (T,) its 0-based place there, and lengths (B,).
    """
    lengths = offsets.diff()
    row = torch.repeat_interleave(lengths)
    column = torch.arange(len(row), device=offsets.device) - offsets[row]
    return row, column, lengths


class CausalCollator:
    """Every item but the first is predicted from the ones before it (SASRec, section III).

    Args:
        max_length: newest items read.
    """

    def __init__(self, max_length: int) -> None:
        self.max_length = max_length

    def __call__(self, examples: Sequence[TrainExample]) -> dict[str, Tensor]:
        newest = [example.items[-(self.max_length + 1) :] for example in examples]
        items, offsets = lay_out([sequence[:-1] for sequence in newest])
        labels, _ = lay_out([sequence[1:] for sequence in newest])
        return {
            "items": torch.from_numpy(items),
            "offsets": torch.from_numpy(offsets),
            "predict": torch.arange(len(items)),
            "labels": torch.from_numpy(labels),
        }


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

    def __call__(self, examples: Sequence[TrainExample]) -> dict[str, Tensor]:
        items, offsets = lay_out([example.items[-self.max_length :] for example in examples])
        hidden = np.zeros(len(items), dtype=bool)
        for (start, stop), example in zip(pairwise(offsets), examples, strict=True):
            draws = np.random.default_rng(example.seed).random(stop - start)
            hidden[start:stop] = draws < self.mask_probability
            hidden[stop - 1] |= not hidden[start:stop].any()
        labels = items[hidden]
        items[hidden] = self.num_items
        return {
            "items": torch.from_numpy(items),
            "offsets": torch.from_numpy(offsets),
            "predict": torch.from_numpy(np.flatnonzero(hidden)),
            "labels": torch.from_numpy(labels),
        }


class HistoryCollator:
    """Evaluation batches: `eval_fields`, and the history whose last place predicts the target.

    Args:
        max_length: newest items read.
        hidden_item: id put after the history, for models that fill in hidden items; then one item
            less of the history is read.
    """

    def __init__(self, max_length: int, hidden_item: int | None = None) -> None:
        self.max_length = max_length
        self.hidden_item = hidden_item

    def __call__(self, examples: Sequence[EvalExample]) -> dict[str, Any]:
        histories = [example.items[-self.max_length :] for example in examples]
        if self.hidden_item is not None:
            histories = [np.append(h, self.hidden_item)[-self.max_length :] for h in histories]
        items, offsets = lay_out(histories)
        return {
            "items": torch.from_numpy(items),
            "offsets": torch.from_numpy(offsets),
            "predict": torch.from_numpy(offsets[1:] - 1),
            **eval_fields(examples),
        }
