"""The model card: what a folder says of itself to people and to hubs."""

from __future__ import annotations

from pathlib import Path

import yaml

from recformer.checkpoints.card import ENCODING, write_card


def test_a_card(tmp_path: Path) -> None:
    facts = {"data": "a|b: 3 users", "split": "abc"}
    write_card(tmp_path, "Recformer for x", "It recommends.", facts, {"NDCG@10": 0.12345}, ENCODING)
    text = (tmp_path / "README.md").read_text(encoding="utf-8")
    _, front, body = text.split("---\n", 2)
    assert yaml.safe_load(front) == {
        "library_name": "recformer",
        "tags": ["sequential-recommendation", "recformer"],
    }
    assert body.startswith("\n# Recformer for x\n\nIt recommends.\n")
    assert "|data|a\\|b: 3 users|\n|split|abc|\n" in body
    assert "| metric | test |\n|---|---|\n|NDCG@10|0.1235|\n" in body
    assert "pip install recformer" in body
    assert "transformers alone does not have this architecture" in body
    (code,) = body.split("```python\n")[1:]
    compile(code.split("```")[0], "card", "exec")
