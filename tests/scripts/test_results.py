"""Tables of the page of results are those of the runs, not typed."""

from __future__ import annotations

import json
from pathlib import Path

from scripts import results


def test_the_page_holds_what_was_measured() -> None:
    text = results.PAGE.read_text(encoding="utf-8")
    names = [match[2] for match in results.TABLE.finditer(text)]
    assert names
    assert results.with_tables(text) == text, "run python scripts/results.py --write"
    assert sorted(path.stem for path in results.FIGURES.glob("*.json")) == sorted(names)


def test_a_table_is_put_in_its_place(tmp_path: Path) -> None:
    name = next(results.FIGURES.glob("*.json")).stem
    content = json.loads((results.FIGURES / f"{name}.json").read_text())
    content["rows"][0]["name"] = "a new name"
    (tmp_path / f"{name}.json").write_text(json.dumps(content))
    page = f"before\n<!-- reproduced: {name} -->\nto be replaced\n<!-- end -->\nafter\n"
    made = results.with_tables(page, tmp_path)
    assert made.startswith(f"before\n<!-- reproduced: {name} -->\n\n`recformer reproduce {name}`: ")
    assert made.endswith("<!-- end -->\nafter\n")
    assert "|a new name|" in made
    assert "to be replaced" not in made
    assert results.with_tables(made, tmp_path) == made
