"""A product that did not exist: from `add_items` to a recommendation that offers it and reads it.

An encoder of MiniLM's size with random weights, a catalogue whose vectors are there already. Timed
are single products one after the other: tokenised, encoded, in the catalogue; and a request whose
history holds the product and whose answer does.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.encoder import build_ours, values_of
from benchmarks.measure import row
from benchmarks.tokenization import make_items
from recformer import RecformerConfig, RecformerForSeqRec, RecformerTokenizer
from recformer.config import PAPER
from recformer.recommendation import CatalogueRecommender
from recformer.tokenization import train_tokenizer

SIZES = (("MiniLM", 100_000), ("MiniLM", 1_000_000))
QUICK = (("tiny", 1_000),)
PRODUCTS = 20


def rows(quick: bool) -> Iterator[dict[str, Any]]:
    for size, items in QUICK if quick else SIZES:
        recommender = build(size, items)
        added, asked, worked = [], [], []
        texts = make_items(PRODUCTS + 1, np.random.default_rng(1))
        for number, text in enumerate(texts):
            name = f"new {number}"
            text = {**text, "title": f"{text.get('title', '')} of {number}"}
            started, used = time.perf_counter(), time.process_time()
            recommender.add_items({name: text})
            there, used = time.perf_counter(), time.process_time() - used
            (answer,) = recommender.recommend([["item 1", name]], k=10)
            ended = time.perf_counter()
            assert answer.num_unknown == 0
            assert recommender.similar_items(text, k=1).items == [name]
            if number:  # the first one warms up
                added.append(there - started)
                worked.append(used)
                asked.append(ended - there)
        longest = max(a + b for a, b in zip(added, asked, strict=True))
        yield row(
            f"add a product to {items:,} items, {size}",
            statistics.median(added),
            note=f"{1e3 * statistics.median(worked):.1f} ms of processor; the request that reads "
            f"it {1e3 * statistics.median(asked):.1f} ms; at most {1e3 * longest:.1f} ms for both "
            f"with {PRODUCTS} products",
        )


def build(size: str, items: int) -> CatalogueRecommender:
    """A recommender of that many items, their vectors random."""
    config = RecformerConfig(**PAPER, **values_of(size))
    model = RecformerForSeqRec(config)
    model.longformer = build_ours(size)
    table = torch.empty(items, config.hidden_size)
    table.normal_(generator=torch.Generator().manual_seed(0))
    model.init_item_embedding(table)
    texts = make_items(1_000, np.random.default_rng(0))
    with tempfile.TemporaryDirectory() as folder:
        words = (text for item in texts for pair in item.items() for text in pair)
        train_tokenizer(words, min(4096, config.vocab_size), Path(folder))
        tokenizer = RecformerTokenizer.from_pretrained(folder, config)
    named = {f"item {number}": texts[number % len(texts)] for number in range(items)}
    return CatalogueRecommender(model, tokenizer, named)
