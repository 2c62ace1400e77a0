"""Speed of tokenising a catalogue into its store: `python -m benchmarks.tokenization`.

Against the published way, item by item and attribute by attribute: on the slow Python tokenizer
where transformers still has one (4.x), otherwise on the same fast tokenizer. Both give the same
ids, which is checked. Items are made from a seed: title, brand and category of about 40 tokens,
titles all different, a few thousand brands and a few hundred categories.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from itertools import chain
from pathlib import Path

import numpy as np
import tokenizers
import transformers

from recformer.config import PAPER, RecformerConfig
from recformer.data.items import TokenizedItems
from recformer.files import exit_with_message
from recformer.tokenization import RecformerTokenizer, train_tokenizer

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
    """The published encoding of one item, and the name of the tokenizer under it."""
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


def seconds(function: Callable) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tokenization", description=__doc__)
    parser.add_argument("--num_items", type=int, default=100_000)
    parser.add_argument("--num_peer_items", type=int, default=5_000, help="items the peer gets")
    parser.add_argument("--tokenizer", help="folder; without it one of 4,096 tokens is trained")
    args = parser.parse_args()

    config = RecformerConfig(**PAPER)
    items = make_items(args.num_items, np.random.default_rng(0))
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(args.tokenizer or temporary)
        if not args.tokenizer:
            texts = chain.from_iterable(chain(*item.items()) for item in items[:20_000])
            train_tokenizer(texts, 4096, folder)
        tokenizer = RecformerTokenizer.from_pretrained(folder, config)
        peer_name, encode_item = published_way(folder, config)

        cache = Path(temporary) / "cache"
        build = seconds(lambda: TokenizedItems.open_or_build(items, tokenizer, cache))
        reopen = seconds(lambda: TokenizedItems.open_or_build(items, tokenizer, cache))
        store = TokenizedItems.open_or_build(items, tokenizer, cache)
        ids = np.random.default_rng(1).integers(len(store), size=4096)
        gather = min(seconds(lambda: store.gather(ids)) for _ in range(5))

        sample = items[: args.num_peer_items]
        peer_out: list = []
        peer = seconds(lambda: peer_out.extend(map(encode_item, sample)))
        input_ids, token_type_ids, lengths = store.gather(np.arange(len(sample)))

    same = (
        [len(ids) for ids, _ in peer_out] == lengths.tolist()
        and list(chain.from_iterable(ids for ids, _ in peer_out)) == input_ids.tolist()
        and list(chain.from_iterable(types for _, types in peer_out)) == token_type_ids.tolist()
    )
    if not same:
        raise SystemExit("error: the store and the peer disagree")
    speed, peer_speed = len(items) / build, len(sample) / peer
    print(
        f"{len(items):,} items, {store.lengths.mean():.1f} tokens each, vocabulary of "
        f"{len(tokenizer):,}, {os.cpu_count()} cores, transformers {transformers.__version__}, "
        f"tokenizers {tokenizers.__version__}"
    )
    print(f"store built    {build:7.2f} s   {speed:9,.0f} items/s")
    print(f"store reopened {reopen:7.2f} s   (all texts hashed, all checksums compared)")
    print(f"4,096 random items gathered in {1000 * gather:.2f} ms")
    print(
        f"peer           {peer:7.2f} s   {peer_speed:9,.0f} items/s   {peer_name}, {len(sample):,}"
    )
    print(f"ratio          {speed / peer_speed:7.1f}")


if __name__ == "__main__":
    exit_with_message(main)
