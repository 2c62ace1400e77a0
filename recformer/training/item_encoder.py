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
from recformer.models import RecformerForSeqRec

TOKENS_PER_BATCH = 8192  # memory and speed only, no figure depends on it


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


@torch.no_grad()
def encode_items(
    model: RecformerForSeqRec,
    store: TokenizedItems,
    autocast: AbstractContextManager | None = None,
    progress: bool = True,
) -> Tensor:
    """Encode every item as the one-item sequence it is in training.

    With `torch.distributed` initialised each process encodes its share and all get the whole table.

    Args:
        model: encodes; its mode (train or eval) is restored afterwards.
        store: the N tokenised items.
        autocast: context of mixed precision to encode in.
        progress: show a progress bar on the first process.

    Returns:
        (N, H) float32 on the model's device.

    Raises:
        ValueError: the model gives NaN or infinite vectors.
    """
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    rank = torch.distributed.get_rank() if distributed else 0
    world = torch.distributed.get_world_size() if distributed else 1
    training = model.training
    model.eval()
    device = next(model.parameters()).device
    table = torch.zeros(len(store), model.config.hidden_size, device=device)
    # A batch is one process's whole; shares differ in which batches they take, not in the batches.
    batches = list(token_budget_batches(store.lengths + 1, TOKENS_PER_BATCH))[rank::world]
    bar = tqdm(batches, desc="encode items", leave=False, disable=not progress or rank > 0)
    with autocast if autocast is not None else nullcontext():
        for item_ids in bar:
            packed = pack_sequences(store, item_ids[:, None], model.config).to(device)
            table[torch.from_numpy(item_ids).to(device)] = model.encode(packed).float()
    if distributed:
        torch.distributed.all_reduce(table)  # every row is non-zero on one process only
    model.train(training)
    if not torch.isfinite(table).all():
        raise ValueError("the model gives item vectors that are not finite; are its weights sound?")
    return table
