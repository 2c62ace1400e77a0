"""Tables of what was measured, in the pages and beside `--json FILE`: Markdown, LaTeX and CSV.

What is said of "one benchmark" has the form of the files in docs/results/speed, which
`by_benchmark` makes of a run.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from recformer.evaluation.table import csv_table, latex_table, markdown_table
from recformer.files import UserError, atomic_write, is_plain, write_json

Row = dict[str, Any]
Table = tuple[list[str], list[list[str]]]  # heads, and the cells of every row

ISA = {"amx_tile": "AMX", "avx512_bf16": "AVX512_BF16", "avx512f": "AVX-512", "avx2": "AVX2"}
TAG, PLAIN_TAG = "`<s>`", "<s>"  # Markdown would take the plain one, in the name of a row, for HTML


def write(file: str | os.PathLike, content: dict[str, Any], markdown: str, latex: str) -> None:
    """Write what was measured as JSON, and beside it its tables: FILE's stem with .md, .tex, .csv.

    A pipe or a device gets the JSON alone.

    Raises:
        UserError: FILE has the name of one of its tables.
    """
    texts = {".md": markdown, ".tex": latex, ".csv": csv_table(content["rows"])}
    path = Path(file)
    if path.suffix in texts:
        raise UserError(
            f"{path}: {', '.join(texts)} are the tables beside the JSON, give it another ending"
        )
    write_json(file, content, indent=1)
    for ending, text in texts.items() if is_plain(file) else ():
        with atomic_write(path.with_suffix(ending)) as handle:
            handle.write(text)


def by_benchmark(content: dict[str, Any]) -> list[dict[str, Any]]:
    """What a run measured, as one of each benchmark."""
    found: dict[str, dict[str, Any]] = {}
    for row in content["rows"]:
        name, machine = row["benchmark"], dict(content["machine"])
        own = found.setdefault(name, {"benchmark": name, "machine": machine, "rows": []})
        own["rows"].append({key: value for key, value in row.items() if key != "benchmark"})
        if command := content.get("commands", {}).get(name):
            own["command"] = command
    return list(found.values())


def markdown(content: dict[str, Any]) -> str:
    """Command, tables and machine of one benchmark."""
    parts = [f"`{command_of(content)}`\n"]
    for heads, rows in tables_of(content):
        cells = [[first.replace(PLAIN_TAG, TAG), *others] for first, *others in rows]
        parts.append(markdown_table(heads, cells))
    return "\n".join([*parts, f"{machine_of(content)}\n"])


def latex(content: dict[str, Any]) -> str:
    """Tables of one benchmark, command and machine as comments."""
    tables = "\n".join(latex_table(*table) for table in tables_of(content))
    return f"% {command_of(content)}\n{tables}% {machine_of(content)}\n"


def tables_of(content: dict[str, Any]) -> list[Table]:
    """Heads and cells of the tables of one benchmark."""
    rows = [row | {"what": row["what"].replace(TAG, PLAIN_TAG)} for row in content["rows"]]
    return stage_tables(rows) if content["benchmark"] == "stages" else [row_table(rows)]


def row_table(rows: list[Row]) -> Table:
    """A row each; columns without a figure are left out."""
    peers = {row["peer"] for row in rows if row["peer"]}
    columns: list[tuple[str, Callable[[Row], str]]] = [
        ("ours s", _of("ours_seconds")),
        ("a second", rate),
        ("peer", lambda row: row["peer"] if len(peers) > 1 else ""),
        (f"{min(peers)} s" if len(peers) == 1 else "its s", _of("peer_seconds")),
        ("ratio", lambda row: "" if row["ratio"] is None else f"{row['ratio']:.2f}"),
        ("share of the ceiling", _share),
        ("MB", _of("peak_memory_mb")),
        ("its MB", _of("peer_peak_memory_mb")),
        ("", lambda row: row["note"]),
    ]
    used = [(head, cell) for head, cell in columns if any(map(cell, rows))]
    cells = [[row["what"], *(cell(row) for _, cell in used)] for row in rows]
    return ["", *(head for head, _ in used)], cells


def stage_tables(rows: list[Row]) -> list[Table]:
    """Shares of time of `python -m benchmarks stages`: a table a size, a column a dtype."""
    seconds: dict[str, dict[str, float]] = {}  # of all of it, by size and dtype
    shares: dict[str, dict[str, dict[str, str]]] = {}  # by size, stage and dtype
    for row in rows:
        whole, _, stage = row["what"].partition(": ")
        size, _, dtype = whole.rpartition(", ")
        if stage:
            shares.setdefault(size, {}).setdefault(stage, {})[dtype] = row["note"]
        else:
            seconds.setdefault(size, {})[dtype] = row["ours_seconds"]
    tables = []
    for size, found in seconds.items():
        heads = [size, *(f"{dtype}, {number(value)} s" for dtype, value in found.items())]
        cells = [
            [stage, *(each.get(dtype, "") for dtype in found)]
            for stage, each in shares.get(size, {}).items()
        ]
        tables.append((heads, cells))
    return tables


def command_of(content: dict[str, Any]) -> str:
    """What measured one benchmark."""
    machine = content["machine"]
    command = content.get("command") or f"python -m benchmarks {content['benchmark']}"
    fewer = machine["threads"] < machine["cores"]
    return f"{command} --threads {machine['threads']}" if fewer else command


def machine_of(content: dict[str, Any]) -> str:
    """Processor, threads, load, versions and day, in a line."""
    found = content["machine"]
    isa = next((f", {said}" for flag, said in ISA.items() if flag in found["isa"]), "")
    threads = f"{found['threads']} thread{'s' if found['threads'] > 1 else ''}"
    load = "" if found["load_before"] is None else f", load before {found['load_before']}"
    peers = {row.get("peer", "") for row in content["rows"]}
    named = ["torch", "transformers"]
    for package, name in (
        ("sentence-transformers", "sentence-transformers"),
        ("faiss-cpu", "faiss"),
    ):
        if package in found and any(peer.startswith(name) for peer in peers):
            named.append(package)
    versions = ", ".join(f"{name} {found[name]}" for name in named)
    day = f"; {found['date']}" if "date" in found else ""
    return f"{found['cpu']}{isa}, {threads}{load}; {versions}{day}"


def number(value: float | None) -> str:
    """Three digits, or all before the point."""
    if value is None:
        return ""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def rate(row: Row) -> str:
    """How much of its work ours does in a second."""
    if row["amount"] is None:
        return ""
    return f"{number(row['amount'] / row['ours_seconds'])} {row['unit']}"


def _of(name: str) -> Callable[[Row], str]:
    return lambda row: number(row[name])


def _share(row: Row) -> str:
    return "" if row["share_of_ceiling"] is None else f"{row['share_of_ceiling']:.0%}"
