"""The tests of simulated_cases.py, in a process of their own: torch forgets a device only there."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow  # a minute; CI runs it beside the default suite
def test_everything_runs_on_a_simulated_accelerator(repository: Path) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [*command, "tests/simulated_cases.py"],
        cwd=repository,
        env=os.environ | {"PYTHONPATH": str(repository), "PYTEST_ADDOPTS": ""},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
