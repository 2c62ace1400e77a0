"""Rows of several experiments side by side, for the README and method.md."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from baselines.experiment import Experiment
from recformer.evaluation.table import markdown_table
from recformer.files import read_json

SCIENTIFIC, HELD_OUT, BEAUTY = "scientific", "scientific_cold", "beauty"
NDCG, BOTH = ("NDCG@10",), ("NDCG@10", "Recall@10")


@dataclass(frozen=True)
class Column:
    """A column: metrics of an experiment, of all users or of a slice, of which there is the first.

    Attributes:
        head: above it.
        experiment: its name.
        metrics: shown with a stroke between them.
        part: name of the slice; None: all users.
    """

    head: str
    experiment: str
    metrics: tuple[str, ...] = NDCG
    part: str | None = None


# Label of a row -> its name in each experiment.
Rows = dict[str, dict[str, str]]

SASREC_TEXT = "SASRec, learned and text vectors, history term"

SUMMARIES: dict[str, tuple[list[Column], Rows]] = {
    "readme": (
        [
            Column("Scientific", SCIENTIFIC),
            Column("a tenth held out", HELD_OUT),
            Column("of it, targets nobody bought", HELD_OUT, part="cold target"),
            Column("Beauty", BEAUTY),
        ],
        {
            "Recformer, `--method head`": dict.fromkeys((SCIENTIFIC, HELD_OUT, BEAUTY), "head"),
            "Recformer, `--method head`, nothing trained (zero-shot)": dict.fromkeys(
                (SCIENTIFIC, HELD_OUT, BEAUTY), "head, nothing trained"
            ),
            "Recformer, finetuned as published": {SCIENTIFIC: "published"},
            "SASRec over learned and text vectors, that knows the history": {
                SCIENTIFIC: SASREC_TEXT
            },
            "SASRec over projected text vectors": {SCIENTIFIC: "SASRec over text"},
            "SASRec": {SCIENTIFIC: "SASRec, cosine", HELD_OUT: "SASRec", BEAUTY: "SASRec"},
            "TF-IDF text neighbours that know the history": dict.fromkeys(
                (SCIENTIFIC, HELD_OUT), "TF-IDF, history factor"
            ),
            "TF-IDF text neighbours": dict.fromkeys((SCIENTIFIC, HELD_OUT, BEAUTY), "TF-IDF"),
            "co-occurrence of items": dict.fromkeys(
                (SCIENTIFIC, HELD_OUT, BEAUTY), "co-occurrence"
            ),
        },
    ),
    "method": (
        [
            Column("Scientific", SCIENTIFIC, BOTH),
            Column("its rare items, N@10", SCIENTIFIC, part="rare target"),
            Column("a tenth of the items held out", HELD_OUT, BOTH),
            Column("its cold items, N@10", HELD_OUT, part="cold target"),
            Column("Beauty", BEAUTY, BOTH),
        ],
        {
            "`--method head`": dict.fromkeys((SCIENTIFIC, HELD_OUT, BEAUTY), "head"),
            "`--method head --spare_rare 0`": dict.fromkeys(
                (SCIENTIFIC, HELD_OUT), "head, spare_rare 0"
            ),
            "`--method head`, nothing trained (zero-shot)": dict.fromkeys(
                (SCIENTIFIC, HELD_OUT, BEAUTY), "head, nothing trained"
            ),
            "SASRec over learned and projected text vectors, `--history_term`": {
                SCIENTIFIC: SASREC_TEXT
            },
            "TF-IDF, `--history_factor 0.3`": dict.fromkeys(
                (SCIENTIFIC, HELD_OUT), "TF-IDF, history factor"
            ),
            "co-occurrence, `--history_factor 0.2`": dict.fromkeys(
                (SCIENTIFIC, HELD_OUT), "co-occurrence, history factor"
            ),
            "co-occurrence": dict.fromkeys((SCIENTIFIC, HELD_OUT, BEAUTY), "co-occurrence"),
            "published finetuning": {SCIENTIFIC: "published"},
            "TF-IDF": dict.fromkeys((SCIENTIFIC, HELD_OUT, BEAUTY), "TF-IDF"),
            "SASRec": {SCIENTIFIC: "SASRec, cosine", HELD_OUT: "SASRec", BEAUTY: "SASRec"},
        },
    ),
}


def summary(name: str, figures: Path) -> str:
    """A table of `SUMMARIES`, best row first; in brackets what is expected of rows that were not
    run on this state of the repository."""
    columns, rows = SUMMARIES[name]
    made, expected = {}, {}
    for experiment in dict.fromkeys(column.experiment for column in columns):
        path = figures / f"{experiment}.json"
        found = read_json(path)["rows"] if path.is_file() else []
        made[experiment] = {row["name"]: row for row in found}
        expected[experiment] = {row.name: row.expected for row in Experiment.load(experiment).runs}
    lines = []
    for label, names in rows.items():
        cells = []
        for column in columns:
            row = names.get(column.experiment)
            known = made[column.experiment].get(row)
            if known is not None:
                cells.append(_measured(known, column))
            elif row is not None and column.part is None:
                value = expected[column.experiment][row]
                cells.append(f"({' / '.join(_short(value[metric]) for metric in column.metrics)})")
            else:
                cells.append("")
        lines.append([label, *cells])
    lines.sort(key=lambda line: line[1].strip("("), reverse=True)
    return markdown_table(["", *(column.head for column in columns)], lines)


def _measured(row: dict[str, Any], column: Column) -> str:
    if column.part is not None:
        return _short(row["slices"][column.part][1])
    cells = []
    for metric in column.metrics:
        deviation = row["deviation"].get(metric) if len(column.metrics) > 1 else None
        ending = f" ± {_short(deviation)}" if deviation else ""
        cells.append(_short(row["figures"][metric][0]) + ending)
    return " / ".join(cells)


def _short(value: float) -> str:
    return f"{value:.4f}".removeprefix("0")
