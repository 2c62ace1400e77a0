"""Which state of the repository made the rows of `recformer reproduce`, and what is said of it."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from baselines import provenance, reproduce, reproduction
from baselines.provenance import commit, commits_of, joined
from baselines.reproduce import main, origin
from recformer.files import read_json, write_json
from tests.baselines.test_reproduce import place  # noqa: F401

FLAGS = ["shop.yaml", "--raw", "raw files", "--output_dir", "out"]
PROJECT = '[project]\nname = "recformer"\n'


def git(root: Path, *words: str) -> str:
    line = ["git", "-C", str(root), "-c", "user.name=a", "-c", "user.email=a@example.org", *words]
    return subprocess.run(line, check=True, capture_output=True, text=True).stdout.strip()


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A checkout of a project of this name, with one commit."""
    if shutil.which("git") is None:
        pytest.skip("needs git")
    root = tmp_path / "checkout"
    for name in ("recformer", "baselines", "docs"):
        (root / name).mkdir(parents=True)
        (root / name / "file").write_text("1\n")
    (root / "pyproject.toml").write_text(PROJECT)
    git(root, "init", "-q")
    git(root, "add", ".")
    git(root, "commit", "-qm", "first")
    return root


def test_a_commit_is_named_once() -> None:
    made = {"date": "d", "machine": "m", "versions": {"torch": "2"}}
    both = joined(made | {"commit": "a"}, made | {"commit": "a and b"})
    assert both == made | {"commit": "a and b"}
    assert commits_of([both, made | {"commit": "b"}]) == ["a", "b"]


def test_a_checkout_is_named_by_its_commit(
    checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = git(checkout, "rev-parse", "HEAD")[:12]
    assert commit(checkout) == first
    (checkout / "docs" / "file").write_text("2\n")  # no code
    (checkout / "recformer" / "new").write_text("of nobody knows what\n")  # not tracked
    assert commit(checkout) == first
    (checkout / "baselines" / "file").write_text("2\n")
    assert commit(checkout) == f"{first}+changes"
    git(checkout, "add", "baselines")
    assert commit(checkout) == f"{first}+changes"
    git(checkout, "commit", "-qm", "second")
    second = git(checkout, "rev-parse", "HEAD")[:12]
    assert commit(checkout) == second != first
    # As a hook of another repository would call it, and in a worktree.
    (tmp_path / "other").mkdir()
    git(tmp_path / "other", "init", "-q")
    with monkeypatch.context() as patch:
        patch.setenv("GIT_DIR", str(tmp_path / "other" / ".git"))
        assert commit(checkout) == second
    git(checkout, "worktree", "add", "-q", "--detach", str(tmp_path / "beside"), first)
    assert commit(tmp_path / "beside") == first
    monkeypatch.setenv("PATH", str(tmp_path))  # no git
    assert commit(checkout) is None


def test_what_is_no_checkout_of_this_project_has_no_commit(
    checkout: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed = checkout / ".venv" / "lib" / "site-packages"
    (installed / "recformer").mkdir(parents=True)
    monkeypatch.setattr(subprocess, "run", None)  # git is not even asked
    assert commit(installed) is None
    (installed / "pyproject.toml").write_text(PROJECT)
    assert commit(installed) is None
    (checkout / "pyproject.toml").write_text(PROJECT.replace("recformer", "a_shop"))
    assert commit(checkout) is None
    (checkout / "pyproject.toml").unlink()
    assert commit(checkout) is None


def test_a_checkout_without_a_commit_is_no_error(checkout: Path) -> None:
    shutil.rmtree(checkout / ".git")
    git(checkout, "init", "-q")
    assert commit(checkout) is None
    (checkout / ".git" / "HEAD").write_text("damaged")
    assert commit(checkout) is None


def made(*commits: str | None) -> list[dict[str, Any]]:
    """Provenance of one day and machine, by these commits."""
    same = {"date": "2026-01-02", "machine": "a CPU", "versions": {"recformer": "1"}}
    return [same | ({} if each is None else {"commit": each}) for each in commits]


def test_what_is_made_in_parts_has_the_states_of_all() -> None:
    assert joined(*made("a", "a"))["commit"] == "a"
    assert joined(*made("a", "b"))["commit"] == "a and b"
    assert joined(*made("a and b", "b"))["commit"] == "a and b"
    assert joined(*made(None, "b"))["commit"] == "not recorded and b"
    assert "commit" not in joined(*made(None, None))
    assert commits_of(made("a", "b and c", "a", None)) == ["a", "b", "c", "not recorded"]
    assert commits_of(made(None, None)) == []


def test_a_table_says_by_which_states_its_rows_were_made() -> None:
    def shown(*commits: str | None) -> str:
        rows = [{"name": name, "made": m} for name, m in zip("xyz", made(*commits), strict=False)]
        return origin({"steps": [], "rows": rows})

    assert shown(None, None) == "a CPU; recformer 1; 2026-01-02\n"
    assert shown("a", "a") == "a CPU; recformer 1; commit a; 2026-01-02\n"
    assert shown("a", None, "a") == (
        "Rows are of several states of the repository: a, not recorded\n\n"
        "- x, z: a CPU; recformer 1; commit a; 2026-01-02\n- y: a CPU; recformer 1; 2026-01-02\n"
    )
    assert shown("a and b") == (
        "a CPU; recformer 1; commit a and b; 2026-01-02; of several states of the repository: "
        "a, b\n"
    )


def test_rows_say_which_commit_made_them(
    place, monkeypatch, caplog  # noqa: F811
):  # fmt: skip
    states = iter(["one"] * 3 + ["two"] * 20)  # a commit while the row is made

    def state() -> str:
        return next(states)

    for module in (provenance, reproduction, reproduce):
        monkeypatch.setattr(module, "commit", state)
    main([*FLAGS, "--only", "popularity"])  # asked at its start, after the data, before the row
    (row,) = read_json("out/reproduction.json")["rows"]
    assert row["made"]["commit"] == "one and two"
    assert "by another commit" not in caplog.text
    record = Path("out/runs/shop/popularity") / provenance.DONE
    content = read_json(record)
    content["made"]["commit"] = "one"
    write_json(record, content)
    main(FLAGS)
    said = "finished rows made by another commit than two, which stay as they are: 1 (one)"
    assert said in caplog.text
    text = Path("out/reproduction.md").read_text()
    assert "\nRows are of several states of the repository: one, two\n\n- popularity: " in text
    caplog.clear()
    del content["made"]["commit"]  # of an older version
    write_json(record, content)
    main(FLAGS)
    assert "by another commit" not in caplog.text
    assert "commit" not in read_json(record)["made"]
