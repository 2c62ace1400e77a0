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


def format_over_time(figures: dict[str, Any], metrics: Sequence[str]) -> str:
    """A Markdown table: a row a window with the interval by session, then the average with both."""
    lines = [
        "|window|from|sessions|targets|new|" + "|".join(metrics) + "|",
        "|---|---|---|---|---|" + "---|" * len(metrics),
    ]
    for row in figures["windows"]:
        cells = [_cell(row[name], row["intervals"][name]) for name in metrics]
        counts = (row["num_sequences"], row["num_users"], row["num_new"])
        shown = "|".join(f"{number:,}" for number in counts)
        lines.append(f"|{row['number']}|{row['starts']}|{shown}|" + "|".join(cells) + "|")
    for title, key in (("by session", "intervals"), ("by window", "intervals_by_window")):
        cells = [_cell(figures[name], figures[key][name]) for name in metrics]
        total = f"{figures['num_sequences']:,}|{figures['num_users']:,}|"
        lines.append(f"|average, {title}||{total}|" + "|".join(cells) + "|")
    return "\n".join(lines) + "\n"


def _cell(value: float, interval: Sequence[float]) -> str:
    return f"{value:.4f} [{interval[0]:.4f}, {interval[1]:.4f}]"
