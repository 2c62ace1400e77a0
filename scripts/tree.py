"""The tree of the repository, from the layers and the first line of every module's docstring.

python scripts/tree.py            prints it
python scripts/tree.py --write    folders into CONTRIBUTING.md, all into docs/reference/tree.md
"""

from __future__ import annotations

import ast
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
WIDTH = 28  # of the column of names

#: Other ways to type a command, so they import it.
DOORS = (
    "recformer.recommend",
    "recformer.encode_items",
    "recformer.compare",
    "recformer.checkpoint",
    "recformer.data.audit",
    "recformer.data.download",
    "recformer.data.sample",
    "recformer.tokenization.__main__",
)

#: A module may import from its own layer and from the ones above it in this list, never from below.
LAYERS: list[tuple[str, ...]] = [
    (
        "recformer.files",
        "recformer.machine",
        "recformer.packing",
        "recformer.paper",
        "recformer.pictures",
        "recformer.processes",
    ),
    ("recformer.cli", "recformer.config", "recformer.products"),
    ("recformer.tokenization",),
    ("recformer.data",),
    ("recformer.evaluation",),
    ("recformer.models", "recformer.preparation"),
    ("recformer.checkpoints",),
    ("recformer.training",),
    ("recformer.pretrain", "recformer.finetune", "recformer.recommendation"),
    ("recformer.serving",),
    ("recformer.export",),
    ("recformer.commands",),
    ("recformer.__main__", *DOORS),
    ("baselines",),
    ("benchmarks",),
]

ABOVE = {
    "quickstart.sh": "fresh machine -> whole pipeline on the generated sample -> metrics table",
    "run_tests.sh": "fresh machine -> lint, types, tests",
    "lightning_run.sh": "pretraining: variables with defaults, further flags are passed on",
    "finetune.sh": "finetuning and evaluation, likewise",
    "save_longformer_ckpt.py": "start weights into pretraining",
    "convert_pretrain_ckpt.py": "released files out of it",
    "pretrain_data/": "raw reviews and metadata -> pretraining files",
    "finetune_data/": "raw reviews and metadata -> a processed folder",
}
BELOW = {
    "scripts/": "shared by the shell scripts; checks; what makes drawings, tables and this tree",
    "tests/": "in the folders of what they test; golden vectors of the published model",
    "examples/": "a shop from its files to a page, five short scripts, a notebook",
    "docs/": "results with commands, performance and why, the method `head`, guides",
}


def first_line(path: Path) -> str:
    """The first line of a module's docstring, without its full stop."""
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    return text.split("\n")[0].rstrip(".")


def lines_of(path: Path, depth: int, deep: bool = True) -> list[str]:
    """A package with all that is below it, or a module."""
    indent = "  " * depth
    if path.is_file():
        return [_line(indent + path.name, first_line(path))]
    lines = [_line(f"{indent}{path.name}/", first_line(path / "__init__.py"))]
    parts = [p for p in path.iterdir() if p.suffix == ".py" or (p / "__init__.py").exists()]
    for part in sorted(parts, key=lambda p: (p.is_dir(), p.name)):
        if part.name != "__init__.py" and (deep or (part.is_dir() and depth == 0)):
            lines += lines_of(part, depth + 1, deep)
    return lines


def tree(root: Path = ROOT, deep: bool = True) -> str:
    """Modules of `recformer` in the order of the layers; without `deep` folders alone."""
    lines = [_line(*entry) for entry in ABOVE.items()]
    lines.append(_line("recformer/", first_line(root / "recformer" / "__init__.py")))
    names = [name for layer in LAYERS for name in layer]
    for name in names:
        package, _, module = name.partition(".")
        if "." in module:
            continue  # a door, shown in its folder
        path = root / package / module if module else root / package
        if module:
            if path.is_dir() or deep:
                lines += lines_of(path if path.is_dir() else path.with_suffix(".py"), 1, deep)
        else:
            lines += lines_of(path, 0, deep)
    lines += [_line(*entry) for entry in BELOW.items()]
    return "\n".join(lines) + "\n"


def _line(name: str, text: str) -> str:
    return f"{name:<{WIDTH}}{text}".rstrip()


def with_tree(page: str, deep: bool) -> str:
    """The text of a page with the tree in its place."""
    before, start, rest = page.partition("```text\nquickstart.sh")
    _, end, after = rest.partition("```\n")
    return before + start.removesuffix("quickstart.sh") + tree(deep=deep) + end + after


PAGES = {ROOT / "CONTRIBUTING.md": False, ROOT / "docs" / "reference" / "tree.md": True}

if __name__ == "__main__":
    if "--write" in sys.argv[1:]:
        for path, deep in PAGES.items():
            text = path.read_text(encoding="utf-8")
            path.write_text(with_tree(text, deep), encoding="utf-8")
    else:
        print(tree(), end="")
