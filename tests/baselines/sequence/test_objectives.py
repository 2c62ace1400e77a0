"""Permuted and replaced items, sampling and its correction, losses: by hand and by transformers."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from transformers import (
    DataCollatorForPermutationLanguageModeling,
    ElectraForPreTraining,
    XLNetLMHeadModel,
)

from baselines.sequence import padding
from baselines.sequence.collators import (
    ItemHistoryCollator,
    ItemSequences,
    MaskedCollator,
    PermutedCollator,
)
from baselines.sequence.huggingface import HuggingFaceNetwork
from baselines.sequence.item_table import ItemTable
from baselines.sequence.losses import (
    ItemSampler,
    bpr_max_loss,
    log_expected_count,
    log_inclusion,
    top1_max_loss,
)
from baselines.sequence.objectives import OBJECTIVES, OBJECTIVES_OF
from baselines.sequence.permuted import PermutedNetwork, permutation_mask
from baselines.sequence.recommender import Objective, SequenceRecommender
from baselines.sequence.replaced import ReplacedItemRecommender
from recformer.data.collators import EvalExample, TrainExample
from recformer.files import UserError

N, D = 12, 16
SIZES = (D, 2, 2, 8, 0.0)


def permuted() -> SequenceRecommender:
    torch.manual_seed(0)
    return SequenceRecommender(PermutedNetwork("xlnet", *SIZES), ItemTable(N, D), Objective(), D)


def replaced(**options) -> ReplacedItemRecommender:
    torch.manual_seed(0)
    network = HuggingFaceNetwork("electra", "rtd", *SIZES)
    return ReplacedItemRecommender(
        network, ItemTable(N, D), Objective(), D, **{"discriminator_weight": 3.0, **options}
    )


def examples(*sequences: list[int]) -> list[TrainExample]:
    return [TrainExample(u, np.array(s, dtype=np.int32), u) for u, s in enumerate(sequences)]


# Which goes with which


@pytest.mark.parametrize("arch", OBJECTIVES_OF)
def test_the_table_is_what_the_architectures_can(arch, monkeypatch):
    """What it has is built; what it has not is refused, and the forward pass agrees."""
    import baselines.sequence.huggingface as module

    for objective in set(OBJECTIVES) - {"plm"}:
        if objective in OBJECTIVES_OF[arch]:
            HuggingFaceNetwork(arch, objective, *SIZES)
            continue
        with pytest.raises(UserError, match=f"but with {' or '.join(OBJECTIVES_OF[arch])};"):
            HuggingFaceNetwork(arch, objective, *SIZES)
        with monkeypatch.context() as patch:
            patch.setattr(module, "check_goes_with", lambda arch, objective: None)
            with pytest.raises(UserError, match="looks"):
                HuggingFaceNetwork(arch, objective, *SIZES)


# Permuted items


def test_permuted_batches_predict_spans_in_a_random_order():
    batch = PermutedCollator(6, 0.5, 2)(examples([9, 5, 6, 7, 8, 1, 2], [3, 4]))
    history = batch.history
    assert history.items.tolist() == [5, 6, 7, 8, 1, 2, 3, 4]  # nothing is replaced
    assert history.predict.tolist() == history.order.nonzero()[:, 0].tolist()
    assert batch.labels.tolist() == history.items[history.predict].tolist()
    for start, stop in ((0, 6), (6, 8)):
        order = sorted(o for o in history.order[start:stop].tolist() if o)
        assert order == list(range(1, len(order) + 1))
        assert order
    again = PermutedCollator(6, 0.5, 2)(examples([9, 5, 6, 7, 8, 1, 2], [3, 4]))
    assert torch.equal(again.history.order, history.order)


def test_spans_are_as_long_and_as_many_as_asked_for():
    collate = PermutedCollator(50, 0.2, 3)
    orders = [
        collate([TrainExample(0, np.arange(50) % N, seed)]).history.order for seed in range(300)
    ]
    hidden = torch.stack(orders) > 0
    assert hidden.float().mean() == pytest.approx(0.2, abs=0.02)
    runs = [len(run) for row in hidden.int().tolist() for run in "".join(map(str, row)).split("0")]
    single = PermutedCollator(50, 0.2, 1)([TrainExample(0, np.arange(50) % N, 1)]).history.order
    assert len(single.nonzero()) == 10  # one of every five
    assert max(runs) >= 3


def test_who_may_not_see_whom_by_hand():
    mask = permutation_mask(torch.tensor([[0, 2, 1, 0]]))[0]
    # Place 1 is predicted second, place 2 first, 0 and 3 are context.
    assert mask.tolist() == [[0, 1, 1, 0], [0, 1, 0, 0], [0, 1, 1, 0], [0, 1, 1, 0]]


def test_masks_and_both_streams_are_those_of_transformers():
    """The order of a permutation mask that transformers drew gives the same mask and states."""
    model = permuted().eval()

    class Tokenizer:  # what the collator asks of one
        mask_token_id = 0
        pad_token_id = 99
        pad_token = mask_token = "-"

        def get_special_tokens_mask(self, values, already_has_special_tokens):
            return [0] * len(values)

    items = torch.randint(1, N, (3, 8))
    torch.manual_seed(5)
    theirs = DataCollatorForPermutationLanguageModeling(Tokenizer(), plm_probability=0.5)
    _, perm_mask, mapping, labels = theirs.torch_mask_tokens(items.clone())
    predicted = labels != -100
    # One sees the predicted places of a lower number, so their count is the number less 1.
    seen = ((perm_mask == 0) & predicted[:, None, :]).sum(dim=2)
    order = torch.where(predicted, seen + 1, 0)
    assert predicted.any()
    assert torch.equal(permutation_mask(order), perm_mask)

    batch = ItemSequences(
        items.flatten(),
        torch.arange(4) * 8,
        predicted.flatten().nonzero()[:, 0],
        order=order.flatten(),
    )
    whole = XLNetLMHeadModel(model.network.model.config).eval()
    whole.transformer.load_state_dict(model.network.model.state_dict())
    with torch.no_grad():
        ours = model.predictions(batch)
        output = whole.transformer(
            inputs_embeds=model.inputs(items), perm_mask=perm_mask, target_mapping=mapping
        )
    torch.testing.assert_close(ours, output[0][predicted], atol=1e-5, rtol=1e-5)
    scores = F.linear(ours, model.item_vectors())
    loss = F.cross_entropy(scores, items[predicted])
    assert model.loss(ours, items[predicted]).item() == pytest.approx(loss.item(), abs=1e-5)


@pytest.mark.parametrize("call_cost", [0, 512])
def test_predicted_items_are_not_seen_but_by_later_ones(monkeypatch, call_cost):
    monkeypatch.setitem(padding.CALL_COST, "cpu", call_cost)
    model = permuted().eval()
    items = torch.tensor([1, 2, 3, 4, 5, 6, 7, 8])
    order = torch.tensor([0, 0, 0, 0, 2, 1, 3, 0])
    batch = ItemSequences(items, torch.tensor([0, 3, 8]), torch.tensor([4, 5, 6]), order=order)
    batch = replace(batch, predict=torch.tensor([1, 4, 5, 6]), order=order.index_fill(
        0, torch.tensor([1]), 1
    ))  # fmt: skip
    with torch.no_grad():
        before = model.predictions(batch)
        for place, moved in ((1, []), (4, [3]), (5, [1, 3]), (6, []), (7, [1, 2, 3]), (0, [0])):
            changed = items.clone()
            changed[place] = 11
            after = model.predictions(replace(batch, items=changed))
            found = ((after - before).abs().amax(dim=1) > 1e-6).nonzero()[:, 0].tolist()
            assert found == moved, place


def test_the_place_after_a_history_is_predicted_from_all_of_it():
    model = permuted().eval()
    collate = ItemHistoryCollator(8, N)
    whole = collate([EvalExample(0, np.array([1, 2, 3]), 4), EvalExample(1, np.array([5]), 4)])
    with torch.no_grad():
        both = model.user_vectors(whole.history)
        alone = model.user_vectors(collate([EvalExample(1, np.array([5]), 4)]).history)
        other = model.user_vectors(collate([EvalExample(0, np.array([9, 2, 3]), 4)]).history)
    torch.testing.assert_close(both[1:], alone, atol=1e-5, rtol=1e-5)
    assert (both[0] - other[0]).abs().max() > 1e-5


def test_every_weight_of_two_streams_is_trained():
    model = permuted()
    batch = PermutedCollator(8, 0.5, 2)(examples([5, 6, 7, 8, 1, 2], [3, 4]))
    model.training_loss(batch).backward()
    assert not any(name == "hidden_item" for name, _ in model.named_parameters())
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name
    assert model.network.model.mask_emb.grad.abs().max() > 0


# Replaced items


@pytest.mark.parametrize("separate", [False, True])
def test_the_discriminator_loss_is_that_of_transformers(separate):
    network = HuggingFaceNetwork("electra", "rtd", *SIZES) if separate else None
    model = replaced(discriminator=network).eval()
    batch = MaskedCollator(8, N, 0.4)(examples([5, 6, 7, 8, 1, 2], [3, 4, 9]))
    drawn = (batch.labels + torch.arange(len(batch.labels)) % 2) % N  # every other one is right
    loss = model.discriminator_loss(batch.history, batch.labels, drawn)

    theirs = ElectraForPreTraining(model.network.model.config).eval()
    theirs.electra.load_state_dict((network or model.network).model.state_dict())
    head = dict(zip(("dense", "activation", "dense_prediction"), model.discriminator_head))
    for name in ("dense", "dense_prediction"):
        getattr(theirs.discriminator_predictions, name).load_state_dict(head[name].state_dict())
    items = batch.history.items.clone()
    items[batch.history.predict] = drawn
    labels = torch.zeros(len(items))
    labels[batch.history.predict] = (drawn != batch.labels).float()
    assert 0 < labels.sum() < len(drawn)
    vectors, truth, mask = torch.zeros(2, 6, D), torch.zeros(2, 6), torch.zeros(2, 6)
    for row, (start, stop) in enumerate(((0, 6), (6, 9))):
        vectors[row, : stop - start] = model.inputs(items[start:stop])
        truth[row, : stop - start] = labels[start:stop]
        mask[row, : stop - start] = 1
    expected = theirs(inputs_embeds=vectors, attention_mask=mask, labels=truth).loss
    assert loss.item() == pytest.approx(expected.item(), abs=1e-5)


def test_both_terms_are_weighed_and_every_weight_is_trained():
    model = replaced(discriminator=HuggingFaceNetwork("electra", "rtd", *SIZES))
    batch = MaskedCollator(8, N, 0.4)(examples([5, 6, 7, 8, 1, 2], [3, 4, 9]))
    losses = model.training_loss(batch)
    expected = losses["generator_loss"] + 3 * losses["discriminator_loss"]
    assert losses["loss"].item() == pytest.approx(expected.item())
    users = model.predictions(batch.history)
    scores = users @ model.item_vectors().T
    generated = F.cross_entropy(scores, batch.labels)
    assert losses["generator_loss"].item() == pytest.approx(generated.item(), abs=1e-5)
    losses["loss"].backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name


def test_items_are_drawn_from_the_generators_softmax():
    model = replaced().eval()
    torch.manual_seed(2)
    user = torch.randn(1, D) * 3
    with torch.no_grad():
        drawn = model.drawn_items(user.expand(20_000, -1))
        expected = (user @ model.item_vectors().T).softmax(dim=1)[0]
    found = torch.bincount(drawn, minlength=N) / len(drawn)
    assert (found - expected).abs().max() < 0.012  # 3 deviations of 0.0035


# Sampling, its correction, smoothing


def test_items_are_drawn_by_popularity_and_never_the_target():
    counts = torch.tensor([8, 0, 1, 27, 64])
    sampler = ItemSampler(counts, 1 / 3)  # weights 2, 0, 1, 3, 4
    torch.manual_seed(0)
    for label, others in ((0, [0, 0, 1, 3, 4]), (3, [2, 0, 1, 0, 4]), (4, [2, 0, 1, 3, 0])):
        drawn = sampler(torch.tensor([label]), 20_000)[0]
        found = torch.bincount(drawn, minlength=5) / 20_000
        share = torch.tensor(others) / sum(others)
        assert (found - share).abs().max() < 0.012
        assert found[1] == found[label] == 0
        items = torch.tensor([[i for i in range(5) if others[i]]])
        log = sampler.log_probability(torch.tensor([label]), items)
        torch.testing.assert_close(log.exp()[0], share[items[0]])


def test_corrected_sampled_softmax_comes_to_the_full_one():
    """With many draws the estimate of the sum over all items is that sum, by whatever q."""
    torch.manual_seed(0)
    counts = torch.arange(1, N + 1) ** 2
    users, labels = torch.randn(3, D), torch.tensor([0, 5, 11])

    def model(**options) -> SequenceRecommender:
        torch.manual_seed(1)
        network = HuggingFaceNetwork("gpt2", "clm", *SIZES)
        made = SequenceRecommender(
            network, ItemTable(N, D), Objective(**options), D, item_counts=counts
        )
        torch.nn.init.normal_(made.inputs.item_embedding.weight, generator=torch.manual_seed(3))
        return made

    full = model(loss="softmax").loss(users, labels).item()
    for power in (0.0, 1.0):
        made = model(loss="sampled_softmax", negative_power=power, logq=True, num_negatives=8)
        drawn = torch.multinomial(counts.double() ** power, 60_000, replacement=True)
        negatives = torch.stack([drawn[drawn != label][:40_000] for label in labels])
        assert made.loss(users, labels, negatives).item() == pytest.approx(full, abs=0.03)
        plain = model(loss="sampled_softmax", negative_power=power, num_negatives=8)
        assert abs(plain.loss(users, labels, negatives).item() - full) > 1


def test_corrections_by_hand():
    assert log_expected_count(torch.tensor([0.25]).log(), 8).item() == pytest.approx(np.log(2))
    # Among two targets: 1 - (3/4)^2; among many rare ones: how many are expected.
    shares = torch.tensor([0.25, 1e-7])
    expected = [np.log(7 / 16), np.log(2e-7)]
    assert log_inclusion(shares, 2).tolist() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("cosine", [False, True])
def test_in_batch_candidates_but_the_target_lose_log_q(cosine):
    torch.manual_seed(0)
    counts = torch.arange(1, N + 1)
    objective = Objective(
        "in_batch", logq=True, label_smoothing=0.2, temperature=0.5, cosine=cosine
    )
    network = HuggingFaceNetwork("gpt2", "clm", *SIZES)
    model = SequenceRecommender(network, ItemTable(N, D), objective, D, item_counts=counts)
    users, labels = torch.randn(4, D), torch.tensor([2, 7, 2, 9])
    table = model.scored.all()[[2, 7, 9]]
    if cosine:
        users, table = F.normalize(users, dim=1), F.normalize(table, dim=1)
    scores = users @ table.T / 0.5
    share = counts[[2, 7, 9]] / counts.sum()
    scores = scores - (1 - (1 - share) ** 3).log() * torch.tensor(
        [[0, 1, 1], [1, 0, 1], [0, 1, 1], [1, 1, 0]]
    )
    expected = F.cross_entropy(scores, torch.tensor([0, 1, 0, 2]), label_smoothing=0.2)
    assert model.loss(users, labels).item() == pytest.approx(expected.item(), abs=1e-5)


@pytest.mark.parametrize("cosine", [False, True])
def test_smoothed_targets_are_those_of_torch(cosine):
    torch.manual_seed(0)
    network = HuggingFaceNetwork("gpt2", "clm", *SIZES)
    objective = Objective(label_smoothing=0.3, temperature=0.5, cosine=cosine)
    model = SequenceRecommender(network, ItemTable(N, D), objective, D)
    users, labels = torch.randn(4, D), torch.tensor([0, 5, 5, 11])
    table = model.scored.all()
    if cosine:
        users, table = F.normalize(users, dim=1), F.normalize(table, dim=1)
    expected = F.cross_entropy(users @ table.T / 0.5, labels, label_smoothing=0.3)
    assert model.loss(users, labels).item() == pytest.approx(expected.item(), abs=1e-5)
    others = torch.tensor([[i for i in range(N) if i != label] for label in labels])
    model.objective = replace(objective, loss="sampled_softmax")
    assert model.loss(users, labels, others).item() == pytest.approx(expected.item(), abs=1e-5)


def test_ranking_losses_by_hand():
    positive, negatives = torch.tensor([1.0]), torch.tensor([[0.0, np.log(3)]]).float()
    # Weights 1/4 and 3/4.
    sigmoid = [1 / (1 + np.exp(-1)), 1 / (1 + np.exp(np.log(3) - 1))]
    ranked = -np.log(sigmoid[0] / 4 + 3 * sigmoid[1] / 4)
    bpr = bpr_max_loss(positive, negatives).item()
    assert bpr == pytest.approx(ranked + 3 / 4 * np.log(3) ** 2, abs=1e-5)
    terms = [1 - sigmoid[0] + 1 / 2, 1 - sigmoid[1] + 1 / (1 + np.exp(-(np.log(3) ** 2)))]
    top1 = top1_max_loss(positive, negatives).item()
    assert top1 == pytest.approx(terms[0] / 4 + 3 * terms[1] / 4, abs=1e-5)


# Padding


def test_groups_cost_least():
    offsets = torch.tensor([0, 1, 2, 4, 24, 44])  # lengths 1, 1, 2, 20, 20

    def shapes(cost: int) -> list[tuple[int, ...]]:
        padding.CALL_COST["cpu"] = cost
        return [tuple(group.mask.shape) for group in padding.length_groups(offsets)]

    kept = padding.CALL_COST["cpu"]
    try:
        assert shapes(0) == [(2, 1), (1, 2), (2, 20)]
        assert shapes(10) == [(3, 2), (2, 20)]
        assert shapes(100) == [(5, 20)]
    finally:
        padding.CALL_COST["cpu"] = kept
    group = padding.length_groups(offsets)[0]
    assert group.places.tolist() == list(range(44))
    assert group.padded(torch.arange(1, 45))[2].tolist() == [3, 4] + [0] * 18
