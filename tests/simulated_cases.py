"""Models, losses, evaluation and training on a simulated accelerator give what the CPU gives.

Run by test_simulated_device.py in a process of its own.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import lightning
import numpy as np
import pytest
import torch

from baselines.__main__ import run as baseline
from baselines.generative.recommender import CodeHistoryCollator
from recformer.evaluation.ranking import (
    rank_among_by_vectors,
    rank_and_top_items,
    rank_by_vectors,
)
from recformer.evaluation.ranks import count_ranks, count_ranks_among
from recformer.evaluation.top_items import top_items, top_items_by_vectors
from recformer.files import UserError
from recformer.finetune import run as finetune
from recformer.models import losses
from recformer.pretrain import Run
from recformer.training import trainer as trainer_module
from tests import test_finetune as plain
from tests import test_finetune_head as headed
from tests import test_pretrain as pretraining
from tests.baselines.generative import test_generation as generation
from tests.baselines.sequence import test_sequence_models as sequences
from tests.evaluation.test_ranking import as_lists, catalogue
from tests.models.test_models import check_device
from tests.simulated_device import (
    NAME,
    SimulatedTrainer,
    WaitsOfSteps,
    host_waits,
    simulated_device,
)

inputs = pretraining.inputs
shop = headed.shop
codes = generation.codes
data, encoder, semantic_ids = sequences.data, sequences.encoder, sequences.semantic_ids


@pytest.fixture
def device() -> Iterator[torch.device]:
    with simulated_device() as device:
        yield device


@pytest.fixture
def trained_there(device, monkeypatch) -> torch.device:
    """Every trainer trains on the device."""
    monkeypatch.setattr(lightning, "Trainer", SimulatedTrainer)
    WaitsOfSteps.steps.clear()
    monkeypatch.setattr(trainer_module, "half_precision", lambda accelerator: "bf16-mixed")
    choose = trainer_module.choose_devices

    def choose_there(*args: Any) -> tuple[str, list[int] | int]:  # of a machine with one card
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.cuda, "is_available", lambda: True)
            patch.setattr(torch.cuda, "device_count", lambda: 1)
            return choose(*args)

    monkeypatch.setattr(trainer_module, "choose_devices", choose_there)
    return device


def test_what_a_gpu_refuses_is_refused(device) -> None:
    there, here = torch.ones(3, device=device), torch.ones(3)
    assert there.device == device
    with pytest.raises(RuntimeError, match="at least two devices"):
        there + here
    with pytest.raises(TypeError, match="numpy"):
        there.numpy()
    with pytest.raises(TypeError, match="numpy"):
        np.asarray(there)
    assert (there.cpu() + here).tolist() == [2, 2, 2]
    with host_waits() as waits:
        assert (there + 1).sum().item() == 6
        assert there.cpu().tolist() == [1, 1, 1]
        assert there.nonzero().shape == (3, 1)
        there.index_add_(0, torch.tensor([0], device=device), torch.ones(1, device=device))
        there[there > 5] = 0
    assert sum(waits.values()) == 4
    assert there[0] == 2


def test_autocast_casts_as_on_a_gpu(device) -> None:
    layer = torch.nn.Linear(4, 4).to(device)
    x = torch.randn(2, 4, device=device)
    with torch.autocast(NAME, torch.bfloat16):
        y = layer(x)
        assert y.dtype == (x @ x.T).dtype == torch.bfloat16
        assert y.softmax(-1).dtype == y.sum().dtype == torch.float32
        assert (x.double() @ x.double().T).dtype == torch.float64
        y.sum().backward()
    assert layer.weight.grad.dtype == torch.float32
    assert layer(x).dtype == torch.float32


@pytest.mark.parametrize("pooler_type", ["cls", "avg"])
def test_the_encoder_gives_the_same_vectors_and_gradients(device, pooler_type) -> None:
    check_device(pooler_type, NAME)


@pytest.mark.parametrize("cosine", [True, False])
def test_ranks_and_best_items_are_the_same(device, cosine) -> None:
    users, items, targets = catalogue()
    generator = np.random.default_rng(0)
    seen = generator.integers(0, 64, 500), generator.integers(0, 300, 500)
    added = generator.integers(0, 64, 50), generator.integers(0, 300, 50), generator.random(50)
    there = users.to(device), items.to(device), targets.to(device)
    options = {"cosine": cosine, "additions": added}
    expected, best = rank_and_top_items(users, items, targets, 9, seen, **options)
    for table in (there[1], items.numpy()):
        ranks, found = rank_and_top_items(there[0], table, there[2], 9, seen, **options)
        assert as_lists(ranks) == as_lists(expected)
        assert found.tolist() == best.tolist()
    assert as_lists(rank_by_vectors(*there, seen, **options)) == as_lists(expected)
    assert top_items_by_vectors(*there[:2], 9, seen, **options)[0].tolist() == best.tolist()
    candidates = generator.integers(0, 300, (64, 20))
    among = rank_among_by_vectors(*there, candidates, **options)
    assert as_lists(among) == as_lists(
        rank_among_by_vectors(users, items, targets, candidates, **options)
    )
    scores = (users @ items.T).round(decimals=1)
    assert as_lists(count_ranks(scores.to(device), there[2], seen)) == as_lists(
        count_ranks(scores, targets, seen)
    )
    assert as_lists(count_ranks_among(scores.to(device), there[2], candidates)) == as_lists(
        count_ranks_among(scores, targets, candidates)
    )
    assert top_items(scores.to(device), 9, seen)[0].tolist() == (
        top_items(scores, 9, seen)[0].tolist()
    )


@pytest.mark.parametrize("autocast", [False, True])
def test_losses_and_their_gradients_are_the_same(device, autocast) -> None:
    users, items, labels = torch.randn(6, 8), torch.randn(20, 8), torch.arange(6)
    ids = torch.tensor([0, 1, 2, 0, 4, 5])
    calls = {
        "full": lambda u, i, y, t: losses.full_softmax_loss(u, i, y, 0.1),
        "dot": lambda u, i, y, t: losses.full_softmax_loss(u, i, y, 1.0, cosine=False),
        "contrastive": lambda u, i, y, t: torch.nn.functional.cross_entropy(
            losses.contrastive_scores(u, i[:6], 0.1, t), y
        ),
        "sampled": lambda u, i, y, t: losses.sampled_softmax_loss(u, i, y, 19, 0.1),
    }
    for name, call in calls.items():
        results = []
        for place in ("cpu", device):
            u, i = (x.detach().to(place).requires_grad_() for x in (users, items))
            with torch.autocast(torch.device(place).type, torch.bfloat16, enabled=autocast):
                loss = call(u, i, labels.to(place), ids.to(place))
            loss.backward()
            results.append([loss.detach().cpu(), u.grad.cpu(), i.grad.cpu()])
        for got, expected in zip(*results, strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("kind", sequences.NETWORKS)
def test_sequence_networks_give_the_same(device, kind, autocast) -> None:
    model = sequences.made(kind)
    examples = sequences.train_examples([5, 6, 7, 8, 9], [1, 2, 3])
    batch = sequences.CausalCollator(5)(examples)
    expected = model.eval().predictions(batch.history)
    loss = model.train().training_loss(batch)
    model.to(device)
    with torch.autocast(NAME, torch.bfloat16, enabled=autocast):
        got = model.eval().predictions(batch.to(device).history)
        there = model.train().training_loss(batch.to(device))
    there.backward()
    rtol = 0.05 if autocast else 1e-4
    torch.testing.assert_close(there.detach().cpu(), loss.detach(), rtol=rtol, atol=rtol)
    cosines = torch.cosine_similarity(got.float().cpu(), expected, dim=-1)
    assert cosines.min() > (0.98 if autocast else 0.9999)


@pytest.mark.parametrize("exact_rank", [False, True])
@pytest.mark.parametrize("make", [generation.tiger, generation.gpt2])
def test_generated_items_are_the_same(device, codes, make, exact_rank) -> None:
    batch = CodeHistoryCollator(generation.MAX_ITEMS)(generation.examples(len(codes)))
    model = generation.randomised(make(codes, num_beams=6, exact_rank=exact_rank))
    ranks = generation.ranks_of(model, batch, filter_seen=True)
    expected = model.recommend(model.read(batch.history, batch.seen), 8, True)
    model.to(device)
    batch = batch.to(device)
    found = generation.ranks_of(model, batch, filter_seen=True)
    assert found.above.tolist() == ranks.above.tolist()
    best = model.recommend(model.read(batch.history, batch.seen), 8, True)
    assert best.tolist() == expected.tolist()


LOSS_IS_FINITE = "aten::_local_scalar_dense in recformer/training/lit.py:training_step"
LONGEST = "aten::_local_scalar_dense in baselines/sequence/sasrec.py:forward"
LENGTHS = "aten::_to_copy in baselines/sequence/padding.py:length_groups"
MASKS = "aten::_local_scalar_dense in baselines/sequence/huggingface.py:_padded"  # transformers'


def check_waits(*others: str) -> None:
    """The host waits for the check of the loss, and for nothing but `others`, once each."""
    steps = WaitsOfSteps.steps
    assert len(steps) > 2
    least, most = Counter([LOSS_IS_FINITE]), Counter([LOSS_IS_FINITE, *others])
    assert [dict(step) for step in steps if not least <= step <= most] == []


WAITS: dict[str, list[str] | None] = {
    "sasrec": [LONGEST],
    "gsasrec": [LONGEST],
    "sasrec codes": [LONGEST],
    "gru4rec": [LENGTHS],
    "bert4rec": [LENGTHS, MASKS],
    "transformer": [LENGTHS, MASKS],
    "xlnet plm": None,  # the places of each draw
    "electra rtd": None,
    "tiger": None,  # transformers' own
    "gpt2_codes": None,
}


@pytest.mark.parametrize("name", WAITS)
def test_baselines_train_there(
    data, encoder, semantic_ids, tmp_path, trained_there, monkeypatch, name
) -> None:
    def trained(place: str, device: int, **more: Any) -> dict[str, Any]:
        if name == "tiger":
            # Adafactor makes steps of gradients that are zero but for rounding: after twelve of
            # them losses differ by percents where gradients differed by 1e-9.
            more |= {"optimizer": "adamw", "user_tokens": 7}
        own = sequences.arguments(
            data, tmp_path / place, name, encoder, semantic_ids, num_train_epochs=3, **more
        )
        return baseline(replace(own, device=[device]))

    half = trained("half", 0, fp16=True)
    assert 0 < half["test"]["MRR"] <= 1
    WaitsOfSteps.steps.clear()
    there = trained("there", 0)
    assert SimulatedTrainer.asked == ("cuda", [0])
    if (others := WAITS[name]) is not None:
        check_waits(*others)
    monkeypatch.undo()  # Lightning's own trainer
    here = trained("here", -1)
    figures = [{k: v for k, v in each["test"].items() if "@" in k} for each in (there, here)]
    assert figures[0] == pytest.approx(figures[1], abs=1e-9)


def test_a_card_that_is_not_there_is_refused(data, tmp_path, trained_there) -> None:
    with pytest.raises(UserError, match="--device 1: this machine has 1 GPUs"):
        baseline(sequences.arguments(data, tmp_path, "sasrec", device=[1]))


@pytest.mark.parametrize("fp16", [False, True])
def test_finetuning_ends_there(shop, tmp_path, trained_there, fp16) -> None:
    result = finetune(
        plain.arguments(shop, tmp_path / "plain", num_train_epochs=1, verbose=1, fp16=fp16)
    )
    check_waits()
    assert list(result["evaluations"]) == ["zero_shot", "stage1", "stage2"]
    assert 0 < result["test"]["NDCG@10"] <= 1
    result = finetune(headed.head_arguments(shop, tmp_path / "head", num_train_epochs=1, fp16=fp16))
    check_waits()
    assert 0 < result["test"]["NDCG@10"] <= 1


@pytest.mark.parametrize("fp16", [False, True])
@pytest.mark.parametrize(
    ("grad_cache", "ablation"),
    [(None, None), (2, None), (2, "mlm")],
    ids=["plain", "cached", "no mlm"],
)
def test_pretraining_ends_there(
    inputs, tmp_path, trained_there, fp16, grad_cache, ablation
) -> None:
    settings = {"num_train_epochs": 1, "fp16": fp16, "grad_cache": grad_cache, "ablation": ablation}
    result = Run(pretraining.arguments(inputs, tmp_path, **settings)).train()
    assert np.isfinite(result["last"]["val/loss"])
    check_waits()
    if not fp16:
        assert result["last"]["val/Recall@10"] > 0
