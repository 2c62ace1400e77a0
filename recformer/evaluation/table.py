"""Tables of figures as Markdown, LaTeX and CSV."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Mapping, Sequence
from typing import Any

# Signs that mean something in LaTeX's text.
_LATEX = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_",
    "{": r"\{", "}": r"\}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}",
    "<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}",
    "±": r"$\pm$", "→": r"$\rightarrow$",
}  # fmt: skip


def cell_text(name: str) -> str:
    """Text in a cell of a Markdown table, which a bare `|` or the end of a line would end.

    Backslashes that stand before either are doubled, or they would take it for themselves.
    """
    line = re.sub(r"\s*[\r\n]+\s*", " ", name)
    return re.sub(r"(\\*)(\||$)", lambda m: m[1] * 2 + (m[2] and "\\|"), line)


def figure_text(value: float, low: float, high: float, deviation: float | None = None) -> str:
    """A figure with its interval, and its deviation over seeds if there is one."""
    around = "" if deviation is None else f" ± {deviation:.4f}"
    return f"{value:.4f}{around} [{low:.4f}, {high:.4f}]"


def markdown_table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table of any texts."""

    def line(cells: Sequence[str]) -> str:
        return "|" + "|".join(map(cell_text, cells)) + "|"

    lines = [line([heads[0] or " ", *heads[1:]]), "|" + "---|" * len(heads), *map(line, rows)]
    return "\n".join(lines) + "\n"


def latex_table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A `tabular` of LaTeX; its document needs the package booktabs."""

    def line(cells: Sequence[str]) -> str:
        text = " & ".join("".join(_LATEX.get(c, c) for c in " ".join(x.split())) for x in cells)
        # `\\` and rules before it would take these for an option of theirs.
        return re.sub(r"^[\[*]", r"{\g<0>}", text) + r" \\"

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
