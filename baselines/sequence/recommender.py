"""A sequence model around its network: item vectors, loss, ranking.

Shapes: B sequences, T items laid end to end, P predictions, N items, D hidden, K negatives.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from baselines.sequence.candidates import candidate_scores
from baselines.sequence.collators import ItemSequences, met_before
from baselines.sequence.item_table import ItemTable
from baselines.sequence.losses import (
    ItemSampler,
    bpr_max_loss,
    log_expected_count,
    log_inclusion,
    top1_max_loss,
)
from baselines.settings import SequenceSettings
from recformer.data.batches import TrainBatch
from recformer.evaluation.additions import Additions
from recformer.evaluation.recommender import VectorRecommender
from recformer.models.losses import (
    full_softmax_loss,
    gbce_loss,
    mean_over_processes,
    sample_negatives,
    scores_of_all,
    softmax_loss_with_terms,
)


@dataclass(frozen=True)
class Objective:
    """Scores of predictions and the loss that they are trained on.

    Attributes:
        loss: `softmax` over all items; `sampled_softmax` over the target and sampled items; `bce`,
            binary cross-entropy with sampled items; `gbce`, its generalised form (gSASRec);
            `bpr_max` and `top1_max`, ranking losses over sampled items (GRU4Rec); `in_batch`,
            softmax over the items that are targets somewhere in the batch (InfoNCE).
        num_negatives: sampled items a prediction, never its target.
        calibration: t of gBCE.
        temperature: scores are divided by it.
        cosine: scores are cosines, not dot products.
        hard_negatives: with `in_batch`: this many items whose texts are most like the target's are
            candidates too.
        history_term: items that stand before a prediction have a score of their own.
        negative_power: items are sampled in proportion to their interactions to this power.
        logq: scores of sampled items are corrected by how likely they are sampled.
        label_smoothing: e of the targets (1 - e) one-hot + e / candidates (Szegedy et al., CVPR
            2016, section 7), with a softmax.
    """

    loss: str = SequenceSettings.loss
    num_negatives: int = SequenceSettings.num_negatives
    calibration: float = SequenceSettings.gbce_t
    temperature: float = SequenceSettings.temperature
    cosine: bool = SequenceSettings.cosine
    hard_negatives: int = SequenceSettings.hard_negatives
    history_term: bool = SequenceSettings.history_term
    negative_power: float = SequenceSettings.negative_power
    logq: bool = SequenceSettings.logq
    label_smoothing: float = SequenceSettings.label_smoothing

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
            settings.negative_power,
            settings.logq,
            settings.label_smoothing,
        )


class SequenceNetwork(nn.Module, ABC):
    """The network inside a `SequenceRecommender`.

    Attributes:
        bidirectional: whether it is trained to fill in items, from both sides.
        hides_items: whether these have a vector of their own in place of the item's.
    """

    bidirectional: bool
    hides_items: bool = True

    @abstractmethod
    def forward(self, vectors: Tensor, offsets: Tensor) -> Tensor:
        """Hidden states (T, D) of item vectors (T, D), sequences beginning at offsets (B+1,)."""

    def predictions(self, vectors: Tensor, sequences: ItemSequences) -> Tensor:
        """Hidden states (P, D) at `sequences.predict`, of vectors (T, D)."""
        return self(vectors, sequences.offsets)[sequences.predict]


class SequenceRecommender(nn.Module, VectorRecommender[ItemSequences]):
    """A sequence model: a network over item vectors, its loss and its ranking.

    Args:
        network: from item vectors to predictions.
        inputs: item vectors that the network reads.
        objective: the loss.
        outputs: item vectors that predictions are scored with; None: `inputs`.
        similar_items: int64 (N, hard_negatives), for the objective that wants them.
        item_counts: (N,) training interactions, for the objectives that sample by them.
        input_features: makes input vectors (T, D) of item vectors (T, D) and the features of their
            places, `ItemSequences.features`; None: the network reads the item vectors.
    """

    similar_items: Tensor
    item_shares: Tensor

    def __init__(
        self,
        network: SequenceNetwork,
        inputs: ItemTable,
        objective: Objective,
        hidden_size: int,
        outputs: ItemTable | None = None,
        similar_items: Tensor | None = None,
        item_counts: Tensor | None = None,
        input_features: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.network = network
        self.inputs = inputs
        self.input_features = input_features
        self.outputs = outputs
        self.objective = objective
        if network.bidirectional and network.hides_items:
            self.hidden_item = nn.Parameter(torch.randn(hidden_size) * 0.02)
        if objective.history_term:
            self.history_factor = nn.Parameter(torch.tensor(0.5))
            self.history_bias = nn.Parameter(torch.zeros(()))
        if similar_items is not None:
            self.register_buffer("similar_items", similar_items, persistent=False)
        if objective.negative_power:
            assert item_counts is not None
            self.sampler = ItemSampler(item_counts, objective.negative_power)
        if objective.logq and objective.loss == "in_batch":
            assert item_counts is not None
            shares = item_counts / item_counts.sum()
            self.register_buffer("item_shares", shares, persistent=False)

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
        if self.network.bidirectional and self.network.hides_items:
            vectors = torch.where((items == num_items)[:, None], self.hidden_item, vectors)
        return vectors

    def predictions(self, sequences: ItemSequences) -> Tensor:
        """Hidden states (P, D) at `sequences.predict`."""
        return self.network.predictions(self.embed(sequences), sequences)

    def training_loss(self, batch: TrainBatch[ItemSequences]) -> Tensor | dict[str, Tensor]:
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
            return self._softmax_loss(users, labels)
        if objective.loss == "in_batch":
            return self._in_batch_loss(users, labels)
        if negatives is None:
            negatives = self._negatives(labels)
        candidates = torch.cat([labels[:, None], negatives], dim=1)  # (P, 1 + K)
        if candidates.numel() < scored.num_trained:  # of a huge catalogue only what is asked for
            ids, candidates = candidates.unique(return_inverse=True)
            table = scored(ids)
        else:
            table = scored.all()
        scores = candidate_scores(*self._sides(users, table), candidates)
        positive, others = scores[:, 0], scores[:, 1:]
        if objective.loss == "sampled_softmax":
            if objective.logq and self._sampled:
                scores = torch.cat([scores[:, :1], others - self._logq(labels, negatives)], dim=1)
            truth = torch.zeros_like(labels)
            return F.cross_entropy(scores, truth, label_smoothing=objective.label_smoothing)
        if objective.loss == "bpr_max":
            return bpr_max_loss(positive, others)
        if objective.loss == "top1_max":
            return top1_max_loss(positive, others)
        calibration = objective.calibration if objective.loss == "gbce" else 0.0
        return gbce_loss(positive, others, scored.num_trained, calibration)

    @property
    def _sampled(self) -> bool:
        """Whether negatives are drawn at all: of a small catalogue they are all other items."""
        return self.objective.num_negatives < self.scored.num_trained - 1

    def _negatives(self, labels: Tensor) -> Tensor:
        """Items (P, K) sampled for labels (P,); each other item once where there are no more."""
        count, others = self.objective.num_negatives, self.scored.num_trained - 1
        if self._sampled and self.objective.negative_power:
            return self.sampler(labels, count)
        if self._sampled:
            return sample_negatives(labels, others + 1, count)
        every = torch.arange(others, device=labels.device)
        return every + (every >= labels[:, None])

    def _logq(self, labels: Tensor, negatives: Tensor) -> Tensor:
        """Correction that is subtracted from the scores of negatives (P, K)."""
        if self.objective.negative_power:
            probability = self.sampler.log_probability(labels, negatives)
        else:
            probability = (
                torch.full_like(negatives, self.scored.num_trained - 1).float().log().neg()
            )
        return log_expected_count(probability, negatives.shape[1])

    def _softmax_loss(self, users: Tensor, labels: Tensor) -> Tensor:
        objective, table = self.objective, self.scored.all()
        loss = full_softmax_loss(
            users, table, labels, objective.temperature, cosine=objective.cosine
        )
        if objective.label_smoothing:
            # Mean over candidates of their cross-entropies, less the target's: the sum of
            # exponentials is the same, so that only mean scores are needed.
            users, table = self._sides(users, table)
            target = (users * table[labels]).sum(dim=1)
            mean = (users * table.mean(dim=0)).sum(dim=1)  # no product: in 16 bits under autocast
            loss = loss + objective.label_smoothing * (target - mean).mean()
        return loss

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
        places = places[: len(labels)]
        objective = self.objective
        if not (objective.logq or objective.label_smoothing):
            return full_softmax_loss(
                users, self.scored(ids), places, objective.temperature, cosine=objective.cosine
            )
        scores = scores_of_all(users, self.scored(ids), objective.temperature, objective.cosine)
        if objective.logq:
            corrected = scores - log_inclusion(self.item_shares[ids], max(1, len(labels) - 1))
            target = F.one_hot(places, len(ids)).bool()
            scores = torch.where(target, scores, corrected)
        return F.cross_entropy(scores, places, label_smoothing=objective.label_smoothing)

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
