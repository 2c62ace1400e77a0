"""Runs against each other, user by user: intervals and paired tests."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import NDArray

from recformer.evaluation.metrics import per_user_metrics
from recformer.evaluation.runs import RULE, RankedRun
from recformer.evaluation.statistics import (
    RESAMPLES,
    bootstrap_interval,
    holm,
    percentiles,
    permutation_p,
    resampled_means,
)
from recformer.files import UserError

# Figures that tables of runs show.
METRICS = ("NDCG@10", "Recall@10", "NDCG@50", "Recall@50", "MRR")


def compare(
    runs: Sequence[RankedRun],
    metric: str = "NDCG@10",
    seed: int = 0,
    against: str | None = None,
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Figures of each run and differences of each pair.

    Where a sequence has several targets (runs over windows), sequences are what is drawn anew and
    what is exchanged: its targets are not independent of each other.

    Args:
        runs: two or more.
        metric: what pairs are tested on.
        seed: of bootstrap and permutations.
        against: name of the run that every other one is paired with; None: all pairs.

    Returns:
        A row a run: `name` and, by metric, `value`, `low`, `high` (95 % bootstrap over users). And
        a row a pair: `runs`, `difference` (first minus second), `low`, `high` (paired bootstrap),
        `p` (paired permutation test) and `p_holm` (corrected for the number of pairs).

    Raises:
        UserError: runs that cannot be compared, an unknown metric, or no run named `against`.

    Examples:
        >>> from recformer.evaluation.runs import RankedRun
        >>> runs = [RankedRun.load("head=result"), RankedRun.load("runs/popularity")]
        >>> rows, (pair,) = compare(runs)
        >>> [row["name"] for row in rows]
        ['head', 'popularity']
        >>> first, second = (row["NDCG@10"]["value"] for row in rows)
        >>> round(pair["difference"] - (first - second), 9)
        0.0
        >>> 0 < pair["p"] <= pair["p_holm"] <= 1
        True
    """
    first = runs[0]
    for run in runs[1:]:
        different = [name for name in RULE if run.rule[name] != first.rule[name]]
        if different:
            what = ", ".join(f"{n}: {first.rule[n]} and {run.rule[n]}" for n in different)
            raise UserError(f"{first.name} and {run.name} cannot be compared ({what})")
        same = np.array_equal(first.user_ids, run.user_ids)
        if not same or not np.array_equal(first.targets, run.targets):
            raise UserError(f"{first.name} and {run.name} ranked different users or targets")
    names = [run.name for run in runs]
    if len(set(names)) < len(names):
        raise UserError(f"runs of the same name: {', '.join(names)}; give names: NAME=FOLDER")
    ks = cuts((*METRICS, metric))
    values = [per_user_metrics(run.ranks, ks, first.rule["ties"]) for run in runs]
    if metric not in values[0]:
        raise UserError(f"--metric {metric}: expected one of NDCG@k, Recall@k, MRR@k, MRR, AUC")
    rows = []
    for name, figures in zip(names, values, strict=True):
        row: dict[str, Any] = {"name": name}
        for each in dict.fromkeys((*METRICS, metric)):
            low, high = interval(figures[each], first.sequences, seed)
            row[each] = {"value": float(figures[each].mean()), "low": low, "high": high}
        rows.append(row)
    pairs: list[dict[str, Any]] = []
    places: Iterable[tuple[int, int]] = combinations(range(len(runs)), 2)
    if against is not None:
        if against not in names:
            raise UserError(f"--against {against}: expected one of {', '.join(names)}")
        chosen = names.index(against)
        places = [(chosen, place) for place in range(len(runs)) if place != chosen]
    for one, other in places:
        difference = values[one][metric] - values[other][metric]
        found = paired_test(difference, first.sequences, seed)
        pairs.append({"runs": [names[one], names[other]], **found})
    for pair, corrected in zip(pairs, holm([pair["p"] for pair in pairs]), strict=True):
        pair["p_holm"] = corrected
    return rows, pairs


def cuts(metrics: Iterable[str]) -> list[int]:
    """The k of names such as NDCG@10, each once.

    Examples:
        >>> cuts(["NDCG@20", "Recall@10", "Recall@20", "MRR"])
        [10, 20]
    """
    found = {name.partition("@")[2] for name in metrics}
    return sorted({int(cut) for cut in found if cut.isdecimal()})


def paired_test(
    difference: NDArray[np.float64], sequences: NDArray[np.int64] | None, seed: int = 0
) -> dict[str, float]:
    """Mean of paired differences (U,), their 95 % bootstrap interval `low` and `high`, and `p` of
    the permutation test: of users, or of whole sequences where there are some."""
    low, high = interval(difference, sequences, seed)
    p = permutation_p(by_sequence(difference, sequences)[0], seed)
    return {"difference": float(difference.mean()), "low": low, "high": high, "p": p}


def by_sequence(
    values: NDArray[np.float64], sequences: NDArray[np.int64] | None
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Sums of values (U,) of each sequence and how many these are, (G,) each; users by themselves
    where there are no sequences."""
    if sequences is None:
        return values, np.ones(len(values))
    _, group = np.unique(sequences, return_inverse=True)
    sums = np.bincount(group, weights=values).astype(np.float64)
    return sums, np.bincount(group).astype(np.float64)


def interval(
    values: NDArray[np.float64], sequences: NDArray[np.int64] | None, seed: int
) -> tuple[float, float]:
    """95 % bootstrap interval of the mean of values (U,), of users or of whole sequences."""
    if sequences is None:
        return bootstrap_interval(values, seed)
    return percentiles(resampled_means(*by_sequence(values, sequences), seed, RESAMPLES))
