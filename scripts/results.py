"""The tables of the documents, from what was measured.

python -m scripts.results --take PATH … [--write]    keeps what was measured in docs/results
python -m scripts.results --write                    puts the tables into the pages

A PATH is a folder that `recformer reproduce` or `recformer compare` wrote, or a file that
`python -m benchmarks --json FILE` or `benchmarks.scale` wrote. Several files of one benchmark are
pieces of one table.

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
from benchmarks.tables import by_benchmark, machine_of
from benchmarks.tables import markdown as benchmark_markdown
from recformer.cli import exit_with_message
from recformer.commands.compare import captions, figure_cells, pair_cells
from recformer.evaluation.table import markdown_table
from recformer.files import UserError, read_json, write_json
from scripts.summaries import summary

ROOT = Path(__file__).resolve().parent.parent
FIGURES = ROOT / "docs" / "results"
SPEED, COMPARED = "speed", "compared"  # folders within it
NAMES = ("results.md", "speed.md", "quickstart.md", "method.md", "performance.md", "scale.md")
PAGES = (*(ROOT / "docs" / name for name in NAMES), ROOT / "README.md")
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


def benchmark(name: str, figures: Path) -> str:
    """Tables of a benchmark."""
    path = figures / SPEED / f"{name}.json"
    if not path.is_file():
        return f"`python -m benchmarks {name}`: {NOT_YET}"
    return benchmark_markdown(read_json(path))


def scale(_: str, figures: Path) -> str:
    """The rows of `python -m benchmarks.scale`."""
    content = read_json(figures / "scale.json")
    return f"{scale_table(content['rows'])}\n{machine_of(content)}\n"


KINDS: dict[str, Callable[[str, Path], str]] = {
    "experiments": experiments,
    "reproduced": reproduced,
    "compared": compared,
    "benchmark": benchmark,
    "scale": scale,
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
            names = ("reproduction.json", "comparison.json")
            inside = (path / name for name in names)
            path = next((each for each in inside if each.is_file()), path)
        if not path.is_file():
            raise UserError(
                f"{path}: no file, and no folder of `recformer reproduce` or `recformer compare`"
            )
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
        elif path.name == "comparison.json":
            kept[figures / COMPARED / f"{path.absolute().parent.name}.json"] = content
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
    for piece in by_benchmark(content):
        name = piece["benchmark"]
        table = kept.setdefault(figures / SPEED / f"{name}{ending}.json", piece | {"rows": []})
        if "command" in piece:
            table["command"] = piece["command"]
        for key, value in machine.items():
            if key in ("load_before", "date"):
                known = [each for each in (table["machine"].get(key), value) if each is not None]
                table["machine"][key] = max(known, default=None)
            elif table["machine"][key] != value:
                both = f"{table['machine'][key]} and {value}"
                raise UserError(f"pieces of {name} are of two machines: {key} {both}")
        table["rows"] += piece["rows"]


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
