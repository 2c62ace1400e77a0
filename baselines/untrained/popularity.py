"""Popularity: everyone is offered the same items, those bought most often in training."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import torch

from baselines.untrained.base import Scores, evaluate, rank_in_chunks
from recformer.data.processed import EvalExamples, ProcessedFolder
from recformer.evaluation.ranks import TargetRanks


class Popularity:
    """Items in the order of their number of training interactions.

    Attributes:
        counts: int64 (N,) interactions of every item in `folder.train`.
    """

    def __init__(self, folder: ProcessedFolder) -> None:
        self.folder = folder
        self.counts = np.bincount(folder.train.items, minlength=folder.num_items)

    def scores(self, examples: EvalExamples) -> Scores:
        """Number of training interactions, the same for everyone."""
        counts = torch.from_numpy(self.counts)
        return lambda chunk: counts.expand(chunk.stop - chunk.start, -1)

    def rank(self, examples: EvalExamples, filter_seen: bool = False) -> TargetRanks:
        """Place the target of every example; equal counts tie."""
        return rank_in_chunks(examples, self.folder.num_items, filter_seen, self.scores(examples))

    def evaluate(self, split: Literal["val", "test"] = "test", **options: Any) -> dict[str, float]:
        """Figures of a split; `options` as in `baselines.untrained.base.evaluate`."""
        return evaluate(self, split, **options).compute()
