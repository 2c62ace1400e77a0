"""The quickstart as a new user runs it, and what its report says."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest


@pytest.fixture(scope="module")
def report(repository: Path):
    path = repository / "scripts" / "quickstart_report.py"
    spec = importlib.util.spec_from_file_location("quickstart_report", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_report_claims_only_what_the_numbers_show(report):
    theirs = np.zeros(100)
    ours = np.tile([0.0, 1.0], 50)
    assert report.verdict(ours, theirs + 0.01, "x").startswith("Recformer beats x")
    assert report.verdict(theirs, ours, "x").startswith("Recformer falls behind x")
    few = np.array([0.0, 1.0, 0.0, 0.0])
    assert "cannot be told apart" in report.verdict(few, few[::-1].copy(), "x")


@pytest.mark.slow
def test_quickstart_twice(repository, tmp_path):
    environment = os.environ | {"OUTPUT_DIR": str(tmp_path / "run"), "PYTHON": sys.executable}
    outputs = []
    for _ in range(2):
        done = subprocess.run(
            ["bash", str(repository / "quickstart.sh")],
            env=environment, capture_output=True, text=True, timeout=1500,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
        outputs.append(done.stdout)
    assert "Recformer beats popularity" in outputs[0]
    assert "Recformer beats TF-IDF neighbours" in outputs[0]
    tables = [output[output.index("test users of Cycling") :] for output in outputs]
    assert tables[0] == tables[1]
    assert "epoch" not in outputs[1]  # the second run trains nothing
