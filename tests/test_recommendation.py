"""A catalogue that changes: what is added is recommended and read, by the model's own vectors."""

from __future__ import annotations

import json
import shutil
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from recformer import (
    RecformerConfig,
    RecformerForSeqRec,
    RecformerModel,
    RecformerTokenizer,
)
from recformer.data.catalogue import write_catalogue
from recformer.data.collators import EvalExample, RecformerEvalCollator
from recformer.data.histories import HistoryEvalCollator
from recformer.data.items import ItemsInMemory, TokenizedItems
from recformer.data.mapped import open_mapped
from recformer.data.processed import ProcessedFolder, Sequences, write_processed
from recformer.evaluation.evaluator import Evaluator
from recformer.evaluation.scan import _parts
from recformer.files import UserError, read_json
from recformer.models import HeadOptions, RecformerForCatalogue
from recformer.models.catalogue import token_bags
from recformer.recommendation import CatalogueRecommender, Explanation
from recformer.recommendation.diversity import marginally_relevant
from recformer.recommendation.saving import load_catalogue
from recformer.recommendation.view import Rows
from recformer.training.item_encoder import encode_items
from tests.tiny import tiny_recformer

WORDS = ("tent", "lamp", "stove", "rope", "boots", "map", "torch", "knife")
NAMES = [f"B{number}" for number in range(len(WORDS))]
TEXTS = {
    name: {"title": word, "brand": "Acme" if row % 2 else "Borex"}
    for row, (name, word) in enumerate(zip(NAMES, WORDS, strict=True))
}
COLD = {"N0": {"title": "tent rope"}, "N1": {"title": "knife map", "brand": "Acme"}}


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finetuned folder of the eight words, without what stands for products beyond them."""
    path = tiny_recformer(tmp_path_factory.mktemp("model"), ["title", "brand", "Acme", *WORDS])
    model = RecformerForSeqRec.from_pretrained(path)
    generator = torch.Generator().manual_seed(1)
    model.init_item_embedding(torch.randn(len(WORDS), 16, generator=generator))
    model.save_pretrained(path)
    (path / "smap.json").write_text(json.dumps({name: i for i, name in enumerate(NAMES)}))
    return path


@pytest.fixture
def folder(bare: Path) -> Path:
    (bare / "meta_data.json").write_text(json.dumps(TEXTS | COLD))
    (bare / "item_counts.json").unlink(missing_ok=True)
    return bare


class Truth:
    """Scores by the published signature of the model, one sequence at a time."""

    def __init__(self, folder: Path) -> None:
        self.model = RecformerForSeqRec.from_pretrained(folder).eval()
        self.tokenizer = RecformerTokenizer.from_pretrained(folder)
        table = self.model.item_embedding.weight
        self.vectors = {name: table[row] for row, name in enumerate(NAMES)}

    def vector(self, *items: dict[str, str]) -> torch.Tensor:
        with torch.no_grad():
            batch = self.tokenizer([list(items)], return_tensor=True)
            return self.model.longformer(**batch).pooler_output[0]

    def scores(self, user: torch.Tensor, cold: dict[str, dict[str, str]]) -> dict[str, float]:
        vectors = {name: v for name, v in self.vectors.items() if name not in cold}
        vectors |= {name: self.vector(item) for name, item in cold.items()}
        cosine = torch.nn.functional.cosine_similarity
        found = {n: float(cosine(user.double(), v.double(), dim=0)) for n, v in vectors.items()}
        return dict(sorted(found.items(), key=lambda pair: -pair[1]))


def check(answer, scores: dict[str, float], names=None, error: float = 1e-5) -> None:
    expected = {n: s for n, s in scores.items() if names is None or n in names}
    assert answer.items == list(expected)[: len(answer.items)]
    assert answer.scores == pytest.approx(list(expected.values())[: len(answer.items)], abs=error)


def test_products_that_nobody_bought_are_recommended_and_read(folder: Path) -> None:
    recommender, truth = CatalogueRecommender.load(folder), Truth(folder)
    assert len(recommender) == 10
    user = truth.vector(TEXTS["B2"], COLD["N1"])
    (answer,) = recommender.recommend([["B2", "N1"]], k=50)
    assert len(answer.items) == 10
    assert (answer.num_unknown, answer.fallback) == (0, None)
    check(answer, truth.scores(user, COLD))
    (answer,) = recommender.recommend([["B2", "N1"]], k=50, filter_seen=True)
    check(answer, truth.scores(user, COLD), {*NAMES, "N0"} - {"B2"})
    assert len(answer.items) == 8


def test_vectors_of_new_products_are_kept_beside_the_model(folder: Path, monkeypatch) -> None:
    first = CatalogueRecommender.load(folder).recommend([["B2"]])
    (store,) = (folder / "vectors").iterdir()
    assert sum(len(open_mapped(table).arrays["vectors"]) for table in store.iterdir()) == 2
    encoded = []
    encode = RecformerForSeqRec.encode
    monkeypatch.setattr(
        RecformerForSeqRec, "encode", lambda self, packed: encoded.append(1) or encode(self, packed)
    )
    again = CatalogueRecommender.load(folder)
    assert encoded == []
    assert again.recommend([["B2"]]) == first


def test_add_update_remove(folder: Path) -> None:
    recommender, truth = CatalogueRecommender.load(folder), Truth(folder)
    cold = dict(COLD)
    new = {"N2": {"title": "lamp torch"}, "N3": {"title": "boots"}, "N4": {"title": "lamp torch"}}
    assert recommender.add_items(new) == 2  # N4 reads as N2
    cold |= new
    user = truth.vector(TEXTS["B1"], new["N2"])
    (answer,) = recommender.recommend([["B1", "N2"]], k=50)
    check(answer, truth.scores(user, cold))
    assert answer.items.index("N4") == answer.items.index("N2") + 1  # a tie: the earlier first

    changed = {"N2": {"title": "stove map"}, "B0": {"title": "lamp torch"}, "N3": new["N3"]}
    assert recommender.update_items(changed) == 1  # B0 reads as N4, N3 as before
    cold |= {"N2": changed["N2"]}
    user = truth.vector(changed["B0"])
    (answer,) = recommender.recommend([["B0"]], k=50)
    assert len(answer.items) == len(set(answer.items)) == 13
    check(answer, truth.scores(user, cold | {"B0": changed["B0"]}))

    recommender.remove_items(["B3", "N2"])
    (answer,) = recommender.recommend([["B0", "B3"]], k=50)
    assert answer.num_unknown == 1
    assert len(answer.items) == 11
    left = set(cold) | set(NAMES) - {"B3"}
    check(answer, truth.scores(user, cold | {"B0": changed["B0"]}), left - {"N2"})
    assert recommender.add_items({"B3": {"title": "rope"}}) == 1
    assert len(recommender.recommend([["B0"]], k=50)[0].items) == 12


def test_wrong_changes_change_nothing(folder: Path) -> None:
    recommender = CatalogueRecommender.load(folder)
    before = recommender.recommend([["B0"]], k=50)
    for change, message in (
        (lambda: recommender.add_items({"X": {"title": "a"}, "B1": {"title": "b"}}), "B1 are in"),
        (lambda: recommender.add_items({"X": {"title": "a"}, "Y": {}}), "'Y' has no text"),
        (lambda: recommender.add_items({"X": {"title": {"a": 1}}}), "item 0: the value of 'title'"),
        (lambda: recommender.update_items({"B1": {"title": "b"}, "X": {}}), "X are not in"),
        (lambda: recommender.remove_items(["B1", "X"]), "X are not in the catalogue of 10"),
        (lambda: recommender.remove_items("B1"), "the string 'B1', expected a list"),
    ):
        with pytest.raises(UserError, match=message):
            change()
    assert recommender.recommend([["B0"]], k=50) == before


def test_a_look_in_bfloat16_changes_no_answer(folder: Path) -> None:
    plain, quick = CatalogueRecommender.load(folder), CatalogueRecommender.load(folder)
    changes = {"N2": {"title": "tent map"}, "B3": {"title": "boots rope"}, "N3": {"title": "lamp"}}
    for recommender in (plain, quick):
        recommender.add_items({"N2": changes["N2"]})
    quick.search_in_bfloat16()  # from here on, rows that come later included
    for recommender in (plain, quick):
        recommender.put_items(changes)
        recommender.remove_items(["B5"])
    assert quick.catalogue.view.units is not None
    assert len(Rows(quick.catalogue.view.units)) == len(quick.catalogue.view)
    histories = [["B1", "B2"], ["N3", {"title": "knife"}], ["B0"]]
    for filters in ({}, {"filter_seen": True}, {"blocked": ["N2", "B0"]}, {"allowed": ["B7"]}):
        for asked in (histories, histories[:1]):
            expected = plain.recommend(asked, k=5, **filters)
            assert quick.recommend(asked, k=5, **filters) == expected
    assert quick.similar_items("B1", 3) == plain.similar_items("B1", 3)


def test_items_by_their_attributes(folder: Path) -> None:
    recommender, truth = CatalogueRecommender.load(folder), Truth(folder)
    mine = {"title": "tent", "brand": "Nobody"}
    (answer,) = recommender.recommend([["B1", mine]], k=50)
    check(answer, truth.scores(truth.vector(TEXTS["B1"], mine), COLD))
    long = [TEXTS[name] for name in NAMES]  # four items are read, the newest
    (answer,) = recommender.recommend([long], k=50)
    check(answer, truth.scores(truth.vector(*long), COLD))
    assert recommender.recommend([["B1", {}]])[0].num_unknown == 1


def test_filters(folder: Path) -> None:
    recommender, truth = CatalogueRecommender.load(folder), Truth(folder)
    both = {"title": "tent", "brand": ["Acme", "Borex"]}
    scores = truth.scores(truth.vector(TEXTS["B2"]), COLD | {"N2": both})

    def names(**filters) -> list[str]:
        (answer,) = recommender.recommend([["B2"]], k=50, **filters)
        check(answer, scores, set(answer.items))
        return sorted(answer.items)

    assert names(allowed=["B6", "N0", "B2", "elsewhere"]) == ["B2", "B6", "N0"]
    assert names(allowed=["B6", "N0", "B2"], filter_seen=True) == ["B6", "N0"]
    assert names(allowed=["B6", "N0"], blocked=["N0"]) == ["B6"]
    assert names(blocked=["B0", "elsewhere"]) == [*NAMES[1:], "N0", "N1"]
    assert names(where={"brand": "Acme"}) == ["B1", "B3", "B5", "B7", "N1"]
    assert names(where={"brand": ["Acme", "Borex"], "title": {"map", "tent"}}) == ["B0", "B5"]
    assert names(where={"brand": "None"}) == []
    recommender.add_items({"N2": both})
    assert "N2" in names(where={"brand": "Borex"})
    recommender.remove_items(["N2"])
    assert "N2" not in names(where={"brand": "Borex"})
    with pytest.raises(UserError, match="no item of the catalogue has the attribute 'colour'"):
        names(where={"colour": "red"})
    with pytest.raises(UserError, match="none of the 2 allowed items"):
        names(allowed=["x", "y"])
    with pytest.raises(UserError, match="got a string"):
        names(blocked="B1")


def test_a_fallback_is_marked(folder: Path) -> None:
    recommender = CatalogueRecommender.load(folder)
    empty, unknown, known = recommender.recommend([[], ["gone", "too"], ["B1"]], k=2)
    assert (empty.items, empty.scores, empty.fallback) == (["N1", "N0"], [0, 0], "newest")
    assert (unknown.items, unknown.num_unknown, unknown.fallback) == (["N1", "N0"], 2, "newest")
    assert known.fallback is None
    counts = {"B4": 7, "B1": 7, "B6": 9}
    (folder / "item_counts.json").write_text(json.dumps(counts))
    recommender = CatalogueRecommender.load(folder)
    (answer,) = recommender.recommend([[]], k=4)
    assert (answer.items, answer.scores) == (["B6", "B1", "B4", "B0"], [9, 7, 7, 0])
    assert answer.fallback == "popular"
    assert recommender.recommend([[]], k=2, blocked=["B6"])[0].items == ["B1", "B4"]


def test_similar_items(folder: Path) -> None:
    recommender, truth = CatalogueRecommender.load(folder), Truth(folder)
    answer = recommender.similar_items("B5", k=50)
    assert "B5" not in answer.items
    assert len(answer.items) == 9
    check(answer, truth.scores(truth.vectors["B5"], COLD), {*NAMES, *COLD} - {"B5"})
    answer = recommender.similar_items("N0", k=3, where={"brand": "Acme"})
    acme = ["B1", "B3", "B5", "B7", "N1"]
    check(answer, truth.scores(truth.vector(COLD["N0"]), COLD), acme)
    answer = recommender.similar_items({"title": "tent rope"}, k=50)
    check(answer, truth.scores(truth.vector(COLD["N0"]), COLD))
    assert answer.items[0] == "N0"
    assert answer.scores[0] == pytest.approx(1)
    with pytest.raises(UserError, match="'gone' is not in the catalogue of 10 items"):
        recommender.similar_items("gone")


def test_a_string_is_no_history(folder: Path) -> None:
    recommender = CatalogueRecommender.load(folder)
    with pytest.raises(UserError, match="history 0 is 'B1', expected a list of names"):
        recommender.recommend(["B1"])
    with pytest.raises(UserError, match="histories is 'B1', expected a list of lists"):
        recommender.recommend("B1")
    with pytest.raises(UserError, match="history 1 is {'title': 'tent'}"):
        recommender.recommend([["B1"], {"title": "tent"}])
    with pytest.raises(UserError, match=r"a history holds 1\.5, expected names"):
        recommender.recommend([[1.5]])
    with pytest.raises(UserError, match="k is 0"):
        recommender.recommend([["B1"]], k=0)
    recommender.add_items({"7": {"title": "map"}})
    by_number, by_name = recommender.recommend([[7], ["7"]])
    assert by_number == by_name
    assert by_number.num_unknown == 0


def test_equal_to_the_ranking_of_the_evaluation(folder: Path, tmp_path: Path) -> None:
    """Every rank that the evaluator counts is the place in the list."""
    model = RecformerForSeqRec.from_pretrained(folder).eval()
    tokenizer = RecformerTokenizer.from_pretrained(folder)
    store = TokenizedItems.open_or_build([TEXTS[name] for name in NAMES], tokenizer, tmp_path)
    rng = np.random.default_rng(0)
    examples = [
        EvalExample(user, rng.choice(8, size=rng.integers(1, 4)), int(rng.integers(8)))
        for user in range(40)
    ]
    evaluator = Evaluator(ks=(3,))
    batch = RecformerEvalCollator(store, model.config)(examples)
    with torch.no_grad():
        users = model.read(batch.history, batch.seen)
        ranks = model.rank(users, batch.labels, filter_seen=False)
    evaluator.update(batch.user_ids, batch.labels, ranks)
    state = evaluator.state()
    assert (state["tied"] == 0).all()
    recommender = CatalogueRecommender.load(folder)
    answers = recommender.recommend(
        [[NAMES[item] for item in example.items] for example in examples], k=8, allowed=NAMES
    )
    places = [a.items.index(NAMES[e.target]) for a, e in zip(answers, examples, strict=True)]
    assert places == state["above"].tolist()


def test_what_finetuning_leaves(tmp_path: Path) -> None:
    write_processed(
        tmp_path / "data",
        train=Sequences.from_lists([[0, 1], [1, 2, 1]]),
        val=Sequences.from_lists([[2], [0]]),
        test=Sequences.from_lists([[1], [2]]),
        user_names=["u", "v"],
        asins=["B0", "B1", "B2"],
        meta={"N0": COLD["N0"]} | {name: TEXTS[name] for name in NAMES[:3]},
        dataset={},
    )
    write_catalogue(tmp_path / "model", ProcessedFolder.load(tmp_path / "data"))
    assert read_json(tmp_path / "model" / "smap.json") == {"B0": 0, "B1": 1, "B2": 2}
    texts = read_json(tmp_path / "model" / "meta_data.json")
    assert list(texts.items()) == [(n, TEXTS[n]) for n in NAMES[:3]] + [("N0", COLD["N0"])]
    assert read_json(tmp_path / "model" / "item_counts.json") == {"B0": 1, "B1": 3, "B2": 1}


def test_readers_see_whole_catalogues_while_it_changes(folder: Path) -> None:
    recommender = CatalogueRecommender.load(folder)
    stop, wrong = threading.Event(), []

    def read() -> None:
        while not stop.is_set():
            (answer,) = recommender.recommend([["B0"]], k=50)
            if len(answer.items) != len(set(answer.items)) or len(answer.items) not in (10, 11):
                wrong.append(answer.items)

    readers = [threading.Thread(target=read) for _ in range(3)]
    for reader in readers:
        reader.start()
    for turn in range(10):
        recommender.add_items({"X": {"title": f"tent {turn}"}})
        recommender.update_items({"X": {"title": f"rope {turn}"}})
        recommender.remove_items(["X"])
    stop.set()
    for reader in readers:
        reader.join(timeout=60)
    assert wrong == []
    assert len(recommender) == 10


# --- the method `head` ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def headed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return with_head(tmp_path_factory.mktemp("head"))


@pytest.fixture(scope="module")
def with_next_offsets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return with_head(tmp_path_factory.mktemp("next"), next_offsets=True)


def with_head(place: Path, next_offsets: bool = False) -> Path:
    path = tiny_recformer(place, ["title", "brand", "Acme", *WORDS])
    config = RecformerConfig.from_pretrained(path)
    options = HeadOptions(bag_size=6, max_history=4, next_offsets=next_offsets)
    config.head = options.as_dict()
    config.item_num = len(WORDS)
    model = RecformerForCatalogue(config)
    model.longformer = RecformerForSeqRec.from_pretrained(path).longformer
    tokenizer = RecformerTokenizer.from_pretrained(path, config)
    store = ItemsInMemory.of([TEXTS[name] for name in NAMES], tokenizer)
    vectors, bags = encode_items(model.longformer, store), token_bags(store)
    model.head.fit(vectors, bags, (torch.arange(8) != 5).long())
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name in ("offset", "log_recency", "history_bias"):
            weight = getattr(model.head, name)
            weight.add_(0.3 * torch.randn(weight.shape, generator=generator))
        if options.next_offsets:
            weight = model.head.next_offset
            weight.add_(torch.randn(weight.shape, generator=generator))
    model.set_catalogue(vectors, bags)
    model.refresh_table()
    model.save_pretrained(path)
    (path / "smap.json").write_text(json.dumps({name: i for i, name in enumerate(NAMES)}))
    (path / "meta_data.json").write_text(json.dumps(TEXTS | COLD))
    return path


@pytest.mark.parametrize("name", ["headed", "with_next_offsets"])
def test_the_head_recommends_as_it_is_evaluated(name: str, request: pytest.FixtureRequest) -> None:
    headed = request.getfixturevalue(name)
    model = RecformerForCatalogue.from_pretrained(headed).eval()
    rng = np.random.default_rng(0)
    examples = [
        EvalExample(user, rng.choice(8, size=rng.integers(1, 7)), int(rng.integers(8)))
        for user in range(40)
    ]
    batch = HistoryEvalCollator(4)(examples)
    with torch.no_grad():
        users = model.read(batch.history, batch.seen)
    recommender = CatalogueRecommender.load(headed)
    histories = [[NAMES[item] for item in example.items] for example in examples]
    answers = recommender.recommend(histories, k=8, allowed=NAMES)
    for filter_seen in (False, True):
        answers = recommender.recommend(histories, 8, filter_seen, allowed=NAMES)
        expected = model.recommend(users, 8, filter_seen)
        rows = [[NAMES[item] for item in row if item >= 0] for row in expected]
        assert [answer.items for answer in answers] == rows
    ranks = model.rank(users, batch.labels, filter_seen=False)
    answers = recommender.recommend(histories, k=8, allowed=NAMES)
    places = [a.items.index(NAMES[e.target]) for a, e in zip(answers, examples, strict=True)]
    assert places == ranks.above.tolist()


def test_the_head_reads_new_products_by_their_texts(headed: Path) -> None:
    """By hand: one item of history is its own vector; a known one has the term on top."""
    recommender = CatalogueRecommender.load(headed)
    model, tokenizer = recommender.model, recommender.tokenizer

    def text_vector(item: dict[str, str]) -> torch.Tensor:
        store = ItemsInMemory.of([item], tokenizer)
        with torch.no_grad():
            encoded = model.longformer(**tokenizer([[item]], return_tensor=True)).pooler_output
            return model.head.text_vectors(encoded, token_bags(store))[0]

    vectors = dict(zip(NAMES, model.item_embedding.weight.detach(), strict=True))
    vectors |= {name: text_vector(item) for name, item in COLD.items()}
    assert torch.allclose(vectors["B5"], text_vector(TEXTS["B5"]), atol=1e-3)  # nobody bought it

    def scores(user: torch.Tensor) -> dict[str, float]:
        found = {name: float(user.double() @ vector.double()) for name, vector in vectors.items()}
        return dict(sorted(found.items(), key=lambda pair: -pair[1]))

    new = {"title": "boots torch"}
    by_text, by_name = recommender.recommend([[new], ["N1"]], k=50)
    check(by_text, scores(text_vector(new)), error=1e-3)  # whitening blows up rounding
    assert len(by_text.items) == 10
    head = model.head
    own = scores(vectors["N1"])  # which is beyond the items that it was trained with
    own["N1"] = float(head.history_factor * own["N1"] + head.history_bias[0])
    check(by_name, dict(sorted(own.items(), key=lambda pair: -pair[1])), error=1e-3)
    assert recommender.add_items({"N9": new}) == 1
    by_name = recommender.recommend([["N9"]], k=50, filter_seen=True)[0]
    check(by_name, scores(text_vector(new)), error=1e-3)
    assert len(by_name.items) == 10


# --- explaining, diversity, saving: both methods --------------------------------------------------


@pytest.fixture(params=["folder", "headed", "with_next_offsets"])
def either(request: pytest.FixtureRequest) -> Path:
    return request.getfixturevalue(request.param)


@pytest.mark.parametrize("item", ["B2", "N0", "B6"])  # B6 is in the history
def test_an_explanation_adds_up_and_is_what_is_lost_without(either: Path, item: str) -> None:
    recommender = CatalogueRecommender.load(either)
    history = ["B1", {"title": "stove", "brand": "Acme"}, "B6", "gone", "B1"]

    def score(history: list) -> float:
        (answer,) = recommender.recommend([history], k=50)
        return dict(zip(answer.items, answer.scores, strict=True))[item]

    found = recommender.explain(history, item)
    assert found.score == pytest.approx(score(history), abs=1e-4)
    assert [entry for entry, _ in found.history] == ["B1", history[1], "B6", "B1"]
    for place, (_, carried) in zip((0, 1, 2, 4), found.history, strict=True):
        without = history[:place] + history[place + 1 :]
        assert carried == pytest.approx(score(history) - score(without), abs=1e-4)
    carried = sum(value for _, value in found.history)
    assert carried + found.history_remainder == pytest.approx(found.score, abs=1e-12)
    text = (TEXTS | COLD)[item]
    assert [name for name, _ in found.attributes] == list(text)
    carried = sum(value for _, value in found.attributes)
    assert carried + found.attributes_remainder == pytest.approx(found.score, abs=1e-12)
    assert found.num_unknown == 1
    assert (found.title, found.titles) == (text["title"], ["lamp", "stove", "torch", "lamp"])
    assert found.sentence().startswith(f"“{text['title']}” has a score of {found.score:.3f}: ")


def test_what_attributes_carry(either: Path) -> None:
    """By the scores of texts that lack one of them; an item that nobody knows has no other."""
    recommender = CatalogueRecommender.load(either)
    item = {"title": "tent", "brand": "Acme"}
    recommender.add_items({"X": item, "Y": {"brand": "Acme"}, "Z": {"title": "tent"}})
    (answer,) = recommender.recommend([["B3", "B4"]], k=50)
    scores = dict(zip(answer.items, answer.scores, strict=True))
    for asked in (item, "X"):
        found = recommender.explain(["B3", "B4"], asked)
        assert found.item == asked
        assert found.score == pytest.approx(scores["X"], abs=1e-4)
        expected = [scores["X"] - scores["Y"], scores["X"] - scores["Z"]]
        assert [value for _, value in found.attributes] == pytest.approx(expected, abs=1e-4)
    # Alone, an item of the history and an attribute carry the whole score.
    found = recommender.explain(["B3"], {"title": "tent"})
    assert found.history == [("B3", found.score)]
    assert found.attributes == [("title", found.score)]
    assert (found.history_remainder, found.attributes_remainder) == (0, 0)


def test_an_explanation_in_words() -> None:
    found = Explanation(
        item="B1",
        score=0.5,
        history=[("B2", 0.125), ("B3", -0.25), ("B4", 0.25), ("B5", 0.0625)],
        history_remainder=0.3125,
        attributes=[("brand", -0.1)],
        attributes_remainder=0.6,
        num_unknown=0,
        title="Tent",
        titles=["Lamp", "Rope", "Stove", "Map"],
    )
    assert found.sentence() == (
        "“Tent” has a score of 0.500: of the history it is carried most by “Stove” (+0.250) and "
        "“Lamp” (+0.125); of its own text nothing carries it alone."
    )


def test_what_cannot_be_explained(folder: Path) -> None:
    recommender = CatalogueRecommender.load(folder)
    for history, item, message in (
        (["gone"], "B1", "nothing of the history is known"),
        (["B1"], "gone", "'gone' is not in the catalogue of 10 items"),
        (["B1"], {}, "the item has no text"),
        ("B1", "B1", "history 0 is 'B1', expected a list"),
    ):
        with pytest.raises(UserError, match=message):
            recommender.explain(history, item)


def test_diversity_by_hand() -> None:
    scores = torch.tensor([0.9, 0.8, 0.7, 0.1])
    vectors = torch.tensor([[2.0, 0], [1, 0], [0, 3], [-1, 0]])
    assert marginally_relevant(scores, vectors, 4, 0.0) == [0, 1, 2, 3]
    # second: .4 - .5, .35 - 0, .05 + .5; third: .4 - .5, .35 - 0
    assert marginally_relevant(scores, vectors, 3, 0.5) == [0, 3, 2]
    assert marginally_relevant(scores, vectors, 9, 1.0) == [0, 3, 2, 1]
    assert marginally_relevant(scores[:0], vectors[:0], 2, 0.5) == []


def test_diverse_recommendations(either: Path) -> None:
    recommender = CatalogueRecommender.load(either)
    (plain,) = recommender.recommend([["B2"]], k=50, allowed=NAMES)
    (few,) = recommender.recommend([["B2"]], k=3, allowed=NAMES, diversity=0.7)
    vectors = recommender.model.item_embedding.weight[[NAMES.index(name) for name in plain.items]]
    places = marginally_relevant(torch.tensor(plain.scores), vectors, 3, 0.7)
    assert few.items == [plain.items[place] for place in places]
    assert few.items != plain.items[:3]
    assert few.scores == [plain.scores[place] for place in places]
    assert recommender.recommend([["B2"]], k=50, allowed=NAMES, diversity=0)[0] == plain
    for wrong in (-0.1, 1.5, float("nan"), True):
        with pytest.raises(UserError, match="expected a number from 0 to 1"):
            recommender.recommend([["B2"]], diversity=wrong)


def test_a_changed_catalogue_is_saved_and_loaded(either: Path, tmp_path: Path, monkeypatch) -> None:
    home = tmp_path / "home"
    shutil.copytree(either, home)
    recommender = CatalogueRecommender.load(home)
    recommender.add_items({"N2": {"title": "lamp torch"}, "\ud83d": {"title": "map"}})
    recommender.update_items({"B0": {"title": "rope map"}, "B4": {**TEXTS["B4"], "shelf": 7}})
    recommender.remove_items(["B3", "N0"])
    ask = ([["B0", "N2", "B3"], ["B5", "\ud83d"], []], 50)
    before = recommender.recommend(*ask)
    recommender.save(home)
    recommender.save(tmp_path / "new")
    for folder in (home, tmp_path / "new"):
        with monkeypatch.context() as patch:
            patch.setattr(RecformerModel, "encode", None)  # nothing is encoded
            loaded = CatalogueRecommender.load(folder)
        assert loaded.recommend(*ask) == before
        assert loaded.recommend([["B1"]], where={"shelf": "7"})[0].items == ["B4"]
        assert loaded.add_items({"N5": {"title": "lamp torch"}, "N6": {"title": "knife"}}) == 1
        loaded.save(folder)
        names = {path.name for path in folder.iterdir() if path.name.startswith("catalogue")}
        assert len(names) == 2  # the store of before is gone
        again = CatalogueRecommender.load(folder)
        assert again.recommend(*ask) == loaded.recommend(*ask)
        assert len(again) == 12
    # The file of texts, where it is named, takes the place of what was saved.
    (tmp_path / "meta.json").write_text(json.dumps(TEXTS))
    assert len(CatalogueRecommender.load(home, tmp_path / "meta.json")) == 8


def test_a_catalogue_is_whole_for_those_who_load_it_meanwhile(folder: Path, tmp_path: Path) -> None:
    recommender = CatalogueRecommender.load(folder)
    key = recommender._model_key
    recommender.save(tmp_path / "home")
    stop, seen, wrong = threading.Event(), set(), []

    def load() -> None:
        while not stop.is_set():
            try:
                saved = load_catalogue(tmp_path / "home", len(NAMES), key)
                seen.add(len(saved.texts))
                if len(saved.texts) != len(NAMES) + len(saved.vectors):
                    wrong.append(len(saved.vectors))
            except Exception as error:
                wrong.append(error)

    readers = [threading.Thread(target=load) for _ in range(2)]
    for reader in readers:
        reader.start()
    for turn in range(15):
        recommender.add_items({f"X{turn}": {"title": f"tent {turn}"}})
        recommender.save(tmp_path / "home")
    stop.set()
    for reader in readers:
        reader.join(timeout=60)
    assert wrong == []
    assert seen <= set(range(10, 26))
    assert len(load_catalogue(tmp_path / "home", len(NAMES), key).texts) == 25


def test_a_saved_catalogue_belongs_to_its_model(folder: Path, headed: Path, tmp_path: Path) -> None:
    recommender = CatalogueRecommender.load(folder)
    with pytest.raises(UserError, match="holds another model than this catalogue's"):
        recommender.save(headed)
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.txt").touch()
    with pytest.raises(UserError, match="holds something else"):
        recommender.save(tmp_path / "notes")
    home = tmp_path / "home"
    recommender.save(home)
    model = RecformerForSeqRec.from_pretrained(home)
    with torch.no_grad():
        model.item_embedding.weight[0] += 1
    model.save_pretrained(home)
    with pytest.raises(UserError, match="model.safetensors is damaged, or was replaced"):
        CatalogueRecommender.load(home)
    (home / "checksums.json").unlink()
    with pytest.raises(UserError, match="was saved with another model"):
        CatalogueRecommender.load(home)
    with pytest.raises(UserError, match="holds another model"):
        recommender.save(home)
    recommender.save(tmp_path / "other")
    (store,) = (tmp_path / "other").glob("catalogue-*")
    (store / "vectors.bin").write_bytes(b"\1" * (store / "vectors.bin").stat().st_size)
    with pytest.raises(UserError, match=r"saved catalogue is damaged .*catalogue.json"):
        CatalogueRecommender.load(tmp_path / "other")


def test_rows_are_added_without_moving_those_there(folder: Path, monkeypatch) -> None:
    cat = torch.cat
    recommender = CatalogueRecommender.load(folder)
    recommender.add_items({f"X{n}": {"title": f"tent {n}"} for n in range(300)})
    tables = recommender.catalogue.view.tables
    assert list(map(len, tables)) == [8, 2, 256, 44]
    recommender.add_items({f"Y{n}": {"title": f"lamp {n}"} for n in range(600)})
    after = recommender.catalogue.view.tables
    assert list(map(len, after)) == [8, 2, 256, 512, 132]
    assert [t.data_ptr() for t in tables] == [t.data_ptr() for t in after[:4]]
    # Searched piece by piece: no part of the table is copied.
    parts = []
    monkeypatch.setattr(torch, "cat", lambda *args: parts.append(args) or cat(*args))
    rows = Rows(after)
    assert [len(rows[part]) for part in _parts(len(rows), 300, rows.borders)] == [
        *(8, 2, 256, 300, 212, 132)
    ]
    assert parts == []
    monkeypatch.undo()
    vectors = recommender.catalogue.view.at(np.array([10, 909, 310]))
    for vector, text in zip(vectors, ("tent 0", "lamp 599", "lamp 0"), strict=True):
        expected = Truth(folder).vector({"title": text})
        assert torch.allclose(vector, expected, atol=1e-5)


def test_remembered_histories_are_not_read_again(folder: Path, monkeypatch) -> None:
    plain, recommender = CatalogueRecommender.load(folder), CatalogueRecommender.load(folder)
    recommender.remember_users(2)
    encode, read = RecformerForSeqRec.encode, []

    def counted(self, packed):
        read.append(len(packed.cu_seqlens) - 1)
        return encode(self, packed)

    histories = [["B1", "B2"], ["B3"], ["B1", "B2"], [{"title": "lamp tent"}]]
    expected = plain.recommend(histories, k=5)
    monkeypatch.setattr(RecformerForSeqRec, "encode", counted)

    def check(asked: list, count: int) -> None:
        read.clear()
        for answer, number in zip(recommender.recommend([histories[n] for n in asked], k=5), asked):
            assert answer.items == expected[number].items
            assert answer.scores == pytest.approx(expected[number].scores, abs=1e-6)
        assert sum(read) == count

    check([0, 1, 2], 2)  # 0 and 2 are the same
    check([0, 1], 0)
    check([3], 1)  # 0, used least recently, is forgotten
    check([1, 3], 0)
    check([0], 1)
    recommender.update_items({"B2": {"title": "another text"}})
    read.clear()
    recommender.recommend([histories[0]], k=5)
    assert sum(read) == 1


def test_tokens_of_a_row_are_kept_and_of_a_new_text_made(folder: Path, monkeypatch) -> None:
    tokenised: list[int] = []
    of = ItemsInMemory.of.__func__

    def counting(cls: type, items: list, tokenizer: RecformerTokenizer) -> ItemsInMemory:
        tokenised.append(len(items))
        return of(cls, items, tokenizer)

    recommender, plain = (CatalogueRecommender.load(folder) for _ in range(2))
    monkeypatch.setattr(ItemsInMemory, "of", classmethod(counting))
    unknown = {"title": "tent torch"}
    histories = [["B1", "B2"], ["B2", unknown, "N0", "B2"]]
    vectors = recommender.user_vectors(histories)
    assert tokenised == [4]  # B1, B2, N0 and the text that no catalogue knows
    assert torch.equal(recommender.user_vectors(histories), vectors)
    assert torch.equal(recommender.user_vectors([["N0"]]), plain.user_vectors([["N0"]]))
    assert tokenised[1:3] == [1, 0]
    recommender.update_items({"B2": {"title": "rope knife"}})
    plain.update_items({"B2": {"title": "rope knife"}})
    changed = recommender.user_vectors(histories)
    assert torch.equal(changed, plain.user_vectors(histories))
    assert not torch.isclose(changed, vectors).all(dim=1).any()
