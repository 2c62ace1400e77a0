"""Figures window by window, their average, and how sure both are.

A window's figure is the mean over its targets, the run's the mean over its windows, as in
Transformers4Rec (RecSys 2021, section 4.2). Two intervals answer two questions: drawn by session,
what another crowd in the same windows would have given; drawn by window, what other days would
have.

Shapes: E targets of a window, G sessions, W windows, R resamples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from recformer.evaluation.figures import RESAMPLES
from recformer.evaluation.metrics import per_user_metrics
from recformer.evaluation.ranks import TargetRanks
from recformer.evaluation.statistics import bootstrap_interval, percentiles, resampled_means
from recformer.evaluation.table import figure_text, markdown_table


@dataclass(frozen=True)
class WindowRanks:
    """Ranks of the targets of one window.

    Attributes:
        number: of the window.
        starts: its beginning, for tables.
        places: int64 (E,), the interaction that each target is.
        targets: int64 (E,) item ids.
        sequences: int64 (E,), the session of each target.
        is_new: bool (E,), nobody met the item before this window.
        ranks: (E,).
    """

    number: int
    starts: str
    places: NDArray[np.int64]
    targets: NDArray[np.int64]
    sequences: NDArray[np.int64]
    is_new: NDArray[np.bool_]
    ranks: TargetRanks


def figures_over_time(
    windows: Sequence[WindowRanks], ks: Sequence[int], ties: str
) -> dict[str, Any]:
    """Figures of all windows.

    Args:
        windows: W, in the order of time.
        ks, ties: see `per_user_metrics`.

    Returns:
        Every metric's mean over windows; `num_users`, targets of all windows; `num_sequences`;
        `tie_rate`; `intervals`, 95 % of sessions drawn anew within their windows;
        `intervals_by_window`, of windows drawn anew; `slices` of all targets together, known and
        new; `windows`, a row each: `number`, `starts`, `num_users`, `num_sequences`, `num_new`,
        metrics and `intervals` by session.
    """
    rows: list[dict[str, Any]] = []
    draws: list[dict[str, NDArray[np.float64]]] = []
    slices = _Pool()
    for window in windows:
        values = per_user_metrics(window.ranks, ks, ties)
        _, of_group = np.unique(window.sequences, return_inverse=True)
        counts = np.bincount(of_group).astype(np.float64)
        own = {}
        for name, each in values.items():
            sums = np.bincount(of_group, weights=each).astype(np.float64)
            own[name] = resampled_means(sums, counts, window.number, RESAMPLES)
        rows.append(
            {
                "number": window.number,
                "starts": window.starts,
                "num_users": len(window.places),
                "num_sequences": len(counts),
                "num_new": int(window.is_new.sum()),
                **{name: float(each.mean()) for name, each in values.items()},
                "intervals": {name: list(percentiles(each)) for name, each in own.items()},
            }
        )
        draws.append(own)
        slices.add("known target", ~window.is_new, values)
        slices.add("new target", window.is_new, values)
    metrics = list(draws[0])
    tied = sum(int((window.ranks.tied > 0).sum()) for window in windows)
    total = sum(row["num_users"] for row in rows)
    return {
        **{name: float(np.mean([row[name] for row in rows])) for name in metrics},
        "tie_rate": tied / total,
        "num_users": total,
        "num_sequences": sum(row["num_sequences"] for row in rows),
        "intervals": {
            name: list(percentiles(np.mean([own[name] for own in draws], axis=0)))
            for name in metrics
        },
        "intervals_by_window": {
            name: list(
                bootstrap_interval(np.array([row[name] for row in rows]), resamples=RESAMPLES)
            )
            for name in metrics
        },
        "slices": slices.figures(),
        "windows": rows,
    }


class _Pool:
    """Values of targets of several windows, by slice."""

    def __init__(self) -> None:
        self._parts: dict[str, dict[str, list[NDArray[np.float64]]]] = {}

    def add(self, name: str, chosen: NDArray[np.bool_], values: dict[str, Any]) -> None:
        own = self._parts.setdefault(name, {})
        for metric, each in values.items():
            own.setdefault(metric, []).append(each[chosen])

    def figures(self) -> dict[str, dict[str, Any]]:
        found = {}
        for name, own in self._parts.items():
            values = {metric: np.concatenate(parts) for metric, parts in own.items()}
            number = len(next(iter(values.values())))
            if number:
                found[name] = {
                    "num_users": number,
                    **{metric: float(each.mean()) for metric, each in values.items()},
                    "intervals": {
                        metric: list(bootstrap_interval(each, resamples=RESAMPLES))
                        for metric, each in values.items()
                    },
                }
        return found


#: The two lines of the average in a table, and where their intervals stand.
_AVERAGES = {"average, by session": "intervals", "average, by window": "intervals_by_window"}


def format_over_time(figures: dict[str, Any], metrics: Sequence[str]) -> str:
    """A Markdown table: a row a window with the interval by session, then the average with both."""
    return markdown_table(*cells_over_time(figures, metrics))


def cells_over_time(
    figures: dict[str, Any], metrics: Sequence[str]
) -> tuple[list[str], list[list[str]]]:
    """Heads and cells of that table."""

    def cells(row: dict[str, Any], key: str) -> list[str]:
        return [figure_text(row[name], *row[key][name]) for name in metrics]

    rows = []
    for row in figures["windows"]:
        counts = (row["num_sequences"], row["num_users"], row["num_new"])
        shown = [f"{number:,}" for number in counts]
        rows.append([str(row["number"]), row["starts"], *shown, *cells(row, "intervals")])
    total = [f"{figures[name]:,}" for name in ("num_sequences", "num_users")]
    rows += [[title, "", *total, "", *cells(figures, key)] for title, key in _AVERAGES.items()]
    return ["window", "from", "sessions", "targets", "new", *metrics], rows


def records_over_time(figures: dict[str, Any], metrics: Sequence[str]) -> list[dict[str, Any]]:
    """Rows of that table with their figures in full, for CSV."""

    def record(window: Any, starts: str, row: dict[str, Any], key: str) -> dict[str, Any]:
        facts = {"window": window, "from": starts, "sessions": row["num_sequences"]}
        facts |= {"targets": row["num_users"], "new": row.get("num_new")}
        for name in metrics:
            low, high = row[key][name]
            facts |= {name: row[name], f"{name} low": low, f"{name} high": high}
        return facts

    rows = [record(row["number"], row["starts"], row, "intervals") for row in figures["windows"]]
    return rows + [record(title, "", figures, key) for title, key in _AVERAGES.items()]
