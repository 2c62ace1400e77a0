"""Links of the documentation to files outside `docs/`, for mkdocs: the site has no such pages.

On the site such a link becomes the name of the file; in the repository, where the pages are read as
well, it stays a link. A name that is no file of the repository stops the build.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
LINK = re.compile(r"(?<!!)\[([^\]]+)\]\(([^)\s:]+?)(#[^)\s]*)?\)")
DOCS = ROOT / "docs"


def without_outer_links(markdown: str, page: Path) -> str:
    """`markdown` of `page` with links to files outside `docs/` as text.

    Raises:
        FileNotFoundError: a link to a file that is not in the repository.
    """

    def replaced(match: re.Match[str]) -> str:
        text, target = match[1], match[2]
        path = (page.parent / target).resolve()
        if path.is_relative_to(DOCS):
            return match[0]
        if not path.exists():
            raise FileNotFoundError(f"{page}: [{text}]({target}) leads to no file")
        name = path.relative_to(ROOT).as_posix()
        return f"{text}" if text.strip("`") == name else f"{text} (`{name}`)"

    return LINK.sub(replaced, markdown)


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Called by mkdocs for every page."""
    return without_outer_links(markdown, Path(page.file.abs_src_path))
