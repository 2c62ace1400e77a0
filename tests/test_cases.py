"""Reproductions of faults that users met, kept outside of the repository: each must end with 0.

    RECFORMER_CASES=FOLDER bash run_tests.sh -m slow tests/test_cases.py

A case is a folder with a `run.sh` that works on the checkout $CLONE with the interpreter $PY; it
exits with 1 while its fault is there, and with 99 where it could not tell.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

CASES_VARIABLE = "RECFORMER_CASES"


def cases() -> list[Path]:
    folder = os.environ.get(CASES_VARIABLE)
    return sorted(path.parent for path in Path(folder).glob("[!_]*/run.sh")) if folder else []


@pytest.mark.slow
@pytest.mark.skipif(not cases(), reason=f"${CASES_VARIABLE} is not set")
@pytest.mark.parametrize("case", cases(), ids=lambda path: path.name)
def test_the_fault_is_gone(case: Path, repository: Path) -> None:
    environment = os.environ | {"CLONE": str(repository), "PY": sys.executable}
    done = subprocess.run(
        ["bash", str(case / "run.sh")], env=environment, capture_output=True, text=True, timeout=290
    )
    if done.returncode == 99:
        pytest.skip(done.stdout.strip().splitlines()[-1])
    assert done.returncode == 0, done.stdout + done.stderr
