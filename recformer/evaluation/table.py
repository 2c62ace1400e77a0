"""Tables of figures as Markdown, LaTeX and CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from typing import Any

# Signs that mean something in LaTeX's text.
_LATEX = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_",
    "{": r"\{", "}": r"\}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}",
    "±": r"$\pm$", "→": r"$\rightarrow$",
}  # fmt: skip


def cell_text(name: str) -> str:
    """A name in a cell of a Markdown table, which a bare `|` would end."""
    return name.replace("|", "\\|")


def figure_text(value: float, low: float, high: float, deviation: float | None = None) -> str:
    """A figure with its interval, and its deviation over seeds if there is one."""
    around = "" if deviation is None else f" ± {deviation:.4f}"
    return f"{value:.4f}{around} [{low:.4f}, {high:.4f}]"


def markdown_table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; the first column's cells are names."""
    lines = ["| |" + "|".join(heads[1:]) + "|" if not heads[0] else "|" + "|".join(heads) + "|"]
    lines.append("|" + "---|" * len(heads))
    lines += ["|" + "|".join([cell_text(row[0]), *row[1:]]) + "|" for row in rows]
    return "\n".join(lines) + "\n"


def latex_table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A `tabular` of LaTeX; its document needs the package booktabs."""

    def line(cells: Sequence[str]) -> str:
        return " & ".join("".join(_LATEX.get(c, c) for c in cell) for cell in cells) + r" \\"

    return "\n".join(
        [
            r"\begin{tabular}{l" + "r" * (len(heads) - 1) + "}",
            r"\toprule",
            line(heads),
            r"\midrule",
            *map(line, rows),
            r"\bottomrule",
            r"\end{tabular}",
            "",
        ]
    )


def csv_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """CSV with a head, numbers in full; a value that a row lacks is empty."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, names, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
