"""The tables of the documents, from what was measured.

python -m scripts.results --take PATH … [--write]    keeps what was measured in docs/results
python -m scripts.results --write                    puts the tables into the pages

A PATH is a folder that `recformer reproduce`, `recformer compare` or `experiments/sessions.py`
wrote, a file that `python -m benchmarks --json FILE` or `benchmarks.scale` wrote, or an audit.json,
whose row has the name of its folder. Several files of one benchmark are pieces of one table.

In the pages `<!-- KIND: NAME -->` and `<!-- end -->` stand around a table, which is never typed;
`KINDS` lists the kinds.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from baselines.experiment import FOLDER, Experiment, Run
from baselines.reproduce import markdown
from benchmarks.scale import table as scale_table
from experiments.sessions import tables_of as session_tables
from recformer.cli import exit_with_message
from recformer.commands.compare import captions, figure_cells, pair_cells
from recformer.evaluation.table import markdown_table
from recformer.files import UserError, read_json, write_json
from scripts.summaries import summary

ROOT = Path(__file__).resolve().parent.parent
FIGURES = ROOT / "docs" / "results"
SPEED, COMPARED = "speed", "compared"  # folders within it
NAMES = ("results.md", "speed.md", "method.md", "performance.md", "scale.md")
PAGES = (*(ROOT / "docs" / name for name in NAMES), ROOT / "README.md")
AUDITS = "audits.json"
ISA = {"amx_tile": "AMX", "avx512_bf16": "AVX512_BF16", "avx512f": "AVX-512", "avx2": "AVX2"}
TAG = re.compile("`?<s>`?")  # in the name of a row, which Markdown would take for HTML
NOT_YET = "not measured on this state of the repository\n"
TABLE = re.compile(r"(<!-- (\w+)(?:: ([\w ]+))? -->\n)((?:(?!<!-- ).)*?)(<!-- end -->)", re.DOTALL)


# --- tables ---------------------------------------------------------------------------------------


def experiments(_: str, figures: Path) -> str:
    """A row an experiment: its rows, those of a table in the page, and what all of it takes."""
    rows = []
    for path in sorted(FOLDER.glob("*.yaml")):
        experiment = Experiment.load(path.stem)
        minutes = sum(data.minutes for data in experiment.data.values())
        minutes += sum(step.minutes for step in experiment.steps.values())
        minutes += sum(map(experiment.minutes, experiment.runs))
        made = len(_made(_reproduction(path.stem, figures)))
        counts = (len(experiment.rows()), made, round(minutes))
        rows.append([f"`{path.stem}`", experiment.title, *map(str, counts)])
    return markdown_table(["NAME", "", "rows", "run here", "minutes on two cores"], rows)


def reproduced(name: str, figures: Path) -> str:
    """What `recformer reproduce NAME` wrote, and rows of it that were not run here."""
    experiment, content = Experiment.load(name), _reproduction(name, figures)
    text = f"`recformer reproduce {name}`: "
    if content is None:
        text += f"{experiment.title}\n"
    else:
        text += markdown(content)
    lacking = [row for row in experiment.rows() if row.name not in _made(content)]
    if not lacking:
        return text
    rows = []
    for row in lacking:
        form, share = (".4f", "") if isinstance(row, Run) else ("g", " of it")
        expected = ", ".join(f"{metric} {value:{form}}" for metric, value in row.expected.items())
        minutes = experiment.minutes(row) if isinstance(row, Run) else row.minutes
        off = f"{row.tolerance:g}{share}"
        rows.append([row.name, expected, off, f"{minutes:g}" if minutes else ""])
    heads = ["not run here", "expected", "may differ by", "minutes on two cores"]
    return f"{text}\n{markdown_table(heads, rows)}"


def _reproduction(name: str, figures: Path) -> dict[str, Any] | None:
    path = figures / f"{name}.json"
    return read_json(path) if path.is_file() else None


def _made(content: dict[str, Any] | None) -> list[str]:
    """Names of the rows of a reproduction."""
    if content is None:
        return []
    return [row["name"] for row in [*content.get("steps", []), *content["rows"]]]


def _origin(content: dict[str, Any]) -> str:
    """Machine, versions and day of a study."""
    versions = ", ".join(f"{name} {number}" for name, number in content["versions"].items())
    day = f"; {content['date']}" if "date" in content else ""
    return f"{content['machine']}; {versions}{day}"


def compared(name: str, figures: Path) -> str:
    """Runs that `recformer compare --against` set against one of them."""
    path = figures / COMPARED / f"{name}.json"
    if not path.is_file():
        return NOT_YET
    content = read_json(path)
    judged = content.get("judged", f"{content['users']:,} test users")
    resampled = content.get("resampled", "users")
    above, between = captions(content["rule"], judged, content["metric"], resampled)
    runs, pairs = (markdown_table(*cells) for cells in (
        figure_cells(content["runs"]), pair_cells(content["pairs"])
    ))  # fmt: skip
    return f"{above}\n\n{runs}\n{between}\n\n{pairs}"


def sessions(name: str, figures: Path) -> str:
    """Tables of a data set of `experiments/sessions.py`."""
    content = read_json(figures / "sessions.json")
    return "\n".join(session_tables(content, name)) + f"\n{_origin(content)}\n"


def benchmark(name: str, figures: Path) -> str:
    """Rows of a benchmark; columns without a figure are left out."""
    path = figures / SPEED / f"{name}.json"
    if not path.is_file():
        return f"`python -m benchmarks {name}`: {NOT_YET}"
    content = read_json(path)
    rows = content["rows"]
    peers = {row["peer"] for row in rows if row["peer"]}
    columns: list[tuple[str, Callable[[dict[str, Any]], str]]] = [
        ("ours s", lambda row: _number(row["ours_seconds"])),
        ("a second", _rate),
        ("peer", lambda row: row["peer"] if len(peers) > 1 else ""),
        (f"{min(peers)} s" if len(peers) == 1 else "its s", _of("peer_seconds")),
        ("ratio", lambda row: "" if row["ratio"] is None else f"{row['ratio']:.2f}"),
        ("share of the ceiling", _share),
        ("MB", _of("peak_memory_mb")),
        ("its MB", _of("peer_peak_memory_mb")),
        ("", lambda row: row["note"]),
    ]
    used = [(head, cell) for head, cell in columns if any(map(cell, rows))]
    cells = [[TAG.sub("`<s>`", row["what"]), *(cell(row) for _, cell in used)] for row in rows]
    table = markdown_table(["", *(head for head, _ in used)], cells)
    command = content.get("command") or f"python -m benchmarks {content['benchmark']}"
    if content["machine"]["threads"] < content["machine"]["cores"]:
        command += f" --threads {content['machine']['threads']}"
    return f"`{command}`\n\n{table}\n{_machine(content)}\n"


def stages(_: str, figures: Path) -> str:
    """Shares of time of `python -m benchmarks stages`: a table a size, a column a dtype."""
    path = figures / SPEED / "stages.json"
    if not path.is_file():
        return f"`python -m benchmarks stages`: {NOT_YET}"
    content = read_json(path)
    seconds: dict[str, dict[str, float]] = {}  # of all of it, by size and dtype
    shares: dict[str, dict[str, dict[str, str]]] = {}  # by size, stage and dtype
    for row in content["rows"]:
        whole, _, stage = row["what"].partition(": ")
        size, _, dtype = whole.rpartition(", ")
        if stage:
            shares.setdefault(size, {}).setdefault(stage, {})[dtype] = row["note"]
        else:
            seconds.setdefault(size, {})[dtype] = row["ours_seconds"]
    texts = ["`python -m benchmarks stages`\n"]
    for size, found in seconds.items():
        heads = [size, *(f"{dtype}, {_number(value)} s" for dtype, value in found.items())]
        cells = [
            [TAG.sub("`<s>`", stage), *(each.get(dtype, "") for dtype in found)]
            for stage, each in shares.get(size, {}).items()
        ]
        texts.append(markdown_table(heads, cells))
    return "\n".join((*texts, f"{_machine(content)}\n"))


def _machine(content: dict[str, Any]) -> str:
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


def _number(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def _of(name: str) -> Callable[[dict[str, Any]], str]:
    return lambda row: _number(row[name])


def _rate(row: dict[str, Any]) -> str:
    if row["amount"] is None:
        return ""
    return f"{_number(row['amount'] / row['ours_seconds'])} {row['unit']}"


def _share(row: dict[str, Any]) -> str:
    return "" if row["share_of_ceiling"] is None else f"{row['share_of_ceiling']:.0%}"


def scale(_: str, figures: Path) -> str:
    """The rows of `python -m benchmarks.scale`."""
    content = read_json(figures / "scale.json")
    return f"{scale_table(content['rows'])}\n{_machine(content)}\n"


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


def audits(_: str, figures: Path) -> str:
    """A row a data set: what can spoil an evaluation on it."""

    def share(value: float | None) -> str:
        return "" if value is None else f"{value:.1%}"

    rows = [
        [
            name,
            *(f"{found[key]:,}" for key in ("users", "items", "interactions", "targets")),
            *(share(found[key]) for key in ("ties", "cold", "seen", "same", "no_history", "later")),
        ]
        for name, found in read_json(figures / AUDITS).items()
    ]
    return markdown_table(AUDIT_HEADS, rows)


def audit_facts(found: dict[str, Any]) -> dict[str, Any]:
    """Of an audit.json what the table says: shares, None where times are not real.

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


KINDS: dict[str, Callable[[str, Path], str]] = {
    "experiments": experiments,
    "reproduced": reproduced,
    "compared": compared,
    "sessions": sessions,
    "benchmark": benchmark,
    "stages": stages,
    "scale": scale,
    "audits": audits,
    "summary": summary,
}


def with_tables(page: str, figures: Path = FIGURES) -> str:
    """The text of a page with every table in its place."""

    def table(match: re.Match[str]) -> str:
        text = KINDS[match[2]](match[3] or "", figures)
        return f"{match[1]}\n{text}\n{match[5]}"

    return TABLE.sub(lambda match: table(match) if match[2] in KINDS else match[0], page)


# --- what is kept ---------------------------------------------------------------------------------


def take(paths: Sequence[Path], figures: Path = FIGURES) -> list[Path]:
    """Keep what was measured, without folders of the machine it was made on; the files written.

    Raises:
        UserError: a path holds no measurement, or pieces of a benchmark are of two machines.
    """
    kept: dict[Path, Any] = {}
    for path in paths:
        if path.is_dir():
            names = ("reproduction.json", "study.json", "comparison.json")
            inside = (path / name for name in names)
            path = next((each for each in inside if each.is_file()), path)
        if not path.is_file():
            raise UserError(f"{path}: no file, and no folder of `recformer reproduce` or a study")
        content = read_json(path)
        if path.name == "reproduction.json":
            for row in content["rows"]:
                del row["command"]
            place = figures / f"{content['experiment']}.json"
            lost = set(_made(_reproduction(content["experiment"], figures))) - set(_made(content))
            if lost:
                raise UserError(
                    f"{path} lacks rows that {place} has: {', '.join(sorted(lost))}; make them, or "
                    "remove that file first"
                )
            kept[place] = content
        elif path.name == "study.json":
            kept[figures / "sessions.json"] = content
        elif path.name == "comparison.json":
            kept[figures / COMPARED / f"{path.absolute().parent.name}.json"] = content
        elif path.name == "audit.json":
            place = figures / AUDITS
            before = kept.get(place, read_json(place) if place.is_file() else {})
            kept[place] = before | {path.absolute().parent.name: audit_facts(content)}
        elif "rows" in content and "machine" in content:
            _take_benchmarks(content, figures, kept)
        else:
            raise UserError(f"{path}: nothing that was measured")
    for place, content in kept.items():
        place.parent.mkdir(parents=True, exist_ok=True)
        write_json(place, content, indent=1)
    return list(kept)


def _take_benchmarks(content: dict[str, Any], figures: Path, kept: dict[Path, Any]) -> None:
    """A file a benchmark; with fewer threads than cores their number is part of its name."""
    machine = content["machine"]
    if content["rows"] and "interactions" in content["rows"][0]:
        kept[figures / "scale.json"] = content
        return
    ending = f"_{machine['threads']}" if machine["threads"] < machine["cores"] else ""
    for row in content["rows"]:
        row = dict(row)
        name = row.pop("benchmark")
        place = figures / SPEED / f"{name}{ending}.json"
        table = kept.setdefault(place, {"benchmark": name, "machine": dict(machine), "rows": []})
        if command := content.get("commands", {}).get(name):
            table["command"] = command
        for key, value in machine.items():
            if key in ("load_before", "date"):
                known = [each for each in (table["machine"].get(key), value) if each is not None]
                table["machine"][key] = max(known, default=None)
            elif table["machine"][key] != value:
                both = f"{table['machine'][key]} and {value}"
                raise UserError(f"pieces of {name} are of two machines: {key} {both}")
        table["rows"].append(row)


def main(words: list[str]) -> None:
    """Take, write or say how."""
    paths = words[1:-1] if words[-1:] == ["--write"] else words[1:]
    if words[:1] == ["--take"] and paths:
        for path in take([Path(word) for word in paths]):
            print(path.relative_to(ROOT))
    elif words != ["--write"]:
        raise SystemExit(__doc__)
    if words[-1:] == ["--write"]:
        for page in PAGES:
            page.write_text(with_tables(page.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    exit_with_message(lambda: main(sys.argv[1:]))
