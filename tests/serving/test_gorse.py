"""Gorse's own client against the service, and what its API says beyond the client."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import gorse
import pytest
from starlette.testclient import TestClient

from recformer.serving.app import create_app
from recformer.serving.service import Service
from tests.serving.conftest import KEY, NAMES, TEXTS, MakeService, client_of, listening


@pytest.fixture
def gorse_client(service: Service) -> Iterator[gorse.Gorse]:
    with listening(create_app(service, KEY)) as address:
        yield gorse.Gorse(address, KEY, timeout=30)


def test_the_life_of_an_item(gorse_client: gorse.Gorse) -> None:
    item = {
        "ItemId": "100",
        "IsHidden": False,
        "Labels": {"brand": "Acme"},
        "Categories": ["Camping", "Light"],
        "Timestamp": "2022-02-24T00:00:00Z",
        "Comment": "lamp torch",
    }
    assert gorse_client.insert_item(item) == {"RowAffected": 1}
    assert gorse_client.get_item("100") == item
    patched = {"RowAffected": 1}
    assert gorse_client.update_item("100", is_hidden=True, comment="tent") == patched
    assert gorse_client.get_item("100") == item | {"IsHidden": True, "Comment": "tent"}
    assert gorse_client.delete_item("100") == {"RowAffected": 1}
    with pytest.raises(gorse.GorseException) as caught:
        gorse_client.get_item("100")
    assert caught.value.status_code == 404


def test_pages_hold_items_of_the_folder_and_of_the_database(gorse_client: gorse.Gorse) -> None:
    gorse_client.insert_item({"ItemId": "A0", "Comment": "tent"})
    gorse_client.insert_item({"ItemId": "B3", "Comment": "lamp lamp"})
    gorse_client.insert_item({"ItemId": "Z", "Comment": "rope"})
    gorse_client.delete_item("B2")
    found, cursor = [], ""
    while True:
        page, cursor = gorse_client.get_items(3, cursor)
        found += page
        if not cursor:
            break
    expected = ["A0", *(name for name in NAMES if name != "B2"), "Z"]
    assert [item["ItemId"] for item in found] == expected
    assert found[expected.index("B3")]["Comment"] == "lamp lamp"
    assert found[expected.index("B4")] == {
        "ItemId": "B4",
        "IsHidden": False,
        "Categories": ["Camping"],
        "Timestamp": "0001-01-01T00:00:00Z",
        "Labels": {"brand": "Borex"},
        "Comment": "boots",
    }
    assert [item["ItemId"] for item in gorse_client.search_items("lam", 9)] == ["B3", "B1"]


def test_users(gorse_client: gorse.Gorse) -> None:
    bob = {"UserId": "bob", "Labels": ["a", "b"], "Comment": "first"}
    assert gorse_client.insert_user(bob) == {"RowAffected": 1}
    assert gorse_client.insert_users([{"UserId": "al"}, {"UserId": "cy"}]) == {"RowAffected": 2}
    assert gorse_client.get_user("bob") == bob
    page, cursor = gorse_client.get_users(2)
    assert ([user["UserId"] for user in page], cursor) == (["al", "bob"], "bob")
    page, cursor = gorse_client.get_users(2, cursor)
    assert ([user["UserId"] for user in page], cursor) == (["cy"], "")
    assert gorse_client.delete_user("bob") == {"RowAffected": 1}
    with pytest.raises(gorse.GorseException) as caught:
        gorse_client.get_user("bob")
    assert caught.value.status_code == 404


def test_feedback_steers_recommendations_at_once(
    gorse_client: gorse.Gorse, service: Service
) -> None:
    newcomer = gorse_client.get_recommend("ann", n=3)
    assert [score.id for score in newcomer] == ["B3", "B0", "B1"]  # as often as they were bought
    assert [score.score for score in newcomer] == [7, 5, 5]
    inserted = gorse_client.insert_feedback("click", "ann", "B2", "2022-02-24T00:00:02Z", 1.5)
    assert inserted == {"RowAffected": 1}
    gorse_client.insert_feedbacks(
        [
            {
                "FeedbackType": "click",
                "UserId": "ann",
                "ItemId": "B5",
                "Timestamp": "2022-02-24T00:00:01Z",
            }
        ]
    )
    (expected,) = service.main.recommender.recommend([["B5", "B2"]], 6, filter_seen=True)
    found = gorse_client.get_recommend("ann", n=6)
    assert [score.id for score in found] == expected.items
    assert [score.score for score in found] == pytest.approx(expected.scores)
    rest = gorse_client.get_recommend("ann", n=2, offset=1)
    assert [score.id for score in rest] == expected.items[1:3]
    (first, second) = gorse_client.list_feedbacks("click", "ann")
    assert (first["ItemId"], second["ItemId"], second["Value"]) == ("B5", "B2", 1.5)
    assert second["Timestamp"] == "2022-02-24T00:00:02Z"
    assert gorse_client.delete_feedback("ann", "B2") == {"RowAffected": 1}
    (expected,) = service.main.recommender.recommend([["B5"]], 6, filter_seen=True)
    assert [score.id for score in gorse_client.get_recommend("ann", n=6)] == expected.items


def test_sessions_are_ordered_by_their_times(gorse_client: gorse.Gorse, service: Service) -> None:
    def step(name: str, second: int) -> dict[str, str]:
        return {
            "FeedbackType": "click",
            "UserId": "",
            "ItemId": name,
            "Timestamp": f"2022-02-24T00:00:0{second}Z",
        }

    (expected,) = service.main.recommender.recommend([["B1", "B6"]], 4, filter_seen=True)
    found = gorse_client.session_recommend([step("B6", 3), step("B1", 2)], n=4)
    assert [score["Id"] for score in found] == expected.items
    assert gorse_client.get_feedbacks(10) == ([], "")


def test_neighbours(gorse_client: gorse.Gorse, service: Service) -> None:
    expected = service.main.recommender.similar_items("B1", 3)
    found = gorse_client.get_neighbors("B1", n=2, offset=1)
    assert [score["Id"] for score in found] == expected.items[1:]
    assert [score["Score"] for score in found] == pytest.approx(expected.scores[1:])
    with pytest.raises(gorse.GorseException) as caught:
        gorse_client.get_neighbors("nothing")
    assert caught.value.status_code == 404


def test_another_key_is_refused(service: Service) -> None:
    with listening(create_app(service, KEY)) as address:
        with pytest.raises(gorse.GorseException) as caught:
            gorse.Gorse(address, "another key").get_items(1)
        assert caught.value.status_code == 401


def test_what_was_shown_is_not_offered_again_nor_read(client: TestClient, service: Service) -> None:
    client.post("/api/feedback", json=[_feedback("click", "eve", "B2")]).raise_for_status()
    written = {"n": 2, "write-back-type": "read"}
    first = client.get("/api/recommend/eve", params=written).json()
    (expected,) = service.main.recommender.recommend([["B2"]], 8, filter_seen=True)
    assert first == expected.items[:2]
    assert client.get("/api/recommend/eve", params={"n": 9}).json() == expected.items[2:]
    later = {"n": 1, "write-back-type": "read", "write-back-delay": "24h0m0s"}
    assert client.get("/api/recommend/eve", params=later).json() == expected.items[2:3]
    assert client.get("/api/recommend/eve", params={"n": 9}).json() == expected.items[2:]
    client.put("/api/feedback", json=[_feedback("buy", "eve", first[1])]).raise_for_status()
    (expected,) = service.main.recommender.recommend([["B2", first[1]]], 8, filter_seen=True)
    kept = [name for name in expected.items if name != first[0]]
    assert client.get("/api/recommend/eve", params={"n": 9}).json() == kept


def _feedback(kind: str, user: str, item: str) -> dict[str, str]:
    return {"FeedbackType": kind, "UserId": user, "ItemId": item}


def test_hidden_items_are_read_but_not_offered(client: TestClient, service: Service) -> None:
    everything = client.get("/api/recommend/x", params={"n": 99}).json()
    assert sorted(everything) == NAMES
    client.patch("/api/item/B3", json={"IsHidden": True}).raise_for_status()
    assert client.get("/api/recommend/x", params={"n": 99}).json() == [
        name for name in everything if name != "B3"
    ]
    (expected,) = service.main.recommender.recommend([["B3"]], 9, filter_seen=True)
    session = [{"ItemId": "B3", "FeedbackType": "click"}]
    found = client.post("/api/session/recommend", params={"n": 9}, json=session).json()
    assert [score["Id"] for score in found] == expected.items
    client.patch("/api/item/B3", json={"IsHidden": False}).raise_for_status()
    assert client.get("/api/recommend/x", params={"n": 99}).json() == everything


def test_categories_filter(client: TestClient) -> None:
    client.patch("/api/item/B1", json={"Categories": ["Camping", "Light"]}).raise_for_status()
    client.put("/api/item/B6/category/Light").raise_for_status()
    assert client.get("/api/item/B6").json()["Categories"] == ["Camping", "Light"]
    found = client.get("/api/recommend/new/Light").json()
    assert found == ["B1", "B6"]
    both = {"category": ["Light", "Camping"]}
    assert client.get("/api/recommend/new", params=both).json() == ["B1", "B6"]
    assert client.get("/api/recommend/new/Nothing").json() == []
    assert [score["Id"] for score in client.get("/api/popular/Light").json()] == ["B1", "B6"]
    assert [s["Id"] for s in client.get("/api/item/B1/neighbors/Light").json()] == ["B6"]
    client.delete("/api/item/B6/category/Light").raise_for_status()
    assert client.get("/api/recommend/new/Light").json() == ["B1"]


def test_everything_is_there_after_a_restart(make_service: MakeService) -> None:
    service = make_service()
    client = client_of(service)
    client.post("/api/items", json=[{"ItemId": "N", "Comment": "torch map"}]).raise_for_status()
    client.patch("/api/item/B1", json={"Comment": "knife"}).raise_for_status()
    client.patch("/api/item/B4", json={"IsHidden": True}).raise_for_status()
    client.delete("/api/item/B0").raise_for_status()
    client.post("/api/feedback", json=[_feedback("click", "u", "N")]).raise_for_status()
    answer = client.get("/api/recommend/u", params={"n": 9}, headers={"X-API-Version": "2"}).json()
    assert {score["Id"] for score in answer} == set(NAMES) - {"B0", "B4"}
    items = client.get("/api/items", params={"n": 99}).json()
    service.close()

    again = client_of(make_service())
    assert again.get("/api/items", params={"n": 99}).json() == items
    after = again.get("/api/recommend/u", params={"n": 9}, headers={"X-API-Version": "2"}).json()
    assert [score["Id"] for score in after] == [score["Id"] for score in answer]
    scores = [score["Score"] for score in answer]
    assert [score["Score"] for score in after] == pytest.approx(scores, abs=1e-6)


def test_feedback_on_an_unknown_item_makes_it_and_waits_for_its_text(client: TestClient) -> None:
    client.post("/api/feedback", json=[_feedback("click", "u", "later")]).raise_for_status()
    assert client.get("/api/item/later").json()["Comment"] == ""
    assert "later" not in client.get("/api/recommend/x", params={"n": 99}).json()
    assert client.get("/api/item/later/neighbors").json() == []
    client.patch("/api/item/later", json={"Comment": "tent"}).raise_for_status()
    assert "later" in client.get("/api/recommend/x", params={"n": 99}).json()
    assert client.get("/api/item/B0").json()["Comment"] == "tent"  # of the folder's own


@pytest.mark.parametrize(
    ("method", "path", "json", "said"),
    [
        ("POST", "/api/item", {"ItemId": ""}, "is no name"),
        ("POST", "/api/item", {"ItemId": "a/b"}, "without slashes"),
        ("POST", "/api/item", {"ItemId": "a", "Timestamp": "soon"}, "expected ISO 8601"),
        ("POST", "/api/item", {"ItemId": "a", "Labels": ["price", 100]}, "texts alone or numbers"),
        ("POST", "/api/items", {"ItemId": "a"}, "valid list"),
        ("POST", "/api/feedback", [{"ItemId": "a"}], "Field required"),
        ("GET", "/api/items?n=-1", None, "greater than or equal to 0"),
        ("GET", "/api/items?n=10001", None, "at most 10000"),
        ("GET", "/api/recommend/u?n=600&offset=600", None, "at most 1000"),
        ("GET", "/api/recommend/u?write-back-delay=1y", None, "no duration"),
        ("GET", "/api/recommend/u?write-back-type=a/b", None, "is no name"),
        ("GET", "/api/feedback?cursor=abc", None, "no cursor"),
    ],
)
def test_bad_requests_are_told_in_a_line(
    client: TestClient, method: str, path: str, json: object, said: str
) -> None:
    answer = client.request(method, path, json=json)
    assert answer.status_code == 400
    assert said in answer.json()["detail"]
    assert client.get("/api/feedback").json() == {"Cursor": "", "Feedback": []}


def test_texts_that_no_database_takes_are_refused(client: TestClient) -> None:
    for bad in ('"\\ud800"', '"a\\u0000b"', '{"x": "\\ud800"}', "NaN", '{"n": 1e999}'):
        body = f'{{"ItemId": "a", "Labels": {bad}}}'
        answer = client.post(
            "/api/item", content=body, headers={"Content-Type": "application/json"}
        )
        assert answer.status_code == 400, bad
    deep = "[" * 100_000
    answer = client.post("/api/item", content=deep, headers={"Content-Type": "application/json"})
    assert answer.status_code == 400
    assert client.get("/api/item/a").status_code == 404


def test_an_item_without_text_keeps_its_learned_vector(
    make_service: MakeService, model_folder: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(model_folder, tmp_path / "m"))
    texts = {name: item for name, item in TEXTS.items() if name != "B6"}
    (folder / "meta_data.json").write_text(json.dumps(texts))
    client = client_of(make_service(folder))
    everything = client.get("/api/recommend/x", params={"n": 99}).json()
    assert "B6" in everything
    client.patch("/api/item/B6", json={"IsHidden": True}).raise_for_status()
    assert "B6" not in client.get("/api/recommend/x", params={"n": 99}).json()
    client.patch("/api/item/B6", json={"IsHidden": False}).raise_for_status()
    assert client.get("/api/recommend/x", params={"n": 99}).json() == everything
