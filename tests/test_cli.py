"""Freed memory stays with the process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from recformer import cli

SCRIPT = """
import resource
import numpy as np
from recformer.cli import keep_freed_memory

def page_faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    np.empty(8 << 20).fill(1)  # 64 MB, in small pages: see the environment
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

left = [page_faults() for _ in range(3)][-1]
set_up = keep_freed_memory()
kept = [page_faults() for _ in range(3)][-1]
print(left if set_up else 0, kept)
"""


def test_freed_blocks_are_used_again_without_page_faults() -> None:
    printed = subprocess.check_output(
        [sys.executable, "-c", SCRIPT],
        text=True,
        env={**os.environ, "NUMPY_MADVISE_HUGEPAGE": "0"},
    )
    left, kept = map(int, printed.split())
    if left == 0:
        pytest.skip("another C library, or a sandbox that counts no page faults")
    assert 4 * kept < left


def test_another_c_library_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli.ctypes, "CDLL", lambda name: object())
    assert not cli.keep_freed_memory()
    monkeypatch.setattr(sys, "platform", "darwin")
    assert not cli.keep_freed_memory()


def test_no_bar_of_a_library_fills_a_log_file(tmp_path: Path) -> None:
    """transformers draws one for every folder it writes, terminal or not."""
    code = (
        "from recformer.cli import exit_with_message\n"
        "from tests.tiny import tiny_config\n"
        "from recformer import RecformerModel\n"
        f"save = lambda: RecformerModel(tiny_config()).save_pretrained({str(tmp_path)!r})\n"
        "exit_with_message(save)"
    )
    root = Path(__file__).resolve().parents[1]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], cwd=root, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert (tmp_path / "model.safetensors").exists()
