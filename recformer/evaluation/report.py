"""Figures as text for the screen."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def report(rows: Mapping[str, Mapping[str, Any]], metric: str) -> str:
    """The text printed at the end of a run.

    Args:
        rows: name of a model -> `detailed_figures`; the last one is looked at closely.
        metric: shown for slices.

    Returns:
        A table of all rows with intervals of the last, what the last one recommends, its slices,
        and under a heading of its own what sampled negatives give.
    """
    last = list(rows.values())[-1]
    parts = [format_table(rows)]
    if any(name.startswith("Coverage") for name in last):
        parts.append(format_recommended(last))
    parts.append(format_slices(last, metric))
    if "sampled" in last:
        parts += [SAMPLED_HEADING, format_sampled({n: row["sampled"] for n, row in rows.items()})]
    return "\n".join(parts)


SAMPLED_HEADING = (
    "\namong sampled negatives: NOT comparable with the full ranking above, nor with other numbers "
    "of negatives"
)


def format_table(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """Figures, a row a model, as an aligned text table, under the last row its 95 % intervals.

    MRR at cut-offs, coverage and Gini are left out.
    """
    last = list(rows.values())[-1]
    columns = [name for name in last if name in last["intervals"] and "MRR@" not in name]
    columns.append("tie_rate")
    lines = {name: [f"{figures[c]:.4f}" for c in columns] for name, figures in rows.items()}
    drawn = (
        f" ({last['num_users']:,} of {last['drawn_from']:,} users)" if "drawn_from" in last else ""
    )
    for end, label in enumerate((f"  95 %{drawn} from", "  to")):
        lines[label] = [f"{last['intervals'][c][end]:.4f}" for c in columns[:-1]]
    return _aligned(columns, lines)


def format_recommended(figures: Mapping[str, Any]) -> str:
    """Coverage and Gini of `detailed_figures`, one line."""
    names = [name for name in figures if name.startswith(("Coverage@", "Gini@"))]
    return "recommended: " + ", ".join(f"{name} {figures[name]:.4f}" for name in names)


def format_sampled(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """Figures among sampled negatives, a line a metric, with 95 % intervals of the last row."""
    last = list(rows.values())[-1]
    lines = {
        metric: [f"{figures[metric]:.4f}" for figures in rows.values()]
        + [f"{end:.4f}" for end in ends]
        for metric, ends in last["intervals"].items()
        if "MRR@" not in metric
    }
    return _aligned([*rows, "95 % from", "to"], lines)


def format_slices(figures: Mapping[str, Any], metric: str) -> str:
    """The slices of `detailed_figures` as an aligned text table: users, a metric with its 95 %
    interval, and MRR."""
    lines = {
        name: [
            f"{part['num_users']:,}",
            f"{part[metric]:.4f}",
            *(f"{end:.4f}" for end in part["intervals"][metric]),
            f"{part['MRR']:.4f}",
        ]
        for name, part in figures["slices"].items()
    }
    return _aligned(["users", metric, "95 % from", "to", "MRR"], lines)


def _aligned(columns: list[str], lines: Mapping[str, list[str]]) -> str:
    width = max(map(len, lines))
    rows = {" " * width: columns, **lines}
    return "\n".join(
        (f"{name:<{width}}" + "".join(f"{cell:>11}" for cell in cells)).rstrip()
        for name, cells in rows.items()
    )
