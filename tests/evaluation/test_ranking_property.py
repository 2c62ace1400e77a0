"""Ranks and best items of one pass equal, bit for bit, what the scores of all pairs give."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from recformer.evaluation import exact, scan
from recformer.evaluation.exact import (
    TIE_TOLERANCE,
    bfloat16_units,
    item_norms,
    of_length_one,
    pair_scores,
)
from recformer.evaluation.ranking import rank_and_top_items, rank_by_vectors
from recformer.evaluation.top_items import top_items_by_vectors


@st.composite
def questions(draw):
    """Vectors with copies and near copies, hidden pairs and pairs with terms, of any size."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    users, items = draw(st.integers(1, 9)), draw(st.integers(1, 200))
    hidden = draw(st.sampled_from([1, 3, 8, 33]))
    spread = draw(st.sampled_from([1.0, 1e-3, 1e-6, 1e-8, 0.0]))
    scale = draw(st.sampled_from([1.0, 1e-12, 1e12]))
    table = rng.normal(size=(1, hidden)) + spread * rng.normal(size=(items, hidden))
    copies = rng.integers(0, items, items)
    some = rng.random(items) < draw(st.sampled_from([0.0, 0.5, 1.0]))
    table[some] = table[copies[some]]
    vectors = rng.normal(size=(users, hidden)) + draw(st.sampled_from([0.0, 3.0]))
    pairs, terms = rng.integers(0, 3 * users), rng.integers(0, 3 * users)
    seen = rng.integers(0, users, pairs), rng.integers(0, items, pairs)
    values = rng.choice([0.5, -0.5, 1e-9, 2.0**-24, 7e3], terms)
    return {
        "users": torch.from_numpy(vectors).float(),
        "items": torch.from_numpy(table * scale).float(),
        "targets": rng.integers(0, items, users),
        "seen": seen if draw(st.booleans()) else None,
        "additions": (rng.integers(0, users, terms), rng.integers(0, items, terms), values),
        "k": draw(st.integers(1, 12)),
        "chunk_size": draw(st.sampled_from([None, 1, 7, 64, 128])),
        "cosine": draw(st.booleans()),
        "block": draw(st.sampled_from([2, 512])),
    }


def by_the_book(question) -> tuple[list, list, list, list, np.ndarray]:
    """above, tied, candidates, best items and their scores, from the exact score of every pair."""
    users, items = question["users"], question["items"]
    vectors, lengths = of_length_one(users, 0)
    if question["cosine"]:
        lengths = torch.ones_like(lengths)
    count, size = len(users), len(items)
    scores = pair_scores(
        vectors.repeat_interleave(size, 0), items.repeat(count, 1), question["cosine"]
    ).reshape(count, size)
    terms = np.zeros((count, size))
    rows, cols, values = question["additions"]
    order = np.lexsort((values, cols, rows))
    for row, col, value in zip(rows[order], cols[order], values[order], strict=True):
        terms[row, col] += value
    scores = (scores + torch.from_numpy(terms) / lengths[:, None]).numpy()
    gone = np.zeros((count, size), bool)
    if question["seen"] is not None:
        gone[question["seen"]] = True
    above, tied, candidates, best = [], [], [], []
    found = np.full((count, question["k"]), -np.inf)
    for row, target in enumerate(question["targets"]):
        scale = 1.0
        if not question["cosine"]:
            target_vector = items[target].double()[None]
            scale = float(exact._ordered_norm(target_vector))
        others = ~gone[row]
        others[target] = False
        apart = scores[row, others] - scores[row, target]
        above.append(int((apart > scale * TIE_TOLERANCE).sum()))
        tied.append(int((abs(apart) <= scale * TIE_TOLERANCE).sum()))
        candidates.append(int(others.sum()) + 1)
        order = np.lexsort((np.arange(size), -scores[row]))
        order = order[~gone[row][order]][: question["k"]]
        best.append(order.tolist() + [-1] * (question["k"] - len(order)))
        found[row, : len(order)] = scores[row, order] * float(lengths[row])
    return above, tied, candidates, best, found


@settings(max_examples=50, deadline=None, derandomize=True)
@given(questions())
def test_one_pass_gives_what_all_pairs_give(question) -> None:
    users, items, seen = question["users"], question["items"], question["seen"]
    above, tied, candidates, best, found = by_the_book(question)
    with pytest.MonkeyPatch.context() as patched:
        for module in (exact, scan):
            patched.setattr(module, "USER_BLOCK", question["block"])
        options = {key: question[key] for key in ("chunk_size", "cosine", "additions")}
        ranks, top = rank_and_top_items(
            users, items, question["targets"], question["k"], seen, **options
        )
        alone = rank_by_vectors(users, items, question["targets"], seen, **options)
        for each in (ranks, alone):
            assert each.above.tolist() == above
            assert each.tied.tolist() == tied
            assert each.num_candidates.tolist() == candidates
        assert top.tolist() == best
        norms, units = item_norms(items), bfloat16_units(items)
        for known in ({}, {"norms": norms}, {"norms": norms, "units": units}):
            got = top_items_by_vectors(users, items, question["k"], seen, **known, **options)
            assert got[0].tolist() == best
            assert got[1].tolist() == found.tolist()
