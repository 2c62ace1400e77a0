"""`recformer env`: one screen of versions and devices, without names of folders or accounts."""

from __future__ import annotations

import getpass
import os
import platform
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

import recformer
from recformer.__main__ import main


def test_env_fits_a_screen_and_says_what_matters(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    monkeypatch.setenv("HF_TOKEN", "secret")
    main(["env"])
    lines = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert lines["recformer"] == recformer.__version__
    assert lines["Python"].startswith(platform.python_version())
    assert f"torch {version('torch')}, transformers {version('transformers')}," in lines["packages"]
    assert "missing" not in lines["packages"]
    assert lines["threads"].startswith(f"{torch.get_num_threads()} of torch")
    assert lines["cores"].endswith(f"of {os.cpu_count()} for this process")
    assert "OMP_NUM_THREADS=3" in lines["variables"]
    if not torch.cuda.is_available():
        assert lines["device"] == "CPU alone"
    assert len(lines) <= 24
    text = " ".join(lines.values())
    assert "secret" not in text
    assert str(Path.home()) not in text or str(Path.home()) == "/"
    assert platform.node() not in text.split() or platform.node() == "localhost"
    assert getpass.getuser() not in text.split()


def test_env_names_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    from recformer.commands import env

    monkeypatch.setattr(env, "NEEDED", ("torch", "no-such-package"))
    monkeypatch.setattr(env, "OPTIONAL", ("no-such-package",))
    facts = dict(env.environment())
    assert facts["packages"] == f"torch {version('torch')}, no-such-package missing"
    assert facts["extras"] == "none"
