"""What a folder of a reproduction says of itself: its recipe, when and where it was made."""

from __future__ import annotations

import platform
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

from recformer.files import UserError, read_json
from recformer.machine import cores, processor

DONE = "reproduced.json"  # in the folder of data, a step or a run
MARKS = "content"  # in it: split and texts of the data that something was made from
PACKAGES = ("recformer", "torch", "transformers", "numpy")


def provenance() -> dict[str, Any]:
    """When, where and with what something was made."""
    return {
        "date": time.strftime("%Y-%m-%d"),
        "machine": f"{processor()}, {cores()} cores; {platform.system()} {platform.machine()}, "
        f"Python {platform.python_version()}",
        "versions": {name: version(name) for name in PACKAGES},
    }


def joined(earlier: dict[str, Any], made: dict[str, Any]) -> dict[str, Any]:
    """Provenance of what was made in parts, one seed today and one before."""

    def both(one: str, other: str) -> str:
        return one if other in ("", one) else f"{one} and {other}" if one else other

    versions = {
        name: both(earlier["versions"].get(name, ""), number)
        for name, number in made["versions"].items()
    }
    joined = {name: both(earlier[name], made[name]) for name in ("date", "machine")}
    return joined | {"versions": versions}


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
