"""Packed batches by hand: order, cuts, item positions, targets."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from recformer.config import RecformerConfig
from recformer.data.collators import (
    EvalExample,
    RecformerEvalCollator,
    RecformerTrainCollator,
    TrainExample,
    pack_sequences,
    target_position,
)


class Store:
    """Items of hand-written tokens behind the two members that packing uses."""

    def __init__(self, items: list[list[int]]) -> None:
        self.items = items
        self.lengths = np.array([len(item) for item in items])
        self.offsets = np.append(0, np.cumsum(self.lengths))

    def gather(self, item_ids: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        tokens = [token for item in item_ids for token in self.items[item]]
        types = [1 if place == 0 else 2 for item in item_ids for place in range(self.lengths[item])]
        return (np.array(tokens, int), np.array(types, int), self.lengths[item_ids])


# item 0: 2 tokens, item 1: 3, item 2: none (a product without metadata), item 3: 1
STORE = Store([[10, 11], [20, 21, 22], [], [40]])


def config(**values) -> RecformerConfig:
    return RecformerConfig(
        bos_token_id=0, **{"max_item_embeddings": 51, "max_token_num": 1024, **values}
    )


def sequence(packed, row: int) -> tuple[list[int], list[int], list[int]]:
    start, stop = packed.cu_seqlens[row], packed.cu_seqlens[row + 1]
    fields = (packed.input_ids, packed.token_type_ids, packed.item_position_ids)
    return tuple(field[start:stop].tolist() for field in fields)


def test_newest_item_comes_first():
    packed = pack_sequences(
        STORE, [np.array([0, 1, 3]), np.array([2]), np.array([3, 2, 0])], config()
    )
    assert packed.cu_seqlens.tolist() == [0, 7, 8, 12]
    assert sequence(packed, 0) == (
        [0, 40, 20, 21, 22, 10, 11],
        [0, 1, 1, 2, 2, 1, 2],
        [0, 1, 2, 2, 2, 3, 3],
    )
    assert sequence(packed, 1) == ([0], [0], [0])  # an item without a token is <s> alone
    # The empty item keeps its item position: 3 is the third newest although nothing stands between.
    assert sequence(packed, 2) == ([0, 10, 11, 40], [0, 1, 2, 1], [0, 1, 1, 3])


def test_cut_to_items_and_tokens():
    rows = [np.array([0, 1, 3]), np.array([1])]
    packed = pack_sequences(STORE, rows, config(max_item_embeddings=3))
    assert sequence(packed, 0)[0] == [0, 40, 20, 21, 22]
    packed = pack_sequences(STORE, rows, config(max_token_num=3))
    assert sequence(packed, 0) == ([0, 40, 20], [0, 1, 1], [0, 1, 2])
    assert sequence(packed, 1) == ([0, 20, 21], [0, 1, 2], [0, 1, 1])
    packed = pack_sequences(STORE, rows, config(max_token_num=2))
    assert sequence(packed, 0)[0] == [0, 40]


def test_a_batch_equals_its_sequences_alone():
    generator = np.random.default_rng(0)
    rows = [generator.integers(0, 4, size=generator.integers(1, 9)) for _ in range(40)]
    for settings in ({}, {"max_token_num": 6}, {"max_item_embeddings": 4, "max_token_num": 7}):
        packed = pack_sequences(STORE, rows, config(**settings))
        for number, row in enumerate(rows):
            alone = pack_sequences(STORE, [row], config(**settings))
            assert sequence(packed, number) == sequence(alone, 0)


def test_empty_sequences_are_refused():
    with pytest.raises(ValueError, match="at least one item"):
        pack_sequences(STORE, [np.array([0]), np.array([], dtype=int)], config())
    with pytest.raises(ValueError, match="at least one item"):
        pack_sequences(STORE, [], config())


def test_target_is_never_the_first_item_and_every_other_one():
    drawn = {target_position(4, seed) for seed in range(200)}
    assert drawn == {1, 2, 3}
    assert target_position(2, 7) == 1


def test_train_collator_predicts_the_item_after_the_history():
    items = np.array([3, 0, 1])
    for seed in range(10):
        batch = RecformerTrainCollator(STORE, config())([TrainExample(5, items, seed)])
        position = target_position(3, seed)
        assert batch.labels.tolist() == [items[position]]
        expected = pack_sequences(STORE, [items[:position]], config())
        assert torch.equal(batch.history.input_ids, expected.input_ids)


def test_eval_collator_names_seen_items():
    examples = [EvalExample(7, np.array([3, 0]), 1), EvalExample(9, np.array([1]), 0)]
    batch = RecformerEvalCollator(STORE, config())(examples)
    assert batch.user_ids.tolist() == [7, 9]
    assert batch.labels.tolist() == [1, 0]
    rows, columns = batch.seen
    assert list(zip(rows.tolist(), columns.tolist(), strict=True)) == [(0, 3), (0, 0), (1, 1)]
    assert batch.history.cu_seqlens.tolist() == [0, 4, 8]
