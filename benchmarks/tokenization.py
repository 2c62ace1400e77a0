"""Tokenising a catalogue into its store, and getting items out of it.

Against the published way, item by item and attribute by attribute: on the slow Python tokenizer
where transformers still has one (4.x), otherwise on the same fast tokenizer, on a part of the
items, its time in proportion. Both give the same ids, which is checked. Items are made from a seed:
title, brand and category of about 40 tokens, titles all different, a few thousand brands and a few
hundred categories.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import transformers

from benchmarks.measure import REPEATS, Work, in_turns, row, run_alone
from recformer.config import PAPER, RecformerConfig
from recformer.data.items import TokenizedItems
from recformer.files import sha256_of
from recformer.tokenization import RecformerTokenizer, train_tokenizer

PEER_ITEMS = 2_000  # that the peer gets
SYLLABLES = [a + b for a in "bcdfghklmnprst" for b in ("a", "e", "i", "o", "u", "ar", "in", "on")]


def make_items(num_items: int, rng: np.random.Generator) -> list[dict[str, str]]:
    """`num_items` items of made-up words whose frequencies fall as those of a language do."""
    words = np.array(
        ["".join(rng.choice(SYLLABLES, size)) for size in rng.integers(1, 4, size=20_000)]
    )
    frequency = 1 / np.arange(1, len(words) + 1)
    frequency /= frequency.sum()

    def phrases(count: int, size: int) -> list[str]:
        drawn = words[rng.choice(len(words), (count, size), p=frequency)]
        return [" ".join(row).title() for row in drawn]

    brands = np.array(phrases(3000, 1))[rng.integers(3000, size=num_items)]
    categories = np.array(phrases(400, 4))[rng.integers(400, size=num_items)]
    numbers = rng.integers(10_000, size=num_items)
    return [
        {"title": f"{title}, {number} Pack", "brand": str(brand), "category": str(category)}
        for title, number, brand, category in zip(
            phrases(num_items, 10), numbers, brands, categories, strict=True
        )
    ]


def published_way(folder: Path, config: RecformerConfig) -> tuple[str, Callable]:
    """The name of the tokenizer below, and the published encoding of one item."""
    bare = not (folder / "tokenizer.json").is_file()
    name = "RobertaTokenizer" if bare else "PreTrainedTokenizerFast"
    tokenizer = getattr(transformers, name).from_pretrained(folder)

    def ids_of(text: str) -> list[int]:
        return tokenizer.convert_tokens_to_ids(tokenizer.tokenize(text))

    def encode_item(item: dict[str, str]) -> tuple[list[int], list[int]]:
        input_ids: list[int] = []
        token_type_ids: list[int] = []
        for attribute, value in list(item.items())[: config.max_attr_num]:
            name_ids, value_ids = ids_of(attribute), ids_of(value)
            input_ids += (name_ids + value_ids)[: config.max_attr_length]
            types = [1] * len(name_ids) + [2] * len(value_ids)
            token_type_ids += types[: config.max_attr_length]
        return input_ids, token_type_ids

    kind = "fast" if tokenizer.is_fast else "slow Python"
    return f"{type(tokenizer).__name__} ({kind}), item by item", encode_item


def train(folder: Path, items: list[dict[str, str]]) -> RecformerTokenizer:
    """A tokenizer of 4,096 tokens, trained on the items and written to the folder."""
    texts = chain.from_iterable(chain(*item.items()) for item in items[:20_000])
    train_tokenizer(texts, 4096, folder)
    return RecformerTokenizer.from_pretrained(folder, RecformerConfig(**PAPER))


def store_case(folder: str, num_items: int) -> Work:
    """Build the store of all items; the summary hashes it."""
    items = make_items(num_items, np.random.default_rng(0))
    tokenizer = RecformerTokenizer.from_pretrained(folder, RecformerConfig(**PAPER))
    cache = Path(folder) / "cache"

    def build() -> TokenizedItems:
        shutil.rmtree(cache, ignore_errors=True)
        return TokenizedItems.open_or_build(items, tokenizer, cache)

    def summary(store: TokenizedItems) -> str:
        ids, types, lengths = store.gather(np.arange(PEER_ITEMS))
        return sha256_of(str((ids.tolist(), types.tolist(), lengths.tolist())))

    return Work(build, summary)


def peer_case(folder: str, num_items: int) -> Work:
    """Encode the first items in the published way; the summary hashes them."""
    items = make_items(num_items, np.random.default_rng(0))[:PEER_ITEMS]
    _, encode_item = published_way(Path(folder), RecformerConfig(**PAPER))

    def summary(encoded: list[tuple[list[int], list[int]]]) -> str:
        ids, types = (list(chain.from_iterable(column)) for column in zip(*encoded))
        return sha256_of(str((ids, types, [len(row_ids) for row_ids, _ in encoded])))

    return Work(lambda: [encode_item(item) for item in items], summary)


def rows(quick: bool) -> Iterator[dict[str, Any]]:
    """Building a store, opening it again, gathering from it.

    Raises:
        AssertionError: the two sides did not come to the same ids.
    """
    num_items = PEER_ITEMS if quick else 100_000
    items = make_items(num_items, np.random.default_rng(0))
    with tempfile.TemporaryDirectory() as name:
        tokenizer = train(Path(name), items)
        peer_name, _ = published_way(Path(name), tokenizer.config)
        ours = run_alone(store_case, name, num_items, repeats=REPEATS)
        peer = run_alone(peer_case, name, num_items, repeats=REPEATS)
        assert ours["summary"] == peer["summary"], "the store and the peer disagree"
        yield row(
            f"tokenise {num_items:,} items",
            ours["seconds"],
            peer_name,
            peer["seconds"] * num_items / PEER_ITEMS,
            amount=num_items,
            unit="items",
            peak_memory_mb=ours["peak_memory_mb"],
            note=f"the peer over {PEER_ITEMS:,} items",
        )
        cache = Path(name) / "cache"
        store = TokenizedItems.open_or_build(items, tokenizer, cache)
        ids = np.random.default_rng(1).integers(len(store), size=4096)
        reopen, gather = in_turns(
            REPEATS,
            lambda: TokenizedItems.open_or_build(items, tokenizer, cache),
            lambda: store.gather(ids),
        )
        yield row(
            f"open the store of {num_items:,} items again",
            reopen,
            amount=num_items,
            unit="items",
            note="all texts hashed, all checksums compared",
        )
        yield row("gather 4,096 random items", gather, amount=len(ids), unit="items")
