"""Tables beside the JSON of a benchmark: Markdown, LaTeX and CSV of the same rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import measure, tables
from benchmarks.measure import Report, row
from recformer.files import UserError

MACHINE = {
    "date": "2026-01-02", "cpu": "A CPU", "isa": ["avx2"], "cores": 2, "threads": 1,
    "load_before": 0.1, "torch": "2", "transformers": "5",
}  # fmt: skip
LINE = "A CPU, AVX2, 1 thread, load before 0.1; torch 2, transformers 5; 2026-01-02"


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "machine", lambda threads: MACHINE)
    monkeypatch.setattr(measure, "quiet", lambda: None)


def test_tables_of_rows_with_and_without_a_peer(tmp_path: Path) -> None:
    report = Report(1, str(tmp_path / "speed.json"))
    with_peer = row(
        "a|`<s>`",
        0.3,
        "peer",
        1.2345678,
        amount=100,
        unit="items",
        share_of_ceiling=0.5,
        note="50%",
    )
    report.add("one", [with_peer, row("b", 1234.5, peak_memory_mb=7.25)])
    report.add("two", [row("c_1", 2.0)], "python -m benchmarks.two")
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "speed.csv", "speed.json", "speed.md", "speed.tex"
    ]  # fmt: skip
    assert (tmp_path / "speed.md").read_text() == (
        "`python -m benchmarks one --threads 1`\n\n"
        "| |ours s|a second|peer s|ratio|share of the ceiling|MB||\n"
        "|---|---|---|---|---|---|---|---|\n"
        "|a\\|`<s>`|0.3|333 items|1.23|4.12|50%||50%|\n"
        "|b|1,234|||||7.25||\n\n"
        f"{LINE}\n\n"
        "`python -m benchmarks.two --threads 1`\n\n"
        "| |ours s|\n|---|---|\n|c_1|2|\n\n"
        f"{LINE}\n"
    )
    assert (tmp_path / "speed.tex").read_text() == (
        "% python -m benchmarks one --threads 1\n"
        "\\begin{tabular}{lrrrrrrr}\n\\toprule\n"
        " & ours s & a second & peer s & ratio & share of the ceiling & MB &  \\\\\n\\midrule\n"
        "a\\textbar{}\\textless{}s\\textgreater{} & "
        "0.3 & 333 items & 1.23 & 4.12 & 50\\% &  & 50\\% \\\\\n"
        "b & 1,234 &  &  &  &  & 7.25 &  \\\\\n"
        "\\bottomrule\n\\end{tabular}\n"
        f"% {LINE}\n\n"
        "% python -m benchmarks.two --threads 1\n"
        "\\begin{tabular}{lr}\n\\toprule\n & ours s \\\\\n\\midrule\nc\\_1 & 2 \\\\\n"
        "\\bottomrule\n\\end{tabular}\n"
        f"% {LINE}\n"
    )
    assert (tmp_path / "speed.csv").read_text() == (
        "benchmark,what,ours_seconds,peer,peer_seconds,ratio,amount,unit,share_of_ceiling,"
        "peak_memory_mb,peer_peak_memory_mb,note\n"
        "one,a|`<s>`,0.3,peer,1.2345678,4.115226,100,items,0.5,,,50%\n"
        "one,b,1234.5,,,,,,,7.25,,\n"
        "two,c_1,2.0,,,,,,,,,\n"
    )


def test_a_table_a_size_of_the_stages() -> None:
    sizes = ("MiniLM, items, float32", "base, items, float32")
    rows: list[dict[str, Any]] = [
        row(f"{size}{stage}", 0.25, note=share)
        for size in sizes
        for stage, share in (("", ""), (": `<s>`", "40.0%"))
    ]
    text = tables.latex({"benchmark": "stages", "machine": MACHINE, "rows": rows})
    part = "\\midrule\n\\textless{}s\\textgreater{} & 40.0\\% \\\\\n\\bottomrule\n\\end{tabular}\n"
    assert text == (
        "% python -m benchmarks stages --threads 1\n"
        "\\begin{tabular}{lr}\n\\toprule\nMiniLM, items & float32, 0.25 s \\\\\n"
        f"{part}\n"
        "\\begin{tabular}{lr}\n\\toprule\nbase, items & float32, 0.25 s \\\\\n"
        f"{part}"
        f"% {LINE}\n"
    )


@pytest.mark.parametrize("name", ["speed.md", "speed.tex", "speed.csv"])
def test_the_name_of_a_table_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="give it another ending"):
        Report(1, str(tmp_path / name))
    assert not any(tmp_path.iterdir())


def test_a_descriptor_gets_the_json_alone(capfd: pytest.CaptureFixture[str]) -> None:
    tables.write("/dev/stdout", {"rows": []}, "markdown", "latex")
    assert json.loads(capfd.readouterr().out) == {"rows": []}
    assert not Path("/dev/stdout.md").exists()
