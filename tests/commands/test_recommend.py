"""Recommendations by name: the ranking of the evaluation, whatever a history holds."""

from __future__ import annotations

import json
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
    assert [len(answer.items) for answer in together] == [4, 0, 4, 0]
    assert recommender.recommend([["B0", "B7", "B2"]], k=4)[0].items == together[2].items
    assert recommender.recommend([["nothing"], []]) == [together[1], together[3]]


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
    assert "3 users; 2 items of their histories are not in the catalogue" in said
    assert "1 users have no other and got an empty answer: bob" in said
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [row["user"] for row in rows] == ["ann", 7, "bob"]
    scores = expected_scores(folder, ["B3", "B1"])
    best = sorted(set(NAMES) - {"B3", "B1"}, key=lambda name: -scores[name])
    assert rows[0]["items"] == best[:2]
    assert rows[2] == {"user": "bob", "items": [], "scores": []}
    main(flags)
    assert [json.loads(line) for line in capsys.readouterr().out.splitlines()] == rows


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
