"""An approximate index: what it finds is measured, filters hold, other vectors are refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from recformer import RecformerForSeqRec
from recformer.commands.index import main
from recformer.files import UserError, read_checked_json
from recformer.recommendation import CatalogueRecommender
from recformer.recommendation.approximate import ApproximateIndex
from tests.tiny import tiny_recformer

NAMES = [f"B{number}" for number in range(1000)]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A catalogue of a thousand random vectors, all of the same words."""
    path = tiny_recformer(tmp_path_factory.mktemp("model"), ["title", "tent", "lamp"])
    model = RecformerForSeqRec.from_pretrained(path)
    generator = torch.Generator().manual_seed(1)
    model.init_item_embedding(torch.randn(len(NAMES), 16, generator=generator))
    model.save_pretrained(path)
    (path / "smap.json").write_text(json.dumps({name: i for i, name in enumerate(NAMES)}))
    texts = {n: {"title": "tent" if i % 2 else "lamp"} for i, n in enumerate(NAMES)}
    (path / "meta_data.json").write_text(json.dumps(texts))
    return path


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "model"))


@pytest.mark.parametrize("kind", ["ivf", "hnsw"])
def test_the_recall_of_the_command_is_that_of_the_lists(folder: Path, kind: str, capsys) -> None:
    pytest.importorskip("faiss")
    flags = ["--model", str(folder), "--kind", kind, "--queries", "200", "--recall", "0.9"]
    main(flags)
    said = capsys.readouterr().out
    manifest = read_checked_json(folder / "index" / "manifest.json")
    assert manifest["recall"] >= 0.9
    assert all(each["recall"] < 0.9 for each in manifest["measured"][:-1])
    assert f"recall@10 {manifest['recall']:.4f} over 200 queries" in said
    assert f"{'exact':<20}    1.0000" in said
    assert (manifest["rows"], manifest["kind"]) == (1000, kind)

    # The share of the true ten best, counted over the same items by name.
    recommender = CatalogueRecommender.load(folder)
    view = recommender.catalogue.view
    index = ApproximateIndex.load(folder, view)
    drawn = view.at(np.sort(np.random.default_rng(0).permutation(1000)[:200]))
    units = torch.nn.functional.normalize(drawn)
    true = (units @ torch.nn.functional.normalize(view.tables[0]).T).topk(10).indices.numpy()
    found = index.candidates(drawn, 10, None)
    hits = sum(len(np.intersect1d(a, b)) for a, b in zip(true, found, strict=True))
    assert hits / 2000 == pytest.approx(manifest["recall"], abs=0.002)


def test_a_search_through_the_whole_index_is_the_exact_one(folder: Path) -> None:
    pytest.importorskip("faiss")
    recommender = CatalogueRecommender.load(folder)
    view = recommender.catalogue.view
    index = ApproximateIndex.build(view, view.at(np.arange(50)), "ivf", 10, 1.0)
    recommender.add_items({"X": {"title": "tent tent"}, "Y": {"title": "lamp tent"}})
    recommender.remove_items(["B7"])
    asks = (
        {},
        {"filter_seen": True},
        {"blocked": NAMES[:500]},
        {"where": {"title": "tent"}},
        {"where": {"title": "tent"}, "filter_seen": True, "allowed": [*NAMES[::3], "X"]},
        {"allowed": ["X", "B3"]},
        {"diversity": 0.5},
    )
    histories = [["B1", "B2", "X"], ["B500"], ["Y"]]
    exact = [recommender.recommend(histories, 20, **ask) for ask in asks]
    recommender.use_index(index)
    assert index.manifest.recall == 1.0
    for ask, expected in zip(asks, exact, strict=True):
        for got, want in zip(recommender.recommend(histories, 20, **ask), expected, strict=True):
            assert got.items == want.items, ask
            assert got.scores == pytest.approx(want.scores, abs=1e-12)
    assert recommender.similar_items("X", 5).items[0] != "X"
    recommender.use_index(None)
    assert recommender.recommend(histories, 20) == exact[0]


def test_users_for_whom_an_index_finds_too_few_are_searched_exactly(folder: Path) -> None:
    pytest.importorskip("faiss")
    recommender = CatalogueRecommender.load(folder)
    view = recommender.catalogue.view
    index = ApproximateIndex.build(view, view.at(np.arange(5)), "ivf", 1, 0.01)
    assert index.manifest.depth == 1  # one cluster of 25
    exact = recommender.recommend([["B1"], ["B2"]], 300, True, blocked=["B0"])
    recommender.use_index(index)
    assert recommender.recommend([["B1"], ["B2"]], 300, True, blocked=["B0"]) == exact


def test_an_index_of_other_vectors_is_refused(folder: Path) -> None:
    pytest.importorskip("faiss")
    main(["--model", str(folder), "--queries", "20"])
    recommender = CatalogueRecommender.load(folder)
    recommender.add_items({"X": {"title": "tent tent"}})
    ApproximateIndex.load(folder, recommender.catalogue.view)  # what came later is no change
    model = RecformerForSeqRec.from_pretrained(folder)
    with torch.no_grad():
        model.item_embedding.weight[999, 3] += 1e-3
    model.save_pretrained(folder)
    view = CatalogueRecommender.load(folder).catalogue.view
    with pytest.raises(UserError, match="is of other vectors than the catalogue's"):
        ApproximateIndex.load(folder, view)
    sound = (folder / "index" / "index.faiss").read_bytes()
    for place in (len(sound) // 2, len(sound) - 5):  # a vector, and what says where it is
        raw = bytearray(sound)
        raw[place] ^= 1
        (folder / "index" / "index.faiss").write_bytes(raw)
        with pytest.raises(UserError, match=r"index\.faiss is damaged"):
            ApproximateIndex.load(folder, recommender.catalogue.view)
    (folder / "index" / "index.faiss").unlink()
    with pytest.raises(UserError, match="is missing or damaged"):
        ApproximateIndex.load(folder, recommender.catalogue.view)
    shutil.rmtree(folder / "index")
    with pytest.raises(FileNotFoundError, match="recformer index --model"):
        ApproximateIndex.load(folder, view)


def test_wrong_flags(folder: Path) -> None:
    for flags, message in (
        (["--k", "0"], "--k 0"),
        (["--recall", "0"], "--recall 0.0: must be above 0"),
        (["--histories", "none"], "none does not exist"),
    ):
        with pytest.raises((UserError, FileNotFoundError), match=message):
            main(["--model", str(folder), *flags])
