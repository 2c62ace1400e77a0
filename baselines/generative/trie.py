"""The prefixes of all items' code sequences, as arrays: which code may follow which.

Nodes are numbered level by level from the root, 0, and within a level in the order of their
prefixes, so that the children of a node are neighbours and those of the next node follow. One
increasing array says where each node's children begin; the last level's nodes are the items.
A lookup is a gather, for all beams of all users at once. Memory is linear in the number of nodes,
at most 16 bytes for each code of each item, whatever the sizes of the codebooks.

Shapes: N items, L codes of an item, Q nodes of all levels, M children of a level's widest node.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor, nn
from torch.nn import functional as F

from recformer.files import UserError


class CodeTrie(nn.Module):
    """A trie over the items' code sequences. It has no parameters; `.to` moves its arrays.

    Args:
        codes: integers (N, L) of 0 or more, one row an item, no two rows alike. They may be codes
            or tokens of a model: the trie only compares them.

    Attributes:
        num_levels: L.
        level_starts: L + 2 numbers, first node of each level from 0 to L, and Q.
        widths: L numbers; most children that a node of level l has.
        codes: int64 (Q,), the last code of each node's prefix; 0 for the root.
        first_child: int64 (Q - N + 1,), first child of each node above the last level, and Q.
        items: int64 (N,), items in the order of the last level's nodes.

    Raises:
        UserError: wrong shape, type or sign, or two items with the same codes.
    """

    codes: Tensor
    first_child: Tensor
    items: Tensor

    def __init__(self, codes: ArrayLike) -> None:
        super().__init__()
        array = np.asarray(codes)
        if array.ndim != 2 or 0 in array.shape or array.dtype.kind not in "iu":
            raise UserError(
                f"codes have shape {array.shape} and type {array.dtype}, expected integers "
                "(items, levels), at least one of each"
            )
        if array.min() < 0:
            raise UserError(f"item {int(array.min(1).argmin())} has a negative code")
        order = np.lexsort(array.T[::-1])  # by first code, then second, …
        table = array[order].astype(np.int64)
        # A node of level l begins wherever the first l codes differ from those of the row before.
        differs = np.logical_or.accumulate(table[1:] != table[:-1], axis=1)
        same = np.flatnonzero(~differs[:, -1])
        if len(same):
            one, other = order[same[0]], order[same[0] + 1]
            raise UserError(
                f"items {one} and {other} have the same codes {array[one].tolist()}; every item "
                "needs its own"
            )
        begins = np.concatenate([np.ones((1, table.shape[1]), bool), differs])  # (N, L)
        num_nodes = [1, *begins.sum(axis=0).tolist()]
        self.num_levels = table.shape[1]
        self.level_starts = np.concatenate([[0], np.cumsum(num_nodes)]).tolist()
        # First children of level l: the nodes of level l + 1 whose row also begins one of level l.
        first = [np.ones(1, np.int64)]
        for level in range(1, self.num_levels):
            children = begins[:, level - 1][begins[:, level]]
            first.append(self.level_starts[level + 1] + np.flatnonzero(children))
        first_child = np.concatenate([*first, [self.level_starts[-1]]])
        counts = np.diff(first_child)
        self.widths = [
            int(counts[start:stop].max())
            for start, stop in zip(self.level_starts, self.level_starts[1:-1])
        ]
        last = [table[begins[:, level], level] for level in range(self.num_levels)]
        self.register_buffer("codes", torch.from_numpy(np.concatenate([[0], *last])), False)
        self.register_buffer("first_child", torch.from_numpy(first_child), False)
        self.register_buffer("items", torch.from_numpy(order), False)

    def num_nodes(self, level: int) -> int:
        """Prefixes of `level` codes: 1 at level 0, N at level L."""
        return self.level_starts[level + 1] - self.level_starts[level]

    def children_of(self, nodes: Tensor, level: int) -> tuple[Tensor, Tensor]:
        """Children of nodes of one level.

        Args:
            nodes: int64, any shape, all of `level`.
            level: 0 .. L - 1.

        Returns:
            Node ids, int64 (..., M), padded with copies of the last child, and a mask, bool
            (..., M), True where a child stands and False at the padding.
        """
        slot = torch.arange(self.widths[level], device=nodes.device)
        start = self.first_child[nodes]  # (...)
        count = self.first_child[nodes + 1] - start
        real = slot < count[..., None]  # (..., M)
        return start[..., None] + torch.minimum(slot, count[..., None] - 1), real

    def open_nodes(self, excluded: Tensor) -> list[Tensor]:
        """Prefixes with an item left under them, for each user.

        Args:
            excluded: bool (B, N), items that are out.

        Returns:
            For each level 1 .. L bool (B, nodes of the level), in the order of the nodes.
        """
        levels = [~excluded[:, self.items]]
        for level in range(self.num_levels - 1, 0, -1):
            start, stop = self.level_starts[level : level + 2]
            begin = self.first_child[start : stop + 1] - stop  # among the next level's nodes
            before = F.pad(levels[0].cumsum(1), (1, 0))  # open ones before each of them
            levels.insert(0, before[:, begin].diff(dim=1) > 0)
        return levels

    def parents_of(self, nodes: Tensor) -> Tensor:
        """The node above each node but the root, int64 of the same shape."""
        return torch.searchsorted(self.first_child, nodes, right=True) - 1

    def items_of(self, nodes: Tensor) -> Tensor:
        """The item of each node of the last level, int64 of the same shape."""
        return self.items[nodes - self.level_starts[-2]]
