"""Codes of the target, level by level: their loss, and how often the best item has them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from lightning import LightningModule, Trainer

from baselines.generative.entropy import CodeEntropies
from baselines.generative.recommender import CodeRanks
from recformer.training.callbacks import ExtraFigures
from recformer.training.history import print_line

RIGHT, LOSS = "codes_right@", "code_loss@"


def format_code_accuracy(shares: Mapping[str, float]) -> str:
    """`code_accuracy` of `metrics.json`, number of codes -> share of users, as one line."""
    parts = ", ".join(f"first {number} {share:.4f}" for number, share in shares.items())
    return f"codes of the best item that are right, no figures of items: {parts}"


def format_code_losses(
    losses: Mapping[str, float], entropies: Mapping[str, Sequence[float]]
) -> str:
    """`code_loss` of `metrics.json`, level -> nats, as one line beside `code_entropy`."""
    given, alone = entropies["given_before"], entropies["alone"]
    parts = [
        f"code {level} {loss:.3f} ({given[int(level) - 1]:.3f}, {alone[int(level) - 1]:.3f})"
        for level, loss in losses.items()
    ]
    return (
        "loss of the target's codes in nats (their entropy in training after the codes before, and "
        f"alone): {', '.join(parts)}"
    )


class CodeAccuracy(ExtraFigures):
    """Logs, beside the figures of items, what the model says of the target's codes.

    `val/codes_right@l` and `test/codes_right@l`, l = 1 .. L: share of users for whom the first l
    codes of the item at rank 1 are those of the target. All L codes make the item: @L is Recall@1
    where nothing ties.

    `val/code_loss@l` and `test/code_loss@l`: mean cross-entropy of the target's code l after those
    before it, in nats; those of training batches are `train/code_loss@l`. In training the entropies
    that they are to be compared with are printed at the start, and the losses at every validation.

    Args:
        entropies: of the codes of the training targets.
    """

    def __init__(self, entropies: CodeEntropies) -> None:
        self.entropies = entropies

    def _log(self, module: LightningModule, split: str, ranks: CodeRanks) -> None:
        for level in range(1, module.model.trie.num_levels + 1):
            share = float((ranks.codes_right >= level).mean())
            loss = float(ranks.code_losses[:, level - 1].mean(dtype=float))
            for name, value in ((RIGHT, share), (LOSS, loss)):
                module.log(
                    f"{split}/{name}{level}",
                    value,
                    on_epoch=True,
                    batch_size=len(ranks),
                    sync_dist=True,
                )

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *args: Any
    ) -> None:
        self._log(pl_module, "val", outputs["ranks"])

    def on_test_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *args: Any
    ) -> None:
        self._log(pl_module, "test", outputs["ranks"])

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        print_line(
            trainer,
            "codes of the training targets, entropy in nats, level by level: "
            f"{_row(self.entropies.alone)}; after the codes before them, which a model has to "
            f"beat: {_row(self.entropies.given_before)}",
        )

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        losses = _logged(trainer, f"val/{LOSS}").values()
        print_line(trainer, f"codes, validation loss in nats: {_row(losses)}")

    def figures(self, trainer: Trainer) -> dict[str, Any]:
        return {
            "code_accuracy": _logged(trainer, f"test/{RIGHT}"),
            "code_loss": _logged(trainer, f"test/{LOSS}"),
            "code_entropy": asdict(self.entropies),
        }


def _row(values: Iterable[float]) -> str:
    return " ".join(f"{value:.3f}" for value in values)


def _logged(trainer: Trainer, name: str) -> dict[str, float]:
    """Level -> value of what was logged under the name."""
    metrics = trainer.callback_metrics
    return {k.removeprefix(name): float(v) for k, v in metrics.items() if k.startswith(name)}
