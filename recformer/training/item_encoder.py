"""All items of a catalogue as vectors.

Shapes: N items, T packed tokens, H hidden.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from recformer.data.collators import pack_sequences
from recformer.data.item_vectors import Keys, Vectors, content_keys, open_or_build
from recformer.data.items import TokenizedItems
from recformer.files import UserError, sha256_of
from recformer.models import RecformerForSeqRec, RecformerModel
from recformer.processes import rank_and_world
from recformer.training.start import weights_hash

TOKENS_PER_BATCH = 8192  # memory and speed only, no figure depends on it

# Enters the keys of stored vectors: raise it when the encoder's arithmetic changes.
VECTORS_FORM = "recformer item 2"

# Fields of a configuration that say nothing about the vector of an item.
NOT_IN_VECTORS = frozenset(
    {
        "_name_or_path",
        "architectures",
        "transformers_version",
        "dtype",
        "torch_dtype",
        "item_num",
        "finetune_negative_sample_size",
        "temp",
        "mlm_weight",
    }
)


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


def item_keys(store: TokenizedItems) -> Keys:
    """(N,) content hashes of the items' tokens and token types."""
    offsets = store.offsets
    parts = zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True)
    return content_keys(
        store.input_ids[start:stop].tobytes() + store.token_type_ids[start:stop].tobytes()
        for start, stop in parts
    )


def distinct_items(store: TokenizedItems) -> tuple[np.ndarray, np.ndarray]:
    """Group items whose tokens are the same, so that each text is encoded once.

    That saves work and makes equal items tie exactly: in 16-bit precision the vectors of one text
    encoded in two batches differ by more than distances between items that a ranking rests on.

    Returns:
        first (D,), an item id for each of the D different token sequences, and inverse (N,), which
        of them each item is.
    """
    _, first, inverse = np.unique(item_keys(store), return_index=True, return_inverse=True)
    return first, inverse


def encoder_key(model: PreTrainedModel, *settings: str) -> str:
    """Key of all that vectors depend on beside an item: weights, configuration and `settings`."""
    values = model.config.to_dict()
    kept = {name: value for name, value in values.items() if name not in NOT_IN_VECTORS}
    config = json.dumps(kept, sort_keys=True, default=str)
    return sha256_of(weights_hash(model), config, *settings)


@contextmanager
def _evaluating(
    model: torch.nn.Module, autocast: AbstractContextManager | None
) -> Iterator[torch.device]:
    """Evaluation mode and mixed precision; gives the model's device."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad(), autocast if autocast is not None else nullcontext():
            yield next(model.parameters()).device
    finally:
        model.train(training)


def encode_items(
    model: RecformerForSeqRec | RecformerModel,
    store: TokenizedItems,
    autocast: AbstractContextManager | None = None,
    progress: bool = True,
    item_ids: np.ndarray | None = None,
) -> Tensor:
    """Encode items, in memory, as the one-item sequences they are in training.

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
        UserError: the model gives NaN or infinite vectors.
    """
    rank, world = rank_and_world()
    first, inverse = distinct_items(store)
    if item_ids is not None:
        texts, inverse = np.unique(inverse[item_ids], return_inverse=True)
        first = first[texts]
    # Batches are cut alike everywhere; each process takes every `world`-th one.
    batches = list(token_budget_batches(store.lengths[first] + 1, TOKENS_PER_BATCH))[rank::world]
    bar = tqdm(
        batches, desc="encode items", leave=False, disable=None if progress and rank == 0 else True
    )
    with _evaluating(model, autocast) as device:
        table = torch.zeros(len(first), model.config.hidden_size, device=device)
        for rows in bar:
            packed = pack_sequences(store, list(first[rows, None]), model.config).to(device)
            table[torch.from_numpy(rows).to(device)] = model.encode(packed).float()
    if world > 1:
        torch.distributed.all_reduce(table)  # every row is non-zero on one process only
    if not torch.isfinite(table).all():
        raise UserError("the model gives item vectors that are not finite; are its weights sound?")
    return table[torch.from_numpy(inverse).to(device)]  # from the order of the keys to that of ids


def catalogue_vectors(
    model: RecformerForSeqRec | RecformerModel,
    store: TokenizedItems,
    cache_dir: str | os.PathLike,
    precision: str = "32-true",
    autocast: AbstractContextManager | None = None,
    progress: bool = True,
    unit_length: bool = False,
) -> Vectors:
    """Vectors of all items through a store of files (`recformer.data.item_vectors`).

    For large catalogues whose encoder stays: memory does not grow with N x H, a build that was cut
    off is resumed, and of a changed catalogue only changed items are encoded. With
    `torch.distributed` initialised the processes share the work.

    Args:
        model: encodes; its mode (train or eval) is restored afterwards.
        store: the N tokenised items.
        cache_dir: where stores of vectors are kept.
        precision: Lightning's name of the precision that `autocast` stands for.
        autocast: context of mixed precision to encode in.
        progress: show a progress bar on the first process.
        unit_length: vectors divided by their length.

    Returns:
        (N, H) float32, mapped into memory; see `open_or_build`.

    Raises:
        UserError: the model gives NaN or infinite vectors.
        OSError: not enough room on the disk.
    """
    rank, world = rank_and_world()
    hidden_size = model.config.hidden_size
    with _evaluating(model, autocast) as device:

        def encode(rows: np.ndarray) -> np.ndarray:
            vectors = torch.empty(len(rows), hidden_size)
            for batch in token_budget_batches(store.lengths[rows] + 1, TOKENS_PER_BATCH):
                packed = pack_sequences(store, list(rows[batch, None]), model.config).to(device)
                vectors[batch] = model.encode(packed).float().cpu()
            return (F.normalize(vectors) if unit_length else vectors).numpy()

        return open_or_build(
            item_keys(store),
            encode,
            vectors_key(model, precision, unit_length),
            hidden_size,
            cache_dir,
            rank=rank,
            world=world,
            wait=torch.distributed.barrier if world > 1 else lambda: None,
            progress=progress,
        )


def vectors_key(model: PreTrainedModel, precision: str, unit_length: bool = False) -> str:
    """The `model_key` of the vectors that `catalogue_vectors` gives."""
    return encoder_key(model, VECTORS_FORM, precision, str(unit_length))
