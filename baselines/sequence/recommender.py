"""What every sequence model over items has around its network: item vectors, loss, ranking.

Shapes: B sequences, T items laid end to end, P predictions, N items, D hidden, K negatives.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from baselines.sequence.item_table import ItemTable
from recformer.evaluation.ranking import rank_among_by_vectors, rank_by_vectors
from recformer.evaluation.ranks import TargetRanks
from recformer.evaluation.top_items import top_items_by_vectors
from recformer.files import UserError
from recformer.models.losses import candidate_scores, full_softmax_loss, gbce_loss, sample_negatives

LOSSES = ("softmax", "sampled_softmax", "bce", "gbce", "in_batch")


@dataclass(frozen=True)
class Objective:
    """How predictions are scored and what they are trained on.

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
    """

    loss: str = "softmax"
    num_negatives: int = 256
    calibration: float = 0.75
    temperature: float = 1.0
    cosine: bool = False
    hard_negatives: int = 0

    def __post_init__(self) -> None:
        if self.loss not in LOSSES:
            raise UserError(f"--loss {self.loss}: expected one of {', '.join(LOSSES)}")
        if self.num_negatives < 1 or self.hard_negatives < 0:
            raise UserError("--num_negatives must be at least 1, --hard_negatives at least 0")
        if not self.temperature > 0:
            raise UserError(f"--temperature {self.temperature}: must be above 0")
        if not 0 <= self.calibration <= 1:
            raise UserError(f"--gbce_t {self.calibration}: must be from 0 to 1")
        if self.hard_negatives and self.loss != "in_batch":
            raise UserError(f"--hard_negatives goes with --loss in_batch, not {self.loss}")


class SequenceRecommender(nn.Module):
    """A network over item vectors as a `recformer.training.lit.Recommender`.

    Args:
        network: vectors (T, D) and offsets (B+1,) -> hidden states (T, D); `bidirectional` says
            whether it is trained to fill in hidden items.
        inputs: item vectors that the network reads.
        objective: the loss.
        outputs: item vectors that predictions are scored with; None: `inputs`.
        similar_items: int64 (N, hard_negatives), for the objective that wants them.
    """

    similar_items: Tensor

    def __init__(
        self,
        network: nn.Module,
        inputs: ItemTable,
        objective: Objective,
        hidden_size: int,
        outputs: ItemTable | None = None,
        similar_items: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.network = network
        self.inputs = inputs
        self.outputs = outputs
        self.objective = objective
        if network.bidirectional:
            self.hidden_item = nn.Parameter(torch.randn(hidden_size) * 0.02)
        if similar_items is not None:
            self.register_buffer("similar_items", similar_items, persistent=False)

    @property
    def scored(self) -> ItemTable:
        """The items that predictions are scored with."""
        return self.inputs if self.outputs is None else self.outputs

    def predictions(self, batch: dict[str, Any]) -> Tensor:
        """Hidden states (P, D) at `batch["predict"]`."""
        items, num_items = batch["items"], self.inputs.num_items
        if self.network.bidirectional:
            vectors = self.inputs(items.clamp(max=num_items - 1))
            vectors = torch.where((items == num_items)[:, None], self.hidden_item, vectors)
        else:
            vectors = self.inputs(items)
        return self.network(vectors, batch["offsets"])[batch["predict"]]

    def training_loss(self, batch: dict[str, Any]) -> Tensor:
        """Mean loss of the predictions of a batch; with several processes, of all their batches."""
        labels = batch["labels"]
        loss = self.loss(self.predictions(batch), labels)
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            # Processes average their gradients, but have different numbers of predictions.
            total = torch.tensor(float(len(labels)), device=labels.device)
            torch.distributed.all_reduce(total)
            loss = loss * len(labels) * torch.distributed.get_world_size() / total
        return loss

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

    def rank(self, batch: dict[str, Any], filter_seen: bool) -> TargetRanks:
        """Where the targets of a batch of `HistoryCollator` stand among all items."""
        seen, cosine = batch["seen"] if filter_seen else None, self.objective.cosine
        users, items = self._users(batch), self.scored.all()
        return rank_by_vectors(users, items, batch["labels"], seen, cosine=cosine)

    def recommend(self, batch: dict[str, Any], k: int, filter_seen: bool) -> NDArray[np.int64]:
        """The k best items for each user of a batch, best first, int64 (B, k)."""
        seen, cosine = batch["seen"] if filter_seen else None, self.objective.cosine
        return top_items_by_vectors(self._users(batch), self.scored.all(), k, seen, cosine=cosine)[
            0
        ]

    def rank_among(self, batch: dict[str, Any], candidates: NDArray[np.int64]) -> TargetRanks:
        """Where the targets of a batch stand among items (B, K) of each user's own."""
        users, items = self._users(batch), self.scored.all()
        cosine = self.objective.cosine
        return rank_among_by_vectors(users, items, batch["labels"], candidates, cosine=cosine)

    def encode_users(self, batch: dict[str, Any]) -> dict[str, Any]:
        """The batch with `users`, the predictions (B, D) of its histories."""
        return {**batch, "users": self.predictions(batch)}

    def _users(self, batch: dict[str, Any]) -> Tensor:
        return batch["users"] if "users" in batch else self.predictions(batch)
