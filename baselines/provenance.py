"""What a folder of a reproduction says of itself: its recipe, when and where it was made."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import time
from collections.abc import Iterable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from recformer.files import UserError, read_json
from recformer.machine import cores, processor

DONE = "reproduced.json"  # in the folder of data, a step or a run
MARKS = "content"  # in it: split and texts of the data that something was made from
PACKAGES = ("recformer", "torch", "transformers", "numpy")
ROOT = Path(__file__).resolve().parents[1]  # of the checkout, or where packages are installed
FOLDERS = ("recformer", "baselines")  # of the code that makes rows
OURS = re.compile(r'^name = "recformer"$', re.MULTILINE)  # in pyproject.toml
ELSEWHERE = ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE", "GIT_COMMON_DIR")  # as hooks set them
UNKNOWN, AND = "not recorded", " and "


def commit(root: Path = ROOT) -> str | None:
    """The state of the checkout that the code is imported from.

    Twelve digits of its commit, with "+changes" where files of the code are others than in it. None
    for an installed package, also one within another project's checkout, and where git has no
    answer.
    """
    project = root / "pyproject.toml"
    if not (root / ".git").exists() or not project.is_file():
        return None
    environment = {name: x for name, x in os.environ.items() if name not in ELSEWHERE}

    def git(*words: str) -> subprocess.CompletedProcess[str]:
        line = ["git", "--no-optional-locks", "-C", str(root), *words]
        return subprocess.run(line, env=environment, capture_output=True, text=True, timeout=60)

    try:
        if not OURS.search(project.read_text(encoding="utf-8")):
            return None
        head, changes = git("rev-parse", "HEAD"), git("diff", "--quiet", "HEAD", "--", *FOLDERS)
    except (OSError, ValueError, subprocess.SubprocessError):  # no git, or one that hangs
        return None
    if head.returncode or changes.returncode not in (0, 1):
        return None
    return head.stdout.strip()[:12] + ("+changes" if changes.returncode else "")


def provenance(began: str | None = None) -> dict[str, Any]:
    """When, where and with what something was made.

    Args:
        began: `commit` of when its making began, which may be another than now.
    """
    now = commit()
    return {
        "date": time.strftime("%Y-%m-%d"),
        "machine": f"{processor()}, {cores()} cores; {platform.system()} {platform.machine()}, "
        f"Python {platform.python_version()}",
        "versions": {name: version(name) for name in PACKAGES},
    } | ({} if now is None else {"commit": _both(began or now, now)})


def joined(earlier: dict[str, Any], made: dict[str, Any]) -> dict[str, Any]:
    """Provenance of what was made in parts, one seed today and one before."""
    versions = {
        name: _both(earlier["versions"].get(name, ""), number)
        for name, number in made["versions"].items()
    }
    joined = {name: _both(earlier[name], made[name]) for name in ("date", "machine")}
    commits = [each.get("commit") for each in (earlier, made)]
    state = {"commit": _both(*(each or UNKNOWN for each in commits))} if any(commits) else {}
    return joined | {"versions": versions} | state


def _both(one: str, other: str) -> str:
    return AND.join(
        dict.fromkeys(word for text in (one, other) for word in text.split(AND) if word)
    )


def commits_of(made: Iterable[Mapping[str, Any]]) -> list[str]:
    """States of the repository that something was made by, each once; none where no record has one.

    Args:
        made: what `provenance` and `joined` say.
    """
    found = [each.get("commit") for each in made]
    words = [word for each in found for word in (each or UNKNOWN).split(AND)]
    return list(dict.fromkeys(words)) if any(found) else []


def read_record(folder: Path) -> dict[str, Any] | None:
    """What a folder says of itself; None where it says nothing, or not in today's form."""
    try:
        record = read_json(folder / DONE)
    except (FileNotFoundError, UserError):  # nothing there, or damaged
        return None
    if not isinstance(record, dict) or not isinstance(record.get("recipe"), dict):
        return None
    made = record.get("made")
    known = isinstance(made, dict) and {"date", "machine", "versions"} <= made.keys()
    if made and not (known and isinstance(record.get(MARKS), dict)):
        return None
    return {"made": None, MARKS: {}, "replaced": {}, "before": None} | record


def is_damaged(folder: Path) -> bool:
    """Whether a folder's record is there, and cannot be read."""
    return read_record(folder) is None and (folder / DONE).exists()
