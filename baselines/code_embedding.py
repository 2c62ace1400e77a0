"""Dense use of semantic ids: the vector of an item is the sum of the vectors of its codes.

Shapes: N items, L codes of an item, D hidden.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor, nn
from torch.nn import functional as F

from recformer.files import UserError


class CodeItemEmbedding(nn.Module):
    """Item vectors as sums over levels of learned code vectors, in place of one vector an item.

    Items that share codes share what is learned of them, and an item never met has a vector.

    Args:
        codes: integers (N, L), row i the codes of item i.
        codebook_size: L numbers, how many codes each level may have.
        hidden_size: D.

    Raises:
        UserError: a code is outside its codebook.
    """

    rows: Tensor

    def __init__(self, codes: ArrayLike, codebook_size: Sequence[int], hidden_size: int) -> None:
        super().__init__()
        table, sizes = np.asarray(codes), np.array(codebook_size)
        if table.ndim != 2 or sizes.shape != table.shape[1:]:
            raise UserError(
                f"codes have shape {table.shape} and there are {len(sizes)} codebooks, expected "
                "codes (items, levels) and a codebook a level"
            )
        if ((table < 0) | (table >= sizes)).any():
            raise UserError(f"codes outside their codebooks, whose sizes are {sizes.tolist()}")
        rows = table.astype(np.int64) + np.cumsum(sizes) - sizes
        self.register_buffer("rows", torch.from_numpy(rows), persistent=False)  # (N, L)
        self.weight = nn.Parameter(torch.empty(int(sizes.sum()), hidden_size))
        # The sum of L code vectors then varies as an item's own vector of this deviation would.
        nn.init.normal_(self.weight, std=0.02 / len(sizes) ** 0.5)

    def forward(self, item_ids: Tensor | None = None) -> Tensor:
        """The vectors of items, (S, D) for ids of any shape S; None: of all, (N, D)."""
        rows = self.rows if item_ids is None else self.rows[item_ids]  # (S, L)
        vectors = F.embedding_bag(rows.reshape(-1, rows.shape[-1]), self.weight, mode="sum")
        return vectors.reshape(*rows.shape[:-1], -1)
