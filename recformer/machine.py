"""What this machine is, as tables and `recformer env` say it."""

from __future__ import annotations

import os
import platform
import re
from pathlib import Path


def cpuinfo() -> str:
    """The system's description of the processor, empty where there is none."""
    path = Path("/proc/cpuinfo")  # of Linux
    return path.read_text() if path.is_file() else ""


def processor() -> str:
    """Name of the processor, where the system tells it."""
    found = re.search(r"^model name\s*:\s*(.+)$", cpuinfo(), re.MULTILINE)
    return found[1] if found else platform.processor() or platform.machine() or "unknown"


def cores() -> int | None:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
