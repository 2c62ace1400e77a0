"""Lists of items that are not all alike: maximal marginal relevance (Carbonell and Goldstein 1998).

Shapes: P items to choose from, H hidden.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from recformer.files import UserError

POOL = 10  # items to choose from, times those that are asked for
LEAST_POOL = 100


def check_diversity(diversity: float) -> None:
    """Refuse what is not between 0 and 1."""
    if isinstance(diversity, bool) or not 0 <= diversity <= 1:
        raise UserError(f"diversity is {diversity!r}, expected a number from 0 to 1")


def marginally_relevant(scores: Tensor, vectors: Tensor, k: int, diversity: float) -> list[int]:
    """Places of k items, each chosen for its score and for being unlike those chosen before it.

    The next item is that of the largest (1 - d) score - d (largest cosine to a chosen item), with
    d the diversity; of equal ones the one that stands first. So 0 keeps the order, and the best
    item stays the first for every d.

    Args:
        scores: (P,), descending.
        vectors: (P, H) of the items.
        k: items to choose; all P if there are fewer.
        diversity: d, from 0 to 1.
    """
    units = F.normalize(vectors.double(), dim=1)
    relevance = (1 - diversity) * scores.double()
    nearest = torch.zeros_like(relevance)  # nothing is chosen yet
    left = torch.ones(len(scores), dtype=torch.bool, device=scores.device)
    chosen: list[int] = []
    for _ in range(min(k, len(scores))):
        values = (relevance - diversity * nearest).masked_fill(~left, -torch.inf)
        best = int((values == values.max()).nonzero()[0])
        cosines = units @ units[best]
        nearest = torch.maximum(nearest, cosines) if chosen else cosines
        left[best] = False
        chosen.append(best)
    return chosen
