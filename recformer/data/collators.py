"""From item ids to packed token batches, by array operations alone.

Shapes: B sequences, T packed tokens, M items over all sequences.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch

from recformer.config import RecformerConfig
from recformer.data.batches import EvalBatch, TrainBatch
from recformer.data.items import TokenizedItems
from recformer.packing import PackedTokens

H = TypeVar("H")


@dataclass(frozen=True)
class TrainExample:
    """A user's training sequence and the random numbers that belong to it this epoch."""

    user_id: int
    items: np.ndarray  # (n,) item ids, oldest first, n >= 2
    seed: int  # changes with epoch and user, not with batch, worker or number of processes
    start: int = 0  # place of the first item among the folder's interactions


@dataclass(frozen=True)
class EvalExample:
    """A user's history and the item to be found."""

    user_id: int
    items: np.ndarray  # (n,) item ids, oldest first, n >= 1
    target: int
    start: int = 0  # place of the first item among the folder's interactions


def _segment_starts(counts: np.ndarray) -> np.ndarray:
    """(S,) first index of each of S segments laid end to end."""
    return np.cumsum(counts) - counts


def _index_in_segment(counts: np.ndarray) -> np.ndarray:
    """(sum(counts),) 0-based place of each element within its segment."""
    return np.arange(counts.sum()) - np.repeat(_segment_starts(counts), counts)


def pack_sequences(
    store: TokenizedItems, sequences: Sequence[np.ndarray], config: RecformerConfig
) -> PackedTokens:
    """Pack item sequences into the batch that the encoder reads (paper, section 2.2).

    Each sequence is turned newest first, cut to `max_item_embeddings - 1` items, headed by `<s>`
    and cut to `max_token_num` tokens; the k-th newest item has item position k. Equals
    `RecformerTokenizer` on the same items.

    Args:
        store: tokenised items.
        sequences: B arrays of item ids, oldest first.
        config: `bos_token_id`, `max_item_embeddings`, `max_token_num` are read.

    Raises:
        ValueError: no sequence, or a sequence without items.
    """
    counts = np.array([len(sequence) for sequence in sequences], dtype=np.int64)
    if len(counts) == 0 or (counts == 0).any():
        raise ValueError("every sequence needs at least one item")
    max_items, max_tokens = config.max_item_embeddings - 1, config.max_token_num
    item_ids = np.concatenate([np.asarray(s)[::-1][:max_items] for s in sequences])  # (M,)
    counts = np.minimum(counts, max_items)

    # Only items that begin before the cut are fetched at all.
    lengths = store.offsets[item_ids + 1] - store.offsets[item_ids]  # (M,)
    ends = np.cumsum(lengths)
    first = np.repeat(_segment_starts(counts), counts)  # (M,) first item of the same sequence
    begin = 1 + ends - lengths - (ends - lengths)[first]  # (M,) place of the item's first token
    kept = begin < max_tokens
    owner = np.repeat(np.arange(len(counts)), counts)[kept]  # sequence of each kept item
    position = (_index_in_segment(counts) + 1)[kept]
    tokens, types, lengths = store.gather(item_ids[kept])

    # Where each token goes: behind its sequence's <s>, unless it is past the cut.
    place = np.repeat(begin[kept], lengths) + _index_in_segment(lengths)
    inside = place < max_tokens
    token_owner = np.repeat(owner, lengths)
    total = np.bincount(token_owner[inside], minlength=len(counts)) + 1  # (B,) with <s>
    starts = _segment_starts(total)
    where = starts[token_owner[inside]] + place[inside]

    input_ids = np.full(total.sum(), config.bos_token_id, dtype=np.int64)
    token_type_ids = np.zeros(total.sum(), dtype=np.int64)
    item_position_ids = np.zeros(total.sum(), dtype=np.int64)
    input_ids[where] = tokens[inside]
    token_type_ids[where] = types[inside]
    item_position_ids[where] = np.repeat(position, lengths)[inside]
    borders = np.append(starts, total.sum())
    return PackedTokens(
        torch.from_numpy(input_ids),
        torch.from_numpy(token_type_ids),
        torch.from_numpy(item_position_ids),
        torch.from_numpy(borders),
        borders=borders,
    )


def target_position(n: int, seed: int) -> int:
    """A uniform target position in [1, n - 1], so that the history is never empty.

    The published code also draws 0, which leaves an empty history (a defect).
    """
    return int(np.random.default_rng(seed).integers(1, n))


class RecformerTrainCollator:
    """Training batches: the history before a random position, and the item at it as the label."""

    def __init__(self, store: TokenizedItems, config: RecformerConfig) -> None:
        self.store = store
        self.config = config

    def __call__(self, examples: Sequence[TrainExample]) -> TrainBatch[PackedTokens]:
        positions = [target_position(len(e.items), e.seed) for e in examples]
        histories = [e.items[:p] for e, p in zip(examples, positions, strict=True)]
        labels = [int(e.items[p]) for e, p in zip(examples, positions, strict=True)]
        history = pack_sequences(self.store, histories, self.config)
        return TrainBatch(torch.tensor(labels), history)


def eval_batch(examples: Sequence[EvalExample], history: H) -> EvalBatch[H]:
    """The evaluation batch of any model.

    Args:
        examples: B of them.
        history: their histories, in the form that the model reads.
    """
    rows = np.repeat(np.arange(len(examples)), [len(e.items) for e in examples])
    columns = np.concatenate([np.asarray(e.items, dtype=np.int64) for e in examples])
    return EvalBatch(
        labels=torch.tensor([e.target for e in examples]),
        history=history,
        user_ids=torch.tensor([e.user_id for e in examples]),
        seen=(torch.from_numpy(rows), torch.from_numpy(columns)),
    )


class RecformerEvalCollator:
    """Evaluation batches whose histories are packed tokens."""

    def __init__(self, store: TokenizedItems, config: RecformerConfig) -> None:
        self.store = store
        self.config = config

    def __call__(self, examples: Sequence[EvalExample]) -> EvalBatch[PackedTokens]:
        histories = [example.items for example in examples]
        return eval_batch(examples, pack_sequences(self.store, histories, self.config))
