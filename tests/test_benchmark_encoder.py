"""The encoder benchmark runs both sides on the same weights and says what it measured."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.encoder import LENGTHS, main


@pytest.mark.parametrize(
    ("flags", "rows"), [([], ["items, hidden", "items, pooled"]), (["--train"], ["items, step"])]
)
def test_both_sides_agree_and_are_timed(
    flags: list[str], rows: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "times.json"
    main(["--size", "tiny", "--batches", "items", "--repeats", "1", "--json", str(path), *flags])
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("items")]
    times = json.loads(path.read_text())
    assert list(times) == rows
    for line, row in zip(lines, rows, strict=True):
        tokens, _, _, ratio, error = line.removeprefix(row).replace(",", "").split()
        assert int(tokens) == sum(LENGTHS["items"]) == times[row]["tokens"]
        assert float(error) < 1e-4
        assert float(ratio) == pytest.approx(times[row]["peer_s"] / times[row]["ours_s"], abs=0.01)
