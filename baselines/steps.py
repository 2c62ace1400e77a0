"""Figures of steps as records and tables: semantic ids of items, audits of data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from baselines.experiment import AUDITED, CODES, Step
from recformer.files import read_json

Table = tuple[str, list[str], list[list[str]]]  # caption, heads and cells

AUDIT_HEADS = (
    "",
    "users",
    "items",
    "interactions",
    "test targets",
    "decided by ties in time",
    "never trained on",
    "in the history already",
    "of a text that another item has",
    "nothing before the test part",
    "training that is later",
)


def step_record(step: Step, folder: Path) -> dict[str, Any]:
    """What a table says of a step that has something to expect, and whether that came out.

    Raises:
        KeyError, TypeError, UserError: its file holds something else.
    """
    name, _ = step.report
    found = read_json(folder / name)
    figures = audit_facts(found) if name == "audit.json" else _codes(found)
    values = {figure: found_value(figures[figure]) for figure in step.expected}
    return (
        {"name": step.name, "of": name.partition(".")[0], **figures}
        | {"expected": step.expected, "tolerance": step.tolerance}
        | {"verdict": _verdict(step, values)}
    )


def _verdict(step: Step, values: Mapping[str, Any]) -> str:
    """`reproduced`, or by how much a figure differs."""
    for figure, value in values.items():
        if value is None:
            return f"differs: {figure} is not there"
    off = {figure: values[figure] / value - 1 for figure, value in step.expected.items()}
    worst = max(off, key=lambda figure: abs(off[figure]))
    if abs(off[worst]) <= step.tolerance + 1e-9:
        return "reproduced"
    return f"differs: {worst} {off[worst]:+.1%}"


def found_value(figure: Any) -> Any:
    """A figure, of a list the last one."""
    return figure[-1] if isinstance(figure, list) else figure


def _codes(found: Mapping[str, Any]) -> dict[str, Any]:
    """Of the report of semantic ids what the table says."""
    figures = {"items": found["items"], "seconds": sum(found["seconds"].values())}
    return figures | {name: found[name] for name in CODES}


def audit_facts(found: Mapping[str, Any]) -> dict[str, Any]:
    """Of an audit.json what the table says: counts, then shares of the test users' targets; None
    where times are not real.

    Where the audit counted tokens, texts are the same that a model reads as the same.
    """
    test, times = found["targets"]["test"], found["times"]
    real = times is not None and not times["synthetic"]
    same = (found["tokens"] or found["texts"])["identical"]["test_targets"]
    return {
        **{name: found["sizes"][name] for name in ("users", "items", "interactions")},
        "targets": test["evaluated"],
        "ties": test["decided_by_ties"]["share"] if real else None,
        "cold": test["cold"]["share"],
        "seen": test["in_history"]["share"],
        "same": same["share"],
        "no_history": test["nothing_before_the_part"]["share"],
        "later": times.get("mean_share_of_train_after_a_target") if real else None,
    }


def is_audit(record: Mapping[str, Any]) -> bool:
    """Whether a record is of an audit; those of older files do not say it and are of codes."""
    return record.get("of") == "audit"


def step_tables(records: Sequence[Mapping[str, Any]]) -> list[Table]:
    """The tables of steps, one a kind."""
    kinds = ((False, _codes_table), (True, _audit_table))
    groups = (([r for r in records if is_audit(r) is kind], table) for kind, table in kinds)
    return [("", *table(group)) for group, table in groups if group]


def _codes_table(records: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Semantic ids: what each level loses of the vectors, and how its codes are used."""
    heads = ["", "items", "variance lost, level by level", "codes used", "entropy, bits"]
    heads += ["items that share their codes", "at most", "minutes", "expected"]
    cells = [
        [
            record["name"],
            f"{record['items']:,}",
            " ".join(f"{lost:.3f}" for lost in record["reconstruction_error"]),
            " ".join(f"{used:.1%}" for used in record["usage"]),
            " ".join(f"{bits:.2f}" for bits in record["entropy"]),
            f"{record['colliding_items']:,}",
            f"{record['largest_collision']:,}",
            f"{record['seconds'] / 60:.1f}",
            record["verdict"],
        ]
        for record in records
    ]
    return heads, cells


def _audit_table(records: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Audits: what can spoil an evaluation on each data set."""
    cells = []
    for record in records:
        counts = [f"{record[name]:,}" for name in AUDITED[:4]]
        shares = ["" if record[name] is None else f"{record[name]:.1%}" for name in AUDITED[4:]]
        cells.append([record["name"], *counts, *shares, record["verdict"]])
    return [*AUDIT_HEADS, "expected"], cells


def csv_line(record: Mapping[str, Any]) -> dict[str, Any]:
    """Name, figures (of a list the last one) and verdict of a record, in full."""
    names = AUDITED if is_audit(record) else ("items", "seconds", *CODES)
    values = {name: found_value(record[name]) for name in names}
    line = {name: "" if value is None else value for name, value in values.items()}
    return {"name": record["name"], **line, "verdict": record["verdict"]}
