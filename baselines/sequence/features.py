"""Item and interaction features beside the item vectors, as Transformers4Rec joins them.

Every feature becomes a vector: a category's learned row, a list's mean row, a number's projection
or soft one-hot; layer-normed, and in training dropped as a whole now and then, or swapped with
another place's (de Souza Pereira Moreira et al., RecSys 2021, section 3.1 and appendix A). Then

    concat    W [v; f1; f2; …] + b         v the item vector, each f of a size of its own
    sum       v + f1 + f2 + …              each f as wide as v
    product   v * (1 + f1 + f2 + …)        likewise; without features the item vector

Features of items are part of the item vector wherever it stands, also where predictions are scored
with it, so that an item nobody met yet has a vector that says something. Those of interactions are
read only.

Shapes: V places (items, or interactions of the folder), S of them asked for, D hidden.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from recformer.data.features import MISSING, Encoded

AGGREGATIONS = ("concat", "sum", "product")


def embedding_size(categories: int, hidden_size: int) -> int:
    """Width of a table of categories: 8 x the fourth root of their number, at most `hidden_size`.

    Transformers4Rec's rule (`get_embedding_sizes_from_schema`) with a larger multiplier: its 2
    leaves 1,000 categories 12 numbers.
    """
    return max(1, min(hidden_size, round(8 * categories**0.25)))


class FeatureVector(nn.Module):
    """Vectors of one feature.

    Args:
        encoded: its values.
        size: of the vectors.
        bins: soft one-hot of a number over so many learned rows; 0: a projection.
    """

    values: Tensor
    present: Tensor
    offsets: Tensor

    def __init__(self, encoded: Encoded, size: int, bins: int) -> None:
        super().__init__()
        self.kind = encoded.feature.kind
        # Not in checkpoints: they are in the folder.
        self.register_buffer("values", torch.from_numpy(encoded.values), persistent=False)
        if encoded.present is not None:
            self.register_buffer("present", torch.from_numpy(encoded.present), persistent=False)
        if encoded.offsets is not None:
            self.register_buffer("offsets", torch.from_numpy(encoded.offsets), persistent=False)
        if self.kind == "float":
            self.bins = nn.Linear(1, bins or size)
            if bins:
                self.rows = nn.Parameter(torch.randn(bins, size) * 0.05)
            self.missing = nn.Parameter(torch.zeros(size))
            self.soft = bins > 0
        else:
            self.table = nn.Embedding(encoded.num_rows, size)
            nn.init.normal_(self.table.weight, std=0.05)
            # What is missing or unknown says nothing until it is trained.
            nn.init.zeros_(self.table.weight[: MISSING + 2])
        # Item vectors begin small too: of size 1 features would drown them.
        self.norm = nn.LayerNorm(size)
        nn.init.constant_(self.norm.weight, 0.1)

    def forward(self, places: Tensor) -> Tensor:
        """Vectors (S, size) of places (S,)."""
        if self.kind == "cat":
            vectors = self.table(self.values[places])
        elif self.kind == "float":
            numbers = self.bins(self.values[places][:, None])
            if self.soft:  # PLR-like soft one-hot (Transformers4Rec's SoftEmbedding)
                numbers = numbers.softmax(dim=1) @ self.rows
            vectors = torch.where(self.present[places][:, None], numbers, self.missing)
        else:
            vectors = self._means(places)
        return self.norm(vectors)

    def _means(self, places: Tensor) -> Tensor:
        """Means of the rows of each list; the row of what is missing where it is empty."""
        begins = self.offsets[places]
        lengths = self.offsets[places + 1] - begins
        owner = torch.repeat_interleave(lengths)
        ends = lengths.cumsum(0)
        within = torch.arange(len(owner), device=places.device) - (ends - lengths)[owner]
        rows = self.table(self.values[begins[owner] + within])
        sums = rows.new_zeros(len(places), rows.shape[1]).index_add(0, owner, rows)
        empty = (lengths == 0)[:, None]
        means = sums / lengths.clamp(min=1)[:, None]
        return torch.where(empty, self.table.weight[MISSING], means)


class FeatureAggregation(nn.Module):
    """Item vectors with the features of their places.

    Args:
        features: one or more, all of items or all of interactions.
        hidden_size: D.
        how: one of `AGGREGATIONS`.
        bins: see `FeatureVector`.
        dropout: probability that a feature of a place is left out in training; the others grow by
            1 / (1 - dropout).
        swap_noise: probability that a feature of a place is that of another place of the batch in
            training.
    """

    def __init__(
        self,
        features: Sequence[Encoded],
        hidden_size: int,
        how: str,
        bins: int = 0,
        dropout: float = 0.0,
        swap_noise: float = 0.0,
    ) -> None:
        super().__init__()
        self.how, self.dropout, self.swap_noise = how, dropout, swap_noise
        sizes = [
            embedding_size(max(one.feature.distinct, 1), hidden_size)
            if how == "concat" and one.feature.kind != "float"
            else (min(16, hidden_size) if how == "concat" else hidden_size)
            for one in features
        ]
        self.vectors = nn.ModuleList(
            FeatureVector(one, size, bins) for one, size in zip(features, sizes, strict=True)
        )
        if how == "concat":
            self.projection = nn.Linear(hidden_size + sum(sizes), hidden_size)
            with torch.no_grad():  # it starts as the item vector, to which features come
                self.projection.weight[:, :hidden_size] = torch.eye(hidden_size)
                self.projection.bias.zero_()

    def forward(self, items: Tensor, places: Tensor) -> Tensor:
        """Item vectors (S, D) at places (S,) -> (S, D)."""
        found = [self._noisy(vector, places) for vector in self.vectors]
        if self.how == "concat":
            return self.projection(torch.cat([items, *found], dim=1))
        total = torch.stack(found).sum(dim=0)
        return items + total if self.how == "sum" else items * (1 + total)

    def _noisy(self, vector: nn.Module, places: Tensor) -> Tensor:
        if not self.training:
            return vector(places)
        if self.swap_noise:
            other = places[torch.randint(len(places), (len(places),), device=places.device)]
            swapped = torch.rand(len(places), device=places.device) < self.swap_noise
            places = torch.where(swapped, other, places)
        found = vector(places)
        if self.dropout:
            kept = torch.rand(len(places), 1, device=places.device) >= self.dropout
            found = found * kept / (1 - self.dropout)
        return found


class InteractionFeatures(FeatureAggregation):
    """Features of interactions at the places of a batch; `SequenceRecommender.embed` calls it."""

    def forward(self, items: Tensor, features: tuple[Tensor, ...]) -> Tensor:  # type: ignore[override]
        """Item vectors (T, D), and the interaction that each of them is, (T,); -1 where it is none,
        a place that is to be filled in."""
        (places,) = features
        joined = super().forward(items, places.clamp(min=0))
        return torch.where((places >= 0)[:, None], joined, items)
