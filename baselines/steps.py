"""Figures of steps as records and tables: semantic ids of items, audits of data."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from baselines.experiment import CODES, COUNTED, SHARES, Step
from recformer.files import read_json

AUDIT = "audit"  # the command
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
    kind = step.commands[-1][0]
    found = read_json(folder / step.report[0])
    figures = audit_facts(found) if kind == AUDIT else _codes(found)
    values = {figure: _value(figures[figure]) for figure in step.expected}
    return (
        {"name": step.name, "kind": kind, **figures}
        | {"expected": step.expected, "tolerance": step.tolerance}
        | {"verdict": _verdict(step, values)}
    )


def _verdict(step: Step, values: Mapping[str, Any]) -> str:
    """`reproduced`, or what is furthest from what was expected."""
    off = {figure: _off(values[figure], value) for figure, value in step.expected.items()}
    allowed = {figure: 0 if figure in COUNTED else step.tolerance for figure in off}
    wrong = [figure for figure in off if not abs(off[figure]) <= allowed[figure] + 1e-9]
    if not wrong:
        return "reproduced"
    worst = max(wrong, key=lambda figure: abs(off[figure]))
    if math.isinf(off[worst]):
        found = "not there" if values[worst] is None else f"{values[worst]:g}, expected 0"
        return f"differs: {worst} is {found}"
    return f"differs: {worst} {off[worst]:+.1%}"


def _off(found: Any, expected: float) -> float:
    """By which share a figure is off; infinite where it is not there, or no 0."""
    if found is None or (expected == 0 and found != 0):
        return math.inf
    return found / expected - 1 if expected else 0.0


def _value(figure: Any) -> Any:
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


def _is_audit(record: Mapping[str, Any]) -> bool:
    """Whether a record is of an audit; those of older files do not say it and are of codes."""
    return record.get("kind") == AUDIT


def step_tables(records: Sequence[Mapping[str, Any]]) -> list[Table]:
    """The tables of steps, one a kind."""
    kinds = ((False, _codes_table), (True, _audit_table))
    groups = (([r for r in records if _is_audit(r) is kind], table) for kind, table in kinds)
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
        counts = [f"{record[name]:,}" for name in COUNTED]
        shares = ["" if record[name] is None else f"{record[name]:.1%}" for name in SHARES]
        cells.append([record["name"], *counts, *shares, record["verdict"]])
    return [*AUDIT_HEADS, "expected"], cells


def csv_line(record: Mapping[str, Any]) -> dict[str, Any]:
    """Name, figures (of a list the last one) and verdict of a record, in full."""
    names = (*COUNTED, *SHARES) if _is_audit(record) else ("items", "seconds", *CODES)
    values = {name: _value(record[name]) for name in names}
    line = {name: "" if value is None else value for name, value in values.items()}
    return {"name": record["name"], **line, "verdict": record["verdict"]}
