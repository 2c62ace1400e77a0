"""How long a training step waits for its batch, with no worker beside it.

The loaders are those of training, over made-up items of about 40 tokens and sequences of 2 to 60 of
them; the model has MiniLM size. The batch is made in the process that trains, so this is the most
that can be waited: with `--dataloader_num_workers` it is made while the step before runs.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader

from benchmarks.encoder import DEVICE, SIZES
from benchmarks.measure import REPEATS, row, seconds_of
from benchmarks.tokenization import make_items, train
from recformer import PAPER, RecformerConfig, RecformerForPretraining, RecformerForSeqRec
from recformer.data.batches import Batch
from recformer.data.collators import RecformerTrainCollator
from recformer.data.datamodule import EpochBatchSampler, TrainDataset
from recformer.data.items import TokenizedItems
from recformer.data.masking import WholeWordMasker
from recformer.data.pairs import PairBatchSampler, PairDataset, PretrainCollator
from recformer.data.processed import Sequences

BATCH_SIZE = 16


def rows(quick: bool) -> Iterator[dict[str, Any]]:
    """Finetuning and pretraining."""
    num_items = 300 if quick else 20_000
    rng = np.random.default_rng(0)
    items = make_items(num_items, rng)
    num_sequences = BATCH_SIZE * (REPEATS + 1)
    sequences = Sequences.from_lists(
        [rng.integers(num_items, size=rng.integers(2, 61)) for _ in range(num_sequences)]
    )
    with tempfile.TemporaryDirectory() as name:
        tokenizer = train(Path(name), items)
        values = {**SIZES["tiny" if quick else "MiniLM"], "vocab_size": len(tokenizer)}
        config = RecformerConfig(**PAPER, **values, max_position_embeddings=1026)
        store = TokenizedItems.open_or_build(items, tokenizer, Path(name) / "cache")

        recommender = RecformerForSeqRec(config)
        recommender.init_item_embedding(torch.randn(num_items, config.hidden_size))
        loader = DataLoader(
            TrainDataset(sequences),
            batch_size=None,
            sampler=EpochBatchSampler(num_sequences, BATCH_SIZE, seed=0),
            collate_fn=RecformerTrainCollator(store, config),
        )
        yield _row("finetuning", recommender, loader)

        ends = np.concatenate([[0], np.cumsum(store.lengths[sequences.items])])
        masker = WholeWordMasker(tokenizer, 0.15, list(items[0]))
        loader = DataLoader(
            PairDataset(sequences),
            batch_size=None,
            sampler=PairBatchSampler(sequences, ends, config, BATCH_SIZE, None, seed=0),
            collate_fn=PretrainCollator(store, config, masker),
        )
        yield _row("pretraining", RecformerForPretraining(config), loader)


def _row(
    what: str, model: RecformerForSeqRec | RecformerForPretraining, loader: DataLoader
) -> dict[str, Any]:
    """Train an epoch in bfloat16 and compare what a batch takes with what its step takes."""
    model.to(DEVICE).train()
    adam = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)
    waiting, working = [], []
    start = time.perf_counter()
    for batch in loader:
        waiting.append(time.perf_counter() - start)
        working.append(seconds_of(partial(_step, model, adam, batch)))
        start = time.perf_counter()
    wait, work = statistics.median(waiting[1:]), statistics.median(working[1:])  # warm
    return row(
        f"{what}: wait for a batch of {BATCH_SIZE} sequences",
        wait,
        "the training step it is for",
        work,
        note=f"{wait / (wait + work):.2%} of the time, with no worker",
    )


def _step(model: Any, adam: torch.optim.Optimizer, batch: Batch) -> None:
    model.zero_grad()
    with torch.autocast(DEVICE, torch.bfloat16):
        loss = model.training_loss(batch.to(DEVICE))
    (loss["loss"] if isinstance(loss, dict) else loss).backward()
    adam.step()
