"""examples/shop: the commands of its README, as they stand there, on a tiny model."""

from __future__ import annotations

import csv
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from recformer.__main__ import main
from recformer.data.processed import ProcessedFolder
from tests.tiny import tiny_bert

SHOP = Path(__file__).parents[2] / "examples" / "shop"
MODEL = "sentence-transformers/all-MiniLM-L6-v2"
WORDS = ["bike", "light", "lock", "helmet", "pump", "chain", "red", "black", "alloy", "starter"]


def commands() -> list[list[str]]:
    """Words of every command of the README, in order."""
    text = "\n".join(re.findall(r"```bash\n(.*?)```", (SHOP / "README.md").read_text(), re.DOTALL))
    lines = text.replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def make(folder: Path, seed: int = 0) -> None:
    script = SHOP / "make_shop.py"
    command = [sys.executable, script, "--output_dir", folder, "--seed", str(seed)]
    subprocess.run(command, check=True, cwd=SHOP.parents[1])


def rows(path: Path) -> list[dict[str, str]]:
    with open(path, encoding="utf-8", newline="") as handle:
        return list(csv.DictReader(handle))


def test_from_files_to_recommendations(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    model = tiny_bert(tmp_path / "model", WORDS, positions=512)
    script, *ours = commands()
    assert script == ["python", "examples/shop/make_shop.py", "--output_dir", "shop"]
    make(tmp_path / "shop")
    assert [words[:2] for words in ours] == [
        ["recformer", word] for word in ("process", "finetune", "recommend", "serve")
    ]
    for _, *words in ours[:3]:
        capsys.readouterr()
        extra = ["--num_train_epochs", "1"] if words[0] == "finetune" else []
        main([str(model) if word == MODEL else word for word in words] + extra)
    answers = [json.loads(line) for line in capsys.readouterr().out.splitlines() if line[0] == "{"]

    log = rows(tmp_path / "shop" / "events.csv")
    bought = [row for row in log if row["event"] == "purchase"]
    data = ProcessedFolder.load(tmp_path / "shop" / "data")
    catalogue = {row["item_id"] for row in rows(tmp_path / "shop" / "products.csv")}
    known_items = {row["item_id"] for row in bought} & catalogue  # of some the name is missing
    assert (data.num_users, data.num_items) == (500, len(known_items))
    known, stranger, new = answers
    for answer in answers:
        assert len(answer["items"]) == len(set(answer["items"])) == 5
        assert set(answer["items"]) <= catalogue
    assert "fallback" not in known
    assert "fallback" not in stranger
    assert new["fallback"] == "popular"
    assert ours[3] == ["recformer", "serve", "shop/run/best_model"]
    assert (tmp_path / "shop" / "run" / "best_model" / "model.safetensors").is_file()


def test_the_files_are_those_of_a_shop(tmp_path: Path) -> None:
    make(tmp_path / "shop")
    make(tmp_path / "again")
    make(tmp_path / "other", seed=1)
    for name in ("products.csv", "events.csv", "histories.jsonl"):
        assert (tmp_path / "shop" / name).read_bytes() == (tmp_path / "again" / name).read_bytes()
        assert (tmp_path / "shop" / name).read_bytes() != (tmp_path / "other" / name).read_bytes()
    log = rows(tmp_path / "shop" / "events.csv")
    assert [row["timestamp"] for row in log] == sorted(row["timestamp"] for row in log)
    assert all(re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", row["timestamp"]) for row in log)
    assert {row["event"] for row in log} == {"view", "cart", "purchase"}
    sessions = {row["session_id"]: row["user_id"] for row in log}
    assert all(sessions[row["session_id"]] == row["user_id"] for row in log)
    bought = {row["item_id"] for row in log if row["event"] == "purchase"}
    catalogue = {row["item_id"] for row in rows(tmp_path / "shop" / "products.csv")}
    assert len(catalogue - bought) >= 12  # some that nobody has bought
