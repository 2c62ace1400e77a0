"""The benchmark of item encoding counts what it encodes; speed is not asserted."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks import item_encoding
from benchmarks.encoder import SIZES, build_ours, operations
from benchmarks.item_encoding import RandomItems
from recformer.data.collators import pack_sequences
from recformer.training.item_encoder import distinct_items


def test_made_up_items_have_forty_tokens_on_average() -> None:
    items = RandomItems(2000, 1000)
    assert len(items) == 2000
    assert (items.lengths.min() + 1, items.lengths.max() + 1) == (20, 60)
    assert abs(items.lengths.mean() + 1 - 40) < 1
    assert len(distinct_items(items)[0]) == 2000
    config = build_ours("tiny").config
    packed = pack_sequences(items, [[7], [8]], config)
    assert packed.lengths.tolist() == (items.lengths[[7, 8]] + 1).tolist()
    assert int(packed.input_ids.max()) < SIZES["tiny"]["vocab_size"]


def test_rows_of_both_dtypes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(item_encoding, "run_alone", lambda *_: {"peak_memory_mb": 7.0})
    seconds = iter([2.0, 0.5] * 3 + [4.0, 0.5] * 3)  # ours and the product, three times a dtype
    timed: list[Any] = []

    def clock(call: Any) -> float:
        timed.append(call)
        return next(seconds)

    monkeypatch.setattr(item_encoding, "seconds_of", clock)
    first, second = item_encoding.rows(quick=True)
    assert first["what"] == "tiny, 64 items of 40 tokens, float32"
    assert (first["ours_seconds"], second["ours_seconds"]) == (2.0, 4.0)
    assert (first["amount"], first["unit"], first["peak_memory_mb"]) == (64, "items", 7.0)
    config = build_ours("tiny").config
    lengths = (RandomItems(64, 1000).lengths + 1).tolist()
    # two layers of 8,192 rows: q, k, v and output of 64 x 64, the halves of the FFN of 64 x 96
    product = 2 * 8192 * 2 * (4 * 64 * 64 + 2 * 64 * 96) / 0.5
    share = operations(config, lengths, pooled=True) / 2.0 / product
    assert first["share_of_ceiling"] == pytest.approx(share)
    assert second["share_of_ceiling"] == pytest.approx(share / 2)
