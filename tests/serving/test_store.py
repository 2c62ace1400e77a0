"""The database, on SQLite and on PostgreSQL."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from sqlalchemy import text

from recformer.files import UserError
from recformer.serving.store import Base, FeedbackRow, ItemRow, Store, UserRow

NAMES = ["B", "a", "b", "z", "Ä", "日本", "😀"]  # by code points


def item(name: str, comment: str = "", **values: object) -> ItemRow:
    fields = {"is_hidden": False, "categories": [], "timestamp": -5, "labels": None}
    return ItemRow(item_id=name, comment=comment, deleted=False, **(fields | values))


def click(user: str, name: str, time: int, kind: str = "click", value: float = 0.0) -> FeedbackRow:
    return FeedbackRow(
        feedback_type=kind, user_id=user, item_id=name, value=value, timestamp=time, comment=""
    )


@pytest.fixture(params=["sqlite", "postgres"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "sqlite":
        return str(tmp_path / "folder" / "serve.sqlite3")
    return request.getfixturevalue("postgres")


@pytest.fixture
def store(url: str) -> Iterator[Store]:
    found = Store(url)
    with found._engine.begin() as connection:  # one PostgreSQL server serves all tests
        for table in Base.metadata.sorted_tables:
            connection.execute(text(f"DELETE FROM {table.name}"))
    yield found
    found.close()


def test_a_path_is_a_path(tmp_path: Path) -> None:
    path = tmp_path / "a?timeout=1 #b%20" / "serve.sqlite3"
    store = Store(str(path))
    store.put_items([item("a", "first")])
    store.close()
    assert path.stat().st_size > 0
    assert [each.name for each in tmp_path.iterdir()] == [path.parent.name]


def test_items_come_back_as_they_were(store: Store, url: str) -> None:
    labels = {"brand": "Ünï", "sizes": [1, 2.5], "deep": {"er": ["x"]}, "none": None}
    store.put_items(
        [item("a", "first"), item("a", "Zelt 日本 😀", labels=labels, categories=["x"])]
    )
    store.close()
    row = Store(url).item("a")
    assert row is not None
    assert (row.comment, row.labels, row.categories) == ("Zelt 日本 😀", labels, ["x"])
    assert (row.timestamp, row.is_hidden, row.deleted) == (-5, False, False)
    assert store.item("b") is None


def test_pages_follow_the_order_of_code_points(store: Store) -> None:
    store.put_items([item(name) for name in reversed(NAMES)])
    store.put_users([UserRow(user_id=name, labels=None, comment="") for name in NAMES])
    assert sorted(NAMES) == NAMES
    first = [row.item_id for row in store.items_after("", 3)]
    assert first + [row.item_id for row in store.items_after(first[-1], 10)] == NAMES
    assert [row.user_id for row in store.users_after("a", 2)] == ["b", "z"]


def test_feedback_is_ordered_by_time_and_then_arrival(store: Store) -> None:
    store.put_feedback([click("u", "b", 7), click("u", "a", 7), click("u", "c", 3)], False)
    store.put_feedback([click("u", "d", 7), click("v", "a", 1)], False)
    assert [row.item_id for row in store.feedback(user_id="u")] == ["c", "b", "a", "d"]
    assert [row.item_id for row in store.feedback(user_id="u", newest=2)] == ["a", "d"]
    assert [row.item_id for row in store.feedback(user_id="u", until=6)] == ["c"]
    assert [row.user_id for row in store.feedback(item_id="a")] == ["v", "u"]
    assert [row.user_id for row in store.users_after("", 9)] == ["u", "v"]


def test_feedback_that_is_there_stays_or_is_replaced(store: Store) -> None:
    store.put_feedback([click("u", "a", 1, value=1.0), click("u", "a", 2, value=2.0)], False)
    assert [row.value for row in store.feedback()] == [1.0]
    store.put_feedback([click("u", "a", 3, value=3.0)], False)
    assert [row.value for row in store.feedback()] == [1.0]
    store.put_feedback([click("u", "a", 4, value=4.0), click("u", "a", 5, value=5.0)], True)
    assert [(row.value, row.timestamp) for row in store.feedback()] == [(5.0, 5)]


def test_deleting(store: Store) -> None:
    store.put_items([item("a"), item("b")])
    store.put_feedback(
        [click("u", "a", 1), click("u", "b", 2), click("v", "b", 3), click("v", "b", 4, "buy")],
        False,
        [item("b", "must not replace"), item("new")],
    )
    assert [(row.item_id, row.comment) for row in store.items()] == [
        ("a", ""),
        ("b", ""),
        ("new", ""),
    ]
    store.delete_item("a")
    row = store.item("a")
    assert row is not None
    assert row.deleted
    assert store.delete_feedback("v", "b", "buy") == 1
    assert store.delete_feedback("v", "b", "buy") == 0
    store.delete_user("v")
    assert [(row.user_id, row.item_id) for row in store.feedback()] == [("u", "b")]
    assert store.user("v") is None


def test_pages_of_feedback(store: Store) -> None:
    store.put_feedback([click("u", str(i), 9 - i, "ab"[i % 2]) for i in range(5)], False)
    rows = store.feedback_after(0, 2)
    rows += store.feedback_after(rows[-1].number, 9)
    assert [row.item_id for row in rows] == ["0", "1", "2", "3", "4"]
    assert [row.item_id for row in store.feedback_after(0, 9, "b")] == ["1", "3"]


def test_many_writers_lose_nothing(store: Store) -> None:
    def write(writer: int) -> None:
        for i in range(10):
            store.put_feedback([click(f"u{i}", f"{writer}", i)], False, [item(f"{writer}")])

    threads = [threading.Thread(target=write, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(store.feedback()) == 80
    assert len(store.items()) == 8
    assert len(store.users_after("", 99)) == 10


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("mysql://root@localhost/x", "no database of SQLite or PostgreSQL"),
        ("postgresql://u:secret@/x?host=/nowhere", "cannot be used"),
        ("://", "cannot be used"),
    ],
)
def test_a_database_that_cannot_be_used_is_one_line(url: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        Store(url)
    assert "\n" not in str(caught.value)
    assert "secret" not in str(caught.value)


def test_a_file_that_is_no_database_stays_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("my notes, " * 100)
    with pytest.raises(UserError, match="notes.txt cannot be used"):
        Store(str(path))
    assert path.read_text() == "my notes, " * 100


def test_vectors_come_back_as_they_were(store: Store, url: str) -> None:
    vectors = {bytes([i]) * 16: np.array([i, 0.1, -i], np.float32) for i in range(1, 5)}
    store.put_vectors("one", vectors)
    store.put_vectors("other", {b"x": np.zeros(3, np.float32)})
    found = Store(url).vectors("one", [*vectors, b"unknown"])
    assert found.keys() == vectors.keys()
    assert all((found[content] == vectors[content]).all() for content in vectors)
    store.put_vectors("one", {b"\1" * 16: np.ones(3, np.float32)})
    assert store.vectors("one", [b"\1" * 16])[b"\1" * 16].tolist() == [1.0, 1.0, 1.0]
    store.keep_vectors_of({"one": {b"\2" * 16, b"never encoded"}})
    assert store.vectors("one", list(vectors)).keys() == {b"\2" * 16}
    assert store.vectors("other", [b"x"]) == {}
