"""Sparse scores are ranked and recommended from as the same scores written out."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse

from baselines.untrained.sparse_scores import (
    count_sparse_ranks,
    scaled_entries,
    top_sparse_items,
)
from recformer.evaluation.ranks import count_ranks
from recformer.evaluation.top_items import top_items


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.integers(0, 2**32 - 1), st.integers(1, 6), st.integers(1, 30), st.integers(1, 12))
def test_sparse_scores_are_those_of_the_full_matrix(seed, users, items, k) -> None:
    rng = np.random.default_rng(seed)
    full = rng.choice([0.0, 0.0, 0.0, 0.5, 1.0, 1 / 3, -0.5], (users, items))
    scores = sparse.csr_array(full)
    if rng.random() < 0.5 and scores.nnz:  # entries that are zero, and in no order
        scores.data[rng.integers(scores.nnz)] = 0.0
        full = scores.toarray()
        other = scores[:, ::-1].tocsr()
        scores = other[:, ::-1].tocsr()
    targets = rng.integers(0, items, users)
    count = int(rng.integers(0, 2 * items))
    pairs = rng.integers(0, users, count), rng.integers(0, items, count)
    for seen in (None, pairs):
        expected = count_ranks(torch.from_numpy(full), targets, seen)
        got = count_sparse_ranks(scores, targets, seen)
        assert got.above.tolist() == expected.above.tolist()
        assert got.tied.tolist() == expected.tied.tolist()
        assert got.num_candidates.tolist() == expected.num_candidates.tolist()
        expected_items, _ = top_items(torch.from_numpy(full), k, seen)
        assert top_sparse_items(scores, k, seen).tolist() == expected_items.tolist()
    raised = full.copy()
    raised[tuple(np.unique(np.stack(pairs), axis=1))] *= 1.7
    assert scaled_entries(scores, pairs, 1.7).toarray().tolist() == raised.tolist()
