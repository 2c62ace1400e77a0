"""Figures of ranks: NDCG, Recall, MRR, AUC, coverage, Gini."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from recformer.evaluation.ranks import TargetRanks
from recformer.files import UserError

TIES = ("expected", "pessimistic", "optimistic")


def per_user_metrics(
    ranks: TargetRanks, ks: Sequence[int] = (10, 50), ties: str = "expected"
) -> dict[str, NDArray[np.float64]]:
    """Figures of every user, float64 (B,): `NDCG@k`, `Recall@k`, `MRR@k` for each k, `MRR`, `AUC`.

    There is one target a user, at position r (1-based): NDCG@k = 1 / log2(r + 1) and MRR@k = 1 / r
    up to k and 0 beyond, Recall@k = 1 up to k, MRR = 1 / r over the full ranking, AUC = 1 - (items
    above) / (candidates), as published.

    Ties: a target tied with m others stands at one of the positions above + 1 .. above + m + 1.
    "expected" is the exact mean over them all, equally likely; "pessimistic" takes the last and
    "optimistic" the first.

    Raises:
        UserError: `ties` is none of the three, or `ks` are not different positive integers.

    Examples:
        >>> # One user's target is the best of five items; another's is tied with one item for the
        >>> # second and third place.
        >>> ranks = TargetRanks(above=[0, 1], tied=[0, 1], num_candidates=[5, 5])
        >>> figures = per_user_metrics(ranks, ks=(2,))
        >>> figures["Recall@2"].tolist()
        [1.0, 0.5]
        >>> figures["MRR"].round(4).tolist()  # (1 / 2 + 1 / 3) / 2
        [1.0, 0.4167]
        >>> per_user_metrics(ranks, ks=(2,), ties="optimistic")["Recall@2"].tolist()
        [1.0, 1.0]
    """
    _check_options(ks, ties)
    first, last = ranks.above, ranks.above + ranks.tied  # items before the target, least and most
    if ties == "pessimistic":
        first = last
    elif ties == "optimistic":
        last = first
    figures = {}
    for k in ks:
        figures[f"NDCG@{k}"] = _mean_gain(_discount, first, last, k)
        figures[f"Recall@{k}"] = np.clip(k - first, 0, last - first + 1) / (last - first + 1)
        figures[f"MRR@{k}"] = _mean_gain(_reciprocal, first, last, k)
    figures["MRR"] = _mean_gain(_reciprocal, first, last, None)
    figures["AUC"] = 1 - (first + last) / 2 / ranks.num_candidates
    return figures


def _discount(position: NDArray) -> NDArray[np.float64]:
    return 1 / np.log2(position + 1)


def _reciprocal(position: NDArray) -> NDArray[np.float64]:
    return 1 / position


def _mean_gain(
    gain: Callable[[NDArray], NDArray[np.float64]], first: NDArray, last: NDArray, k: int | None
) -> NDArray[np.float64]:
    """Mean of gain(r) over the positions r = first + 1 .. last + 1, where gain is 0 beyond k."""
    deepest = int(last.max(initial=0)) + 1
    k = deepest if k is None else min(k, deepest)
    sums = np.concatenate([[0.0], np.cumsum(gain(np.arange(1, k + 1)))])  # sums[j]: positions 1..j
    mean = (sums[np.minimum(last + 1, k)] - sums[np.minimum(first, k)]) / (last - first + 1)
    # without ties the gain itself, not a difference of sums
    return np.where(first == last, np.where(first < k, gain(first + 1), 0.0), mean)


def coverage(counts: NDArray[np.int64]) -> float:
    """Share of N items that are recommended to anybody; counts (N,) of their recommendations."""
    return int(np.count_nonzero(counts)) / len(counts)


def gini(counts: NDArray[np.int64]) -> float:
    """Gini coefficient of counts (N,): 0 where all N items are recommended equally often, 1 - 1/N
    where every recommendation is of one item."""
    total, number = int(counts.sum()), len(counts)
    places = np.arange(1, number + 1)
    return float((2 * places - number - 1) @ np.sort(counts)) / (number * total) if total else 0.0


def _check_options(ks: Sequence[int], ties: str) -> None:
    if ties not in TIES:
        raise UserError(f"ties is {ties!r}, expected one of {', '.join(TIES)}")
    if not all(isinstance(k, int) and k > 0 for k in ks) or len(set(ks)) != len(ks):
        raise UserError(f"ks are {list(ks)}, expected different positive integers")
