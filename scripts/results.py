"""The tables of docs/results.md that `recformer reproduce` made, from what it wrote.

python scripts/results.py --take FOLDER    takes FOLDER/reproduction.json into docs/results
python scripts/results.py --write          puts the tables into docs/results.md

In the page `<!-- reproduced: NAME -->` and `<!-- end -->` stand around a table: never typed.
`<!-- experiments -->` stands before the list of all experiments.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

from baselines.reproduce import FOLDER, Experiment, markdown
from recformer.evaluation.table import markdown_table

ROOT = Path(__file__).resolve().parent.parent
FIGURES = ROOT / "docs" / "results"
PAGE = ROOT / "docs" / "results.md"
TABLE = re.compile(r"(<!-- reproduced: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


LIST = re.compile(r"(<!-- experiments -->\n).*?(<!-- end -->)", re.DOTALL)


def experiments(figures: Path) -> str:
    """A row an experiment: its rows, those of a table in the page, and what all of it takes."""
    rows = []
    for path in sorted(FOLDER.glob("*.yaml")):
        experiment = Experiment.load(path.stem)
        made = json.loads((figures / path.name).with_suffix(".json").read_text(encoding="utf-8"))
        minutes = sum(data.minutes for data in experiment.data.values())
        minutes += sum(r.minutes * max(1, len(r.seeds)) for r in experiment.runs if r.of is None)
        counts = (len(experiment.runs), len(made["rows"]), round(minutes))
        rows.append([f"`{path.stem}`", experiment.title, *map(str, counts)])
    return markdown_table(["NAME", "", "rows", "in a table", "minutes on two cores"], rows)


def with_tables(page: str, figures: Path = FIGURES) -> str:
    """The text of the page with every table in its place."""

    def table(match: re.Match[str]) -> str:
        content = json.loads((figures / f"{match[2]}.json").read_text(encoding="utf-8"))
        made = ", ".join(f"{name} {number}" for name, number in content["versions"].items())
        text = (
            f"`recformer reproduce {match[2]}`: {markdown(content)}\n{content['machine']}; {made}\n"
        )
        return f"{match[1]}\n{text}\n{match[3]}"

    page = LIST.sub(lambda match: f"{match[1]}\n{experiments(FIGURES)}\n{match[2]}", page)
    return TABLE.sub(table, page)


def taken(path: Path) -> dict[str, Any]:
    """A `reproduction.json` without what names folders of the machine it was made on."""
    content = json.loads(path.read_text(encoding="utf-8"))
    for row in content["rows"]:
        del row["command"]
    return content


def main(words: list[str]) -> None:
    """Take, write or print."""
    if words[:1] == ["--take"] and len(words) == 2:
        content = taken(Path(words[1]) / "reproduction.json")
        FIGURES.mkdir(exist_ok=True)
        path = FIGURES / f"{content['experiment']}.json"
        path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    elif words == ["--write"]:
        PAGE.write_text(with_tables(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    else:
        raise SystemExit(__doc__)


if __name__ == "__main__":
    main(sys.argv[1:])
