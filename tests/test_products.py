"""Products of float32 where torch's are slow: they are products, and losses take them."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from recformer import products
from recformer.evaluation import scan
from recformer.evaluation.ranking import rank_and_top_items
from recformer.models.losses import full_softmax_loss


def numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def slow_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    if not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        pytest.skip("torch without oneDNN")
    monkeypatch.setattr(products, "torch_is_slow", lambda: True)


@pytest.mark.usefixtures("slow_torch")
def test_products_of_any_layout() -> None:
    a, b = numbers(30, 50, seed=1), numbers(50, 70, seed=2)
    exact = a.double() @ b.double()
    for left in (a, a.T.contiguous().T):
        for right in (b, b.T.contiguous().T):
            torch.testing.assert_close(products.mm(left, right), exact.float())
            out = torch.empty(30, 70)
            assert products.mm(left, right, out=out) is out
            torch.testing.assert_close(out, exact.float())
            total = torch.ones(30, 70)
            assert products.addmm_(total, left, right) is total
            torch.testing.assert_close(total, (1 + exact).float())


@pytest.mark.usefixtures("slow_torch")
@pytest.mark.parametrize("cosine", [False, True])
def test_a_softmax_in_parts_takes_them(cosine: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []
    mm = products.mm

    def noted(a: torch.Tensor, b: torch.Tensor, *, out: torch.Tensor | None = None) -> torch.Tensor:
        sizes.append(a.shape)
        return mm(a, b, out=out)

    monkeypatch.setattr(products, "mm", noted)
    users = numbers(300, 32, seed=1).requires_grad_()  # two parts of 128 and one of 44
    items = numbers(9000, 32, seed=2).requires_grad_()
    labels = torch.arange(300) * 7
    loss = full_softmax_loss(users, items, labels, temperature=0.5, cosine=cosine)
    grads = torch.autograd.grad(loss, (users, items))
    # scores, gradient of users and of items
    assert sizes == 2 * [(128, 32), (128, 9000), (9000, 128)]

    exact_users, exact_items = (x.detach().double().requires_grad_() for x in (users, items))
    own, table = exact_users, exact_items
    if cosine:
        own, table = F.normalize(own, dim=1), F.normalize(table, dim=1)
    exact = F.cross_entropy(own @ table.T / 0.5, labels)
    torch.testing.assert_close(loss.double(), exact, rtol=1e-6, atol=0)
    for grad, expected in zip(grads, torch.autograd.grad(exact, (exact_users, exact_items))):
        assert (grad.double() - expected).norm() < 1e-6 * expected.norm()


@pytest.mark.usefixtures("slow_torch")
@pytest.mark.parametrize("count", [1, 3, 600])
@pytest.mark.parametrize("cosine", [False, True])
def test_ranks_do_not_depend_on_who_multiplies(
    count: int, cosine: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    users, items = numbers(count, 24, seed=1), numbers(700, 24, seed=2)
    items[350:] = items[:350] + 1e-7 * numbers(350, 24, seed=3)  # nearly ties
    targets = (torch.arange(count) * 7) % 700
    found = []
    for least in (scan.MANY_ITEMS, 1):  # torch alone, oneDNN alone
        monkeypatch.setattr(scan, "MANY_ITEMS", least)
        ranks, best = rank_and_top_items(users, items, targets, 10, None, 128, cosine)
        found.append((ranks.above.tolist(), ranks.tied.tolist(), best.tolist()))
    assert found[0] == found[1]
