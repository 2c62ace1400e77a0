"""Loaders: order, seeds, shares, the sample of validation users."""

from __future__ import annotations

import numpy as np
import pytest

from recformer.data import datamodule
from recformer.data.collators import RecformerTrainCollator
from recformer.data.datamodule import (
    EpochBatchSampler,
    SeqRecDataModule,
    ShareSampler,
    TrainDataset,
)
from recformer.data.processed import ProcessedFolder, Sequences, write_processed
from recformer.data.token_batches import HistoryTokens
from recformer.files import UserError
from tests.data.test_collators import Store, config


def batches(monkeypatch, world: int, rank: int, rows: int, size: int, epoch: int, seed: int = 1):
    monkeypatch.setattr(datamodule, "rank_and_world", lambda: (rank, world))
    sampler = EpochBatchSampler(rows, size, seed)
    sampler.set_epoch(epoch)
    found = list(sampler)
    assert len(found) == len(sampler)
    return found


def test_order_depends_on_seed_and_epoch_alone(monkeypatch):
    first = batches(monkeypatch, 1, 0, 10, 3, epoch=4)
    assert first == batches(monkeypatch, 1, 0, 10, 3, epoch=4)
    assert [len(batch) for batch in first] == [3, 3, 3, 1]
    assert sorted(row for batch in first for row, _ in batch) == list(range(10))
    assert first != batches(monkeypatch, 1, 0, 10, 3, epoch=5)
    assert first != batches(monkeypatch, 1, 0, 10, 3, epoch=4, seed=2)


def test_the_draw_of_a_user_does_not_depend_on_the_batch_size(monkeypatch):
    small = dict(pair for batch in batches(monkeypatch, 1, 0, 10, 2, 3) for pair in batch)
    large = dict(pair for batch in batches(monkeypatch, 1, 0, 10, 7, 3) for pair in batch)
    assert small == large
    assert len(set(small.values())) == 10


@pytest.mark.parametrize("rows", [12, 13, 14])
def test_two_processes_see_what_one_sees(monkeypatch, rows):
    one = batches(monkeypatch, 1, 0, rows, 4, epoch=0)
    halves = [batches(monkeypatch, 2, rank, rows, 2, epoch=0) for rank in (0, 1)]
    assert len(halves[0]) == len(halves[1])
    joined = [left + right for left, right in zip(*halves, strict=True)]
    for whole, parts in zip(one, joined, strict=False):
        assert whole[: len(parts)] == parts
    assert sum(map(len, joined)) == rows - rows % 2


@pytest.mark.parametrize("world", [1, 2])
def test_batches_by_tokens(monkeypatch, world):
    draws = np.random.default_rng(0)
    store = Store([[1] * count for count in draws.integers(0, 8, 30)])
    lengths = np.append(draws.integers(0, 9, 99), 2)  # some rows are too short to train on
    sequences = Sequences.from_rows(
        np.repeat(np.arange(100), lengths), draws.integers(0, 30, lengths.sum()), 100
    )
    rows, cut = TrainDataset(sequences), config(max_item_embeddings=5, max_token_num=20)
    tokens = HistoryTokens(sequences, rows.user_ids, store, cut)
    collate = RecformerTrainCollator(store, cut)
    epochs = []
    for epoch in (0, 1, 0):
        parts = []
        for rank in range(world):
            monkeypatch.setattr(datamodule, "rank_and_world", lambda rank=rank: (rank, world))
            sampler = EpochBatchSampler(len(rows), 4, 1, 60, tokens)
            sampler.set_epoch(epoch)
            parts.append(list(sampler))
            assert len(parts[-1]) == len(sampler)
        epochs.append(parts)
        found = []
        for together in zip(*parts, strict=True):
            assert len({len(keys) for keys in together}) == 1  # as many examples a process
            sizes = [collate(rows[keys]).history.num_tokens for keys in together]
            own = [tokens(*map(np.array, zip(*keys, strict=True))).sum() for keys in together]
            assert sizes == own
            assert max(sizes) <= 60
            found.append(sum(sizes) / world)
        assert np.mean(found) > 45
        trained = [row for part in parts for keys in part for row, _ in keys]
        if epoch == 0:
            assert len(set(trained)) == len(trained) >= len(rows) - world + 1
            assert max(tokens(np.array(trained), np.zeros(len(trained), int))) == 20
    assert epochs[0] == epochs[2] != epochs[1]


def test_evaluation_shares_hold_every_row_once(monkeypatch):
    seen = []
    for rank in range(3):
        monkeypatch.setattr(datamodule, "rank_and_world", lambda rank=rank: (rank, 3))
        sampler = ShareSampler(8)
        rows = list(sampler)
        assert len(rows) == len(sampler)
        seen += rows
    assert sorted(seen) == list(range(8))


@pytest.fixture
def folder(tmp_path) -> ProcessedFolder:
    train = [[0, 1, 2], [3, 0], [1, 3], [2], [0, 1, 2, 3]]
    val = [[3], [1], [0], [], [1]]
    test = [[0], [2], [2], [], [2]]
    write_processed(
        tmp_path / "data",
        train=Sequences.from_lists(train),
        val=Sequences.from_lists(val),
        test=Sequences.from_lists(test),
        user_names=[f"u{user}" for user in range(5)],
        asins=list("abcd"),
        meta={asin: {"title": f"thing {asin}"} for asin in "abcd"},
        dataset={},
    )
    return ProcessedFolder.load(tmp_path / "data")


def module(folder: ProcessedFolder, **settings) -> SeqRecDataModule:
    return SeqRecDataModule(folder, list, list, batch_size=2, **settings)


def test_loaders_of_a_small_folder(folder):
    data = module(folder)
    users = [example.user_id for batch in data.train_dataloader() for example in batch]
    assert sorted(users) == [0, 1, 2, 4]  # user 3 has one item: nothing to predict from
    (tests,) = list(data.test_dataloader())
    assert [(e.user_id, e.items.tolist(), e.target) for e in tests] == [
        (0, [0, 1, 2, 3], 0),
        (1, [3, 0, 1], 2),
        (2, [1, 3, 0], 2),
        (4, [0, 1, 2, 3, 1], 2),
    ]
    (validation,) = list(data.val_dataloader())
    assert [e.items.tolist() for e in validation] == [[0, 1, 2], [3, 0], [1, 3], [0, 1, 2, 3]]


def test_every_beginning_of_a_sequence_by_hand():
    sequences = Sequences.from_lists([[1, 2, 3], [4], [5, 6], []])
    whole = TrainDataset(sequences)
    assert [e.items.tolist() for e in whole[[(0, 7), (1, 8)]]] == [[1, 2, 3], [5, 6]]
    every = TrainDataset(sequences, every_prefix=True)
    assert len(every) == 3
    found = every[[(2, 1), (0, 2), (1, 3)]]
    assert [e.items.tolist() for e in found] == [[5, 6], [1, 2], [1, 2, 3]]
    assert [(e.user_id, e.start, e.seed) for e in found] == [(2, 4, 1), (0, 0, 2), (0, 0, 3)]


def test_workers_change_nothing(folder):
    def draws(workers: int) -> list:
        loader = module(folder, num_workers=workers).train_dataloader()
        return [[(e.user_id, e.seed) for e in batch] for batch in loader]

    assert draws(0) == draws(2)


def test_sample_of_test_users_is_one_for_all_runs(folder):
    def users(**settings) -> list[int]:
        return [e.user_id for b in module(folder, **settings).test_dataloader() for e in b]

    chosen = users(test_users=2, seed=3)
    assert len(chosen) == 2
    assert users(test_users=2, seed=4) == chosen
    assert users(test_users=99) == users() == [0, 1, 2, 4]
    assert len(module(folder, test_users=2).val_set) == 4


def test_sample_of_validation_users_is_seeded_and_never_of_test(folder):
    def users(**settings) -> list[int]:
        return [e.user_id for b in module(folder, **settings).val_dataloader() for e in b]

    assert users(eval_users=2, seed=3) == users(eval_users=2, seed=3)
    assert len(users(eval_users=2)) == 2
    assert len({tuple(users(eval_users=2, seed=seed)) for seed in range(20)}) > 1
    assert users(eval_users=99) == [0, 1, 2, 4]
    assert len(module(folder, eval_users=2).test_set) == 4


def test_nobody_to_evaluate_is_refused(tmp_path, folder):
    write_processed(
        tmp_path / "alone",
        train=Sequences.from_lists([[0, 1]]),
        val=Sequences.from_lists([[]]),
        test=Sequences.from_lists([[]]),
        user_names=["u"],
        asins=["a", "b"],
        meta={"a": {"title": "x"}, "b": {"title": "y"}},
        dataset={},
    )
    with pytest.raises(UserError, match="no user with a val target"):
        module(ProcessedFolder.load(tmp_path / "alone"))
    assert np.array_equal(folder.train.lengths, [3, 2, 2, 1, 4])
