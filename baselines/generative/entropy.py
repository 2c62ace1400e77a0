"""Entropy of codes: what is known of the next item's codes by how often they occur alone.

Shapes: N items, L codes of an item, M targets.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from recformer.data.sequences import Sequences


@dataclass(frozen=True)
class CodeEntropies:
    """Entropies of the codes of the items that training asks for, in nats.

    A model's cross-entropy of the codes of a level begins near `alone`, once it knows which tokens
    belong to the level. That of a model that knows how often items are bought, and nothing of the
    user, is near `given_before`: what is below it was learnt from histories.

    Attributes:
        alone: of each level's codes, L numbers.
        given_before: of each level's codes, where those before them are known, L numbers. They add
            up to the entropy of the items.
    """

    alone: list[float]
    given_before: list[float]

    @classmethod
    def of(cls, codes: NDArray[np.integer], targets: NDArray[np.integer]) -> CodeEntropies:
        """Of frequencies.

        Args:
            codes: (N, L), those of each item.
            targets: (M,) item ids, at least one.
        """
        counts = np.bincount(targets, minlength=len(codes))
        met = counts > 0
        codes, counts = np.asarray(codes)[met], counts[met]
        levels = range(codes.shape[1])
        alone = [_entropy(codes[:, level : level + 1], counts) for level in levels]
        joint = [_entropy(codes[:, : level + 1], counts) for level in levels]
        return cls(alone, np.diff(joint, prepend=0.0).tolist())

    @classmethod
    def of_training(cls, codes: NDArray[np.integer], sequences: Sequences) -> CodeEntropies:
        """Of every item of training sequences but the first, which nothing stands before."""
        begins = np.zeros(len(sequences.items), dtype=bool)
        begins[sequences.offsets[:-1][sequences.lengths > 0]] = True
        return cls.of(codes, sequences.items[~begins])


def _entropy(rows: NDArray[np.integer], counts: NDArray[np.integer]) -> float:
    """Entropy in nats of rows that occur so often each; equal rows are one."""
    _, place = np.unique(rows, axis=0, return_inverse=True)
    shares = np.bincount(place.reshape(-1), weights=counts) / counts.sum()
    return float(-(shares * np.log(shares)).sum()) + 0.0
