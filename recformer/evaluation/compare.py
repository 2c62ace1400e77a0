"""Runs against each other, user by user: intervals and paired tests."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import combinations
from typing import Any

import numpy as np

from recformer.evaluation.metrics import per_user_metrics
from recformer.evaluation.runs import RULE, RankedRun
from recformer.evaluation.statistics import bootstrap_interval, holm, permutation_p
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
    cuts = {name.partition("@")[2] for name in (*METRICS, metric)}
    ks = sorted({int(cut) for cut in cuts if cut.isdecimal()})
    values = [per_user_metrics(run.ranks, ks, first.rule["ties"]) for run in runs]
    if metric not in values[0]:
        raise UserError(f"--metric {metric}: expected one of NDCG@k, Recall@k, MRR@k, MRR, AUC")
    rows = []
    for name, figures in zip(names, values, strict=True):
        row: dict[str, Any] = {"name": name}
        for each in dict.fromkeys((*METRICS, metric)):
            low, high = bootstrap_interval(figures[each], seed)
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
        low, high = bootstrap_interval(difference, seed)
        pairs.append(
            {
                "runs": [names[one], names[other]],
                "difference": float(difference.mean()),
                "low": low,
                "high": high,
                "p": permutation_p(difference, seed),
            }
        )
    for pair, corrected in zip(pairs, holm([pair["p"] for pair in pairs]), strict=True):
        pair["p_holm"] = corrected
    return rows, pairs
