"""Pretraining: mapped data, pairs, batches, and the objective over several processes."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.utils.checkpoint import checkpoint

from recformer import RecformerConfig, RecformerForPretraining
from recformer.data import pairs, pretraining
from recformer.data.draws import uniform
from recformer.data.masking import WholeWordMasker
from recformer.data.pairs import (
    PairBatchSampler,
    PairDataset,
    PretrainCollator,
    PretrainDataModule,
    pair_seeds,
    target_positions,
)
from recformer.data.pretraining import PretrainingData
from recformer.data.processed import Sequences
from recformer.tokenization import RecformerTokenizer, train_tokenizer

NAMES = ["title", "brand", "category"]


def catalogue(count: int = 30) -> dict[str, dict[str, str]]:
    words = ["steel", "brass", "bell", "saddle", "lamp", "waterproof", "bag", "chain"]
    return {
        f"A{i}": {
            "title": " ".join(words[(i * k) % 8] for k in range(1, 2 + i % 5)),
            "brand": f"maker {i % 4}",
            "category": words[i % 8],
        }
        for i in range(count)
    }


def sequences(count: int, seed: int) -> list[list[str]]:
    draw = np.random.default_rng(seed)
    return [[f"A{i}" for i in draw.integers(30, size=draw.integers(2, 9))] for _ in range(count)]


@pytest.fixture
def files(tmp_path) -> dict[str, Path]:
    contents = {"train": [*sequences(40, 1), ["A3"]], "dev": sequences(12, 2), "items": catalogue()}
    paths = {name: tmp_path / f"{name}.json" for name in contents}
    for name, content in contents.items():
        paths[name].write_text(json.dumps(content))
    return paths


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> RecformerTokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    texts = [text for item in catalogue().values() for text in (*item, *item.values())]
    train_tokenizer(texts, 400, folder)
    return RecformerTokenizer.from_pretrained(folder, RecformerConfig(max_attr_num=3))


def open_data(files, tokenizer) -> PretrainingData:
    cache = files["train"].parent / "cache"
    return PretrainingData.open_or_build(
        files["train"], files["dev"], files["items"], tokenizer, cache
    )


def small_config(tokenizer, **values) -> RecformerConfig:
    small = {
        "vocab_size": len(tokenizer),
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "attention_window": 8,
        "max_attr_num": 3,
        "max_attr_length": 16,
        "max_item_embeddings": 6,
        "max_token_num": 40,
        "max_position_embeddings": 60,
        "bos_token_id": tokenizer.bos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "initializer_range": 0.2,
    }
    return RecformerConfig(**small | values)


# --- data


def test_files_become_mapped_sequences(files, tokenizer):
    data = open_data(files, tokenizer)
    rows = json.loads(files["train"].read_text())[:-1]
    assert [[f"A{i}" for i in data.sequences["train"][row]] for row in range(40)] == rows
    assert data.counts["train_left_out"] == 1
    assert data.counts["dev_sequences"] == 12
    assert data.attribute_names == sorted(NAMES)
    lengths = data.store.lengths[data.sequences["train"].items]
    assert data.token_ends["train"].tolist() == [0, *np.cumsum(lengths)]
    assert isinstance(data.sequences["train"].items.base, np.memmap)


def test_a_second_opening_reads_no_json(files, tokenizer, monkeypatch):
    first = open_data(files, tokenizer)

    def refuse(*args):
        raise AssertionError("built again")

    monkeypatch.setattr(pretraining, "_build", refuse)
    again = open_data(files, tokenizer)
    assert np.array_equal(again.sequences["train"].items, first.sequences["train"].items)
    files["train"].write_text(json.dumps(sequences(40, 3)))  # other content, other key
    with pytest.raises(AssertionError, match="built again"):
        open_data(files, tokenizer)


def test_a_damaged_file_is_made_anew(files, tokenizer):
    data = open_data(files, tokenizer)
    before = data.sequences["train"].items.copy()
    [path] = (files["train"].parent / "cache").glob("pretraining-*/train_items.bin")
    os.truncate(path, 8)
    assert np.array_equal(open_data(files, tokenizer).sequences["train"].items, before)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("train", {"0": [1, 2]}, "train.json holds dict .* expected a list of sequences"),
        ("train", [["A1", "A2"], [3, 4]], "sequence 1 is .* expected a list of asins"),
        ("train", [["A1", "B9"], ["B9", "B8"]], r"2 asins \(3 interactions\) .*first 'B9'"),
        ("train", [["A1"], []], "no sequence of two items or more"),
        ("dev", [["A1"]], "dev.json has no sequence of two items or more"),
        ("dev", [], "dev.json has no sequence"),
        ("items", [], "items.json holds list"),
        ("items", {"A1": 0}, "'A1' has int .* smap.json has numbers"),
    ],
)
def test_wrong_files_are_refused(files, tokenizer, name, content, message):
    files[name].write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message):
        open_data(files, tokenizer)
    assert not list(files["train"].parent.glob("cache/pretraining-*"))


def test_a_missing_file_is_named(files, tokenizer):
    files["dev"].unlink()
    with pytest.raises(FileNotFoundError, match="dev.json does not exist"):
        open_data(files, tokenizer)


# --- pairs and batches


def test_targets_are_uniform_over_the_published_range_without_empty_histories():
    for n in (2, 3, 4, 7, 10):
        places = target_positions(np.full(6000, n), np.arange(6000, dtype=np.uint64))
        expected = range(max(1, (n - 1) // 2), n)
        values, counts = np.unique(places, return_counts=True)
        assert values.tolist() == list(expected)
        assert counts.min() / 6000 == pytest.approx(1 / len(expected), rel=0.12)


def test_uniform_numbers_are_uniform_and_differ_by_each_argument():
    seeds, places = np.arange(20000, dtype=np.uint64), np.zeros(20000, dtype=np.int64)
    numbers = uniform(seeds, places, 0)
    assert numbers.min() >= 0
    assert numbers.max() < 1
    assert np.histogram(numbers, bins=10, range=(0, 1))[0].min() > 1800
    assert abs(np.corrcoef(numbers, uniform(seeds, places + 1, 0))[0, 1]) < 0.05
    assert abs(np.corrcoef(numbers, uniform(seeds, places, 1))[0, 1]) < 0.05


def sampler(files, tokenizer, batch_size=4, max_tokens=None, shuffle=True) -> PairBatchSampler:
    data = open_data(files, tokenizer)
    return PairBatchSampler(
        data.sequences["train"],
        data.token_ends["train"],
        small_config(tokenizer),
        batch_size,
        max_tokens,
        7,
        shuffle,
    )


@pytest.mark.parametrize("max_tokens", [None, 170])
def test_an_epoch_holds_every_sequence_once_in_an_order_of_its_own(files, tokenizer, max_tokens):
    batches = sampler(files, tokenizer, max_tokens=max_tokens)
    epochs = []
    for epoch in (0, 1, 0):
        batches.set_epoch(epoch)
        epochs.append(list(batches))
        rows = [row for batch in epochs[-1] for row, _ in batch]
        if max_tokens is None or epoch == 0:
            assert sorted(rows) == list(range(40))
    assert epochs[0] == epochs[2] != epochs[1]


def test_epochs_by_tokens_have_equally_many_batches(files, tokenizer):
    batches = sampler(files, tokenizer, max_tokens=170)
    made = []
    for epoch in range(8):
        batches.set_epoch(epoch)
        own = [rows.tolist() for rows in batches._global_batches(epoch, 1)]
        made.append(len(own))
        served = [[row for row, _ in batch] for batch in batches]
        assert served == (own + own)[: len(batches)]
    assert min(made) < len(batches)


def test_batches_by_tokens_keep_the_budget_and_use_it(files, tokenizer):
    batches = sampler(files, tokenizer, max_tokens=170)
    data = open_data(files, tokenizer)
    pairs = PairDataset(data.sequences["train"])
    collate = PretrainCollator(data.store, small_config(tokenizer), None)
    sizes = []
    for keys in batches:
        batch = collate(pairs[keys])
        tokens = batch.a.num_tokens + batch.b.num_tokens
        assert tokens == batches.tokens(np.array([row for row, _ in keys]), 0).sum()
        sizes.append(tokens)
    assert max(sizes) <= 170
    assert np.mean(sizes) > 120


@pytest.mark.parametrize("max_tokens", [None, 100])
def test_processes_share_the_batches_of_one(files, tokenizer, monkeypatch, max_tokens):
    twice = None if max_tokens is None else 2 * max_tokens
    whole = list(sampler(files, tokenizer, 8, twice))
    parts = []
    for rank in (0, 1):
        monkeypatch.setattr(pairs, "rank_and_world", lambda rank=rank: (rank, 2))
        parts.append(list(sampler(files, tokenizer, 4, max_tokens)))
    assert all(len(a) == len(b) for a, b in zip(*parts, strict=True))
    if max_tokens is None:
        for together, left, right in zip(whole, *parts, strict=True):
            assert sorted(together) == sorted([*left, *right])
    rows = [row for part in parts for batch in part for row, _ in batch]
    assert len(set(rows)) == len(rows) >= 39


def test_a_loader_goes_on_in_the_middle_of_an_epoch(files, tokenizer):
    data = open_data(files, tokenizer)
    config = small_config(tokenizer)

    def loader():
        module = PretrainDataModule(data, config, None, 4, None, 0, seed=3)
        return module.train_dataloader()

    def ids(batch):
        return batch.user_ids.tolist()

    whole = loader()
    whole.sampler.set_epoch(2)
    expected = [ids(batch) for batch in whole]
    first = loader()
    first.sampler.set_epoch(2)
    iterator = iter(first)
    begun = [ids(next(iterator)) for _ in range(4)]
    state = first.state_dict()
    second = loader()
    second.load_state_dict(state)
    second.sampler.set_epoch(2)
    assert begun + [ids(batch) for batch in second] == expected
    assert [ids(batch) for batch in second] == expected  # once only
    third = loader()
    third.load_state_dict(state)
    third.sampler.set_epoch(3)  # that epoch was over
    assert len(list(third)) == len(expected)


def test_validation_ranks_among_all_dev_items(files, tokenizer):
    data = open_data(files, tokenizer)
    module = PretrainDataModule(data, small_config(tokenizer), None, 4, None, 0, seed=3)
    assert set(module.pool) == {int(i) for i in data.sequences["dev"].items}
    epochs = []
    for epoch in (0, 5):
        loader = module.val_dataloader()
        loader.sampler.set_epoch(epoch)
        batches = list(loader)
        for batch in batches:
            assert np.array_equal(module.pool[batch.labels], batch.target_ids)
        epochs.append([batch.target_ids.tolist() for batch in batches])
    assert epochs[0] == epochs[1]  # the same question every time
    assert sum(map(len, epochs[0])) == 12


# --- the objective


def eight_pairs(tokenizer, config, folder) -> tuple[list, WholeWordMasker]:
    """Examples of 8 pairs, two of them with the same target, and what masks them."""
    rows = Sequences.from_lists(
        [[1, 2, 3], [4, 5], [6, 7, 8, 9], [1, 3], [2, 2, 9], [9, 1], [5, 6], [7, 5]]
    )
    seeds = pair_seeds(0, 0, np.arange(8))
    examples = PairDataset(rows)[list(zip(range(8), seeds.tolist(), strict=True))]
    return examples, WholeWordMasker(tokenizer, 0.3, NAMES)


def losses_of(model, collate, examples, at_once=None) -> tuple[torch.Tensor, dict]:
    model.zero_grad()
    losses = model.training_loss(collate(examples), at_once)
    losses["loss"].backward()
    return losses["loss"].detach(), {
        name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None
    }


def build(tokenizer, folder, **values):
    from recformer.data.items import TokenizedItems

    torch.manual_seed(0)
    config = small_config(tokenizer, temp=0.2, mlm_weight=0.5, **values)
    model = RecformerForPretraining(config).eval()
    store = TokenizedItems.open_or_build(list(catalogue().values()), tokenizer, folder)
    examples, masker = eight_pairs(tokenizer, config, folder)
    return model, PretrainCollator(store, config, masker), examples


def one_of_two(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2
    )
    tokenizer = RecformerTokenizer.from_pretrained(
        folder / "tokenizer", RecformerConfig(max_attr_num=3)
    )
    model, collate, examples = build(tokenizer, folder)
    for at_once in (None, 3):
        loss, grads = losses_of(model, collate, examples[rank * 4 : rank * 4 + 4], at_once)
        for tensor in (loss, *grads.values()):
            dist.all_reduce(tensor)
            tensor /= 2  # what data-parallel training makes of them
        if rank == 0:
            torch.save((loss, grads), folder / f"result_{at_once}.pt")
    dist.destroy_process_group()


def test_two_processes_give_the_loss_and_gradients_of_one(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    model, collate, examples = build(tokenizer, tmp_path)
    targets = [example.target for example in examples]
    assert len(set(targets[:4]) & set(targets[4:])) > 0  # repeated across the processes
    loss, grads = losses_of(model, collate, examples)
    mp.spawn(one_of_two, args=(tmp_path,), nprocs=2)
    for at_once in (None, 3):  # the second one with gradient caching
        loss_of_two, grads_of_two = torch.load(tmp_path / f"result_{at_once}.pt")
        torch.testing.assert_close(loss_of_two, loss, rtol=1e-5, atol=1e-6)
        assert grads.keys() == grads_of_two.keys()
        for name, grad in grads.items():
            torch.testing.assert_close(grads_of_two[name], grad, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("at_once", [1, 3, 4, 8, 50])
@pytest.mark.parametrize("masks", [True, False])
def test_gradient_caching_changes_neither_loss_nor_gradients(tokenizer, tmp_path, at_once, masks):
    model, collate, examples = build(tokenizer, tmp_path)
    batch = collate(examples)
    if not masks:
        batch = replace(batch, mlm_a=None, mlm_b=None)
    plain = losses_of(model, lambda _: batch, examples)
    cached = losses_of(model, lambda _: batch, examples, at_once)
    torch.testing.assert_close(cached[0], plain[0], rtol=1e-6, atol=1e-6)
    assert cached[1].keys() == plain[1].keys()
    for name, grad in plain[1].items():
        torch.testing.assert_close(cached[1][name], grad, rtol=1e-5, atol=1e-6, msg=name)
    with torch.no_grad():  # as validation sees it
        whole, parts = model.batch_losses(batch), model.batch_losses(batch, at_once)
    torch.testing.assert_close(parts.logits, whole.logits, rtol=1e-5, atol=1e-6)
    assert parts.num_correct == whole.num_correct


def test_both_passes_of_gradient_caching_draw_the_same_dropout(tokenizer, tmp_path):
    """The gradient is that of the loss: it foretells what a small step does to it."""
    dropout = {"hidden_dropout_prob": 0.3, "attention_probs_dropout_prob": 0.2}
    model, collate, examples = build(tokenizer, tmp_path, **dropout)
    model.train()
    batch = collate(examples)

    def loss() -> torch.Tensor:
        torch.manual_seed(3)
        return model.training_loss(batch, 3)["loss"]

    model.zero_grad()
    first = loss()
    first.backward()
    squared, step = 0.0, 1e-3
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.grad is not None:
                squared += float(parameter.grad.double().square().sum())
                parameter -= step * parameter.grad
        foretold = step * squared
        assert float(first - loss()) == pytest.approx(foretold, rel=0.1)


@pytest.mark.parametrize("masks", [True, False])
def test_gradient_caching_says_on_which_device_it_computes(
    tokenizer, tmp_path, monkeypatch, masks
) -> None:
    """`checkpoint` keeps random state and autocast of the devices of tensors among its arguments;
    of a device that it does not see the second pass would draw other dropout."""
    seen = []

    def spied(function, *given, **how):
        seen.append([each.device for each in given if isinstance(each, torch.Tensor)])
        return checkpoint(function, *given, **how)

    monkeypatch.setattr("recformer.models.pretraining.checkpoint", spied)
    model, collate, examples = build(tokenizer, tmp_path)
    batch = collate(examples)
    if not masks:
        batch = replace(batch, mlm_a=None, mlm_b=None)
    model.training_loss(batch, 3)["loss"].backward()
    assert len(seen) > 2
    assert all(seen)


@pytest.mark.parametrize("at_once", [4, 16])
def test_memory_of_gradient_caching_is_that_of_one_part(tokenizer, tmp_path, at_once):
    """Tensors that the backward pass keeps: a part's, whatever the batch."""
    model, collate, examples = build(tokenizer, tmp_path)

    def kept(repeats: int, parts: int | None) -> int:
        sizes = []
        batch = collate(examples * repeats)
        with torch.autograd.graph.saved_tensors_hooks(
            lambda tensor: sizes.append(tensor.numel()) or tensor, lambda tensor: tensor
        ):
            model.training_loss(batch, parts)
        return sum(sizes)

    assert kept(4, None) > 3 * kept(1, None)
    assert kept(4, at_once) < kept(1, None) / 4


def test_masked_copies_change_the_mlm_losses_alone(tokenizer, tmp_path):
    model, collate, examples = build(tokenizer, tmp_path)
    batch = collate(examples)
    with_mlm = model.batch_losses(batch)
    alone = model.forward_packed(batch.a, batch.b, target_ids=batch.target_ids)
    torch.testing.assert_close(alone.loss, with_mlm.parts["contrastive"])
    torch.testing.assert_close(alone.vectors, with_mlm.vectors)
    expected = with_mlm.parts["contrastive"]
    expected = expected + 0.5 * (with_mlm.parts["mlm_a"] + with_mlm.parts["mlm_b"])
    torch.testing.assert_close(with_mlm.loss, expected)


def test_a_tie_is_not_correct(tokenizer, tmp_path):
    model, collate, examples = build(tokenizer, tmp_path)
    losses = model.batch_losses(collate(examples))
    scores = torch.tensor([[3.0, 1.0], [2.0, 2.0]])
    changed = type(losses)(losses.loss, {}, scores, torch.tensor([0, 1]), losses.vectors)
    assert changed.num_correct == 1
