"""The check of a fresh machine: what it takes from the README, and how a step runs and fails."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest

from recformer.__main__ import COMMANDS


@pytest.fixture(scope="module")
def fresh(repository: Path) -> ModuleType:
    """`scripts/fresh_machine.py` as a module."""
    path = repository / "scripts" / "fresh_machine.py"
    spec = importlib.util.spec_from_file_location("fresh_machine", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules["fresh_machine"] = module  # dataclasses look there
    spec.loader.exec_module(module)
    return module


PAGE = """# Title
<!-- fresh machine: shop, minilm; prints NDCG@10 -->
```bash
# a comment
cd x  # another
```
## Models
<!-- fresh machine: as it is -->

```python
import torch
x = 1
```
<!-- fresh machine: not run, needs a GPU, or two -->
```python
y = 2
```
<!-- fresh machine: as it is; prints 1 -->
```python
print(x)
```
```text
a tree
```
"""


def test_blocks_say_how_they_run(fresh: ModuleType) -> None:
    found = fresh.blocks(PAGE)
    assert [(b.line, b.section, b.language) for b in found] == [
        (3, "Title", "bash"),
        (10, "Models", "python"),
        (15, "Models", "python"),
        (19, "Models", "python"),
        (22, "Models", "text"),
    ]
    assert (found[0].fixtures, found[0].prints) == (("shop", "minilm"), "NDCG@10")
    assert (found[1].fixtures, found[1].prints, found[1].not_run) == ((), None, None)
    assert found[2].not_run == "needs a GPU, or two"
    assert [b.name for b in found[:2]] == ["line 3: cd x", "line 10: x = 1"]
    assert [text for _, text in fresh.programs(found)] == [
        "# a comment\ncd x  # another\n",
        "import torch\nx = 1\n",
        "import torch\nx = 1\nprint(x)\n",  # a section's Python is one program
    ]


@pytest.mark.parametrize(
    ("page", "message"),
    [
        ("\n```bash\nls\n```\n", "line 2: nothing says whether this block runs"),
        ("```\nls\n```\n", "line 1: a block that is no command says so"),
        ("<!-- fresh machine: mall -->\n```bash\nls\n```\n", "no fixture is called mall"),
        ("<!-- fresh machine: shop -->\ntext\n", "line 2: a comment for a block, and no block"),
        ("<!-- fresh machine: shop -->\n```bash\nls\n", "ends within a block"),
    ],
)
def test_a_block_that_nobody_classified_is_refused(
    fresh: ModuleType, page: str, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        fresh.blocks(page)


def test_commands_of_the_table(fresh: ModuleType, repository: Path) -> None:
    page = "| `a.sh` | does |\n| `b/c.py` | x |\n| `recformer inspect FILE` | y |\ntext `d.sh` |\n"
    assert fresh.scripts(page) == ["bash a.sh", "python b/c.py", "recformer inspect"]
    found = fresh.scripts((repository / fresh.COMMANDS_PAGE).read_text(encoding="utf-8"))
    assert {"bash finetune.sh", "recformer recommend", "python finetune_data/process.py"} <= {
        *found
    }
    assert len(found) > 15


def test_the_page_of_commands_names_every_command(fresh: ModuleType, repository: Path) -> None:
    page = (repository / fresh.COMMANDS_PAGE).read_text(encoding="utf-8")
    names = [name for group in COMMANDS.values() for name in group]
    assert [name for name in names if f"`recformer {name}" not in page] == []


def found_on(fresh: ModuleType, repository: Path) -> dict[str, list]:
    return {
        path.relative_to(repository).as_posix(): fresh.blocks(path.read_text(encoding="utf-8"))
        for path in fresh.pages(repository)
    }


def test_pages_run_in_the_order_of_the_site(fresh: ModuleType, repository: Path) -> None:
    names = list(found_on(fresh, repository))
    assert names[:2] == ["README.md", "docs/quickstart.md"]
    own, recommending = (names.index(f"docs/guides/{n}.md") for n in ("own-shop", "recommending"))
    assert own < recommending  # which takes what the first one leaves
    assert names[-1] == "examples/shop/README.md"
    written = {f"docs/guides/{path.name}" for path in (repository / "docs/guides").glob("*.md")}
    assert written <= {*names}, "name the guide in mkdocs.yml"


def test_what_the_pages_promise_runs(fresh: ModuleType, repository: Path) -> None:
    """The quickstart, both scripts with nothing set, one's own data, Python."""
    found = found_on(fresh, repository)
    lines = [
        line.partition(" #")[0].strip()
        for page in found.values()
        for _, text in fresh.programs(page)
        for line in text.splitlines()
    ]
    for command in ("bash quickstart.sh", "bash lightning_run.sh", "bash finetune.sh"):
        assert command in lines
    assert any("DATA_PATH=finetune_data/MyShop" in line for line in lines)
    python = [b for page in found.values() for b in page if b.language == "python"]
    assert sum(block.not_run is None for block in python) >= 11
    shop = found["examples/shop/README.md"]
    assert sum(b.language == "bash" and b.not_run is None for b in shop) == 4


def test_the_readme_is_one_page_and_its_links_lead_somewhere(repository: Path) -> None:
    text = (repository / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 120
    targets = re.findall(r"\]\(([^):#]+)(?:#[^)]*)?\)|(?:src|srcset)=\"([^\"]+)\"", text)
    places = [repository / (link or picture) for link, picture in targets]
    assert len(places) > 20
    assert [place for place in places if not place.exists()] == []


def test_every_expected_time_is_of_a_step(fresh: ModuleType, repository: Path) -> None:
    found = [
        block.name
        for path in fresh.pages(repository)
        for block, _ in fresh.programs(fresh.blocks(path.read_text(encoding="utf-8")))
    ]
    names = [*found, "--help of 3 commands", "wheel: install"]
    assert [part for part in fresh.EXPECTED if not any(part in name for name in names)] == []


@pytest.fixture
def machine(fresh: ModuleType, tmp_path: Path):
    (tmp_path / "home").mkdir()
    machine = fresh.Machine(tmp_path)
    machine.new_session(tmp_path)
    return machine


def test_a_step_sees_the_environment_of_a_stranger(
    machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("PYTHONPATH", "VIRTUAL_ENV", "CDPATH", "RECFORMER_REAL_DATA", "PYTHON"):
        monkeypatch.setenv(name, "/ours")
    monkeypatch.setenv("PIP_INDEX_URL", "https://packages.example/simple")
    monkeypatch.setenv("https_proxy", "http://proxy.example")
    machine.step("look", "env >seen; echo $HOME", prints=str(tmp_path / "home"))
    seen = dict(
        line.split("=", 1) for line in (tmp_path / "seen").read_text().splitlines() if "=" in line
    )
    assert "/ours" not in seen.values()
    assert seen["PIP_INDEX_URL"] == "https://packages.example/simple"
    assert seen["https_proxy"] == "http://proxy.example"
    assert seen["PATH"].split(":")[0] == str(tmp_path / "python" / "bin")
    assert not any(folder.startswith(sys.prefix) for folder in seen["PATH"].split(":"))


def test_steps_are_one_session(machine, tmp_path: Path) -> None:
    machine.step("one", "export KIND='a b'\ncd /")
    machine.step("two", 'echo "<$KIND> $PWD"', prints="<a b> /\n")
    machine.new_session(tmp_path)
    machine.step("three", 'echo "<$KIND> $PWD"', prints=f"<> {tmp_path}\n")
    assert list(machine.seconds) == ["one", "two", "three"]


@pytest.mark.parametrize(
    ("command", "prints", "reason"),
    [
        ("echo before\nfalse\necho after", None, "exit status 1"),
        ("echo before; false | cat", None, "exit status 1"),
        ("echo before; echo after", "figures", "it did not print 'figures'"),
    ],
)
def test_a_step_that_fails_shows_its_end(
    fresh: ModuleType, machine, tmp_path: Path, command: str, prints: str | None, reason: str
) -> None:
    with pytest.raises(fresh.StepFailed, match=f"the step: {reason}; its last lines:") as failed:
        machine.step("the step", command, prints=prints)
    assert "| before" in str(failed.value)
    assert ("| after" in str(failed.value)) == (prints is not None)


def test_help_of_every_command_is_asked_for(fresh: ModuleType, machine) -> None:
    machine.step("fine", fresh._help_of(["echo", "printf '%s\\n'"]))
    with pytest.raises(fresh.StepFailed, match="no such --help") as failed:
        machine.step("bad", fresh._help_of(["echo", "sh -c 'echo no such $0; exit 3'"]))
    assert "exit status 123" in str(failed.value)  # xargs: one of them failed


def test_a_step_that_hangs_is_ended(
    fresh: ModuleType, machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fresh, "STEP_SECONDS", 0.2)
    with pytest.raises(fresh.StepFailed, match="none after 0.2 s"):
        machine.step("sleep", "sleep 100 & sleep 100")


def test_the_first_failure_ends_the_run(
    fresh: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd
) -> None:
    """Of a checkout whose README fails: the table of steps, the name, exit status 1."""
    root = tmp_path / "root"
    root.mkdir()
    (root / "README.md").write_text(
        "<!-- fresh machine: as it is -->\n```bash\necho fine\n```\n"
        "<!-- fresh machine: shop -->\n```bash\nwc -l purchases.csv; exit 3\n```\n"
        "<!-- fresh machine: as it is -->\n```bash\necho never\n```\n"
    )
    machine = fresh.Machine(tmp_path / "empty")
    machine.folder.mkdir()
    monkeypatch.setattr(fresh, "ROOT", root)
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@example.org"]
    for command in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "x"]):
        fresh.subprocess.run([*git, *command], cwd=root, check=True)
    assert fresh.run(machine.folder, show=False) == 1
    out, err = capfd.readouterr()
    assert "FAILED: README.md, line 6: wc -l purchases.csv; exit 3: exit status 3" in err
    assert "561 purchases.csv" in err
    assert "README.md, line 2: echo fine" in out
    assert "never" not in out + err
