"""The GPU check at toy sizes on the CPU: every part measures, and what fails is said."""

from __future__ import annotations

import subprocess

import pytest
import torch

from scripts import gpu_check


@pytest.mark.parametrize("part", gpu_check.PARTS)
def test_every_part_gives_rows(part: str) -> None:
    rows = gpu_check.PARTS[part](True)
    assert all(len(row) == 3 and row[1] != "FAILED" for row in rows)
    if part == "ranking":
        assert rows[0][2].endswith("the same as the CPU's")
    if part == "pretraining":
        assert [row[0].rpartition(", ")[2] for row in rows] == [
            *("plain", "--activation_checkpointing", "--grad_cache")
        ]


def test_the_report_says_what_failed(monkeypatch, capsys) -> None:
    def run(command: list[str], *_: object) -> str:
        if "ranking" in command:
            raise subprocess.TimeoutExpired(command, 170)
        if "machine" in command:
            raise OSError("CUDA error: no kernel | image")
        return 'noise\n[["what", "3 s", "note"]]'

    monkeypatch.setattr(gpu_check, "_run", run)
    monkeypatch.setattr("sys.argv", ["gpu_check.py", "--tiny"])
    assert gpu_check.main() == 2
    printed = capsys.readouterr().out
    assert "| machine | FAILED | CUDA error: no kernel / image |" in printed
    assert "| ranking | FAILED | not done after 170 s |" in printed
    assert printed.count("| what | 3 s | note |") == 2


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(monkeypatch, capsys) -> None:
    monkeypatch.setattr("sys.argv", ["gpu_check.py"])
    assert gpu_check.main() == 1
    assert "no CUDA device" in capsys.readouterr().err
