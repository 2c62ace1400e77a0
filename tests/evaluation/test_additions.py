"""Scores with terms added to single pairs: exact, and unmoved by batches, chunks and orders."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from recformer.evaluation import exact, ranking, scan
from recformer.evaluation import top_items as top_items_module
from recformer.evaluation.exact import TIE_TOLERANCE
from recformer.evaluation.ranking import rank_among_by_vectors, rank_by_vectors
from recformer.evaluation.ranks import TargetRanks
from recformer.evaluation.top_items import top_items_by_vectors

NUM_USERS, NUM_ITEMS = 24, 150


def as_lists(ranks: TargetRanks) -> list[list[int]]:
    return [ranks.above.tolist(), ranks.tied.tolist(), ranks.num_candidates.tolist()]


def everywhere(monkeypatch, name: str, value) -> None:
    for module in (exact, ranking, scan, top_items_module):
        if hasattr(module, name):
            monkeypatch.setattr(module, name, value)


def case(seed: int = 0):
    """Crowded vectors with copies; additions of every size to items of a history and to targets."""
    generator = torch.Generator().manual_seed(seed)
    items = torch.randn(NUM_ITEMS, 48, generator=generator) + 3
    items[60:80] = items[7]  # copies
    items[80:85] = items[7] * 2
    users = torch.randn(NUM_USERS, 48, generator=generator) + 3
    targets = torch.randint(0, NUM_ITEMS, (NUM_USERS,), generator=generator)
    targets[:6] = torch.tensor([7, 60, 79, 82, 0, 1])
    rng = np.random.default_rng(seed)
    rows, cols = rng.integers(0, NUM_USERS, 400), rng.integers(0, NUM_ITEMS, 400)
    values = rng.choice([0.3, -0.2, 1e-9, 1e-3, 40.0, 5e3], 400)
    rows[:4], cols[:4], values[:4] = [0, 0, 1, 4], [7, 60, 61, 0], [0.25, 0.25, 0.125, 0.5]
    return users, items, targets, (rows, cols, values)


def dense_scores(users, items, additions, cosine: bool) -> np.ndarray:
    """All scores in float64, each pair summed without rounding, for users of length 1."""
    users, items = users.double(), items.double()
    terms: dict[tuple[int, int], list[float]] = {}
    for row, col, value in zip(*additions, strict=True):
        terms.setdefault((int(row), int(col)), []).append(float(value))
    scores = np.empty((len(users), len(items)))
    for row, user in enumerate(users):
        length = float(user.norm())
        for col, item in enumerate(items):
            product = math.fsum((user * item).tolist()) / length
            term = math.fsum(terms.get((row, col), []))
            scores[row, col] = (
                product / float(item.norm()) + term if cosine else (product + term / length)
            )
    return scores


def dense_ranks(users, items, targets, additions, cosine, gone=()) -> list[list[int]]:
    scores = dense_scores(users, items, additions, cosine)
    norms = items.double().norm(dim=1).tolist()
    result: list[list[int]] = [[], [], []]
    for row, target in enumerate(targets.tolist()):
        out = {col for r, col in gone if r == row} - {target}
        others = [col for col in range(len(items)) if col not in out and col != target]
        apart = scores[row, others] - scores[row, target]
        tolerance = TIE_TOLERANCE * (1 if cosine else norms[target])
        result[0].append(int((apart > tolerance).sum()))
        result[1].append(int((np.abs(apart) <= tolerance).sum()))
        result[2].append(len(others) + 1)
    return result


def test_ranks_with_additions_by_hand():
    items = torch.tensor([[2.0, 0.0], [1.0, 1.0], [0.0, 5.0], [4.0, 4.0], [-1.0, 0.0]])
    users = torch.tensor([[1.0, 0.0], [0.0, 2.0], [0.0, 0.0]])
    targets = [1, 0, 3]
    # cosines: user 0: 1, .7, 0, .7, -1; user 1: 0, .7, 1, .7, 0; user 2: none
    additions = ([0, 0, 1, 1, 2, 2], [2, 4, 0, 4, 3, 0], [0.8, 1.0, 0.5, 0.5, 0.25, 0.25])
    # user 0: 1, .7, .8, .7, 0; user 1: .5, .7, 1, .7, .5; user 2: .25, 0, 0, .25, 0
    ranks = rank_by_vectors(users, items, targets, additions=additions)
    assert as_lists(ranks) == [[2, 3, 0], [1, 1, 1], [5, 5, 5]]
    # products: user 0: 2, 1, .8, 3, 0; user 1: .5, 2, 10, 6, .5; user 2 as before
    ranks = rank_by_vectors(users, items, targets, cosine=False, additions=additions)
    assert as_lists(ranks) == [[2, 3, 0], [0, 1, 1], [5, 5, 5]]
    # a seen item is no candidate, whatever is added to it; the target stays
    seen = ([0, 1, 1, 2], [2, 4, 0, 0])
    ranks = rank_by_vectors(users, items, targets, seen, additions=additions)
    assert as_lists(ranks) == [[1, 3, 0], [1, 0, 0], [4, 4, 4]]
    candidates = [[2, 3], [4, 1], [0, 1]]
    ranks = rank_among_by_vectors(users, items, targets, candidates, additions=additions)
    assert as_lists(ranks) == [[1, 1, 0], [1, 1, 1], [3, 3, 3]]


def test_top_items_with_additions_by_hand():
    items = torch.tensor([[2.0, 0.0], [1.0, 1.0], [0.0, 5.0], [4.0, 4.0], [-1.0, 0.0]])
    users = torch.tensor([[1.0, 0.0], [0.0, 2.0], [0.0, 0.0]])
    additions = ([0, 0, 1, 1, 2, 2], [2, 4, 0, 4, 3, 0], [0.8, 1.0, 0.5, 0.5, 0.25, 0.25])
    best, scores = top_items_by_vectors(users, items, 3, additions=additions)
    assert best.tolist() == [[0, 2, 1], [2, 1, 3], [0, 3, 1]]
    root = 0.5**0.5
    assert scores == pytest.approx(np.array([[1, 0.8, root], [1, root, root], [0.25, 0.25, 0]]))
    best, scores = top_items_by_vectors(users, items, 3, cosine=False, additions=additions)
    assert best.tolist() == [[3, 0, 1], [2, 3, 1], [0, 3, 1]]
    assert scores == pytest.approx(np.array([[4, 2, 1], [10, 8, 2], [0.25, 0.25, 0]]))
    seen = ([0, 0, 2], [2, 0, 0])
    best, scores = top_items_by_vectors(users, items, 5, seen, cosine=False, additions=additions)
    assert best.tolist() == [[3, 1, 4, -1, -1], [2, 3, 1, 0, 4], [3, 1, 2, 4, -1]]
    assert scores[0].tolist() == [4, 1, 0, -math.inf, -math.inf]


@pytest.mark.parametrize("cosine", [True, False])
@pytest.mark.parametrize("share", [-1.0, 2.0])  # a float64 product for all rows, for none
def test_ranks_with_additions_follow_their_definition(monkeypatch, share, cosine):
    users, items, targets, additions = case()
    everywhere(monkeypatch, "DENSE_SHARE", share)
    ranks = rank_by_vectors(users, items, targets, cosine=cosine, additions=additions)
    expected = dense_ranks(users, items, targets, additions, cosine)
    assert as_lists(ranks) == expected
    plain = as_lists(rank_by_vectors(users, items, targets, cosine=cosine))
    assert sum(a != b for a, b in zip(plain[0], expected[0], strict=True)) > 10
    if cosine:  # both sides of user 0's tie have .25 more; the other copies fell behind it
        assert ranks.tied[0] == 1
    rng = np.random.default_rng(5)
    gone = list(zip(rng.integers(0, NUM_USERS, 900), rng.integers(0, NUM_ITEMS, 900), strict=True))
    seen = tuple(np.array(side) for side in zip(*gone, strict=True))
    ranks = rank_by_vectors(users, items, targets, seen, 40, cosine, additions)
    assert as_lists(ranks) == dense_ranks(users, items, targets, additions, cosine, gone)


@pytest.mark.parametrize("cosine", [True, False])
def test_best_items_with_additions_follow_their_definition(monkeypatch, cosine):
    users, items, _, additions = case()
    rng = np.random.default_rng(1)
    seen = rng.integers(0, NUM_USERS, 500), rng.integers(0, NUM_ITEMS, 500)
    scores = np.round(dense_scores(users, items, additions, cosine), 12)  # copies score the same
    scores[seen] = -np.inf
    order = np.lexsort((np.broadcast_to(np.arange(NUM_ITEMS), scores.shape), -scores), axis=1)
    expected = order[:, :12].tolist()
    call = {"cosine": cosine, "additions": additions}
    best, values = top_items_by_vectors(users, items, 12, seen, **call)
    assert best.tolist() == expected
    lengths = 1 if cosine else users.double().norm(dim=1).numpy()[:, None]
    assert values == pytest.approx(np.take_along_axis(scores, order[:, :12], 1) * lengths, rel=1e-9)
    for chunk_size in (1, 11, 5000):
        again = top_items_by_vectors(users, items, 12, seen, chunk_size, **call)
        assert again[0].tolist() == expected
        assert again[1].tolist() == values.tolist()
    everywhere(monkeypatch, "USER_BLOCK", 5)
    everywhere(monkeypatch, "PAIR_ELEMENTS", 48 * 7)
    assert top_items_by_vectors(users, items, 12, seen, 40, **call)[0].tolist() == expected


@pytest.mark.parametrize("cosine", [True, False])
def test_batches_chunks_and_orders_do_not_move_a_rank_with_additions(monkeypatch, cosine):
    users, items, targets, (rows, cols, values) = case(seed=3)
    call = {"cosine": cosine, "additions": (rows, cols, values)}
    expected = as_lists(rank_by_vectors(users, items, targets, **call))
    for chunk_size in (1, 7, 149, 5000):
        assert (
            as_lists(rank_by_vectors(users, items, targets, None, chunk_size, **call)) == expected
        )
    for size in (1, 5, 23):
        got: list[list[int]] = [[], [], []]
        for start in range(0, NUM_USERS, size):
            mine = (rows >= start) & (rows < start + size)
            ranks = rank_by_vectors(
                users[start : start + size],
                items,
                targets[start : start + size],
                cosine=cosine,
                additions=(rows[mine] - start, cols[mine], values[mine]),
            )
            for column, part in zip(got, as_lists(ranks), strict=True):
                column.extend(part)
        assert got == expected
    shuffled = np.random.default_rng(0).permutation(len(rows))
    call["additions"] = rows[shuffled], cols[shuffled], torch.from_numpy(values[shuffled])
    order = torch.randperm(NUM_ITEMS, generator=torch.Generator().manual_seed(1))
    assert as_lists(rank_by_vectors(users, items, targets, **call)) == expected
    place = torch.empty_like(order)
    place[order] = torch.arange(NUM_ITEMS)
    call["additions"] = rows, place[torch.from_numpy(cols)], values
    assert as_lists(rank_by_vectors(users, items[order], place[targets], **call)) == expected
    everywhere(monkeypatch, "USER_BLOCK", 7)
    everywhere(monkeypatch, "PAIR_ELEMENTS", 48 * 5)
    assert as_lists(rank_by_vectors(users, items[order], place[targets], **call)) == expected


@pytest.mark.parametrize("cosine", [True, False])
def test_all_other_items_as_candidates_are_the_full_ranking_with_additions(cosine):
    users, items, targets, additions = case(seed=4)
    others = np.stack([np.delete(np.arange(NUM_ITEMS), target) for target in targets.tolist()])
    among = rank_among_by_vectors(users, items, targets, others, cosine, additions)
    full = rank_by_vectors(users, items, targets, cosine=cosine, additions=additions)
    assert as_lists(among) == as_lists(full)


def test_copies_with_the_same_addition_tie_and_with_another_do_not():
    items = torch.randn(1, 768, generator=torch.Generator().manual_seed(0)).repeat(6, 1)
    users = torch.randn(1, 768, generator=torch.Generator().manual_seed(1))
    rows, cols, third = [0, 0, 0, 0], [0, 1, 2, 2], 1 / 3
    additions = rows, cols, [third, third, third, 2.0**-22]
    ranks = rank_by_vectors(users, items, [0], additions=additions)
    assert as_lists(ranks) == [[1], [1], [6]]  # item 2 above, item 1 tied, 3 to 5 below
    additions = rows, cols, [third, third, third, 2.0**-24]  # below the tolerance of a tie
    assert as_lists(rank_by_vectors(users, items, [0], additions=additions)) == [[0], [2], [6]]


def test_no_additions_are_additions_of_nothing():
    users, items, targets, _ = case()
    nothing = (np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0))
    expected = as_lists(rank_by_vectors(users, items, targets))
    assert as_lists(rank_by_vectors(users, items, targets, additions=nothing)) == expected
    best = top_items_by_vectors(users, items, 5)
    again = top_items_by_vectors(users, items, 5, additions=nothing)
    assert best[0].tolist() == again[0].tolist()
    assert best[1].tolist() == again[1].tolist()


@pytest.mark.parametrize(
    ("additions", "message"),
    [
        (([24], [0], [1.0]), "rows of additions reach from 24 to 24"),
        (([0], [150], [1.0]), "items of additions reach from 150 to 150"),
        (([0, 1], [0], [1.0]), "items of additions have length 1, expected 2"),
        (([0, 1], [0, 1], [1.0]), r"values of additions have shape \(1,\), expected \(2,\)"),
        (([3], [5], [math.nan]), "item 5 for the user in row 3 is nan"),
        (([3], [5], [-math.inf]), "item 5 for the user in row 3 is -inf"),
    ],
)
def test_additions_that_make_no_sense_are_refused(additions, message):
    users, items, targets, _ = case()
    with pytest.raises(ValueError, match=message):
        rank_by_vectors(users, items, targets, additions=additions)
    with pytest.raises(ValueError, match=message):
        top_items_by_vectors(users, items, 5, additions=additions)
