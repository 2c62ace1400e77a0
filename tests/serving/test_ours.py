"""Routes under /v1, reloading, metrics."""

from __future__ import annotations

import gc
import json
import shutil
import threading
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from starlette.testclient import TestClient

from recformer.data.items import ItemsInMemory
from recformer.data.processed import Sequences, write_processed
from recformer.models import RecformerForSeqRec
from recformer.recommendation import CatalogueRecommender, reading
from recformer.serving.app import create_app
from recformer.serving.examples import ExampleUsers
from recformer.serving.metrics import Metrics
from recformer.serving.served import Filters, Question, Served
from recformer.serving.service import BusyError, Service
from tests.serving.conftest import NAMES, TEXTS, MakeService, client_of, make_model


def ask(client: TestClient, path: str, **body: object) -> dict:
    answer = client.post(f"/v1/{path}", json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()


def names(answer: dict) -> list[str]:
    return [item["item"] for item in answer["items"]]


def test_histories_of_names_and_texts(client: TestClient, service: Service) -> None:
    history = ["B1", {"title": "torch map", "brand": "Acme"}, "unknown"]
    (expected,) = service.main.recommender.recommend([history], 4, filter_seen=True)
    answer = ask(client, "recommend", history=history, k=4)
    assert names(answer) == expected.items
    scores = [item["score"] for item in answer["items"]]
    assert scores == pytest.approx(expected.scores, abs=1e-6)
    assert (answer["num_unknown"], answer["fallback"], answer["model"]) == (1, None, "main")
    assert answer["items"][0]["attributes"] == TEXTS[expected.items[0]]
    assert answer["items"][0]["title"] == TEXTS[expected.items[0]]["title"]
    empty = ask(client, "recommend", history=["unknown"], k=2)
    assert (names(empty), empty["fallback"]) == (["B3", "B0"], "popular")


def test_filters(client: TestClient) -> None:
    everything = names(ask(client, "recommend", history=["B1"], k=50, filter_seen=False))
    assert sorted(everything) == NAMES
    acme = {name for name in NAMES if TEXTS[name]["brand"] == "Acme"}
    found = ask(client, "recommend", history=["B1"], k=50, where={"brand": ["Acme"]})
    assert names(found) == [name for name in everything if name in acme - {"B1"}]
    found = ask(client, "recommend", history=["B1"], k=2, blocked=everything[:3])
    assert names(found) == [name for name in everything if name not in (*everything[:3], "B1")][:2]
    found = ask(client, "recommend", history=["B1"], k=9, allowed=["B7", "B2", "nothing"])
    assert set(names(found)) == {"B7", "B2"}
    for wrong in ({"where": {"colour": ["red"]}}, {"allowed": ["nothing"]}, {"k": 0}):
        answer = client.post("/v1/recommend", json={"history": ["B1"], **wrong})
        assert answer.status_code == 400, wrong
        assert "\n" not in answer.json()["detail"]


def test_diversity(client: TestClient, service: Service) -> None:
    client.patch("/api/item/B6", json={"IsHidden": True}).raise_for_status()
    for diversity in (0.5, 1.0):
        (expected,) = service.main.recommender.recommend(
            [["B1"]], 4, filter_seen=True, blocked=["B2", "B6"], diversity=diversity
        )
        answer = ask(client, "recommend", history=["B1"], k=4, blocked=["B2"], diversity=diversity)
        assert names(answer) == expected.items


def test_similar_items_by_name_and_by_text(client: TestClient, service: Service) -> None:
    (first, *_) = service.main.recommender.similar_items("B1", 3).items
    assert names(ask(client, "similar", item="B1", k=3))[0] == first
    expected = service.main.recommender.similar_items({"title": "lamp torch"}, 3)
    assert names(ask(client, "similar", item={"title": "lamp torch"}, k=3)) == expected.items
    assert client.post("/v1/similar", json={"item": "nothing"}).status_code == 404


def test_bfloat16_is_near(model_folder: Path) -> None:
    exact, fast = (Served(model_folder, "main", Metrics(), bf16=bf16) for bf16 in (False, True))
    question = Question(["B1", "B6", {"title": "torch map"}], 8)
    left, right = (served.recommend(question, Filters()) for served in (exact, fast))
    other = dict(zip(right.items, right.scores, strict=True))
    for name, score in zip(left.items, left.scores, strict=True):
        assert other[name] == pytest.approx(score, abs=0.02)
    assert left.scores != right.scores
    for served in (exact, fast):
        served.close()


def test_a_model_loaded_later_has_as_many_cores(service: Service) -> None:
    """The thread that loads it may have one: threads of a model set torch's number."""
    assert service.main.cores == service.cores
    service.cores = 3
    seen = weakref.ref(service.main)
    assert service.reload("main").cores == 3
    gc.collect()
    assert seen() is None  # the model before is let go
    histories = [["B1"], ["B2", "B6"], ["B3"], ["B7"]]
    questions = [Question(history, 3) for history in histories]
    answers = service.main._answers(Filters(), questions)
    expected = service.main.recommender.recommend(histories, 3)
    for answer, other in zip(answers, expected, strict=True):
        assert answer.items == other.items


def test_search(client: TestClient) -> None:
    def found(q: str) -> list[str]:
        return [item["item"] for item in client.get("/v1/search", params={"q": q}).json()["items"]]

    assert found("stov") == ["B2"]
    assert found("ACME lamp") == ["B1"]
    assert found("acme") == ["B1", "B3", "B5", "B7"]
    assert found("lamp stove") == []
    for odd in ("", '"', "*", "NOT", "a OR b", "title:x", "(", "lamp'; DROP TABLE texts"):
        assert found(odd) == []
    client.post("/api/item", json={"ItemId": "N", "Comment": "Café-Lampe"}).raise_for_status()
    assert found("cafe lam") == ["N"]
    client.patch("/api/item/N", json={"Comment": "Becher"}).raise_for_status()
    assert (found("cafe"), found("becher")) == ([], ["N"])
    client.delete("/api/item/N").raise_for_status()
    assert found("becher") == []


def test_explanations_add_up(client: TestClient, service: Service) -> None:
    history = ["B1", {"title": "torch map"}, "B4"]
    answer = ask(client, "explain", history=history, item="B6")
    assert [part["item"] for part in answer["history"]] == history
    assert [part["attribute"] for part in answer["attributes"]] == ["title", "brand", "category"]
    for parts in ("history", "attributes"):
        total = sum(part["carries"] for part in answer[parts]) + answer[f"{parts}_remainder"]
        assert total == pytest.approx(answer["score"])
    assert "torch" in answer["sentence"]
    assert client.post("/v1/explain", json={"history": ["B1"], "item": "?"}).status_code == 404
    assert client.post("/v1/explain", json={"history": [], "item": "B1"}).status_code == 400


def test_reasons_are_what_the_score_loses(client: TestClient, service: Service) -> None:
    history = ["B1", {"title": "torch map"}, "B4"]
    answer = ask(client, "reasons", history=history, items=["B6", "B2", "nothing"])

    def score(entries: list, name: str) -> float:
        (found,) = service.main.recommender.recommend([entries], 1, allowed=[name])
        return found.scores[0]

    assert [reason["item"] for reason in answer["reasons"]] == ["B6", "B2"]
    for reason in answer["reasons"]:
        whole = score(history, reason["item"])
        carried = [
            whole - score([*history[:i], *history[i + 1 :]], reason["item"]) for i in range(3)
        ]
        best = max(range(3), key=carried.__getitem__)
        assert reason["because"] == ["lamp", "torch map", "boots"][best]
        assert reason["carries"] == pytest.approx(carried[best], abs=1e-5)


def test_test_users(service: Service, tmp_path: Path) -> None:
    def rows(*lists: list[int]) -> Sequences:
        return Sequences.from_lists(lists)

    write_processed(
        tmp_path / "data",
        train=rows([0, 1], [2, 3]),
        val=rows([2], []),
        test=rows([3], [4]),
        user_names=["u0", "u1"],
        asins=[*NAMES],
        meta=TEXTS,
        dataset={},
    )
    users = ExampleUsers(tmp_path / "data")
    client = TestClient(create_app(service, test_users=users), "http://localhost")
    assert client.get("/v1/facts").json()["test_users"] == 2
    first = client.get("/v1/test_users/0").json()
    assert [item["item"] for item in first["history"]] == ["B0", "B1", "B2"]
    assert first["target"]["item"] == "B3"
    assert client.get("/v1/test_users/2").status_code == 404
    assert client.get("/v1/test_users/-1").status_code == 400
    assert client.get("/v1/test_users/" + "9" * 30).status_code == 404


def test_two_models_beside_each_other(
    make_service: MakeService, model_folder: Path, tmp_path: Path
) -> None:
    other = make_model(tmp_path / "other" / "best_model", seed=2)
    client = client_of(make_service(model_folder, other))
    facts = client.get("/v1/facts").json()
    labels = [(model["name"], model["folder"]) for model in facts["models"]]
    assert labels[1] == ("beside", "other/best_model")
    client.post("/api/item", json={"ItemId": "N", "Comment": "torch map"}).raise_for_status()
    for model, folder in (("main", model_folder), ("beside", other)):
        alone = CatalogueRecommender.load(folder)
        alone.add_items({"N": {"title": "torch map"}})
        (expected,) = alone.recommend([["B1", "N"]], 5, filter_seen=True)
        answer = ask(client, "recommend", history=["B1", "N"], k=5, model=model)
        assert (names(answer), answer["model"]) == (expected.items, model)
    assert ask(client, "reload", model="beside")["items"] == 9
    alone_client = client_of(make_service())
    assert alone_client.post("/v1/reload", json={"model": "beside"}).status_code == 400


def test_a_model_is_replaced_without_a_failed_request(
    make_service: MakeService, model_folder: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(model_folder, tmp_path / "live"))
    service = make_service(folder)
    client = client_of(service)
    client.post("/api/item", json={"ItemId": "N", "Comment": "torch map"}).raise_for_status()
    client.delete("/api/item/B7").raise_for_status()
    grown = TEXTS | {"NEW": {"title": "lamp rope"}}
    statuses: list[int] = []
    done = threading.Event()

    def keep_asking() -> None:
        asking = client_of(service)
        while not done.is_set():
            answer = asking.post("/v1/recommend", json={"history": ["B1", "N"], "k": 3})
            statuses.append(answer.status_code)

    threads = [threading.Thread(target=keep_asking) for _ in range(3)]
    for thread in threads:
        thread.start()
    try:
        for turn in range(3):
            (folder / "meta_data.json").write_text(json.dumps(grown if turn % 2 == 0 else TEXTS))
            version = ask(client, "reload")["version"]
            assert version == service.main.version
    finally:
        done.set()
        for thread in threads:
            thread.join()
    assert set(statuses) == {200}
    assert len(statuses) > 3
    everything = names(ask(client, "recommend", history=[], k=50))
    assert set(everything) == (set(NAMES) | {"N", "NEW"}) - {"B7"}


def test_changes_while_a_model_is_loaded_are_taken_over(
    make_service: MakeService, monkeypatch: pytest.MonkeyPatch
) -> None:
    service = make_service()
    client = client_of(service)
    load = service._load

    def slow_load(name: str) -> object:
        served = load(name)
        client.post("/api/item", json={"ItemId": "N", "Comment": "torch map"}).raise_for_status()
        client.delete("/api/item/B2").raise_for_status()
        assert client.post("/v1/reload", json={}).status_code == 409
        with pytest.raises(BusyError):
            service.reload("main")
        return served

    monkeypatch.setattr(service, "_load", slow_load)
    ask(client, "reload")
    assert "N" in service.main.recommender
    assert "B2" not in service.main.recommender


def test_a_folder_that_cannot_be_loaded_changes_nothing(
    make_service: MakeService, model_folder: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(model_folder, tmp_path / "live"))
    client = client_of(make_service(folder))
    before = ask(client, "recommend", history=["B1"], k=5)
    (folder / "meta_data.json").write_text("{")
    answer = client.post("/v1/reload", json={})
    assert answer.status_code == 400
    assert "not valid JSON" in answer.json()["detail"]
    assert ask(client, "recommend", history=["B1"], k=5) == before
    assert client.get("/ready").status_code == 200


def test_figures_of_the_service(client: TestClient) -> None:
    ask(client, "recommend", history=["B1"])
    ask(client, "recommend", history=[])
    client.post("/api/item", json={"ItemId": "N", "Comment": "tent"}).raise_for_status()
    client.get("/api/nothing/here")
    text = client.get("/metrics").text
    for line in (
        'recformer_batch_size_count{model="main"} 2.0',
        'recformer_catalogue_items{model="main"} 9.0',
        'recformer_fallbacks_total{kind="popular",model="main"} 1.0',
        'recformer_request_seconds_count{method="POST",route="/v1/recommend",status="200"} 2.0',
        'recformer_request_seconds_count{method="GET",route="other",status="404"} 1.0',
    ):
        assert line in text.splitlines()


def test_ready_says_when_the_service_stops_or_the_database_is_gone(
    client: TestClient, service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert client.get("/ready").status_code == 200
    service.stopping = True
    assert client.get("/ready").status_code == 503
    assert client.get("/health").status_code == 200
    service.stopping = False
    service.store._engine.dispose()
    monkeypatch.setattr(service.store, "_engine", _broken_engine())
    answer = client.get("/ready")
    assert (answer.status_code, answer.json()["detail"]) == (503, "the database does not answer")


def _broken_engine() -> object:
    from sqlalchemy import create_engine

    return create_engine("sqlite:////nowhere/at/all.sqlite3")


def test_a_restart_encodes_no_text_again(
    make_service: MakeService, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoded: list[int] = []
    encode = reading.Sequences.item_vectors

    def counting(
        self: reading.Sequences, store: ItemsInMemory, cache_dir: object = None
    ) -> torch.Tensor:
        encoded.append(len(store))
        return encode(self, store)

    monkeypatch.setattr(reading.Sequences, "item_vectors", counting)

    def added(service: Service) -> list[list[float]]:
        catalogue = service.main.recommender.catalogue
        rows = [catalogue.row_of[f"new{number}"] for number in range(3)]
        return catalogue.view.at(np.array(rows)).tolist()

    first = make_service()
    client = client_of(first)
    for number, title in enumerate(("tent map", "lamp rope", "stove boots")):
        client.post("/api/item", json={"ItemId": f"new{number}", "Comment": title})
    assert encoded == [1, 1, 1]
    vectors = added(first)

    second = make_service()  # of another process, after a restart
    assert added(second) == vectors
    assert encoded == [1, 1, 1]
    client_of(second).patch("/api/item/new1", json={"Comment": "lamp knife"})
    assert encoded == [1, 1, 1, 1]
    changed = added(second)
    assert (changed[0], changed[2]) == (vectors[0], vectors[2])
    assert changed[1] != vectors[1]
    assert added(make_service()) == changed
    assert encoded == [1, 1, 1, 1]

    folder = make_model(tmp_path / "other")
    model = RecformerForSeqRec.from_pretrained(folder)
    model.longformer.embeddings.word_embeddings.weight.data *= 2
    model.save_pretrained(folder)
    other = make_service(folder)  # another encoder
    assert encoded[4:] == [3]
    assert added(other) != changed
