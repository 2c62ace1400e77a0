"""Losses: by hand, against autograd on the published broadcast form, and within bounded memory."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from recformer.models import losses
from recformer.models.losses import (
    contrastive_scores,
    cosine_scores,
    full_softmax_loss,
    gbce_loss,
    sample_negatives,
    sampled_softmax_loss,
)

B, N, H = 5, 23, 16


def vectors(*shape: int, seed: int = 0, scale: float = 3.0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


def broadcast_loss(users, items, labels, temperature):
    """The published form: cosine similarity of every user with every item, (B, N, H) large."""
    scores = F.cosine_similarity(users[:, None, :], items[None, :, :], dim=-1) / temperature
    return F.cross_entropy(scores, labels)


class LargestTensor(TorchDispatchMode):
    """Remembers the most elements any operation has put out, views of its inputs aside."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        given = {x.untyped_storage().data_ptr() for x in args if isinstance(x, torch.Tensor)}
        for x in out if isinstance(out, tuple | list) else [out]:
            if isinstance(x, torch.Tensor) and x.untyped_storage().data_ptr() not in given:
                self.elements = max(self.elements, x.numel())
        return out


def test_full_softmax_by_hand():
    # cosines 1, 0, -1 over temperature 1/2: scores 2, 0, -2, whatever the lengths
    users = torch.tensor([[3.0, 0.0]])
    items = torch.tensor([[5.0, 0.0], [0.0, 0.1], [-2.0, 0.0]])
    total = math.log(math.exp(2) + 1 + math.exp(-2))
    for label, score in enumerate((2.0, 0.0, -2.0)):
        for chunk_size in (None, 1, 2):
            loss = full_softmax_loss(users, items, torch.tensor([label]), 0.5, chunk_size)
            assert loss.item() == pytest.approx(total - score, abs=1e-6)


@pytest.mark.parametrize("chunk_size", [1, 4, 22, 23, None])
@pytest.mark.parametrize("temperature", [0.05, 1.0])
def test_full_softmax_equals_cross_entropy_in_value_and_gradient(chunk_size, temperature):
    users, items = vectors(B, H, seed=1), vectors(N, H, seed=2)
    labels = torch.tensor([0, 22, 7, 7, 3])
    expected_users, expected_items = (
        users.clone().requires_grad_(),
        items.clone().requires_grad_(),
    )
    expected = broadcast_loss(expected_users, expected_items, labels, temperature)
    (2 * expected).backward()

    users.requires_grad_(), items.requires_grad_()
    loss = full_softmax_loss(users, items, labels, temperature, chunk_size)
    (2 * loss).backward()
    torch.testing.assert_close(loss, expected, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(users.grad, expected_users.grad, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(items.grad, expected_items.grad, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("chunk_size", [1, 4, 23, None])
def test_full_softmax_over_dot_products_in_value_and_gradient(chunk_size):
    values = vectors(B, H, seed=1, scale=1.0), vectors(N, H, seed=2, scale=1.0)
    labels = torch.tensor([0, 22, 7, 7, 3])
    users, items = (v.clone().requires_grad_() for v in values)
    expected = F.cross_entropy(users @ items.T / 0.5, labels)
    expected.backward()
    ours = [v.clone().requires_grad_() for v in values]
    loss = full_softmax_loss(*ours, labels, 0.5, chunk_size, cosine=False)
    loss.backward()
    torch.testing.assert_close(loss, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(ours[0].grad, users.grad, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(ours[1].grad, items.grad, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("cosine", [True, False])
@pytest.mark.parametrize("step", [1, 2, 5])
def test_users_in_parts_have_the_loss_and_gradients_of_all_at_once(step, cosine, monkeypatch):
    values = vectors(B, H, seed=1, scale=1.0), vectors(N, H, seed=2, scale=1.0)
    labels = torch.tensor([0, 22, 7, 7, 3])
    users, items = (v.clone().requires_grad_() for v in values)
    expected = F.cross_entropy(losses.scores_of_all(users, items, 0.5, cosine), labels)
    expected.backward()
    monkeypatch.setattr(losses, "CACHE_ELEMENTS", step * N)
    monkeypatch.setattr(losses, "LEAST_USERS", 1)
    ours = [v.clone().requires_grad_() for v in values]
    loss = full_softmax_loss(*ours, labels, 0.5, cosine=cosine)
    loss.backward()
    torch.testing.assert_close(loss, expected, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(ours[0].grad, users.grad, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(ours[1].grad, items.grad, atol=1e-6, rtol=1e-6)
    with torch.no_grad():
        assert torch.equal(full_softmax_loss(*ours, labels, 0.5, cosine=cosine), loss)


def test_users_in_parts_make_no_tensor_as_large_as_all_scores(monkeypatch):
    monkeypatch.setattr(losses, "CACHE_ELEMENTS", 50_000)
    monkeypatch.setattr(losses, "LEAST_USERS", 1)
    users, items = vectors(600, 4, seed=1).requires_grad_(), vectors(1_000, 4, seed=2)
    with LargestTensor() as seen:
        full_softmax_loss(users, items, torch.arange(600), 0.05).backward()
    assert seen.elements == 50_000  # of 600,000 scores


@pytest.mark.parametrize("chunk_size", [4, None])
def test_only_what_asks_for_a_gradient_gets_one(chunk_size):
    users, items = vectors(B, H, seed=1).requires_grad_(), vectors(N, H, seed=2)
    labels = torch.arange(B)
    full_softmax_loss(users, items, labels, chunk_size=chunk_size).backward()
    assert users.grad is not None
    assert items.grad is None

    frozen, trained = users.detach(), items.clone().requires_grad_()
    full_softmax_loss(frozen, trained, labels, chunk_size=chunk_size).backward()
    assert trained.grad is not None


@pytest.mark.parametrize("chunk_size", [4, None])
def test_a_bfloat16_table_is_read_in_float32(chunk_size):
    users, table = vectors(B, H, seed=1), vectors(N, H, seed=2).bfloat16()
    labels = torch.arange(B)
    expected_table = table.float().requires_grad_()
    expected = broadcast_loss(users, expected_table, labels, 0.05)
    expected.backward()
    table.requires_grad_()
    loss = full_softmax_loss(users, table, labels, 0.05, chunk_size)
    loss.backward()
    torch.testing.assert_close(loss, expected, atol=1e-6, rtol=1e-6)
    assert table.grad.dtype == torch.bfloat16
    torch.testing.assert_close(table.grad, expected_table.grad.bfloat16())


@pytest.mark.parametrize("chunk_size", [4, None])
def test_autocast_leaves_the_similarity_in_float32(chunk_size):
    labels = torch.arange(B)
    results = []
    for enabled in (False, True):
        users, items = vectors(B, H, seed=1).requires_grad_(), vectors(N, H, seed=2)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            full = full_softmax_loss(users, items, labels, 0.05, chunk_size)
            draws = torch.Generator().manual_seed(5)
            sampled = sampled_softmax_loss(users, items, labels, 6, 0.05, draws)
            contrastive = contrastive_loss(users, items[:B], 0.05)
        (sampled + contrastive).backward()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled and chunk_size is not None):
            full.backward()
        results.append(torch.stack([full, sampled, contrastive]).detach())
        results.append(users.grad)
    assert torch.equal(results[0], results[2])
    assert torch.equal(results[1], results[3])


def test_sharp_temperatures_and_zero_vectors_stay_finite():
    users, items = vectors(B, H, seed=1), vectors(N, H, seed=2)
    users[0] = 0
    items[3] = 0
    labels = torch.tensor([3, 3, 1, 2, 0])
    for chunk_size in (4, None):
        u, i = users.clone().requires_grad_(), items.clone().requires_grad_()
        loss = full_softmax_loss(u, i, labels, 1e-3, chunk_size)
        loss.backward()
        assert loss.isfinite()
        assert u.grad.isfinite().all()
        assert i.grad.isfinite().all()
    # a user without direction is as near to every item: log N
    alone = full_softmax_loss(users[:1], items, labels[:1], 0.05, 4)
    assert alone.item() == pytest.approx(math.log(N), abs=1e-6)


@pytest.mark.parametrize("chunk_size", [4, None])
def test_items_shorter_than_the_least_norm_have_the_gradient_of_autograd(chunk_size):
    users, items = vectors(B, H, seed=1), vectors(N, H, seed=2, scale=1.0)
    items[2] *= 1e-10
    labels = torch.tensor([2, 22, 7, 7, 3])
    expected = items.clone().requires_grad_()
    F.cross_entropy(losses.scores_of_all(users, expected, 0.5, True), labels).backward()
    ours = items.clone().requires_grad_()
    full_softmax_loss(users, ours, labels, 0.5, chunk_size).backward()
    torch.testing.assert_close(ours.grad, expected.grad, atol=1e-6, rtol=1e-5)
    assert expected.grad[2].norm() > 1e6  # its direction is what scores follow


def test_the_loss_of_what_is_nearly_sure_keeps_its_digits():
    users, items = torch.tensor([[18.5, 0.0]]), torch.eye(2)
    loss = full_softmax_loss(users, items, torch.tensor([0]), 1.0, cosine=False)
    assert loss.item() == pytest.approx(math.log1p(math.exp(-18.5)), rel=1.0)
    assert full_softmax_loss(users, items, torch.tensor([1]), 1.0, cosine=False).item() == 18.5


def test_a_large_table_is_read_in_chunks(monkeypatch):
    monkeypatch.setattr(losses, "CHUNK_ELEMENTS", 40 * 4)
    monkeypatch.setattr(losses, "LEAST_USERS", 1)
    monkeypatch.setattr(losses, "LEAST_ITEMS", 8)
    monkeypatch.setattr(losses, "CACHE_ELEMENTS", 8)
    for count, largest in ((40, 40 * 4), (41, 41)):  # no float32 copy of 41 x 4 numbers
        table = vectors(count, 4).bfloat16()
        with LargestTensor() as seen:
            full_softmax_loss(vectors(3, 4).requires_grad_(), table, torch.arange(3))
        assert seen.elements == largest


def test_a_chunked_loss_makes_no_tensor_as_large_as_table_or_scores():
    users, items = vectors(8, 32, seed=1).requires_grad_(), vectors(20_000, 32, seed=2)
    labels = torch.arange(8)
    with LargestTensor() as seen:
        full_softmax_loss(users, items, labels, 0.05, chunk_size=500).backward()
    assert seen.elements == 20_000  # one number an item; the table has 640,000, the scores 160,000


@pytest.mark.parametrize("num_negatives", [N - 1, N, 1000])
def test_sampling_all_other_items_is_the_full_softmax(num_negatives):
    users, items = vectors(B, H, seed=1), vectors(N, H, seed=2)
    labels = torch.arange(B)
    sampled = sampled_softmax_loss(users, items, labels, num_negatives)
    torch.testing.assert_close(sampled, full_softmax_loss(users, items, labels))


def test_sampled_softmax_equals_cross_entropy_over_its_candidates():
    users, items = vectors(B, H, seed=1), vectors(N, H, seed=2)
    labels = torch.tensor([0, 22, 7, 7, 3])
    negatives = sample_negatives(labels, N, 6, torch.Generator().manual_seed(3))
    candidates = torch.cat([labels[:, None], negatives], dim=1)
    expected_users, expected_items = (
        users.clone().requires_grad_(),
        items.clone().requires_grad_(),
    )
    scores = F.cosine_similarity(expected_users[:, None, :], expected_items[candidates], dim=-1)
    expected = F.cross_entropy(scores / 0.05, torch.zeros(B, dtype=torch.long))
    expected.backward()

    users.requires_grad_(), items.requires_grad_()
    draws = torch.Generator().manual_seed(3)
    loss = sampled_softmax_loss(users, items, labels, 6, 0.05, draws)
    loss.backward()
    torch.testing.assert_close(loss, expected, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(users.grad, expected_users.grad, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(items.grad, expected_items.grad, atol=1e-6, rtol=1e-6)


def test_gbce_by_hand():
    # 2 negatives of 10 other items: alpha = 1/5 and beta = (t (1 - 5) + 5) / 5
    positive, negatives = torch.tensor([math.log(3)]), torch.tensor([[0.0, -math.log(3)]])
    rest = -math.log(1 / 2) - math.log(3 / 4)
    for t, beta in ((0.0, 1.0), (0.75, 0.4), (1.0, 0.2)):
        expected = (-beta * math.log(3 / 4) + rest) / 3
        assert gbce_loss(positive, negatives, 11, t).item() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("t", [0.0, 0.75, 1.0])
def test_gbce_of_huge_scores_is_finite_and_so_are_its_gradients(t):
    positive = torch.tensor([-1e4, 1e4], requires_grad=True)
    negatives = torch.tensor([[1e4], [-1e4]], requires_grad=True)
    beta = 0.25 * (t * (1 - 4) + 4)  # 1 negative of 4 others
    loss = gbce_loss(positive, negatives, 5, t)
    assert loss.item() == pytest.approx((beta * 1e4 + 1e4) / 2 / 2, rel=1e-6)
    loss.backward()
    assert positive.grad.tolist() == pytest.approx([-beta / 4, 0])
    assert negatives.grad.flatten().tolist() == pytest.approx([1 / 4, 0])


def test_negatives_are_uniform_over_all_items_but_the_target():
    labels = torch.tensor([0, 3, 6])
    draws = sample_negatives(labels, 7, 60_000, torch.Generator().manual_seed(0))
    for label, row in zip(labels.tolist(), draws, strict=True):
        counts = torch.bincount(row, minlength=7)
        assert len(counts) == 7
        assert counts[label] == 0
        others = counts[[i for i in range(7) if i != label]]
        # 10,000 expected each, standard deviation 91
        assert (others - 10_000).abs().max() < 500
    assert not torch.equal(draws[0], draws[1])


def test_two_items_leave_one_negative():
    labels = torch.tensor([0, 1])
    assert sample_negatives(labels, 2, 3).tolist() == [[1, 1, 1], [0, 0, 0]]


def contrastive_loss(a, b, temperature=0.05, target_ids=None):
    scores = contrastive_scores(a, b, temperature, target_ids)
    return torch.nn.functional.cross_entropy(scores, torch.arange(len(a)))


def test_contrastive_by_hand():
    a = torch.tensor([[2.0, 0.0], [0.0, 3.0]])
    b = torch.tensor([[1.0, 0.0], [1.0, 1.0]])
    half = math.sqrt(0.5)
    rows = [(1.0, half), (0.0, half)]  # cosines
    scale = 1 / 0.5
    expected = [
        math.log(sum(math.exp(c * scale) for c in row)) - row[i] * scale
        for i, row in enumerate(rows)
    ]
    assert contrastive_loss(a, b, 0.5).item() == pytest.approx(sum(expected) / 2, abs=1e-6)


def test_repeated_targets_are_no_negatives_of_each_other():
    a, b = vectors(4, H, seed=1), vectors(4, H, seed=2)
    ids = torch.tensor([9, 5, 9, 7])
    scores = cosine_scores(a, b, 0.05)
    keep = [[0, 1, 3], [0, 1, 2, 3], [1, 2, 3], [0, 1, 2, 3]]  # rows 0 and 2 share item 9
    expected = [scores[i, keep[i]].logsumexp(0) - scores[i, i] for i in range(4)]
    loss = contrastive_loss(a, b, 0.05, ids)
    torch.testing.assert_close(loss, torch.stack(expected).mean())
    assert contrastive_loss(a, b, 0.05) > loss
    torch.testing.assert_close(
        contrastive_loss(a, b, 0.05, torch.arange(4)), contrastive_loss(a, b, 0.05)
    )


def test_targets_of_all_processes_are_negatives():
    a, b = vectors(6, H, seed=1), vectors(6, H, seed=2)
    ids = torch.tensor([9, 5, 9, 7, 5, 1])
    whole = contrastive_scores(a, b, 0.05, ids)
    assert torch.isinf(whole).sum() == 4
    parts = [contrastive_scores(a[i : i + 2], b, 0.05, ids, first=i) for i in (0, 2, 4)]
    torch.testing.assert_close(torch.cat(parts), whole)
    with pytest.raises(ValueError, match="at least 4 \\+ B"):
        contrastive_scores(a[:3], b, 0.05, ids, first=4)


def test_contrastive_gradients_reach_both_sides_and_one_shared_target_costs_nothing():
    a, b = vectors(3, H, seed=1).requires_grad_(), vectors(3, H, seed=2).requires_grad_()
    contrastive_loss(a, b).backward()
    assert a.grad.abs().sum() > 0
    assert b.grad.abs().sum() > 0
    a.grad = b.grad = None
    loss = contrastive_loss(a, b, target_ids=torch.tensor([4, 4, 4]))
    loss.backward()
    assert loss.item() == 0
    assert a.grad.abs().sum() == 0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda u, i, y: full_softmax_loss(u, i, y + 20), "from 20 to 24.*from 0 to 22"),
        (lambda u, i, y: full_softmax_loss(u, i, y - 100, chunk_size=4), "from -100"),
        (lambda u, i, y: full_softmax_loss(u, i, y, temperature=0.0), "temperature is 0.0"),
        (lambda u, i, y: full_softmax_loss(u, i, y, chunk_size=0), "chunk_size is 0"),
        (lambda u, i, y: full_softmax_loss(u[:, :3], i, y), r"\(5, 3\).*\(23, 16\)"),
        (lambda u, i, y: full_softmax_loss(u, i, y[:2]), r"labels have shape \(2,\)"),
        (lambda u, i, y: sampled_softmax_loss(u, i, y, 0), "num_negatives is 0"),
        (lambda u, i, y: contrastive_scores(i, u), r"\(23, 16\) and \(5, 16\)"),
        (
            lambda u, i, y: contrastive_scores(u, u, target_ids=y[:2]),
            r"target_ids have shape \(2,\)",
        ),
    ],
)
def test_what_does_not_fit_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call(vectors(B, H, seed=1), vectors(N, H, seed=2), torch.arange(B))
