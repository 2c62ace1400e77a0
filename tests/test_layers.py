"""Imports run one way, and light things stay light to import."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from recformer.__main__ import COMMANDS
from scripts.tree import DOORS, LAYERS, PAGES, first_line, tree, with_tree

ROOT = Path(__file__).resolve().parent.parent

# Run by name; no other module imports them.
ENTRY_POINTS = (
    "recformer.__main__",
    "recformer.commands",
    *DOORS,
    "recformer.pretrain",
    "recformer.finetune",
    "baselines.__main__",
    "baselines.leaderboard",
    "baselines.semantic_ids.__main__",
)

# The package's face: hands names on lazily, so it stands outside the layers.
FACADE = "recformer"

# What `import recformer` and its model, tokenizer and config must not load.
HEAVY = ("lightning", "pytorch_lightning", "deepspeed", "polars", "msgspec")
# What training must not load: only data preparation reads raw files.
PREPARATION_ONLY = ("polars", "msgspec")


def module_name(path: Path, root: Path = ROOT) -> str:
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def modules(root: Path = ROOT) -> dict[str, Path]:
    """Every module of the packages that have layers, by name."""
    packages = sorted({names[0].partition(".")[0] for names in LAYERS})
    return {
        module_name(path, root): path
        for package in packages
        for path in sorted((root / package).rglob("*.py"))
    }


def imported_names(source: str, module: str, is_package: bool) -> list[str]:
    """Absolute names of what `source` imports, inside functions too.

    `from a import b` gives `a.b`: whether b is a module or a name in one, its place is under `a`.
    """
    names = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                package = module.split(".") if is_package else module.split(".")[:-1]
                package = package[: len(package) - node.level + 1]
                base = ".".join(package + ([base] if base else []))
            names += [f"{base}.{alias.name}" for alias in node.names]
    return names


def layer_of(name: str) -> int | None:
    """The place of the layer whose entry says most of a name: a door may lie in a package."""
    found = {
        entry: index
        for index, layer in enumerate(LAYERS)
        for entry in layer
        if name == entry or name.startswith(entry + ".")
    }
    return found[max(found, key=len)] if found else None


def wrong_imports(found: dict[str, Path]) -> list[str]:
    """One line for each import that runs against the order or reaches an entry point."""
    wrong = []
    for module, path in found.items():
        names = imported_names(path.read_text(encoding="utf-8"), module, path.name == "__init__.py")
        for name in names:
            target = layer_of(name)
            own = layer_of(module)
            if target is not None and own is not None and target > own:
                wrong.append(f"{module} imports {name}, which stands below it")
            for entry in ENTRY_POINTS:
                reaches = name == entry or name.startswith(entry + ".")
                if reaches and module != entry and module not in (FACADE, *DOORS):
                    wrong.append(f"{module} imports {name}, an entry point")
    return wrong


def test_imports_run_one_way() -> None:
    assert wrong_imports(modules()) == []


def test_every_module_has_a_layer() -> None:
    unplaced = [name for name in modules() if layer_of(name) is None and name != FACADE]
    assert unplaced == [], "name their layer in LAYERS"


def test_facade_reaches_no_entry_point_nor_baselines() -> None:
    names = imported_names((ROOT / "recformer/__init__.py").read_text(), FACADE, True)
    banned = (*ENTRY_POINTS, "baselines", "benchmarks")
    assert not [n for n in names if any(n == b or n.startswith(b + ".") for b in banned)]


@pytest.mark.parametrize(
    ("module", "source", "expected"),
    [
        ("recformer/files.py", "from .models import encoder\n", "recformer.models.encoder"),
        ("recformer/models/losses.py", "import recformer.finetune\n", "recformer.finetune"),
        (
            "recformer/models/encoder.py",
            "def f():\n    from ..training.lit import LitWrapper\n",
            "recformer.training.lit.LitWrapper",
        ),
        (
            "recformer/evaluation/metrics.py",
            "from baselines.untrained import popularity\n",
            "baselines.untrained.popularity",
        ),
        (
            "recformer/models/__init__.py",
            "from ..checkpoints.loading import load_checkpoint\n",
            "recformer.checkpoints.loading.load_checkpoint",
        ),
    ],
)
def test_the_walk_sees_a_wrong_import(
    tmp_path: Path, module: str, source: str, expected: str
) -> None:
    path = tmp_path / module
    path.parent.mkdir(parents=True)
    path.write_text(source)
    wrong = wrong_imports(modules(tmp_path))
    assert wrong
    assert all(expected in line for line in wrong)


def test_the_walk_accepts_the_right_direction(tmp_path: Path) -> None:
    path = tmp_path / "recformer" / "training" / "lit.py"
    path.parent.mkdir(parents=True)
    path.write_text("from ..models.seqrec import X\nimport recformer.config\nfrom . import y\n")
    assert wrong_imports(modules(tmp_path)) == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_tree_of_the_pages_is_that_of_the_layers(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert "```text\nquickstart.sh" in text
    assert with_tree(text, PAGES[page]) == text, "run python scripts/tree.py --write"


def test_every_module_says_what_it_is_in_one_line() -> None:
    missing = [name for name, path in modules().items() if not first_line(path)]
    assert missing == []
    cut = [name for name, path in modules().items() if len(first_line(path)) > 100]
    assert cut == []


def test_the_tree_holds_every_module_once() -> None:
    shown = tree().split("recformer/ ", 1)[1].splitlines()
    names = [line.split()[0] for line in shown]
    found = [path for path in modules().values() if path.name != "__init__.py"]
    for name in {path.name for path in found}:
        assert names.count(name) == sum(path.name == name for path in found), name


def undeclared(package: str, *extras: str) -> set[str]:
    """What the modules of a package import and pyproject.toml, with extras, does not ask for."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    lists = {
        name: re.search(rf"^{name} = (\[.*?\])$", text, re.MULTILINE | re.DOTALL)
        for name in ("dependencies", *extras)
    }
    lines = [line for found in lists.values() for line in ast.literal_eval(found[1])]
    declared = {re.match(r"[\w-]+", line)[0].replace("-", "_") for line in lines}
    named_otherwise = {"scikit_learn": "sklearn", "PyYAML": "yaml", "faiss_cpu": "faiss"}
    declared = {named_otherwise.get(n, n) for n in declared}
    imported = {
        name.partition(".")[0]
        for path in (ROOT / package).rglob("*.py")
        for name in imported_names(path.read_text(encoding="utf-8"), package, False)
    }
    return imported - declared - set(sys.stdlib_module_names) - {"recformer", "baselines"}


def test_what_is_imported_is_declared() -> None:
    assert undeclared("recformer", "deepspeed", "faiss", "onnx", "serve", "spark", "wandb") == set()
    assert undeclared("baselines", "sweep") == set()
    assert "deepspeed" in undeclared("recformer")


def loaded_by(code: str, names: tuple[str, ...]) -> list[str]:
    """Which of `names` a fresh interpreter has loaded after running `code`."""
    program = f"import sys\n{code}\nprint(*[n for n in {names!r} if n in sys.modules])"
    result = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.split()


# Modules that were typed before there was one command, and what they lead to.
LEADS_TO = {
    "recformer.recommend": "recommend",
    "recformer.encode_items": "encode",
    "recformer.compare": "compare",
    "recformer.checkpoint": "inspect",
    "recformer.data.audit": "audit",
    "recformer.data.download": "download",
    "recformer.data.sample": "sample",
    "recformer.tokenization.__main__": "tokenizer",
}


@pytest.mark.parametrize("module", LEADS_TO)
def test_a_door_leads_to_its_command(module: str) -> None:
    """Read, not run: each would import all that its command does."""
    assert set(DOORS) == LEADS_TO.keys()
    source = (ROOT / f"{module.replace('.', '/')}.py").read_text(encoding="utf-8")
    commands = {name: where for group in COMMANDS.values() for name, (where, _) in group.items()}
    names = imported_names(source, module, False)
    assert f"{commands[LEADS_TO[module]]}.main" in names
    assert 'if __name__ == "__main__":\n    exit_with_message(main)' in source
    assert first_line(ROOT / f"{module.replace('.', '/')}.py").endswith(
        f"another way to type `recformer {LEADS_TO[module]}`"
    )


def test_importing_recformer_is_light() -> None:
    assert loaded_by("import recformer", HEAVY) == []


def test_the_command_line_is_read_without_torch() -> None:
    code = "sys.argv[0] = '/somewhere/bin/recformer'\nimport recformer.__main__"
    assert loaded_by(code, ("torch", "transformers")) == []
    assert loaded_by("import recformer", ("torch", "transformers")) == ["torch", "transformers"]
    assert loaded_by(code.replace("bin/recformer", "train.py"), ("torch",)) == ["torch"]
    for command in ("process", "process_pretraining", "audit", "compare", "download", "env"):
        wanted = code + f"\nimport recformer.commands.{command}"
        assert loaded_by(wanted, ("torch", "transformers")) == [], command


@pytest.mark.parametrize("words", [["-m", "mine.train"], ["-mmine.train"]])
def test_a_package_run_by_name_finds_our_folders_registered(tmp_path: Path, words) -> None:
    """While Python imports `mine`, the name of the program is "-m", as it is for our commands."""
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/__init__.py").write_text("import recformer\n")
    (tmp_path / "mine/train.py").write_text("import sys\nprint('recformer.models' in sys.modules)")
    for command, expected in ((words, "True\n"), (["-m", "recformer", "--version"], "recformer")):
        done = subprocess.run(
            [sys.executable, "-X", "utf8", *command],
            cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith(expected)


def test_public_models_need_no_trainer() -> None:
    code = "import recformer\nfor name in recformer.__all__:\n"
    code += "    if name != 'LitWrapper': getattr(recformer, name)"
    assert loaded_by(code, HEAVY) == []


def test_training_reads_no_raw_files() -> None:
    assert loaded_by("import recformer.finetune", PREPARATION_ONLY) == []


def test_the_check_for_light_imports_can_fail() -> None:
    assert loaded_by("import msgspec", HEAVY) == ["msgspec"]


def circle(found: dict[str, Path]) -> list[str]:
    """Modules that import one another in a ring; empty if there is none."""
    graph: dict[str, set[str]] = {}
    for module, path in found.items():
        names = imported_names(path.read_text(encoding="utf-8"), module, path.name == "__init__.py")
        targets = {name if name in found else name.rpartition(".")[0] for name in names}
        graph[module] = {name for name in targets if name in found and name != module}
    done: set[str] = set()

    def walk(module: str, above: list[str]) -> list[str]:
        if module in above:
            return above[above.index(module) :]
        if module in done:
            return []
        for target in sorted(graph[module]):
            ring = walk(target, [*above, module])
            if ring:
                return ring
        done.add(module)
        return []

    return next((ring for module in sorted(graph) if (ring := walk(module, []))), [])


def test_no_module_imports_itself_in_a_circle() -> None:
    assert circle(modules()) == []


def test_the_walk_sees_a_circle(tmp_path: Path) -> None:
    folder = tmp_path / "recformer" / "data"
    folder.mkdir(parents=True)
    (folder / "one.py").write_text("def f():\n    from recformer.data.two import b\n")
    (folder / "two.py").write_text("from recformer.data import three\n")
    (folder / "three.py").write_text("from recformer.data.one import f\n")
    names = ["recformer.data.one", "recformer.data.two", "recformer.data.three"]
    assert sorted(circle(modules(tmp_path))) == sorted(names)
