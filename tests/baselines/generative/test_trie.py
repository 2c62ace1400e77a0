"""The trie against hand-made nodes and against Python sets of prefixes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from baselines.generative.trie import CodeTrie
from recformer.files import UserError

#  root 0 ─ 2 (node 1) ─ 0 (3) ─ 1 (7) item 3
#                      ─ 5 (4) ─ 0 (8) item 0, 4 (9) item 2
#         ─ 7 (node 2) ─ 1 (5) ─ 1 (10) item 4
#                      ─ 2 (6) ─ 0 (11) item 1
CODES = np.array([[2, 5, 0], [7, 2, 0], [2, 5, 4], [2, 0, 1], [7, 1, 1]])


def test_nodes_by_hand() -> None:
    trie = CodeTrie(CODES)
    assert trie.num_levels == 3
    assert trie.level_starts == [0, 1, 3, 7, 12]
    assert [trie.num_nodes(level) for level in range(4)] == [1, 2, 4, 5]
    assert trie.widths == [2, 2, 2]
    assert trie.codes.tolist() == [0, 2, 7, 0, 5, 1, 2, 1, 0, 4, 1, 0]
    assert trie.first_child.tolist() == [1, 3, 5, 7, 8, 10, 11, 12]
    assert trie.items.tolist() == [3, 0, 2, 4, 1]
    assert trie.items_of(torch.tensor([[8, 11], [7, 7]])).tolist() == [[0, 1], [3, 3]]
    assert trie.parents_of(torch.arange(1, 12)).tolist() == [0, 0, 1, 1, 2, 2, 3, 4, 4, 5, 6]


def test_children_by_hand() -> None:
    trie = CodeTrie(CODES)
    nodes, real = trie.children_of(torch.tensor([[3], [4]]), level=2)
    assert nodes.tolist() == [[[7, 7]], [[8, 9]]]
    assert real.tolist() == [[[True, False]], [[True, True]]]


def test_open_nodes_by_hand() -> None:
    excluded = torch.zeros(3, 5, dtype=torch.bool)
    excluded[0, [3, 0]] = True  # node 3 has no other item, node 4 has
    excluded[1, [4, 1]] = True  # all that is below node 2
    first, second, items = CodeTrie(CODES).open_nodes(excluded)
    assert first.tolist() == [[True, True], [True, False], [True, True]]
    assert second.tolist() == [[False, True, True, True], [True, True, False, False], [True] * 4]
    assert items.int().tolist() == [[0, 0, 1, 1, 1], [1, 1, 1, 0, 0], [1] * 5]


def test_one_item() -> None:
    trie = CodeTrie(np.array([[9, 0]]))
    assert (trie.level_starts, trie.widths) == ([0, 1, 2, 3], [1, 1])
    assert trie.codes.tolist() == [0, 9, 0]


@settings(max_examples=30)
@given(
    st.integers(1, 4).flatmap(
        lambda levels: st.sets(st.tuples(*[st.integers(0, 5)] * levels), min_size=1, max_size=40)
    ),
    st.randoms(use_true_random=False),
)
def test_against_a_set_of_prefixes(rows: set[tuple[int, ...]], random) -> None:
    items = sorted(rows)
    random.shuffle(items)
    trie = CodeTrie(np.array(items))
    prefix_of = {0: ()}  # node -> its prefix, walked from the root
    for level in range(trie.num_levels):
        nodes = torch.arange(trie.level_starts[level], trie.level_starts[level + 1])
        children, real = trie.children_of(nodes, level)
        for node, row, mask in zip(nodes.tolist(), children.tolist(), real.tolist()):
            found = [child for child, ok in zip(row, mask) if ok]
            expected = {p[level] for p in rows if p[:level] == prefix_of[node]}
            assert [trie.codes[child].item() for child in found] == sorted(expected)
            assert trie.parents_of(torch.tensor(found)).tolist() == [node] * len(found)
            assert set(row) == set(found)  # padding repeats a child of the same node
            for child in found:
                prefix_of[child] = (*prefix_of[node], trie.codes[child].item())
    leaves = torch.arange(*trie.level_starts[-2:])
    assert [prefix_of[node] for node in leaves.tolist()] == sorted(rows)
    assert [items[item] for item in trie.items_of(leaves).tolist()] == sorted(rows)


def test_a_thousand_items_under_one_prefix() -> None:
    codes = np.stack([np.zeros(1000, int), np.zeros(1000, int), np.arange(1000)[::-1]], axis=1)
    trie = CodeTrie(codes)
    assert trie.widths == [1, 1, 1000]
    assert trie.items.tolist() == list(range(999, -1, -1))


@pytest.mark.parametrize(
    ("codes", "message"),
    [
        (np.array([[1, 2], [3, 4], [1, 2]]), r"items 0 and 2 have the same codes \[1, 2\]"),
        (np.array([[1, 2], [0, -1]]), "item 1 has a negative code"),
        (np.array([1, 2]), r"shape \(2,\)"),
        (np.zeros((0, 3), int), r"shape \(0, 3\)"),
        (np.array([[0.5]]), "float64"),
    ],
)
def test_what_is_refused(codes: np.ndarray, message: str) -> None:
    with pytest.raises(UserError, match=message):
        CodeTrie(codes)
