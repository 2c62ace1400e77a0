"""Item vectors of sequence models: from ids, texts, or both.

    id        a learned vector an item
    frozen    text vectors, projected; nothing is learned an item, so unseen items have vectors too
    init      a learned vector an item that starts as its text vector, projected
    add       a learned vector an item plus the projected text vector
    codes     the sum of the learned vectors of the item's semantic codes

Shapes: N items, H text vector, D hidden, L code levels, any shape S of item ids.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor, nn
from torch.nn import functional as F

from baselines.sequence.features import FeatureAggregation
from recformer.files import UserError

KINDS = ("id", "frozen", "init", "add", "codes")


class ItemTable(nn.Module):
    """Vectors of all items.

    Args:
        num_items: N.
        hidden_size: D.
        kind: one of `KINDS`.
        text_vectors: (N, H), for `frozen`, `init` and `add`.
        codes: int64 (N, L), for `codes`.
        projection_layers: linear layers of the projection, GELU between them.
        num_trained: items from here on are new: nobody met them yet, so that training does not
            know them; None: there are none.
        features: of the items, which become part of their vectors; None: there are none.
    """

    text_vectors: Tensor

    def __init__(
        self,
        num_items: int,
        hidden_size: int,
        kind: str = "id",
        text_vectors: np.ndarray | None = None,
        codes: np.ndarray | None = None,
        projection_layers: int = 2,
        num_trained: int | None = None,
        features: FeatureAggregation | None = None,
    ) -> None:
        super().__init__()
        self.features = features
        self.num_trained = num_items if num_trained is None else num_trained
        self.kind = kind
        self.num_items = num_items
        self._kept: Tensor | None = None
        if kind in ("id", "add"):
            self.item_embedding = nn.Embedding(num_items, hidden_size)
            nn.init.xavier_normal_(self.item_embedding.weight)
        if kind in ("frozen", "init", "add"):
            assert text_vectors is not None
            vectors = torch.from_numpy(np.array(text_vectors, dtype=np.float32))
            # Entries of about 1, as a LayerNorm gives them: of length 1 they would be a twentieth.
            vectors = vectors * (vectors.shape[1] ** 0.5)
            if kind == "init":
                self.item_embedding = nn.Embedding.from_pretrained(vectors, freeze=False)
            else:  # not in checkpoints: they are in the store, and may be gigabytes
                self.register_buffer("text_vectors", vectors, persistent=False)
            sizes = [vectors.shape[1], *[hidden_size] * projection_layers]
            layers: list[nn.Module] = []
            for into, out in pairwise(sizes):
                layers += [nn.Linear(into, out), nn.GELU()]
            self.projection = nn.Sequential(*layers[:-1])
        if kind == "codes":
            assert codes is not None
            self.code_embedding = CodeItemEmbedding(codes, codes.max(axis=0) + 1, hidden_size)

    def forward(self, item_ids: Tensor) -> Tensor:
        """Vectors (S, D) of item ids (S)."""
        vectors = self._without_features(item_ids)
        if self.features is None:
            return vectors
        flat = self.features(vectors.flatten(0, -2), item_ids.flatten())
        return flat.reshape(vectors.shape)

    def _without_features(self, item_ids: Tensor) -> Tensor:
        if self.kind == "codes":
            return self.code_embedding(item_ids)
        if self.kind == "id":
            return self.item_embedding(item_ids)
        if self.kind == "init":
            return self.projection(self.item_embedding(item_ids))
        projected = self.projection(self.text_vectors[item_ids])
        return projected + self.item_embedding(item_ids) if self.kind == "add" else projected

    def all(self) -> Tensor:
        """Vectors (N, D) of all items in id order; without gradients computed once an evaluation.

        In training those of the items that training knows, the first `num_trained`.

        What is kept is dropped as soon as the module goes into training mode.
        """
        count = self.num_trained if self.training else self.num_items
        if self.kind == "id" and self.features is None:
            weight = self.item_embedding.weight
            return weight if count == self.num_items else weight[:count]
        if self.training or torch.is_grad_enabled():
            return self(torch.arange(count, device=self._device()))
        if self._kept is None:
            ids = torch.arange(self.num_items, device=self._device())
            self._kept = torch.cat([self(part) for part in ids.split(100_000)])
        return self._kept

    def _device(self) -> torch.device:
        return next(self.parameters()).device

    def train(self, mode: bool = True) -> ItemTable:
        self._kept = None
        return super().train(mode)

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        self._kept = None  # it would stay on the old device
        return super()._apply(*args, **kwargs)

    def _load_from_state_dict(self, *args: Any) -> None:
        self._kept = None
        super()._load_from_state_dict(*args)


def nearest_items(vectors: np.ndarray, count: int, chunk_size: int | None = None) -> np.ndarray:
    """The `count` most similar other items of each item by cosine, int64 (N, count).

    Their scores are computed `chunk_size` items at a time; by default as many as make 32 MB.
    """
    table = F.normalize(torch.from_numpy(np.array(vectors, dtype=np.float32)), dim=-1)
    rows = []
    for part in torch.arange(len(table)).split(chunk_size or max(1, 2**23 // len(table))):
        scores = table[part] @ table.T  # (C, N)
        scores[torch.arange(len(part)), part] = -torch.inf
        rows.append(scores.topk(count, dim=1).indices)
    return torch.cat(rows).numpy()


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
