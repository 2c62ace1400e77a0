"""Callbacks: tables of items, validation of the last epoch, early stopping that is resumed."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from typing import Any

import numpy as np
import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping

from recformer.data.items import TokenizedItems
from recformer.models.catalogue import RecformerForCatalogue, token_bags
from recformer.training.item_encoder import catalogue_vectors, encode_items


class ExtraFigures(Callback, ABC):
    """A callback that has figures of its own for an evaluation, beside those of ranks."""

    @abstractmethod
    def figures(self, trainer: Trainer) -> dict[str, Any]:
        """Figures added to those of the split that `trainer` has just tested."""


class ItemTable(Callback):
    """Keeps the item table of a `RecformerForSeqRec` (paper, section 2.4, algorithm 1).

    Args:
        store: the tokenised items.
        every_epoch: encode all items anew at the start of every training epoch (stage 1); otherwise
            only where the model has no table yet (stage 2, zero-shot), through a store of files.
        vectors_dir: where such stores are kept.
    """

    def __init__(
        self, store: TokenizedItems, every_epoch: bool, vectors_dir: str | os.PathLike
    ) -> None:
        self.store = store
        self.every_epoch = every_epoch
        self.vectors_dir = vectors_dir

    def _refresh(self, trainer: Trainer, module: LightningModule) -> None:
        autocast = trainer.strategy.precision_plugin.forward_context()
        model, progress = module.model, not trainer.sanity_checking
        if self.every_epoch:  # the weights change, nobody would read these vectors again
            table = encode_items(model, self.store, autocast, progress)
        else:
            vectors = catalogue_vectors(
                model, self.store, self.vectors_dir, trainer.precision, autocast, progress
            )
            table = torch.from_numpy(vectors).to(module.device)
        model.init_item_embedding(table)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.every_epoch or pl_module.model.item_embedding is None:
            self._refresh(trainer, pl_module)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if pl_module.model.item_embedding is None:
            self._refresh(trainer, pl_module)

    on_test_start = on_validation_start


class HeadTable(Callback):
    """Gives a `RecformerForCatalogue` the texts of its items, and its table before it is judged.

    Args:
        store: the tokenised items.
        interactions: (N,) int64, of each item in training sequences.
        vectors_dir: where stores of the encoder's vectors are kept.
    """

    def __init__(
        self, store: TokenizedItems, interactions: np.ndarray, vectors_dir: str | os.PathLike
    ) -> None:
        self.store, self.interactions, self.vectors_dir = store, interactions, vectors_dir

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        model: RecformerForCatalogue = pl_module.model
        if model.knows_catalogue:
            return
        vectors = catalogue_vectors(
            model.longformer,
            self.store,
            self.vectors_dir,
            trainer.precision,
            trainer.strategy.precision_plugin.forward_context(),
        )
        encoded = torch.from_numpy(np.array(vectors)).to(model.device)
        bags = token_bags(self.store).to(model.device)
        model.set_catalogue(encoded, bags)
        model.head.fit(encoded, bags, torch.from_numpy(self.interactions).to(model.device))

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        pl_module.model.refresh_table()

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.on_fit_start(trainer, pl_module)
        pl_module.model.refresh_table()


class LastEpochIsValidated(Callback):
    """Validate at the last epoch also where `check_val_every_n_epoch` does not divide the epochs.

    The published code left no checkpoint when there were fewer epochs than its interval.
    """

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.max_epochs is not None and trainer.current_epoch + 1 >= trainer.max_epochs:
            trainer.check_val_every_n_epoch = 1


class EarlyStop(EarlyStopping):
    """Early stopping that a resumed run remembers.

    Lightning restores the count of evaluations without gain but not that the run was over; a run
    killed just after its last evaluation would go on.
    """

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.wait_count >= self.patience:
            trainer.should_stop = True
