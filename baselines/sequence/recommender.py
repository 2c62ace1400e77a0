"""A sequence model around its network: item vectors, loss, ranking.

Shapes: B sequences, T items laid end to end, P predictions, N items, D hidden, K negatives.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from baselines.sequence.collators import ItemSequences, met_before
from baselines.sequence.item_table import ItemTable
from baselines.settings import SequenceSettings
from recformer.data.batches import TrainBatch
from recformer.evaluation.additions import Additions
from recformer.evaluation.recommender import VectorRecommender
from recformer.models.losses import (
    candidate_scores,
    full_softmax_loss,
    gbce_loss,
    mean_over_processes,
    sample_negatives,
    softmax_loss_with_terms,
)


@dataclass(frozen=True)
class Objective:
    """Scores of predictions and the loss that they are trained on.

    Attributes:
        loss: `softmax` over all items; `sampled_softmax` over the target and sampled items; `bce`,
            binary cross-entropy with sampled items; `gbce`, its generalised form (gSASRec);
            `in_batch`, softmax over the items that are targets somewhere in the batch (InfoNCE).
        num_negatives: sampled items a prediction, uniform, never its target.
        calibration: t of gBCE.
        temperature: scores are divided by it.
        cosine: scores are cosines, not dot products.
        hard_negatives: with `in_batch`: this many items whose texts are most like the target's are
            candidates too.
        history_term: items that stand before a prediction have a score of their own.
    """

    loss: str = SequenceSettings.loss
    num_negatives: int = SequenceSettings.num_negatives
    calibration: float = SequenceSettings.gbce_t
    temperature: float = SequenceSettings.temperature
    cosine: bool = SequenceSettings.cosine
    hard_negatives: int = SequenceSettings.hard_negatives
    history_term: bool = SequenceSettings.history_term

    @classmethod
    def of(cls, settings: SequenceSettings) -> Objective:
        """The objective that a model's settings name."""
        return cls(
            settings.loss,
            settings.num_negatives,
            settings.gbce_t,
            settings.temperature,
            settings.cosine,
            settings.hard_negatives,
            settings.history_term,
        )


class SequenceNetwork(nn.Module, ABC):
    """The network inside a `SequenceRecommender`.

    Attributes:
        bidirectional: whether it is trained to fill in hidden items.
    """

    bidirectional: bool

    @abstractmethod
    def forward(self, vectors: Tensor, offsets: Tensor) -> Tensor:
        """Hidden states (T, D) of item vectors (T, D), sequences beginning at offsets (B+1,)."""


class SequenceRecommender(nn.Module, VectorRecommender[ItemSequences]):
    """A network over item vectors.

    Args:
        network: from item vectors to predictions.
        inputs: item vectors that the network reads.
        objective: the loss.
        outputs: item vectors that predictions are scored with; None: `inputs`.
        similar_items: int64 (N, hard_negatives), for the objective that wants them.
        input_features: makes input vectors (T, D) of item vectors (T, D) and the features of their
            places, `ItemSequences.features`; None: the network reads the item vectors.
    """

    similar_items: Tensor

    def __init__(
        self,
        network: SequenceNetwork,
        inputs: ItemTable,
        objective: Objective,
        hidden_size: int,
        outputs: ItemTable | None = None,
        similar_items: Tensor | None = None,
        input_features: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.network = network
        self.inputs = inputs
        self.input_features = input_features
        self.outputs = outputs
        self.objective = objective
        if network.bidirectional:
            self.hidden_item = nn.Parameter(torch.randn(hidden_size) * 0.02)
        if objective.history_term:
            self.history_factor = nn.Parameter(torch.tensor(0.5))
            self.history_bias = nn.Parameter(torch.zeros(()))
        if similar_items is not None:
            self.register_buffer("similar_items", similar_items, persistent=False)

    @property
    def scored(self) -> ItemTable:
        """The items that predictions are scored with."""
        return self.inputs if self.outputs is None else self.outputs

    def embed(self, sequences: ItemSequences) -> Tensor:
        """Input vectors (T, D) of the network: those of the items, with their features.

        A hidden item has one vector of its own, whatever its features.
        """
        items, num_items = sequences.items, self.inputs.num_items
        vectors = self.inputs(items.clamp(max=num_items - 1))
        if self.input_features is not None:
            vectors = self.input_features(vectors, sequences.features)
        if self.network.bidirectional:
            vectors = torch.where((items == num_items)[:, None], self.hidden_item, vectors)
        return vectors

    def predictions(self, sequences: ItemSequences) -> Tensor:
        """Hidden states (P, D) at `sequences.predict`."""
        return self.network(self.embed(sequences), sequences.offsets)[sequences.predict]

    def training_loss(self, batch: TrainBatch[ItemSequences]) -> Tensor:
        """Mean loss of the predictions of a batch; with several processes, of all their batches."""
        labels = batch.labels
        users = self.predictions(batch.history)
        if self.objective.history_term:
            loss = self._loss_with_history(users, labels, batch.history)
        else:
            loss = self.loss(users, labels)
        return mean_over_processes(loss, len(labels))

    def _loss_with_history(self, users: Tensor, labels: Tensor, history: ItemSequences) -> Tensor:
        users, table = self._sides(users, self.scored.all())
        return softmax_loss_with_terms(
            users, table, labels, met_before(history), self._rescored, scale=1.0
        )

    def _rescored(self, scores: Tensor, _places: Tensor) -> Tensor:
        return self.history_factor * scores + self.history_bias

    def loss(self, users: Tensor, labels: Tensor, negatives: Tensor | None = None) -> Tensor:
        """The objective.

        Args:
            users: (P, D) predictions.
            labels: (P,) item ids.
            negatives: (P, K) item ids; None: drawn.
        """
        objective, scored = self.objective, self.scored
        if objective.loss == "softmax":
            return full_softmax_loss(
                users, scored.all(), labels, objective.temperature, cosine=objective.cosine
            )
        if objective.loss == "in_batch":
            return self._in_batch_loss(users, labels)
        if negatives is None:
            negatives = self._negatives(labels)
        candidates = torch.cat([labels[:, None], negatives], dim=1)  # (P, 1 + K)
        if candidates.numel() < scored.num_items:  # of a huge catalogue only what is asked for
            ids, candidates = candidates.unique(return_inverse=True)
            table = scored(ids)
        else:
            table = scored.all()
        scores = candidate_scores(*self._sides(users, table), candidates)
        if objective.loss == "sampled_softmax":
            return F.cross_entropy(scores, torch.zeros_like(labels))
        calibration = objective.calibration if objective.loss == "gbce" else 0.0
        return gbce_loss(scores[:, 0], scores[:, 1:], scored.num_items, calibration)

    def _negatives(self, labels: Tensor) -> Tensor:
        """Items (P, K) sampled for labels (P,); each other item once where there are no more."""
        count, others = self.objective.num_negatives, self.scored.num_items - 1
        if count < others:
            return sample_negatives(labels, others + 1, count)
        every = torch.arange(others, device=labels.device)
        return every + (every >= labels[:, None])

    def _sides(self, users: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
        """Both sides of the scores, so that their products are the scores."""
        users, table = users.float(), table.float()
        if self.objective.cosine:
            users, table = F.normalize(users, dim=-1), F.normalize(table, dim=-1)
        return users / self.objective.temperature, table

    def _in_batch_loss(self, users: Tensor, labels: Tensor) -> Tensor:
        pool = labels
        if self.objective.hard_negatives:
            pool = torch.cat([labels, self.similar_items[labels].flatten()])
        ids, places = pool.unique(return_inverse=True)
        objective = self.objective
        return full_softmax_loss(
            users,
            self.scored(ids),
            places[: len(labels)],
            objective.temperature,
            cosine=objective.cosine,
        )

    def user_vectors(self, history: ItemSequences) -> Tensor:
        """The predictions (B, D) of histories."""
        return self.predictions(history)

    def item_vectors(self) -> Tensor:
        """The item vectors (N, D) that predictions are scored with."""
        return self.scored.all()

    def history_terms(self, history: ItemSequences, vectors: Tensor) -> Additions | None:
        if not self.objective.history_term:
            return None
        rows, items = met_before(history)
        table, users = self.scored.all()[items].double(), vectors[rows].double()
        if self.cosine:
            table, users = F.normalize(table, dim=-1), F.normalize(users, dim=-1)
        scores = (users * table).sum(dim=-1) / self.objective.temperature
        added = self._rescored(scores, rows) - scores
        return rows, items, added * self.objective.temperature

    @property
    def cosine(self) -> bool:
        return self.objective.cosine
