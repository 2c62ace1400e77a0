"""Replaced item detection (ELECTRA: Clark et al., ICLR 2020, section 2).

The generator G fills in hidden items: p_G(x | place) = softmax over items of the scores, trained as
in masked modelling. Items drawn from it, x' ~ p_G, take the hidden places, and a discriminator D
says of every place whether its item is the original one:

    loss = loss_MLM(G) + weight * mean over all places of BCE(D(x', place), [x' != x])

An item that G got right counts as original; no gradient of D reaches G through the draws. The item
vectors are shared. ELECTRA weighs the second term by 50 and throws the generator away after
training. A recommender needs scores of items, which only the generator has: as in Transformers4Rec
(`rtd` of its paper and of hf4rec) G ranks, and D is there for what it teaches the shared weights.
There, too, one network is both by default (`rtd_tied_generator`), and the weight was searched from
1 to 50. Features of a replaced place stay those of the original, as there.

Shapes: B sequences, T items laid end to end, P predictions, N items, D hidden.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from baselines.sequence.collators import ItemSequences
from baselines.sequence.recommender import SequenceNetwork, SequenceRecommender
from recformer.data.batches import TrainBatch
from recformer.models.losses import CHUNK_ELEMENTS, mean_over_processes, scores_of_all


class ReplacedItemRecommender(SequenceRecommender):
    """A masked sequence model that is its own generator, with a discriminator.

    Args:
        discriminator_weight: of the second term.
        discriminator: its network; None: the generator's.
        arguments, options: of `SequenceRecommender`.
    """

    def __init__(
        self,
        *arguments: Any,
        discriminator_weight: float,
        discriminator: SequenceNetwork | None = None,
        **options: Any,
    ) -> None:
        super().__init__(*arguments, **options)
        self.discriminator_weight = discriminator_weight
        self.discriminator = discriminator
        hidden_size = len(self.hidden_item)
        # ELECTRA's head, of transformers' names and shapes
        self.discriminator_head = nn.Sequential(
            nn.Linear(hidden_size, hidden_size), nn.GELU(), nn.Linear(hidden_size, 1)
        )

    def training_loss(self, batch: TrainBatch[ItemSequences]) -> dict[str, Tensor]:
        """Both terms and their weighted sum; with several processes, means over all batches."""
        users = self.predictions(batch.history)
        generated = self.loss(users, batch.labels)
        drawn = self.drawn_items(users)
        detected = self.discriminator_loss(batch.history, batch.labels, drawn)
        generator = mean_over_processes(generated, len(batch.labels))
        discriminator = mean_over_processes(detected, len(batch.history.items))
        return {
            "loss": generator + self.discriminator_weight * discriminator,
            "generator_loss": generator,
            "discriminator_loss": discriminator,
        }

    @torch.no_grad()
    def drawn_items(self, users: Tensor) -> Tensor:
        """Item ids (P,) drawn from the softmax of the scores of predictions (P, D)."""
        table, objective = self.scored.all(), self.objective
        step = max(1, CHUNK_ELEMENTS // len(table))
        return torch.cat(
            [
                _drawn(scores_of_all(part, table, objective.temperature, objective.cosine))
                for part in users.split(step)
            ]
        )

    def discriminator_loss(self, history: ItemSequences, labels: Tensor, drawn: Tensor) -> Tensor:
        """Mean binary cross-entropy over all places.

        Args:
            history: sequences with hidden items at `history.predict`.
            labels: int64 (P,), the hidden items.
            drawn: int64 (P,), what stands in their places.
        """
        items = history.items.index_copy(0, history.predict, drawn)
        network = self.network if self.discriminator is None else self.discriminator
        hidden = network(self.embed(replace(history, items=items)), history.offsets)
        logits = self.discriminator_head(hidden)[:, 0]
        replaced = torch.zeros_like(logits)
        replaced[history.predict] = (drawn != labels).to(logits.dtype)
        return F.binary_cross_entropy_with_logits(logits, replaced)


def _drawn(scores: Tensor) -> Tensor:
    """One item (P,) a row of scores (P, N), by their softmax: one random number a row, not N."""
    ends = scores.softmax(dim=-1).cumsum(dim=-1, dtype=torch.float64)
    places = torch.rand(len(ends), 1, dtype=ends.dtype, device=ends.device) * ends[:, -1:]
    return torch.searchsorted(ends, places, right=True)[:, 0].clamp(max=ends.shape[1] - 1)
