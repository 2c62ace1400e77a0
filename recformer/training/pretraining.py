"""The Lightning module of pretraining.

Shapes: B pairs, N items of the pool, H hidden.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor

from recformer.data.batches import PairBatch
from recformer.data.items import TokenizedItems
from recformer.evaluation.evaluator import Evaluator
from recformer.evaluation.ranking import rank_by_vectors
from recformer.models import RecformerForPretraining
from recformer.training.item_encoder import encode_items
from recformer.training.lit import LitTraining, log_figures


class PretrainModule(LitTraining):
    """Pretraining with its validation (paper, section 3.1).

    Validation logs the losses, `val/accuracy` (pairs whose own target is above all other targets of
    the batch over all processes, as published) and, because that depends on the batch, the figures
    of the evaluator with every target ranked among one fixed pool of items.

    Args:
        model: the model.
        store: tokenised items.
        pool: (N,) item ids of the pool; `labels` of validation batches are places in it.
        contrast: False trains on the MLM losses alone.
        grad_cache: pairs that go through the encoder at a time, `at_once` of
            `RecformerForPretraining.training_loss`; None: all of a batch.
        metric_ks: cut-offs of NDCG and Recall.
        options: as in `LitTraining`.
    """

    def __init__(
        self,
        model: RecformerForPretraining,
        store: TokenizedItems,
        pool: np.ndarray,
        contrast: bool = True,
        grad_cache: int | None = None,
        metric_ks: tuple[int, ...] = (10, 50),
        **options: Any,
    ) -> None:
        super().__init__(model, **options)
        self.metric_ks = tuple(metric_ks)
        self.evaluator = Evaluator(self.metric_ks)
        self.store, self.pool, self.contrast = store, pool, contrast
        self.grad_cache = grad_cache
        self._pool_vectors: Tensor | None = None

    @property
    def pretrained(self) -> RecformerForPretraining:
        """The model."""
        model = self.model
        assert isinstance(model, RecformerForPretraining)
        return model

    def batch_loss(self, batch: PairBatch) -> Tensor | dict[str, Tensor]:
        losses = self.pretrained.training_loss(batch, self.grad_cache)
        if not self.contrast:
            losses["loss"] = losses["loss"] - losses["contrastive"]
        return losses

    def configure_gradient_clipping(self, *args: Any, **kwargs: Any) -> None:
        norm = super().configure_gradient_clipping(*args, **kwargs)
        if norm is not None:
            self.log("train/grad_norm", norm, on_step=True, on_epoch=False)

    def on_validation_epoch_start(self) -> None:
        self.evaluator = Evaluator(self.metric_ks)
        autocast = self.trainer.strategy.precision_plugin.forward_context()
        self._pool_vectors = encode_items(
            self.pretrained.longformer, self.store, autocast, progress=True, item_ids=self.pool
        )

    def validation_step(self, batch: PairBatch, batch_idx: int) -> None:
        assert self._pool_vectors is not None
        losses = self.pretrained.batch_losses(batch, self.grad_cache)
        size = len(batch.labels)
        figures = {"loss": losses.loss, **losses.parts, "accuracy": losses.num_correct / size}
        for name, value in figures.items():
            self.log(f"val/{name}", value.float(), batch_size=size, sync_dist=True, on_epoch=True)
        ranks = rank_by_vectors(losses.vectors, self._pool_vectors, batch.labels)
        self.evaluator.update(batch.user_ids, batch.labels, ranks)

    def on_validation_epoch_end(self) -> None:
        log_figures(self, self.evaluator, "val")
        self._pool_vectors = None
