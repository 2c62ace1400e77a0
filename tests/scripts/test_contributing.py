"""What CONTRIBUTING names is there: targets of make, hooks, issue forms."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml  # type: ignore[import-untyped]


def test_targets_are_named_and_run_what_is_there(repository: Path) -> None:
    page = (repository / "CONTRIBUTING.md").read_text(encoding="utf-8")
    makefile = (repository / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z]+):.*## ", makefile, re.MULTILINE))
    assert targets - {"help"} == set(re.findall(r"`make ([a-z]+)`", page))
    assert targets == set(re.findall(r"^\.PHONY: (.*)$", makefile, re.MULTILINE)[0].split())
    for name in re.findall(r"scripts/\w+\.\w+|run_tests\.sh", makefile):
        assert (repository / name).is_file(), name
    if shutil.which("make") is None:
        pytest.skip("make is not installed")
    for target in sorted(targets):
        command = ["make", "--dry-run", "--no-print-directory", target]
        said = subprocess.run(command, cwd=repository, capture_output=True, text=True, check=True)
        assert said.stdout.strip(), target
    listed = subprocess.run(["make"], cwd=repository, capture_output=True, text=True, check=True)
    assert {line.split()[0] for line in listed.stdout.splitlines()} == targets


def test_hooks_are_ruff_of_the_version_that_the_tests_use(repository: Path) -> None:
    """In an environment of pre-commit's own: `python` of the shell that commits may lack ruff."""
    content = yaml.safe_load((repository / ".pre-commit-config.yaml").read_text())
    (pinned,) = re.findall(r"(?m)^ruff==.*$", (repository / "constraints.txt").read_text())
    (local,) = content["repos"]
    assert local["repo"] == "local"
    assert [" ".join(hook["entry"].split()[:2]) for hook in local["hooks"]] == [
        "ruff check", "ruff format"
    ]  # fmt: skip
    for hook in local["hooks"]:
        assert (hook["language"], hook["additional_dependencies"]) == ("python", [pinned])


def test_a_report_of_a_fault_asks_for_the_environment(repository: Path) -> None:
    form = yaml.safe_load((repository / ".github/ISSUE_TEMPLATE/bug.yml").read_text())
    env = next(part for part in form["body"] if part["id"] == "env")
    assert "`recformer env`" in env["attributes"]["description"]
    assert env["validations"]["required"] is True
