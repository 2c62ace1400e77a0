"""Accuracy of codes: how often each code of the target is the likeliest, level by level."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning import LightningModule, Trainer

from baselines.generative.recommender import CodeRanks
from recformer.training.callbacks import ExtraFigures


def format_code_accuracy(shares: Mapping[str, float]) -> str:
    """`code_accuracy` of `metrics.json`, number of codes -> share of users, as one line."""
    parts = ", ".join(f"first {number} {share:.4f}" for number, share in shares.items())
    return f"codes of the best item that are right, no figures of items: {parts}"


class CodeAccuracy(ExtraFigures):
    """Logs, beside the figures of items, how often the first codes of the best item are right.

    `val/codes_right@l` and `test/codes_right@l`, l = 1 .. L: share of users for whom the first l
    codes of the item at rank 1 are those of the target. All L codes make the item: @L is Recall@1
    where nothing ties.
    """

    def _log(self, module: LightningModule, split: str, ranks: CodeRanks) -> None:
        for level in range(1, module.model.trie.num_levels + 1):
            share = float((ranks.codes_right >= level).mean())
            name = f"{split}/codes_right@{level}"
            module.log(name, share, on_epoch=True, batch_size=len(ranks), sync_dist=True)

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *args: Any
    ) -> None:
        self._log(pl_module, "val", outputs["ranks"])

    def on_test_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *args: Any
    ) -> None:
        self._log(pl_module, "test", outputs["ranks"])

    def figures(self, trainer: Trainer) -> dict[str, Any]:
        name = "test/codes_right@"
        shares = {k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith(name)}
        return {"code_accuracy": {k.removeprefix(name): share for k, share in shares.items()}}
