"""`recformer benchmark`: in a checkout from any folder, refused in one line elsewhere."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from recformer.commands import benchmark
from recformer.files import UserError


def test_an_installation_without_the_checkout_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(benchmark, "CHECKOUT", tmp_path)
    with pytest.raises(UserError, match="not part of the installed package"):
        benchmark.main(["--help"])


def test_an_editable_installation_finds_the_checkout(repository: Path, tmp_path: Path) -> None:
    """Its finder knows `recformer` alone: here the package is loaded from where it lies."""
    link = tmp_path / "site" / "recformer"
    link.parent.mkdir()
    link.symlink_to(repository / "recformer")
    program = f"import sys; sys.path.insert(0, {str(link.parent)!r})\n"
    program += "from recformer.__main__ import main; main(['benchmark', '--help'])"
    done = subprocess.run(
        [sys.executable, "-I", "-c", program], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "--quick" in done.stdout
