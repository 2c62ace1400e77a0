"""All items of a catalogue as vectors.

Shapes: N items, T packed tokens, H hidden.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from recformer.data.collators import pack_sequences
from recformer.data.items import TokenizedItems
from recformer.models import RecformerForSeqRec, RecformerModel

TOKENS_PER_BATCH = 8192  # memory and speed only, no figure depends on it
HASH_CHUNK = 100_000  # items


def token_budget_batches(lengths: np.ndarray, budget: int) -> Iterator[np.ndarray]:
    """Rows by length, cut so that a batch holds at most `budget` tokens (but at least one row).

    Args:
        lengths: (N,) tokens of each row.
    """
    order = np.argsort(lengths, kind="stable")
    ends = np.cumsum(lengths[order])
    start = 0
    while start < len(order):
        before = ends[start - 1] if start else 0
        stop = max(start + 1, int(np.searchsorted(ends, before + budget, side="right")))
        yield order[start:stop]
        start = stop


def distinct_items(store: TokenizedItems) -> tuple[np.ndarray, np.ndarray]:
    """Items that read the same, token for token, encoded once.

    It saves work, and it makes equal items tie exactly: in 16-bit precision the vectors of one text
    encoded in two batches differ by more than distances between items that a ranking rests on.

    Returns:
        first (D,), an item id for each of the D different token sequences, and inverse (N,), which
        of them each item is.
    """
    keys = np.empty((len(store), 2), dtype=np.uint64)  # 128 bits an item
    for start in range(0, len(store), HASH_CHUNK):
        offsets = store.offsets[start : start + HASH_CHUNK + 1]
        part = slice(offsets[0], offsets[-1])
        tokens = store.input_ids[part].astype(np.uint64) * np.uint64(4) + store.token_type_ids[part]
        offsets = offsets - offsets[0]
        places = np.arange(len(tokens)) - np.repeat(offsets[:-1], np.diff(offsets))
        tokens += places.astype(np.uint64) << np.uint64(40)
        for column, salt in enumerate((0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F)):
            mixed = tokens * np.uint64(salt)
            mixed ^= mixed >> np.uint64(29)
            mixed *= np.uint64(0xBF58476D1CE4E5B9)
            mixed ^= mixed >> np.uint64(32)
            sums = np.concatenate([[np.uint64(0)], np.cumsum(mixed, dtype=np.uint64)])
            keys[start : start + len(offsets) - 1, column] = sums[offsets[1:]] - sums[offsets[:-1]]
    _, first, inverse = np.unique(keys, axis=0, return_index=True, return_inverse=True)
    return first, inverse.reshape(-1)


@torch.no_grad()
def encode_items(
    model: RecformerForSeqRec | RecformerModel,
    store: TokenizedItems,
    autocast: AbstractContextManager | None = None,
    progress: bool = True,
    item_ids: np.ndarray | None = None,
) -> Tensor:
    """Encode items as the one-item sequences they are in training.

    With `torch.distributed` initialised each process encodes its share and all get the whole table.

    Args:
        model: encodes; its mode (train or eval) is restored afterwards.
        store: the N tokenised items.
        autocast: context of mixed precision to encode in.
        progress: show a progress bar on the first process.
        item_ids: (K,) int64 items to encode; None: all N in order.

    Returns:
        (K, H) or (N, H) float32 on the model's device.

    Raises:
        ValueError: the model gives NaN or infinite vectors.
    """
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    rank = torch.distributed.get_rank() if distributed else 0
    world = torch.distributed.get_world_size() if distributed else 1
    training = model.training
    model.eval()
    device = next(model.parameters()).device
    first, inverse = distinct_items(store)
    if item_ids is not None:
        texts, inverse = np.unique(inverse[item_ids], return_inverse=True)
        first = first[texts]
    table = torch.zeros(len(first), model.config.hidden_size, device=device)
    # A batch is one process's whole; shares differ in which batches they take, not in the batches.
    batches = list(token_budget_batches(store.lengths[first] + 1, TOKENS_PER_BATCH))[rank::world]
    bar = tqdm(batches, desc="encode items", leave=False, disable=not progress or rank > 0)
    with autocast if autocast is not None else nullcontext():
        for rows in bar:
            packed = pack_sequences(store, list(first[rows, None]), model.config).to(device)
            table[torch.from_numpy(rows).to(device)] = model.encode(packed).float()
    if distributed:
        torch.distributed.all_reduce(table)  # every row is non-zero on one process only
    model.train(training)
    if not torch.isfinite(table).all():
        raise ValueError("the model gives item vectors that are not finite; are its weights sound?")
    return table[torch.from_numpy(inverse).to(device)]  # from the order of the keys to that of ids
