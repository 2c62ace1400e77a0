"""The head on item vectors: every equation by hand, what it leaves out, what it keeps."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from recformer.data.batches import EvalBatch, TrainBatch
from recformer.data.collators import EvalExample
from recformer.data.histories import Histories, HistoryEvalCollator, histories_of
from recformer.files import UserError
from recformer.models import RecformerForSeqRec, losses
from recformer.models.catalogue import (
    CatalogueHead,
    HeadOptions,
    RecformerForCatalogue,
    TokenBags,
    whitening,
)
from tests.tiny import tiny_config

N, H, G = 7, 16, 6
INTERACTIONS = torch.tensor([30, 5, 20, 0, 1, 2, 0])
TOKENS = [[3, 4], [3], [5, 6, 7], [], [8], [4, 4], [9, 3]]


def bags(texts=TOKENS) -> TokenBags:
    found = [sorted({(token, row.count(token)) for token in row}) for row in texts]
    tokens = [token for row in found for token, _ in row]
    counts = [float(count) for row in found for _, count in row]
    ends = np.cumsum([len(row) for row in found])
    return TokenBags(torch.tensor(tokens), torch.tensor(counts), torch.tensor([0, *ends.tolist()]))


def options(**given) -> HeadOptions:
    return replace(HeadOptions(max_history=4, bag_size=G), **given)


def model(seed: int = 0, **given) -> RecformerForCatalogue:
    torch.manual_seed(seed)
    config = tiny_config(item_num=N, head=options(**given).as_dict())
    made = RecformerForCatalogue(config).eval()
    encoded = torch.randn(N, H)
    made.set_catalogue(encoded, bags())
    made.head.fit(encoded, bags(), INTERACTIONS)
    made.refresh_table()
    return made


def batch_of(histories: list[list[int]], targets: list[int]) -> EvalBatch[Histories]:
    examples = [
        EvalExample(row, np.array(items), target)
        for row, (items, target) in enumerate(zip(histories, targets, strict=True))
    ]
    return HistoryEvalCollator(4)(examples)


def scores_by_hand(made: RecformerForCatalogue, history: list[int]) -> torch.Tensor:
    """Scores (N,) of one history, from the equations of the module, in float64."""
    head, table = made.head, made.item_embedding.weight.double()
    newest = history[::-1][:4]
    weights = head.log_recency.double().exp()
    read = table.clone()
    if head.options.next_offsets:
        bounded = head.next_offset / head.next_offset.norm(dim=1, keepdim=True).clamp(min=1)
        read += bounded.double() * head.bought[:, None]
    user = F.normalize(sum(weights[age] * read[item] for age, item in enumerate(newest)), dim=0)
    scores = table @ user
    for item in set(newest):
        if made.head.options.history_term:
            bias = head.history_bias.double()[min(newest.index(item), 5)]
            scores[item] = head.history_factor.double() * (table[item] @ user) + bias
    return scores


def test_whitened_vectors_are_uncorrelated() -> None:
    torch.manual_seed(1)
    vectors = torch.randn(500, 5) @ torch.randn(5, 5)
    mean, matrix = whitening(vectors)
    unit = F.normalize(vectors, dim=-1)
    white = (unit - mean) @ matrix
    assert white.mean(dim=0).abs().max() < 1e-5
    # A direction of variance v ends with v / (v + a thousandth of the largest variance).
    before = torch.linalg.eigvalsh((unit - unit.mean(dim=0)).T @ (unit - unit.mean(dim=0)) / 500)
    after = torch.linalg.eigvalsh(white.T @ white / 500)
    damped = before / (before + 1e-3 * before.max())
    assert torch.allclose(after.sort().values, damped.sort().values, atol=1e-4)
    assert torch.allclose(matrix, matrix.T, atol=1e-4)  # no direction is turned


def test_a_bag_weighs_tokens_by_rarity() -> None:
    made = model()
    idf = [math.log((1 + N) / (1 + count)) + 1 for count in (3, 2)]  # of tokens 3 and 4
    assert made.head.idf[3] == pytest.approx(idf[0])
    assert made.head.idf[4] == pytest.approx(idf[1])
    with torch.no_grad():
        text = made.head.text_vectors(made._vectors, bags())
    assert text.shape == (N, H + G)
    assert torch.allclose(text.norm(dim=1), torch.ones(N), atol=1e-5)
    rows = made.head.bag.detach()
    bag = F.normalize(idf[0] * rows[3] + idf[1] * rows[4], dim=0)
    assert F.cosine_similarity(text[0, H:], bag, dim=0) == pytest.approx(1, abs=1e-5)
    assert text[3, H:].abs().max() == 0  # no text: nothing is said, and nothing is not a number
    both = text[5, H:]
    assert F.cosine_similarity(both, rows[4], dim=0) == pytest.approx(1, abs=1e-5)


def test_offsets_are_bounded_and_only_of_what_was_bought() -> None:
    made = model()
    text = made.head.text_vectors(made._vectors, bags())
    assert torch.equal(made.head.item_vectors(text), F.normalize(text, dim=-1))  # zero at first
    with torch.no_grad():
        made.head.offset.copy_(torch.randn(N, H + G) * 5)
    moved = made.head.item_vectors(text)
    unit = F.normalize(made.head.offset, dim=-1)
    assert torch.allclose(moved[0], F.normalize(text[0] + unit[0], dim=0), atol=1e-6)
    for nobody_bought in (3, 6):
        assert torch.allclose(moved[nobody_bought], F.normalize(text[nobody_bought], dim=0))


def test_dropped_offsets_leave_the_text() -> None:
    made = model(offset_dropout=0.5)
    with torch.no_grad():
        made.head.offset.fill_(1.0)
    text = made.head.text_vectors(made._vectors, bags())
    made.head.train()
    torch.manual_seed(0)
    kept = (torch.rand(N) >= 0.5) & made.head.bought
    torch.manual_seed(0)
    vectors = made.head.item_vectors(text)
    plain = F.normalize(text, dim=-1)
    changed = (vectors - plain).abs().amax(dim=1) > 1e-3
    assert changed.tolist() == kept.tolist()
    assert 0 < int(kept.sum()) < int(made.head.bought.sum())


def test_next_offsets_are_of_the_items_of_the_catalogue_alone() -> None:
    made = model(next_offsets=True)
    with torch.no_grad():
        made.head.next_offset.copy_(torch.randn(N, H + G))
    table = made.item_embedding.weight
    users = made.user_vectors(batch_of([[0, 1, 3], [5]], [2, 2]).history)
    # The same items as another table holds them, with one that no catalogue knows beside them.
    order = torch.tensor([5, 3, 1, 0])
    other = torch.cat([table[order], table[:1]])
    rows = torch.cat([order, torch.tensor([-1])])
    again = made.head.user_vectors(batch_of([[3, 2, 1], [0]], [2, 2]).history, other, rows)
    assert torch.allclose(users, again, atol=1e-6)
    (plain,) = made.head.user_vectors(batch_of([[4]], [2]).history, other, rows)
    assert torch.allclose(plain, table[0], atol=1e-6)  # -1: nothing is known of what comes after
    (moved,) = made.head.user_vectors(batch_of([[3]], [2]).history, other, rows)
    assert (moved - table[0]).abs().max() > 0.1
    beyond = torch.tensor([N, N, N, N, N])  # products added since
    (plain,) = made.head.user_vectors(batch_of([[3]], [2]).history, other, beyond)
    assert torch.allclose(plain, table[0], atol=1e-6)


@pytest.mark.parametrize(
    "given",
    [
        {}, {"history_term": False}, {"recency": False}, {"bag_size": 0}, {"whiten": False},
        {"next_offsets": True},
    ],
)  # fmt: skip
def test_ranks_are_those_of_the_equations(given) -> None:
    made = model(**given)
    with torch.no_grad():
        if made.head.options.next_offsets:
            made.head.next_offset.copy_(torch.randn(N, H + made.head.options.bag_size))
        if made.head.options.history_term:
            made.head.history_bias.copy_(torch.tensor([-0.3, 0.2, 0.5, 0.0, -0.1, 0.4]))
    histories = [[0, 1, 2, 1], [5], [6, 4, 3, 2, 1, 0]]
    for target in range(N):
        batch = batch_of(histories, [target] * 3)
        users = made.read(batch.history, batch.seen)
        ranks = made.rank(users, batch.labels, filter_seen=False)
        for row, history in enumerate(histories):
            scores = scores_by_hand(made, history)
            assert ranks.above[row] == int((scores > scores[target] + 1e-6).sum())
    best = made.recommend(users, 3, filter_seen=False)
    for row, history in enumerate(histories):
        assert best[row].tolist() == scores_by_hand(made, history).topk(3).indices.tolist()
    unseen = made.recommend(users, 2, filter_seen=True)
    assert not set(unseen[0]) & {0, 1, 2}
    others = np.array([[0, 4], [5, 6], [1, 3]])
    among = made.rank_among(users, torch.tensor([2, 2, 5]), others)
    for row, (target, others) in enumerate([(2, [0, 4]), (2, [5, 6]), (5, [1, 3])]):
        scores = scores_by_hand(made, histories[row])
        assert among.above[row] == int((scores[others] > scores[target]).sum())


def loss_by_hand(made: RecformerForCatalogue, history: list[int], label: int) -> float:
    scores = scores_by_hand(made, history) / made.head.log_temperature.double().exp()
    options = made.head.options
    total = 0.0
    for item, count in enumerate(INTERACTIONS.tolist()):
        weight = 0.0 if options.spare_unbought and count == 0 else 1.0
        if count < options.spare_rare:
            weight *= math.sqrt(max(count, 1) / options.spare_rare)
        total += weight * math.exp(scores[item])
        if item == label:
            target = weight * math.exp(scores[item])
    return math.log(total / target)


@pytest.mark.parametrize(("unbought", "rare"), [(True, 20), (True, 0), (False, 20), (False, 1)])
def test_the_loss_is_that_of_the_equations_in_parts_too(unbought, rare, monkeypatch) -> None:
    made = model(spare_unbought=unbought, spare_rare=rare)
    histories = [[0, 1], [2], [4, 5, 4, 0, 1]]
    labels = torch.tensor([2, 4, 5])
    with torch.no_grad():
        expected = np.mean([loss_by_hand(made, h, int(y)) for h, y in zip(histories, labels)])
    batch = TrainBatch(labels, histories_of([np.array(h) for h in histories], 4))
    whole = made.training_loss(batch)
    assert whole.item() == pytest.approx(expected, abs=1e-5)
    whole.backward()
    gradients = {n: p.grad.clone() for n, p in made.named_parameters() if p.grad is not None}
    assert {name.partition(".")[0] for name in gradients} == {"head"}  # the encoder stays
    assert all(bool(g.isfinite().all()) for g in gradients.values())

    monkeypatch.setattr(losses, "CHUNK_ELEMENTS", N)  # one history at a time
    made.zero_grad()
    parts = made.training_loss(batch)
    assert parts.item() == pytest.approx(whole.item(), abs=1e-6)
    parts.backward()
    for name, parameter in made.named_parameters():
        if parameter.grad is not None:
            assert torch.allclose(parameter.grad, gradients[name], atol=1e-6), name


def test_what_nobody_bought_is_no_negative() -> None:
    made = model()
    batch = TrainBatch(torch.tensor([1]), histories_of([np.array([0])], 4))
    before = made.training_loss(batch).item()
    with torch.no_grad():
        made._vectors[6] = made._vectors[1]  # an unbought item becomes as good as the target
    made._bags = bags([*TOKENS[:6], TOKENS[1]])
    assert made.training_loss(batch).item() == pytest.approx(before, abs=1e-6)


def test_a_saved_folder_ranks_alike_without_texts(tmp_path) -> None:
    made = model()
    with torch.no_grad():
        made.head.offset.copy_(torch.randn(N, H + G) * 0.1)
    made.refresh_table()
    batch = batch_of([[0, 1, 2], [5, 4]], [3, 1])
    expected = made.rank(made.read(batch.history, batch.seen), batch.labels, False)
    made.save_pretrained(tmp_path)
    loaded = RecformerForCatalogue.from_pretrained(tmp_path).eval()
    assert loaded.head.options == made.head.options
    for name, tensor in made.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    found = loaded.rank(loaded.read(batch.history, batch.seen), batch.labels, False)
    assert (found.above == expected.above).all()
    with pytest.raises(UserError, match="set_catalogue"):
        loaded.refresh_table()
    with pytest.raises(UserError, match="call fit first"):
        loaded.head.loss(batch.history, batch.labels, loaded.item_vectors())
    with pytest.raises(UserError, match="--method head"):
        RecformerForSeqRec.from_pretrained(tmp_path)


def test_options_are_checked_and_a_foreign_configuration_is_refused() -> None:
    for wrong in (
        {"max_history": 0}, {"bag_size": -1}, {"offset_dropout": 1.0}, {"spare_rare": -1}
    ):  # fmt: skip
        with pytest.raises(UserError, match=next(iter(wrong))):
            HeadOptions(**wrong)
    with pytest.raises(UserError, match="has no head"):
        CatalogueHead(tiny_config(item_num=N))
    made = model()
    with pytest.raises(UserError, match=r"expected \(7, 16\)"):
        made.set_catalogue(torch.zeros(6, H), bags())
