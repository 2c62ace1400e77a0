"""Encoding a catalogue through the store of vectors: items a second and share of the ceiling.

    python -m benchmarks.item_encoding --items 100000 --dtype bfloat16

Items are random tokens, 20 to 60 and 40 on average with `<s>`; the model has MiniLM size and random
weights. All of `catalogue_vectors` is measured: keys, batches, encoder, files. The ceiling is that
of `benchmarks.encoder`: the operations needed, at the speed of the linear layers' own products.

An item costs the same in a small catalogue and in a large one, so the table encodes a few thousand.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from benchmarks.encoder import DEVICE, DTYPES, SIZES, build_ours, operations, products
from benchmarks.measure import REPEATS, Work, header, line, pin_threads, row, run_alone, seconds_of
from recformer.cli import exit_with_message
from recformer.data.items import TokenizedItems
from recformer.training.item_encoder import TOKENS_PER_BATCH, catalogue_vectors

NUM_ITEMS = 4096


class RandomItems(TokenizedItems):
    """Made-up items in memory, in place of mapped files."""

    def __init__(self, num_items: int, vocab_size: int) -> None:
        generator = np.random.default_rng(0)
        lengths = generator.integers(20, 60, num_items, endpoint=True) - 1  # less <s>
        self.offsets = np.concatenate([[0], np.cumsum(lengths)])
        self.input_ids = generator.integers(5, vocab_size, self.offsets[-1]).astype(np.uint16)
        self.token_type_ids = generator.integers(1, 3, self.offsets[-1]).astype(np.uint8)


def encoding_case(size: str, dtype: str, num_items: int) -> Work:
    """All items encoded into a new store."""
    model = build_ours(size).eval()
    items = RandomItems(num_items, SIZES[size]["vocab_size"])

    def run() -> None:
        autocast = torch.autocast(DEVICE, torch.bfloat16, enabled=dtype == "bfloat16")
        with tempfile.TemporaryDirectory() as folder:
            catalogue_vectors(model, items, folder, dtype, autocast, progress=False)

    return Work(run)


def rows(quick: bool) -> Iterator[dict[str, Any]]:
    """Both dtypes."""
    for dtype in DTYPES:
        yield _row("tiny" if quick else "MiniLM", dtype, 64 if quick else NUM_ITEMS, REPEATS)


def _row(size: str, dtype: str, num_items: int, repeats: int) -> dict[str, Any]:
    config = build_ours(size).config
    encode = encoding_case(size, dtype, num_items).call
    product, product_operations = products(config, TOKENS_PER_BATCH, getattr(torch, dtype))
    encoding_case(size, dtype, 64).call()  # warms up
    product()
    times = [(seconds_of(encode), seconds_of(product)) for _ in range(repeats)]
    seconds, product_seconds = (statistics.median(column) for column in zip(*times))
    lengths = (RandomItems(num_items, SIZES[size]["vocab_size"]).lengths + 1).tolist()
    needed = operations(config, lengths, pooled=True)
    memory = run_alone(encoding_case, size, dtype, min(num_items, NUM_ITEMS))
    return row(
        f"{size}, {num_items:,} items of 40 tokens, {dtype}",
        seconds,
        amount=num_items,
        unit="items",
        share_of_ceiling=needed / seconds / (product_operations / product_seconds),
        peak_memory_mb=memory["peak_memory_mb"],
    )


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--items", type=int, default=NUM_ITEMS)
    parser.add_argument("--dtype", choices=DTYPES, nargs="+", default=DTYPES)
    parser.add_argument("--threads", type=int, help="default: the cores this process may use")
    args = parser.parse_args(argv)
    pin_threads(args.threads)
    print(header())
    for dtype in args.dtype:
        print(line(_row("MiniLM", dtype, args.items, repeats=1)), flush=True)


if __name__ == "__main__":
    exit_with_message(main)
