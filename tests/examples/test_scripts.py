"""The scripts and the notebook of `examples/`, on a shop of 80 customers and a tiny model."""

from __future__ import annotations

import json
import re
import runpy
import shutil
from pathlib import Path

import pytest

from recformer.__main__ import main
from scripts.notebook import run
from tests.examples.conftest import WORDS
from tests.tiny import tiny_bert

EXAMPLES = Path(__file__).parents[2] / "examples"
SCRIPTS = ("zero_shot", "cold_items", "new_baseline", "compare_runs", "semantic_ids")


def example(name: str, *words: object) -> None:
    runpy.run_path(str(EXAMPLES / f"{name}.py"))["main"]([str(word) for word in words])


def test_every_script_is_tested_and_described() -> None:
    names = {path.stem for path in EXAMPLES.glob("*.py")}
    assert names == set(SCRIPTS)
    page = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    for name in names:
        assert f"[{name}.py]({name}.py)" in page
        text = (EXAMPLES / f"{name}.py").read_text(encoding="utf-8")
        assert len(text.splitlines()) < 90
        assert f"python examples/{name}.py" in text


def test_zero_shot(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The same figures as of the command."""
    example("zero_shot", place / "finetune_data" / "MyShop", "--encoder", place / "encoder")
    said = capsys.readouterr().out
    assert "80 test users, 48 items, nothing trained" in said
    main(["finetune", "--zero_shot", "--pretrain_ckpt", str(place / "encoder"), "--pooler_type",
          "avg", "--data_path", str(place / "finetune_data" / "MyShop"), "--max_token_num", "96",
          "--max_attr_length", "16", "--output_dir", str(place / "zero_shot")])  # fmt: skip
    figures = json.loads((place / "zero_shot" / "metrics.json").read_text())["test"]
    ndcg, recall = figures["NDCG@10"], figures["Recall@10"]
    assert f"NDCG@10 {ndcg:.4f}, Recall@10 {recall:.4f}" in said


def test_cold_items(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (place / "histories.jsonl").write_text(
        '{"user": "ann", "items": ["tent-4", "tent-5"]}\n{"user": "new", "items": []}\n'
    )
    new = {"tent-new": {"title": "red tent number 4", "brand": "Acme", "category": "Camping"}}
    (place / "new.json").write_text(json.dumps(new))
    example("cold_items", place / "result" / "best_model", place / "histories.jsonl",
            place / "new.json")  # fmt: skip
    said = capsys.readouterr().out
    assert "48 products, and 1 that nobody has bought" in said
    assert re.search(r"^ann: [01] new ones among the best 10", said, re.MULTILINE)
    assert re.search(r"^ann: .*red tent number 4.*has a score of", said, re.MULTILINE)
    assert "new: nothing is known of this history, so " in said
    assert said.count("most like tent-new: ") == 1


def test_new_baseline(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every customer buys one kind, so the category says where the next one is."""
    own = place / "own_runs"
    example("new_baseline", place / "finetune_data" / "MyShop", "--runs", own)
    said = capsys.readouterr().out
    figures = dict(re.findall(r"^(popular\w*) +NDCG@10 ([\d.]+)", said, re.M))
    assert float(figures["popular_by_category"]) > 3 * float(figures["popularity"])
    popularity = json.loads((place / "runs" / "popularity" / "metrics.json").read_text())["test"]
    assert figures["popularity"] == f"{popularity['NDCG@10']:.4f}"
    (difference,) = re.findall(r"difference (\+0\.\d+ \[\+.*\]), p 0\.000", said)
    difference = difference.replace(" ", "|", 1)
    # Its folder beside one of `recformer baseline`, by both commands.
    main(["compare", str(own / "popular_by_category"), str(place / "runs" / "popularity")])
    said = capsys.readouterr().out
    assert ", 80 test users, full ranking, ties expected, seen items kept;" in said
    assert f"|popular_by_category - popularity|{difference}|" in said
    shutil.copytree(place / "runs" / "popularity", own / "built_in")
    main(["leaderboard", str(own)])
    (table,) = json.loads((own / "leaderboard.json").read_text())
    names = [row["name"] for row in table]
    assert names == ["popular_by_category", "built_in", "popularity"]
    assert table[1]["figures"] == table[2]["figures"]
    assert table[1]["slices"] == table[2]["slices"]
    assert [row["parameters"] for row in table] == [0, 0, 0]
    with pytest.raises(SystemExit, match="has the attribute colour"):
        example("new_baseline", place / "finetune_data" / "MyShop", "--attribute", "colour")


def test_compare_runs(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    example("compare_runs", f"head={place / 'result'}", place / "runs" / "popularity")
    said = capsys.readouterr().out
    folders = (place / "result", place / "runs" / "popularity")
    runs = [json.loads((folder / "metrics.json").read_text())["test"] for folder in folders]
    for name, figures in zip(("head", "popularity"), runs, strict=True):
        assert f"{name} NDCG@10 {figures['NDCG@10']:.4f} MRR {figures['MRR']:.4f}" in said
    assert f"difference {runs[0]['NDCG@10'] - runs[1]['NDCG@10']:+.4f}" in said
    better, worse = map(int, re.findall(r"(\d+) are served better by the first, (\d+)", said)[0])
    assert 0 < better + worse <= 80


def test_semantic_ids(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    example(
        "semantic_ids",
        place / "finetune_data" / "MyShop",
        "--encoder",
        place / "encoder",
        "--codebook_size",
        4,
    )
    said = capsys.readouterr().out
    lost = [float(x) for x in re.findall(r"each level: (.*)", said)[0].split()]
    assert len(lost) == 3
    assert 1 > lost[0] > lost[2] >= 0
    assert sum(map(int, re.findall(r"^code \d: (\d+) items", said, re.MULTILINE))) == 48
    own = json.loads(re.findall(r"has the id (\[.*\])", said)[0])
    copy = json.loads(re.findall(r"would get (\[.*\])", said)[0])
    assert own[:3] == copy[:3]
    assert own[3] != copy[3]


def test_notebook(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its cells run in order and print what the text around them speaks of."""
    monkeypatch.chdir(EXAMPLES.parent)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    tiny_bert(tmp_path, [*WORDS, "bike", "light", "lock", "helmet", "pump"], positions=512)
    monkeypatch.setenv("RECFORMER_ENCODER", str(tmp_path))
    notebook = json.loads((EXAMPLES / "from_csv.ipynb").read_text(encoding="utf-8"))
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    assert len({cell["id"] for cell in notebook["cells"]}) == len(notebook["cells"])
    made = run(notebook)
    before, after = (
        ["".join(o["text"]) for c in n["cells"] if c["cell_type"] == "code" for o in c["outputs"]]
        for n in (notebook, made)
    )
    assert len(before) == len(after) == 6
    assert before[1] == after[1]  # of what was processed; the model that was stored is MiniLM
    assert "500 users," in after[1]
    assert "head - popularity: " in after[3]
    assert "most like the new product: " in after[5]
    with pytest.raises(RuntimeError, match="cell 0 failed: 1 / 0"):
        run({"cells": [{"cell_type": "code", "source": ["1 / 0"]}]})
