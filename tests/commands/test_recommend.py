"""Recommendations by name: the ranking of the evaluation, whatever a history holds."""

from __future__ import annotations

import gzip
import json
import os
import threading
from pathlib import Path

import pytest
import torch

from recformer import RecformerForSeqRec, RecformerTokenizer
from recformer.commands.recommend import main
from recformer.files import UserError
from recformer.recommendation import CatalogueRecommender
from tests.tiny import tiny_recformer

WORDS = ("tent", "lamp", "stove", "rope", "boots", "map", "torch", "knife")
NAMES = [f"B{number}" for number in range(len(WORDS))]
TEXTS = {name: {"title": word} for name, word in zip(NAMES, WORDS, strict=True)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tiny_recformer(tmp_path_factory.mktemp("model"), ["title", *WORDS])
    model = RecformerForSeqRec.from_pretrained(path)
    generator = torch.Generator().manual_seed(1)
    model.init_item_embedding(torch.randn(len(WORDS), 16, generator=generator))
    model.save_pretrained(path)
    (path / "smap.json").write_text(json.dumps({name: i for i, name in enumerate(NAMES)}))
    (path / "meta_data.json").write_text(json.dumps(TEXTS))
    return path


def expected_scores(folder: Path, history: list[str]) -> dict[str, float]:
    """Cosines by the model's own forward."""
    model = RecformerForSeqRec.from_pretrained(folder).eval()
    tokenizer = RecformerTokenizer.from_pretrained(folder)
    batch = tokenizer([[TEXTS[name] for name in history]], return_tensor=True)
    with torch.no_grad():
        scores = model(**batch)[0] * model.config.temp
    return dict(zip(NAMES, scores.tolist(), strict=True))


def test_recommendations_are_the_best_by_the_models_scores(folder):
    history = ["B3", "B1"]
    recommender = CatalogueRecommender.load(folder)
    answer = recommender.recommend([history], k=3)[0]
    scores = expected_scores(folder, history)
    best = sorted(scores, key=lambda name: -scores[name])
    assert answer.items == best[:3]
    assert answer.scores == pytest.approx([scores[name] for name in best[:3]], abs=1e-5)
    assert answer.num_unknown == 0
    unseen = [name for name in best if name not in history]
    answer = recommender.recommend([history], k=100, filter_seen=True)[0]
    assert answer.items == unseen  # six of eight: the catalogue ends
    assert recommender.recommend([history], k=10**12)[0].items == best  # and takes no memory


def test_a_history_does_not_depend_on_its_company(folder):
    recommender = CatalogueRecommender.load(folder)
    histories = [["B3", "B1"], ["nothing"], ["B0", "gone", "B7", "B2"], []]
    together = recommender.recommend(histories, k=4)
    assert [answer.num_unknown for answer in together] == [0, 1, 1, 0]
    assert [answer.fallback for answer in together] == [None, "newest", None, "newest"]
    assert [len(answer.items) for answer in together] == [4, 4, 4, 4]
    assert recommender.recommend([["B0", "B7", "B2"]], k=4)[0].items == together[2].items
    assert recommender.recommend([["nothing"], []], k=4) == [together[1], together[3]]


def test_the_command(folder, tmp_path, capsys):
    lines = [
        {"user": "ann", "items": ["B3", "B1"]},
        {"user": 7, "items": ["B0", "gone"]},
        {"user": "bob", "items": ["gone"]},
    ]
    path = tmp_path / "histories.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    flags = ["--model", str(folder), "--histories", str(path), "--k", "2", "--filter_seen"]
    main([*flags, "--output", str(tmp_path / "out.jsonl")])
    said = capsys.readouterr().err
    assert "3 users; skipped 2 items that the catalogue lacks" in said
    assert "1 user had no other and got the newest items: bob" in said
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [row["user"] for row in rows] == ["ann", 7, "bob"]
    scores = expected_scores(folder, ["B3", "B1"])
    best = sorted(set(NAMES) - {"B3", "B1"}, key=lambda name: -scores[name])
    assert rows[0]["items"] == best[:2]
    newest = {"items": ["B7", "B6"], "scores": [0, 0], "fallback": "newest"}
    assert rows[2] == {"user": "bob", **newest}
    main(flags)
    assert [json.loads(line) for line in capsys.readouterr().out.splitlines()] == rows


def answers(folder: Path, path: Path, output: Path, *more: str) -> list[dict]:
    flags = ["--model", str(folder), "--histories", str(path), "--output", str(output)]
    main([*flags, *more])
    return [json.loads(line) for line in output.read_text("utf-8").splitlines()]


def test_histories_of_every_encoding(folder, tmp_path):
    text = '{"user": "José", "items": ["B3", {"title": "knife"}]}\n'
    out = tmp_path / "out.jsonl"
    (tmp_path / "plain").write_text(text, encoding="utf-8")
    (right,) = answers(folder, tmp_path / "plain", out)
    assert right["user"] == "José"
    assert len(right["items"]) == 8
    (tmp_path / "mark").write_text(text, encoding="utf-8-sig")
    (tmp_path / "zipped").write_bytes(gzip.compress(text.encode()))
    for name in ("mark", "zipped"):
        assert answers(folder, tmp_path / name, out) == [right]
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    writer = threading.Thread(target=pipe.write_text, args=(text, "utf-8"))
    writer.start()
    assert answers(folder, pipe, out) == [right]
    writer.join(timeout=20)
    (tmp_path / "half").write_text('{"user": "\\ud83d", "items": ["B3"]}\n')
    assert [row["user"] for row in answers(folder, tmp_path / "half", out)] == ["\ud83d"]
    for name, data, message in (
        ("latin", b"\n" + text.encode("latin-1"), r"latin:2 is not UTF-8 \(byte 0xe9\).*LATIN1"),
        ("wide", text.encode("utf-16"), "wide is UTF-16, expected UTF-8"),
        ("cut", gzip.compress(text.encode())[:-9], "cut is a gzip file that is cut off"),
        ("deep", b"[" * 200_000, "deep:1 is not JSON"),
        ("digits", b'{"user": ' + b"1" * 5000, "digits:1 is not JSON"),
    ):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(UserError, match=message):
            answers(folder, tmp_path / name, out)


def test_new_products_and_those_in_stock(folder, tmp_path):
    (tmp_path / "h").write_text('{"user": 1, "items": ["B3", "N1"]}\n')
    meta = tmp_path / "meta.json"
    meta.write_text(json.dumps({**TEXTS, "N1": {"title": "tent lamp"}}))
    flags = ("--meta_file", str(meta), "--k", "1000000000000")
    (row,) = answers(folder, tmp_path / "h", tmp_path / "o", *flags)
    assert sorted(row["items"]) == [*NAMES, "N1"]
    (tmp_path / "stock").write_text("B5\n\nN1\nsold elsewhere\n")
    (few,) = answers(folder, tmp_path / "h", tmp_path / "o", *flags, "--allow", f"{tmp_path}/stock")
    assert few["items"] == [name for name in row["items"] if name in ("B5", "N1")]


def test_nothing_stays_behind_of_a_folder_that_cannot_be_written(folder, tmp_path, monkeypatch):
    meta = tmp_path / "meta.json"
    meta.write_text(json.dumps({**TEXTS, "N1": {"title": "tent lamp"}}))
    (tmp_path / "tmp").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    before = sorted(folder.rglob("*"))
    monkeypatch.setattr(os, "access", lambda *_: False)
    CatalogueRecommender.load(folder, meta)
    assert list((tmp_path / "tmp").iterdir()) == []
    assert sorted(folder.rglob("*")) == before


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"user": 1, "items": ["B1"]', r"histories.jsonl:2 is not JSON"),
        (
            '{"user": ' + "9" * 5000 + ', "items": ["B1"]}',
            r"histories.jsonl:2 is not JSON: Exceeds",
        ),
        ('{"user": ' + "[" * 100_000, r"histories.jsonl:2 is not JSON: nested too deep"),
        ('{"items": ["B1"]}', r'histories.jsonl:2: expected {"user": …, "items": \[name, …\]}'),
        ('{"user": 1, "items": "B1"}', "histories.jsonl:2: expected"),
        ('{"user": 1, "items": [["B1"]]}', "histories.jsonl:2: expected"),
    ],
)
def test_a_wrong_line_is_named(folder, tmp_path, line, message):
    path = tmp_path / "histories.jsonl"
    path.write_text('{"user": 1, "items": ["B1"]}\n' + line + "\n")
    flags = ["--model", str(folder), "--histories", str(path)]
    with pytest.raises(UserError, match=message):
        main([*flags, "--output", str(tmp_path / "out.jsonl")])
    assert not (tmp_path / "out.jsonl").exists()


def test_a_folder_that_cannot_recommend_is_refused(folder, tmp_path):
    bare = tiny_recformer(tmp_path / "bare", ["title", *WORDS])
    (bare / "smap.json").write_text('{"B0": 0}')
    with pytest.raises(FileNotFoundError, match="meta_data.json does not exist: the texts"):
        CatalogueRecommender.load(bare)
    with pytest.raises(UserError, match=r"holds no item vectors and 1 items in smap.json"):
        CatalogueRecommender.load(bare, folder / "meta_data.json")
    (tmp_path / "other.json").write_text('{"X": {}}')
    with pytest.raises(UserError, match="has texts for none of the 8 items"):
        CatalogueRecommender.load(folder, tmp_path / "other.json")
    with pytest.raises(UserError, match="--k 0"):
        main(["--model", str(folder), "--histories", "none", "--k", "0"])
    with pytest.raises(FileNotFoundError, match="none does not exist"):
        main(["--model", str(folder), "--histories", "none"])
