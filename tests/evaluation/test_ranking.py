"""Ranks and figures: by hand as fractions, and unmoved by batches, chunks, orders and processes."""

from __future__ import annotations

import math
from fractions import Fraction
from itertools import permutations

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.utils._python_dispatch import TorchDispatchMode

from recformer.evaluation import exact, ranking, scan
from recformer.evaluation import top_items as top_items_module
from recformer.evaluation.evaluator import Evaluator
from recformer.evaluation.exact import TIE_TOLERANCE, bfloat16_units, item_norms, pair_scores
from recformer.evaluation.metrics import coverage, gini, per_user_metrics
from recformer.evaluation.negatives import sample_unseen
from recformer.evaluation.ranking import rank_among_by_vectors, rank_by_vectors
from recformer.evaluation.ranks import TargetRanks, count_ranks, count_ranks_among
from recformer.evaluation.scan import Scan
from recformer.evaluation.top_items import top_items, top_items_by_vectors
from recformer.files import UserError


def ranks_of(above, tied=0, num_candidates=100) -> TargetRanks:
    above = np.atleast_1d(above)
    ones = np.ones(len(above), dtype=np.int64)
    return TargetRanks(above, tied * ones, num_candidates * ones)


def as_lists(ranks: TargetRanks) -> list[list[int]]:
    return [ranks.above.tolist(), ranks.tied.tolist(), ranks.num_candidates.tolist()]


def everywhere(monkeypatch, name: str, value) -> None:
    """Set a constant in every module that reads it."""
    for module in (exact, ranking, scan, top_items_module):
        if hasattr(module, name):
            monkeypatch.setattr(module, name, value)


# Figures


@pytest.mark.parametrize("ties", ["expected", "pessimistic", "optimistic"])
def test_figures_without_ties(ties):
    figures = per_user_metrics(ranks_of([0, 2, 9, 10]), ks=(1, 10), ties=ties)
    expected = {
        "NDCG@1": [1, 0, 0, 0],
        "Recall@1": [1, 0, 0, 0],
        "MRR@1": [1, 0, 0, 0],
        "NDCG@10": [1, 1 / 2, 1 / math.log2(11), 0],
        "Recall@10": [1, 1, 1, 0],
        "MRR@10": [1, 1 / 3, 1 / 10, 0],
        "MRR": [1, 1 / 3, 1 / 10, 1 / 11],
        "AUC": [1, 98 / 100, 91 / 100, 90 / 100],
    }
    assert {name: values.tolist() for name, values in figures.items()} == expected


def test_expected_figures_of_a_tie_across_the_cut():
    # 8 above and 3 tied: positions 9, 10, 11, 12, equally likely
    figures = per_user_metrics(ranks_of(8, tied=3), ks=(10,))
    assert figures["Recall@10"][0] == 2 / 4
    ndcg = (1 / math.log2(10) + 1 / math.log2(11)) / 4
    assert figures["NDCG@10"][0] == pytest.approx(ndcg, abs=1e-15)
    assert figures["MRR@10"][0] == pytest.approx(float(Fraction(1, 9) + Fraction(1, 10)) / 4)
    mrr = sum(Fraction(1, r) for r in (9, 10, 11, 12)) / 4
    assert figures["MRR"][0] == pytest.approx(float(mrr), abs=1e-15)
    assert figures["AUC"][0] == 1 - 9.5 / 100


def test_pessimistic_and_optimistic_take_the_ends_of_a_tie():
    tie = ranks_of(8, tied=3)
    worst = per_user_metrics(tie, ks=(10,), ties="pessimistic")
    best = per_user_metrics(tie, ks=(10,), ties="optimistic")
    assert (worst["Recall@10"][0], best["Recall@10"][0]) == (0, 1)
    assert (worst["NDCG@10"][0], best["NDCG@10"][0]) == (0, 1 / math.log2(10))
    assert (worst["MRR"][0], best["MRR"][0]) == (1 / 12, 1 / 9)
    assert (worst["AUC"][0], best["AUC"][0]) == (1 - 11 / 100, 1 - 8 / 100)


def test_expected_is_the_mean_over_all_orders_of_tied_items():
    rng = np.random.default_rng(0)
    for _ in range(20):
        scores = rng.integers(0, 3, size=5)
        target = int(rng.integers(5))
        figures = per_user_metrics(count_ranks(scores[None], [target]), ks=(2,))
        totals = dict.fromkeys(("NDCG@2", "Recall@2", "MRR@2", "MRR", "AUC"), 0.0)
        orders = list(permutations(range(5)))
        for order in orders:  # a stable sort of a shuffled list breaks ties as the shuffle says
            ranked = sorted(order, key=lambda i: -scores[i])
            r = ranked.index(target) + 1
            totals["NDCG@2"] += (r <= 2) / math.log2(r + 1)
            totals["Recall@2"] += r <= 2
            totals["MRR@2"] += (r <= 2) / r
            totals["MRR"] += 1 / r
            totals["AUC"] += 1 - (r - 1) / 5
        for name, total in totals.items():
            assert figures[name][0] == pytest.approx(total / len(orders), abs=1e-14), name


def test_expected_figures_of_a_huge_tie():
    size = 1_500_000  # all items alike
    figures = per_user_metrics(ranks_of(0, tied=size - 1, num_candidates=size), ks=(10,))
    assert figures["Recall@10"][0] == 10 / size
    dcg = math.fsum(1 / math.log2(r + 1) for r in range(1, 11))
    assert figures["NDCG@10"][0] == pytest.approx(dcg / size, rel=1e-14)
    harmonic = math.fsum(1 / r for r in range(1, size + 1))
    assert figures["MRR"][0] == pytest.approx(harmonic / size, rel=1e-12)
    assert figures["AUC"][0] == pytest.approx(0.5, abs=1e-6)


def test_a_model_that_sees_no_difference_is_no_winner():
    ranks = count_ranks(torch.zeros(3, 1000), [0, 5, 999])
    evaluator = Evaluator(ks=(10,))
    evaluator.update([0, 1, 2], [0, 5, 999], ranks)
    assert evaluator.compute()["Recall@10"] == pytest.approx(10 / 1000, abs=1e-15)
    assert evaluator.compute()["tie_rate"] == 1


# Ranks from scores


def test_ranks_of_scores_by_hand():
    scores = torch.tensor([[0.1, 0.9, 0.5, 0.5], [4.0, 3.0, 2.0, 1.0]])
    assert as_lists(count_ranks(scores, [2, 0])) == [[1, 0], [1, 0], [4, 4]]
    # user 0 has seen item 1 twice and the target; user 1 has seen items 1 and 2
    seen = ([0, 0, 0, 1, 1], [1, 1, 2, 1, 2])
    assert as_lists(count_ranks(scores, [2, 3], seen)) == [[0, 1], [1, 0], [3, 2]]


@pytest.mark.parametrize("dtype", [torch.int64, torch.bfloat16, torch.float16, torch.float64])
def test_scores_of_any_dtype(dtype):
    scores = torch.tensor([[3, 1, 2, 2]], dtype=dtype)
    assert as_lists(count_ranks(scores, torch.tensor([3]))) == [[1], [1], [4]]
    if dtype == torch.float64:
        assert as_lists(count_ranks(scores.numpy(), np.array([3]))) == [[1], [1], [4]]
        close = torch.tensor([[1.0, 1.0 + 1e-15]], dtype=dtype)  # compared as they are
        assert as_lists(count_ranks(close, [0])) == [[1], [0], [2]]


def test_a_row_of_scores_may_hold_infinities():
    scores = torch.tensor([[-torch.inf, 1.0, torch.inf, -torch.inf]])
    assert as_lists(count_ranks(scores, [1])) == [[1], [0], [4]]
    assert as_lists(count_ranks(scores, [0])) == [[2], [1], [4]]


@pytest.mark.parametrize(
    ("scores", "targets", "seen", "message"),
    [
        ([[0.0, 1.0], [math.nan, 1.0]], [0, 1], None, "row 1 hold NaN"),
        ([0.0, 1.0], [0], None, r"shape \(2,\)"),
        ([[0.0, 1.0]], [2], None, "targets reach from 2 to 2.*0 to 1"),
        ([[0.0, 1.0]], [-1], None, "targets reach from -1"),
        ([[0.0, 1.0]], [0, 1], None, "length 2, expected 1"),
        ([[0.0, 1.0]], [0.0], None, "float64.*integers"),
        ([[0.0, 1.0]], [0], ([1], [0]), "rows of seen reach from 1"),
        ([[0.0, 1.0]], [0], ([0], [2]), "cols of seen reach from 2"),
        ([[0.0, 1.0]], [0], ([0, 0], [1]), "cols of seen have length 1, expected 2"),
    ],
)
def test_scores_that_cannot_be_ranked_are_refused(scores, targets, seen, message):
    with pytest.raises(ValueError, match=message):
        count_ranks(torch.tensor(scores), targets, seen)


# Ranks from vectors


def exact_ranks(users, items, targets, cosine=True) -> tuple[list[int], list[int]]:
    """The definition in `rank_by_vectors`, in float64, one pair at a time."""
    users, items = users.double(), items.double()
    norms = items.norm(dim=1)
    above, tied = [], []
    for user, target in zip(users, targets, strict=True):
        scores = torch.tensor([math.fsum((user * item).tolist()) for item in items])
        if cosine:
            scores = scores / norms
        apart = (scores - scores[target]) / user.norm()
        tolerance = TIE_TOLERANCE * (1 if cosine else norms[target])
        above.append(int((apart > tolerance).sum()))
        tied.append(int((apart.abs() <= tolerance).sum()) - 1)
    return above, tied


def catalogue(
    num_users=64, num_items=300, hidden=96, seed=0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Users, items and targets with copies, near copies and encoder-like crowding."""
    generator = torch.Generator().manual_seed(seed)
    items = torch.randn(num_items, hidden, generator=generator) + 3  # crowded: cosines near 0.9
    items[100:140] = items[7]  # copies
    items[140:150] = items[7] * 2  # copies of another length
    items[150:170] = items[20:40] * (1 + 2.0**-24)  # rounded away or one bit off
    items[170:180] = items[30:40] + 1e-5  # near, but another item
    users = torch.randn(num_users, hidden, generator=generator) + 3
    targets = torch.randint(0, num_items, (num_users,), generator=generator)
    targets[:8] = torch.tensor([7, 100, 139, 145, 30, 160, 170, 0])
    return users, items, targets


@pytest.mark.parametrize("cosine", [True, False])
def test_vector_ranks_follow_their_definition(cosine):
    users, items, targets = catalogue(num_users=24)
    ranks = rank_by_vectors(users, items, targets, cosine=cosine)
    assert (ranks.above.tolist(), ranks.tied.tolist()) == exact_ranks(users, items, targets, cosine)
    copies = 50 if cosine else 40  # items of twice the length differ in their dot product only
    assert ranks.tied[:3].tolist() == [copies] * 3
    assert ranks.num_candidates.tolist() == [300] * 24


def test_dot_products_of_long_items_are_ranked_exactly():
    # every product is small beside the lengths, so float32 rounding is as large as the scores
    generator = torch.Generator().manual_seed(0)
    users = torch.randn(4, 96, generator=generator)
    items = torch.randn(200, 96, generator=generator)
    items -= (items @ users.T) @ torch.linalg.pinv(users.T)  # at right angles to all users
    items[10:] *= 1e5
    items[10:] += 1e-3 * torch.randn(190, 96, generator=generator)
    targets = torch.arange(4)
    ranks = rank_by_vectors(users, items, targets, cosine=False)
    expected = exact_ranks(users, items, targets, cosine=False)
    assert (ranks.above.tolist(), ranks.tied.tolist()) == expected


def test_vector_ranks_by_hand():
    items = torch.tensor([[2.0, 0.0], [1.0, 1.0], [0.0, 5.0], [3.0, 3.0], [-1.0, 0.0], [0.0, 0.0]])
    users = torch.tensor([[1.0, 0.0], [0.0, 2.0], [0.0, 0.0]])
    ranks = rank_by_vectors(users, items, [1, 0, 3])
    # cosines of user 0: 1, .7, 0, .7, -1, 0; of user 1: 0, .7, 1, .7, 0, 0; user 2 has no direction
    assert as_lists(ranks) == [[1, 3, 0], [1, 2, 5], [6, 6, 6]]
    ranks = rank_by_vectors(users, items, [1, 0, 3], cosine=False)
    # products of user 0: 2, 1, 0, 3, -1, 0; of user 1 (length 1): 0, 1, 5, 3, 0, 0
    assert as_lists(ranks) == [[2, 3, 0], [0, 2, 5], [6, 6, 6]]
    seen = ([0, 0, 1, 1, 2], [0, 1, 2, 2, 5])
    ranks = rank_by_vectors(users, items, [1, 0, 3], seen)
    assert as_lists(ranks) == [[0, 2, 0], [1, 2, 4], [5, 5, 5]]


@pytest.mark.parametrize("batch_size", [1, 2, 3, 5, 8, 17, 32, 63, 64])
def test_batch_size_does_not_move_a_rank(batch_size):
    users, items, targets = catalogue(hidden=768)
    expected = as_lists(rank_by_vectors(users, items, targets))
    got: list[list[int]] = [[], [], []]
    for start in range(0, 64, batch_size):
        part = slice(start, start + batch_size)
        for column, values in zip(
            got, as_lists(rank_by_vectors(users[part], items, targets[part])), strict=True
        ):
            column.extend(values)
    assert got == expected


@pytest.mark.parametrize("chunk_size", [1, 7, 64, 101, 192, 256, 299, 300, 5000])
@pytest.mark.parametrize("many", [0.25, 1.0])  # stretches from which on whole rows are read
def test_chunk_size_does_not_move_a_rank(monkeypatch, chunk_size, many):
    everywhere(monkeypatch, "MANY_STRETCHES", many)
    users, items, targets = catalogue(hidden=768)
    expected = as_lists(rank_by_vectors(users, items, targets))
    assert as_lists(rank_by_vectors(users, items, targets, None, chunk_size)) == expected


@pytest.mark.parametrize("seed", range(5))
def test_order_of_users_and_items_does_not_move_a_rank(seed):
    users, items, targets = catalogue(hidden=768)
    expected = rank_by_vectors(users, items, targets)
    generator = torch.Generator().manual_seed(seed)
    order, rows = torch.randperm(300, generator=generator), torch.randperm(64, generator=generator)
    place = torch.empty(300, dtype=torch.int64)
    place[order] = torch.arange(300)  # item i now stands at place[i]
    ranks = rank_by_vectors(users[rows], items[order], place[targets[rows]], None, 37)
    assert ranks.above.tolist() == expected.above[rows].tolist()
    assert ranks.tied.tolist() == expected.tied[rows].tolist()


@pytest.mark.parametrize("share", [-1.0, 2.0])  # a float64 product for all rows, for none
@pytest.mark.parametrize("spread", [0.0, 1e-8, 1e-6, 1e-4])
def test_a_collapsed_encoder_is_ranked_exactly(monkeypatch, share, spread):
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(64, generator=generator)
    items = base + spread * torch.randn(200, 64, generator=generator)
    users = base + spread * torch.randn(6, 64, generator=generator)
    targets = torch.arange(6)
    everywhere(monkeypatch, "DENSE_SHARE", share)
    everywhere(monkeypatch, "PAIR_ELEMENTS", 64 * 7)  # several rounds of single pairs
    expected = exact_ranks(users, items, targets)
    for many in (0.25, 1.0):  # whole rows, and two stretches of 64 items
        everywhere(monkeypatch, "MANY_STRETCHES", many)
        ranks = rank_by_vectors(users, items, targets, None, 128)
        assert (ranks.above.tolist(), ranks.tied.tolist()) == expected
        if spread == 0:
            assert as_lists(ranks) == [[0] * 6, [199] * 6, [200] * 6]


def test_users_in_several_blocks(monkeypatch):
    users, items, targets = catalogue()
    seen = (np.repeat(np.arange(64), 20), np.arange(64 * 20) % 300)
    expected = as_lists(rank_by_vectors(users, items, targets, seen))
    assert expected[2] != [300] * 64
    everywhere(monkeypatch, "USER_BLOCK", 13)
    assert as_lists(rank_by_vectors(users, items, targets, seen, 50)) == expected


def test_seen_items_leave_the_ranking_but_the_target_stays():
    users, items, targets = catalogue(num_users=16)
    rng = np.random.default_rng(0)
    seen = (rng.integers(0, 16, 2000), rng.integers(0, 300, 2000))
    ranks = rank_by_vectors(users, items, targets, seen, 70)
    for user, target in enumerate(targets.tolist()):
        gone = set(seen[1][seen[0] == user].tolist()) - {target}
        stay = [item for item in range(300) if item not in gone]
        above, tied = exact_ranks(users[user : user + 1], items[stay], [stay.index(target)])
        assert [ranks.above[user], ranks.tied[user]] == above + tied
        assert ranks.num_candidates[user] == len(stay) < 300
    assert ranks.tied.max() > 0


def test_item_tables_of_every_kind(tmp_path):
    users, items, targets = catalogue()
    expected = as_lists(rank_by_vectors(users, items, targets))
    on_disk = np.memmap(tmp_path / "items", np.float32, "w+", shape=tuple(items.shape))
    on_disk[:] = items.numpy()
    on_disk.flush()
    read_only = np.memmap(tmp_path / "items", np.float32, "r", shape=tuple(items.shape))
    assert as_lists(rank_by_vectors(users, read_only, targets, None, 64)) == expected
    assert as_lists(rank_by_vectors(users.double(), items.double(), targets)) == expected
    assert as_lists(rank_by_vectors(users.numpy(), items.T.contiguous().T, targets)) == expected

    half = items.bfloat16()
    expected = as_lists(rank_by_vectors(users, half.float(), targets))
    assert as_lists(rank_by_vectors(users, half, targets, None, 64)) == expected
    half = items.half()
    expected = as_lists(rank_by_vectors(users, half.float(), targets))
    assert as_lists(rank_by_vectors(users, half.numpy(), targets, None, 64)) == expected


def test_arguments_are_left_as_they_were():
    users, items, targets = catalogue()
    before = users.clone(), items.clone(), targets.clone()
    rank_by_vectors(users, items, targets, ([0], [1]))
    assert all(torch.equal(a, b) for a, b in zip(before, (users, items, targets), strict=True))


def test_low_precision_settings_of_a_trainer_do_not_reach_the_ranks():
    users, items, targets = catalogue(hidden=768)
    expected = as_lists(rank_by_vectors(users, items, targets))
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")  # bfloat16 products on some CPUs, TF32 on GPUs
    try:
        product = users @ items.T
        with torch.autocast("cpu", torch.bfloat16):
            assert as_lists(rank_by_vectors(users, items, targets)) == expected
        assert torch.get_float32_matmul_precision() == "medium"
        assert torch.equal(users @ items.T, product)
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("cosine", [True, False])
def test_a_gpu_gives_the_same_ranks(cosine):
    users, items, targets = catalogue(num_users=2000, num_items=5000, hidden=768)
    expected = as_lists(rank_by_vectors(users, items, targets, None, None, cosine))
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        got = rank_by_vectors(users.cuda(), items.cuda(), targets.cuda(), None, 700, cosine)
        assert as_lists(got) == expected
        got = rank_by_vectors(users.cuda(), items.numpy(), targets, None, 700, cosine)
        assert as_lists(got) == expected
    finally:
        torch.set_float32_matmul_precision(before)


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory_is_that_of_a_chunk(dtype):
    generator = torch.Generator().manual_seed(0)
    items = torch.randn(20_000, 32, generator=generator).to(dtype)
    users, targets = torch.randn(50, 32, generator=generator), torch.arange(50)
    with LargestTensor() as seen:
        rank_by_vectors(users, items, targets, None, 400)
    assert seen.elements == 400 * 50  # table: 640,000; users x items: 1,000,000


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda u, i, t: (u * math.nan, i, t), "user vector in row 0 holds NaN"),
        (lambda u, i, t: (u, torch.cat([i[:-1], i[-1:] * math.inf]), t), "item vector in row 299"),
        (lambda u, i, t: (u, i * 1e38, t), "row 0 holds NaN, infinity or a value beyond"),
        (lambda u, i, t: (u[:, :5], i, t), r"\(64, 5\) and item vectors \(300, 96\)"),
        (lambda u, i, t: (u, i, t[:5]), "targets have length 5, expected 64"),
        (lambda u, i, t: (u, i, t + 300), "targets reach from .* 0 to 299"),
        (lambda u, i, t: (u, i, t, None, 0), "chunk_size is 0"),
    ],
)
def test_vectors_that_cannot_be_ranked_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        rank_by_vectors(*change(*catalogue()))


# Evaluator


def test_figures_are_sums_over_users_by_their_number():
    evaluator = Evaluator(ks=(1, 10))
    evaluator.update([4, 2, 9], [0, 1, 2], ranks_of([0, 1, 2]))
    evaluator.update(torch.tensor([1]), np.array([5]), ranks_of([9], tied=1))  # a batch of one
    figures = evaluator.compute()
    assert figures["num_users"] == 4
    assert figures["tie_rate"] == 1 / 4
    assert figures["Recall@1"] == 1 / 4
    assert figures["Recall@10"] == (3 + 1 / 2) / 4
    ndcg = 1 + 1 / math.log2(3) + 1 / 2 + 1 / math.log2(11) / 2
    assert figures["NDCG@10"] == pytest.approx(ndcg / 4, abs=1e-15)
    mrr = 1 + Fraction(1, 2) + Fraction(1, 3) + (Fraction(1, 10) + Fraction(1, 11)) / 2
    assert figures["MRR"] == pytest.approx(float(mrr) / 4, abs=1e-15)
    assert figures["AUC"] == pytest.approx(1 - (0 + 1 + 2 + 9.5) / 4 / 100, abs=1e-15)
    assert list(figures) == [
        *("NDCG@1", "Recall@1", "MRR@1", "NDCG@10", "Recall@10", "MRR@10"),
        *("MRR", "AUC", "tie_rate", "num_users"),
    ]


def many_users(count=1000, seed=0) -> tuple[np.ndarray, np.ndarray, TargetRanks]:
    rng = np.random.default_rng(seed)
    ids = rng.permutation(count * 3)[:count]
    above, tied = rng.integers(0, 200, count), rng.integers(0, 3, count)
    return ids, rng.integers(0, 300, count), TargetRanks(above, tied, np.full(count, 300))


def part_of(users, rows) -> tuple[np.ndarray, np.ndarray, TargetRanks]:
    ids, targets, ranks = users
    return (
        ids[rows],
        targets[rows],
        TargetRanks(ranks.above[rows], ranks.tied[rows], ranks.num_candidates[rows]),
    )


def test_batches_order_and_merging_change_nothing_to_the_last_bit():
    users = many_users()
    whole = Evaluator()
    whole.update(*users)
    expected = whole.compute()
    order = np.random.default_rng(1).permutation(1000)
    for size in (1, 7, 64, 999):
        evaluator = Evaluator()
        for start in range(0, 1000, size):
            evaluator.update(*part_of(users, order[start : start + size]))
        assert evaluator.compute() == expected
        assert evaluator.compute() == expected  # computing takes nothing away

    one, other = Evaluator(), Evaluator()
    one.update(*part_of(users, order[:600]))
    other.update(*part_of(users, order[500:]))  # a hundred users stand in both
    one.merge(other.state())
    assert one.compute() == expected
    assert one.state()["user_id"].tolist() == sorted(users[0].tolist())


def test_a_user_counts_once():
    evaluator = Evaluator(ks=(1,))
    evaluator.update([3, 3, 8], [5, 5, 6], ranks_of([0, 0, 1]))
    evaluator.update([3], [5], ranks_of([7]))  # the row that came first stays
    assert evaluator.compute()["Recall@1"] == 1 / 2
    evaluator.update([8], [7], ranks_of([0]))
    with pytest.raises(ValueError, match="user 8 has two targets, items 6 and 7"):
        evaluator.compute()


def test_per_user_ranks_as_parquet(tmp_path):
    import pyarrow.parquet as pq

    evaluator = Evaluator(ks=(10,), ties="pessimistic")
    evaluator.update([9, 4], [1, 2], ranks_of([6, 3], tied=1))
    path = tmp_path / "ranks.parquet"
    evaluator.write_parquet(path)
    table = pq.read_table(path)
    assert table.to_pydict() == {
        "user_id": [4, 9],
        "target": [2, 1],
        "above": [3, 6],
        "tied": [1, 1],
        "num_candidates": [100, 100],
        "rank": [4.5, 7.5],
    }
    evaluator.update([4], [3], ranks_of([0]))  # cannot be written: two targets
    with pytest.raises(ValueError, match="two targets"):
        evaluator.write_parquet(path)
    assert pq.read_table(path) == table
    assert [p.name for p in tmp_path.iterdir()] == ["ranks.parquet"]


def recommended() -> np.ndarray:
    """50 different items of 200 for each of 101 users."""
    generator = np.random.default_rng(3)
    return np.stack([generator.permutation(200)[:50] for _ in range(101)])


def run_process(rank: int, world_size: int, folder: str) -> None:
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world_size
    )
    users = many_users(count=101)
    # rows as a distributed sampler deals them: strided, padded from the start to equal length
    rows = np.resize(np.arange(101), 102)[rank::world_size]
    evaluator = Evaluator()
    evaluator.update(*part_of(users, rows))
    evaluator.count_recommended(recommended()[rank::world_size], 200)  # each user once
    evaluator.gather()
    torch.save(evaluator.compute(), f"{folder}/{rank}.pt")
    alone = Evaluator()  # one process may have no users
    if rank == 1:
        alone.update(*users)
        alone.count_recommended(recommended(), 200)
    alone.gather()
    torch.save(alone.compute(), f"{folder}/{rank}_alone.pt")
    dist.destroy_process_group()


def test_two_processes_equal_one(tmp_path):
    evaluator = Evaluator()
    evaluator.update(*many_users(count=101))
    evaluator.count_recommended(recommended(), 200)
    evaluator.gather()  # a single process: nothing to do
    expected = evaluator.compute()
    mp.spawn(run_process, args=(2, str(tmp_path)), nprocs=2)
    for name in ("0", "1", "0_alone", "1_alone"):
        assert torch.load(tmp_path / f"{name}.pt") == expected


# What is recommended


def test_scores_have_the_same_bits_on_every_processor():
    """Roots of IEEE 754: those of a vector library are off by a bit in a hundredth of the cases."""
    pairs = np.random.default_rng(0).normal(size=(20_000, 2))
    users = torch.tensor([[0.6, 0.8]], dtype=torch.float64).expand(len(pairs), 2)
    scores = pair_scores(users, torch.from_numpy(pairs), cosine=True)
    expected = [(0.6 * a + 0.8 * b) / math.sqrt(a * a + b * b) for a, b in pairs.tolist()]
    assert scores.tolist() == expected


def test_top_items_by_hand():
    scores = torch.tensor([[1, 5, 5, 0, 7], [2, 2, 2, 2, 2], [0, 9, 8, 7, 6]])
    items, values = top_items(scores, 3)
    assert items.tolist() == [[4, 1, 2], [0, 1, 2], [1, 2, 3]]  # of equal scores the lower id
    assert values.tolist() == [[7, 5, 5], [2, 2, 2], [9, 8, 7]]
    seen = ([0, 0, 1, 2, 2, 2], [4, 1, 0, 1, 2, 4])
    assert top_items(scores, 3, seen)[0].tolist() == [[2, 0, 3], [1, 2, 3], [3, 0, -1]]
    items, values = top_items(torch.tensor([[0.5, -math.inf, math.inf]]), 5)
    assert items.tolist() == [[2, 0, -1, -1, -1]]
    assert values.tolist() == [[math.inf, 0.5, -math.inf, -math.inf, -math.inf]]
    with pytest.raises(ValueError, match="row 0 hold NaN"):
        top_items(torch.tensor([[math.nan]]), 1)
    with pytest.raises(ValueError, match="k is 0"):
        top_items(scores, 0)


def exact_top(users, items, k, seen, cosine) -> list[list[int]]:
    """The definition in `top_items_by_vectors`: sums that are exact, then item ids."""
    users, items = users.double(), items.double()
    best = []
    for row, user in enumerate(users):
        scores = []
        for item, vector in enumerate(items):
            length = float(vector.norm()) if cosine else 1.0
            # copies score the same however sums are rounded; others are further apart than that
            score = math.fsum((user * vector).tolist()) / length / float(user.norm())
            scores.append((-round(score, 13), item))
        gone = {c for r, c in zip(*seen, strict=True) if r == row}
        best.append([item for _, item in sorted(scores) if item not in gone][:k])
    return best


@pytest.mark.parametrize("cosine", [True, False])
def test_top_items_by_vectors_follow_their_definition(monkeypatch, cosine):
    users, items, _ = catalogue(num_users=10)
    users[0] = items[7]  # its copies are the best: the lowest ids of them
    rng = np.random.default_rng(0)
    seen = (rng.integers(0, 10, 600), rng.integers(0, 300, 600))
    expected = exact_top(users, items, 20, seen, cosine)
    got, values = top_items_by_vectors(users, items, 20, seen, cosine=cosine)
    assert got.tolist() == expected
    lengths = items[got].norm(dim=2) * users.norm(dim=1)[:, None] if cosine else torch.ones(10, 20)
    products = (items[got] * users[:, None]).sum(dim=2)
    torch.testing.assert_close(torch.from_numpy(values).float(), products / lengths)
    if cosine:
        gone = {c for r, c in zip(*seen, strict=True) if r == 0}
        copies = [i for i in [7, *range(100, 150)] if i not in gone]
        assert got[0].tolist() == copies[:20]

    for chunk_size in (1, 7, 20, 299, 5000):
        again, _ = top_items_by_vectors(users, items, 20, seen, chunk_size, cosine)
        assert again.tolist() == expected
    everywhere(monkeypatch, "USER_BLOCK", 3)
    everywhere(monkeypatch, "PAIR_ELEMENTS", 96 * 7)
    assert top_items_by_vectors(users, items, 20, seen, 90, cosine)[0].tolist() == expected
    for row in range(10):
        mine = [c for r, c in zip(*seen, strict=True) if r == row]
        alone = users[[row]], items.numpy(), 20, ([0] * len(mine), mine)
        assert top_items_by_vectors(*alone, cosine=cosine)[0].tolist() == [expected[row]]


def test_top_items_of_a_collapsed_encoder():
    items = torch.ones(200, 64)
    got, values = top_items_by_vectors(torch.randn(3, 64), items, 4, ([0, 1], [0, 2]), 30)
    assert got.tolist() == [[1, 2, 3, 4], [0, 1, 3, 4], [0, 1, 2, 3]]
    assert (values == values[:, :1]).all()
    got, _ = top_items_by_vectors(torch.zeros(1, 64), items, 300)
    assert got.tolist() == [[*range(200), *[-1] * 100]]


@pytest.mark.parametrize("cosine", [True, False])
def test_top_items_closer_than_float32_can_tell(cosine):
    """All scores within 1e-6 of each other: the float32 product decides nothing."""
    generator = torch.Generator().manual_seed(0)
    items = 1 + 1e-6 * torch.randn(300, 64, generator=generator)
    users = torch.randn(5, 64, generator=generator).abs()
    expected = exact_top(users, items, 9, ([0], [3]), cosine)
    for chunk_size in (40, 300):
        got, _ = top_items_by_vectors(users, items, 9, ([0], [3]), chunk_size, cosine)
        assert got.tolist() == expected
        one, _ = top_items_by_vectors(users[1:2], items, 9, None, chunk_size, cosine)
        assert one.tolist() == expected[1:2]


def test_top_items_in_the_order_that_costs_most():
    """Each item is better than all before it."""
    items = torch.stack([torch.arange(500.0), torch.ones(500)], dim=1)
    got, _ = top_items_by_vectors(torch.tensor([[1.0, 0.0], [-1.0, 0.0]]), items, 3, None, 100)
    assert got.tolist() == [[499, 498, 497], [0, 1, 2]]


@pytest.mark.parametrize("cosine", [True, False])
@pytest.mark.parametrize("scale", [1.0, 1e25, 1e-12])
def test_items_offered_and_norms_known(cosine, scale):
    users, items, _ = catalogue(num_users=8)
    users, items = users[:6], items * scale
    offered = np.random.default_rng(1).random(len(items)) < 0.3
    hidden = np.flatnonzero(~offered)
    pairs = (np.repeat(np.arange(6), len(hidden)), np.tile(hidden, 6))
    added = (np.array([0, 0, 1]), np.array([hidden[0], 2, 2]), np.array([9.0, 0.5, -0.5]))
    expected = top_items_by_vectors(users, items, 15, pairs, cosine=cosine, additions=added)
    norms = item_norms(items)
    assert torch.allclose(norms.double(), items.double().norm(dim=1), rtol=1e-5)
    for known in (None, norms):
        for count in (6, 1):
            mine = tuple(values[: 3 if count == 6 else 2] for values in added)
            got = top_items_by_vectors(
                users[:count], items, 15, None, 70, cosine, mine, offered, known
            )
            assert got[0].tolist() == expected[0][:count].tolist()
            assert got[1].tolist() == expected[1][:count].tolist()
    with pytest.raises(ValueError, match="offered have length 5, expected 300, one an item"):
        top_items_by_vectors(users, items, 15, offered=offered[:5])
    items[7, 0] = torch.nan
    with pytest.raises(ValueError, match="item vector in row 7 holds NaN"):
        item_norms(items)


@pytest.mark.parametrize("users", [1, 5])
def test_a_look_in_bfloat16_is_off_by_no_more_than_it_says(users):
    generator = torch.Generator().manual_seed(users)
    vectors = torch.ones(users, 254)  # of length 1 each number lies just above the middle of two
    items = torch.ones(3000, 254)
    items[:1000] += torch.rand(1000, 254, generator=generator) / 64
    items[1000:2000] = torch.randn(1000, 254, generator=generator)
    looked = []

    class Look:
        def look(self, block, scores, chunk):
            looked.append((scores.all.clone(), chunk))

        def close(self): ...

    known = {"norms": item_norms(items), "units": bfloat16_units(items)}
    for chunk_size in (None, 1000):
        looked.clear()
        Scan(vectors, items, chunk_size=chunk_size, **known).run([Look()])
        scores = torch.cat([each for each, _ in looked], dim=1).double()
        exact = torch.nn.functional.cosine_similarity(
            vectors.double()[:, None], items.double()[None], dim=2
        )
        off = (scores - exact).abs().max()
        assert 0.0077 < off <= looked[0][1].error < 0.012
    # numbers just above and just below the middle of two, so that looks differ most from the truth
    edges = torch.tensor([0.0627456, 0.0627430, -0.0627456, -0.0627430])
    items = edges[torch.randint(0, 4, (3000, 254), generator=generator)]
    vectors = edges[torch.randint(0, 4, (users, 254), generator=generator)]
    norms, units = item_norms(items), bfloat16_units(items)
    best = top_items_by_vectors(vectors, items, 20, norms=norms, units=units)
    expected = top_items_by_vectors(vectors, items, 20)
    assert best[0].tolist() == expected[0].tolist()
    assert best[1].tolist() == expected[1].tolist()
    with pytest.raises(UserError, match="units are given without norms"):
        top_items_by_vectors(vectors, items, 20, units=units)


def test_memory_of_top_items_is_that_of_a_chunk():
    generator = torch.Generator().manual_seed(0)
    items = torch.randn(20_000, 32, generator=generator)
    users = torch.randn(50, 32, generator=generator)
    with LargestTensor() as seen:
        top_items_by_vectors(users, items, 10, None, 400)
    # the first chunk's best of all users are looked at one by one; table: 640,000
    assert seen.elements <= max(400 * 50, 50 * 11 * 32)


def test_coverage_and_gini_by_hand():
    assert coverage(np.array([0, 0, 0, 1, 3])) == 2 / 5
    # (2i - n - 1) c_i over n times the sum: (2 * 1 + 4 * 3) / (5 * 4)
    assert gini(np.array([3, 0, 0, 1, 0])) == 14 / 20
    assert gini(np.array([2, 2, 2])) == 0
    assert gini(np.array([0, 0, 0, 9])) == 3 / 4
    # Mean absolute difference over twice the mean: (6 + 4 + 2) * 2 / 9 / (2 * 4).
    assert gini(np.array([7, 1, 4])) == pytest.approx(24 / 9 / 8)
    assert gini(np.zeros(3, dtype=np.int64)) == 0


def test_coverage_is_that_of_all_users():
    evaluator = Evaluator((1, 3))
    evaluator.update([0, 1], [0, 1], ranks_of([0, 0]))
    assert "Coverage@1" not in evaluator.compute()
    evaluator.count_recommended(np.array([[3, 1, 2]]), 5)
    evaluator.count_recommended(np.array([[3, 1, -1]]), 5)
    figures = evaluator.compute()
    assert figures["Coverage@1"] == 1 / 5
    assert figures["Coverage@3"] == 3 / 5
    assert figures["Gini@1"] == 4 / 5
    assert figures["Gini@3"] == (0 * 1 + 2 * 2 + 4 * 2) / (5 * 5)  # counts 0, 0, 1, 2, 2
    with pytest.raises(ValueError, match=r"shape \(1, 2\), expected \(users, 3\)"):
        evaluator.count_recommended(np.array([[3, 1]]), 5)


# Sampled negatives


def test_negatives_are_neither_target_nor_history():
    seen = ([0, 0, 1], [1, 2, 5])
    drawn = sample_unseen([7, 8], [4, 5], seen, 6, 3)
    assert sorted(drawn[0].tolist()) == [0, 3, 5]
    assert len(set(drawn[1].tolist())) == 3
    assert set(drawn[1].tolist()) <= {0, 1, 2, 3, 4}  # the target stands in the history
    with pytest.raises(ValueError, match="user 7 leaves 3 of 6 items .* at most 3"):
        sample_unseen([7, 8], [4, 5], seen, 6, 4)


def test_negatives_are_drawn_evenly_and_by_user_alone():
    users, targets = np.arange(3000), np.full(3000, 2)
    seen = (np.repeat(users, 2), np.tile([0, 5], 3000))
    drawn = sample_unseen(users, targets, seen, 10, 3)
    counts = np.bincount(drawn.ravel(), minlength=10)
    assert counts[[0, 2, 5]].tolist() == [0, 0, 0]
    expected = 9000 / 7
    assert np.abs(counts[[1, 3, 4, 6, 7, 8, 9]] - expected).max() < 4 * expected**0.5
    rows = np.array([2999, 5, 17])
    alone = sample_unseen(rows, targets[rows], ([0, 0, 1, 1, 2, 2], [5, 0] * 3), 10, 3)
    assert alone.tolist() == drawn[rows].tolist()
    other = sample_unseen(rows, targets[rows], ([0, 0, 1, 1, 2, 2], [5, 0] * 3), 10, 3, seed=1)
    assert other.tolist() != alone.tolist()


def test_ranks_among_a_few_items_by_hand():
    scores = torch.tensor([[1, 5, 5, 0, 7], [2, 2, 2, 3, 2]])
    candidates = [[0, 2, 3], [0, 3, 4]]
    assert as_lists(count_ranks_among(scores, [1, 1], candidates)) == [[0, 1], [1, 2], [4, 4]]
    items = torch.tensor([[2.0, 0.0], [1.0, 1.0], [0.0, 5.0], [3.0, 3.0], [-1.0, 0.0]])
    users = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    # cosines of user 0: 1, .7, 0, .7, -1; of user 1: 0, .7, 1, .7, 0
    ranks = rank_among_by_vectors(users, items, [1, 0], [[0, 2, 3], [4, 1, 2]])
    assert as_lists(ranks) == [[1, 2], [1, 1], [4, 4]]
    ranks = rank_among_by_vectors(users, items, [1, 0], [[0, 2, 3], [4, 1, 2]], cosine=False)
    assert as_lists(ranks) == [[2, 2], [0, 1], [4, 4]]


def test_repeated_candidates_and_the_target_among_them_count_once():
    scores = torch.tensor([[1, 5, 5, 0, 7], [2, 2, 2, 3, 2]])
    candidates = [[0, 2, 3, 1, 2, 2], [0, 3, 4, 4, 1, 0]]
    assert as_lists(count_ranks_among(scores, [1, 1], candidates)) == [[0, 1], [1, 2], [4, 4]]
    items = torch.tensor([[2.0, 0.0], [1.0, 1.0], [0.0, 5.0], [3.0, 3.0], [-1.0, 0.0]])
    users = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    candidates = [[0, 2, 3, 3, 1], [4, 1, 2, 0, 2]]
    assert as_lists(rank_among_by_vectors(users, items, [1, 0], candidates)) == [
        [1, 2],
        [1, 1],
        [4, 4],
    ]


@pytest.mark.parametrize("cosine", [True, False])
def test_all_other_items_as_negatives_are_the_full_ranking(monkeypatch, cosine):
    users, items, targets = catalogue()
    others = [np.delete(np.arange(300), target) for target in targets.tolist()]
    expected = as_lists(rank_by_vectors(users, items, targets, cosine=cosine))
    got = rank_among_by_vectors(users, items.numpy(), targets, np.stack(others), cosine)
    assert as_lists(got) == expected
    everywhere(monkeypatch, "PAIR_ELEMENTS", 299 * 96 * 5)
    again = rank_among_by_vectors(users, items, targets, np.stack(others), cosine)
    assert as_lists(again) == expected
    scores = users @ items.T
    among = count_ranks_among(scores, targets, np.stack(others))
    assert as_lists(among) == as_lists(count_ranks(scores, targets))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Evaluator().compute(), "no users were ranked"),
        (lambda: Evaluator(ties="lucky"), "ties is 'lucky', expected one of expected, pess"),
        (lambda: Evaluator(ks=(10, 0)), r"ks are \[10, 0\]"),
        (lambda: Evaluator(ks=(10, 10)), r"ks are \[10, 10\]"),
        (lambda: Evaluator().update([1, 2], [3, 4], ranks_of([0])), "user_ids have length 2"),
        (lambda: Evaluator().update([1], [3, 4], ranks_of([0])), "targets have length 2"),
        (lambda: ranks_of([99], tied=1), "row 0 has 99 items above and 1 tied of 100"),
        (lambda: ranks_of([-1]), "row 0 has -1 items above"),
        (lambda: TargetRanks(np.zeros(2, int), np.zeros(1, int), np.ones(2, int)), "tied have le"),
    ],
)
def test_what_makes_no_sense_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
