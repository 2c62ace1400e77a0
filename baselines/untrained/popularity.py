"""Popularity: everyone is offered the same items, those bought most often in training."""

from __future__ import annotations

import numpy as np
import torch

from baselines.settings import PopularitySettings
from baselines.untrained.base import Scores, Untrained
from recformer.data.processed import ProcessedFolder, Sequences


class Popularity(Untrained):
    """Items in the order of their number of training interactions.

    Args:
        folder: the data.
        settings: there are none.

    Attributes:
        counts: int64 (N,) interactions of every item in `folder.train`.
    """

    def __init__(self, folder: ProcessedFolder, settings: PopularitySettings | None = None) -> None:
        super().__init__(folder)
        self.counts = np.bincount(folder.train.items, minlength=folder.num_items)

    def scores(self, histories: Sequences) -> Scores:
        """Number of training interactions, the same for everyone; equal counts tie."""
        counts = torch.from_numpy(self.counts)
        return lambda chunk: counts.expand(chunk.stop - chunk.start, -1)
