"""The documentation as a site: its drawings, its links out of `docs/`, and that it asks no host."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"


def module(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    loaded = importlib.util.module_from_spec(spec)
    sys.modules[name] = loaded
    spec.loader.exec_module(loaded)
    return loaded


def test_drawings_are_made_by_the_script_and_shown(tmp_path: Path) -> None:
    drawings = module("drawings")
    drawings.main(tmp_path)
    made = {path.name for path in tmp_path.iterdir()}
    assert made == {path.name for path in (DOCS / "drawings").iterdir()}
    shown = "".join(path.read_text(encoding="utf-8") for path in DOCS.rglob("*.md"))
    for name in made:
        assert f"drawings/{name})" in shown
    # The drawing of ties says what the evaluator computes.
    text = (DOCS / "drawings" / "ties.svg").read_text(encoding="utf-8")
    assert "(0.500 + 0.431 + 0.387) / 3 = 0.439" in text


def test_links_out_of_docs_become_names_and_must_lead_somewhere() -> None:
    links = module("site_links")
    page = DOCS / "guides" / "own-shop.md"
    text = "[a](../results.md#x) [the example](../../examples/shop/README.md) ![p](../../x.png)"
    assert links.without_outer_links(text, page) == (
        "[a](../results.md#x) the example (`examples/shop/README.md`) ![p](../../x.png)"
    )
    assert links.without_outer_links("[`README.md`](../README.md)", DOCS / "x.md") == "`README.md`"
    assert links.without_outer_links("[w](https://example.org/)", page) == (
        "[w](https://example.org/)"
    )
    with pytest.raises(FileNotFoundError, match="leads to no file"):
        links.without_outer_links("[x](../../gone.md)", page)


def test_files_that_pages_name_are_there() -> None:
    """Those of the tree; CHANGELOG tells of what was, NAME stands for any."""
    folders = "tests|scripts|recformer|baselines|benchmarks|examples|docs"
    named = re.compile(rf"(?<![\w/.~-])(?:{folders})/[\w/.-]*\w")
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *DOCS.rglob("*.md")]
    paths = {(page.name, path) for page in pages for path in named.findall(page.read_text("utf-8"))}
    assert ("CONTRIBUTING.md", "tests/test_layers.py") in paths
    gone = {(page, path) for page, path in paths if not (ROOT / path).exists()}
    assert gone == {("results.md", "recformer/experiments/NAME.yaml")}


def test_the_site_asks_no_other_host(tmp_path: Path) -> None:
    """Built as by `mkdocs build --strict`, without the reference, which takes long."""
    pytest.importorskip("material")
    from mkdocs.commands.build import build
    from mkdocs.config import load_config

    whole = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    assert whole["strict"] is True
    config = load_config(
        str(ROOT / "mkdocs.yml"),
        site_dir=str(tmp_path),
        plugins=["search"],
        strict=False,
    )
    build(config)
    pages = list(tmp_path.rglob("*.html"))
    assert len(pages) > 20
    for page in pages:
        html = page.read_text(encoding="utf-8")
        loaded = re.findall(r"<(?:script|img|iframe)[^>]*\bsrc=\"?([^\"\s>]+)", html)
        loaded += re.findall(
            r"<link[^>]*rel=\"?(?:stylesheet|preload)[^>]*href=\"?([^\"\s>]+)", html
        )
        loaded += re.findall(r"<link[^>]*href=\"?([^\"\s>]+)[^>]*rel=\"?stylesheet", html)
        assert loaded
        assert [name for name in loaded if "//" in name] == [], page.name
    for sheet in tmp_path.rglob("*.css"):  # fonts and other sheets
        css = sheet.read_text(encoding="utf-8")
        asked = re.findall(r"(?:url\(|@import)\s*[\"']?([^\"')\s;]+)", css)
        assert [name for name in asked if re.match(r"(?:https?:)?//", name)] == [], sheet.name
