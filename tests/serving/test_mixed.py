"""Many clients add, delete, click, ask and reload while the process is killed: nothing is lost."""

from __future__ import annotations

import random
import signal
import threading
from collections import Counter
from pathlib import Path

import pytest
import requests

from tests.serving.conftest import NAMES
from tests.serving.test_serve_command import Running, running

ALL = 10_000  # more than there will ever be items: an answer holds the whole catalogue


class Client:
    """One client with items and users of its own, so that it knows what must be there.

    Attributes:
        items: titles of its items whose adding was acknowledged, and whose deleting was not.
        clicks: (user, item) of acknowledged feedback.
        open: the item or click of the request that a kill left without an answer.
        sent: requests by method and route.
    """

    def __init__(self, number: int) -> None:
        self.number, self.random = number, random.Random(number)
        self.items: dict[str, str] = {}
        self.clicks: set[tuple[str, str]] = set()
        self.open: set[object] = set()
        self.count = 0
        self.sent: Counter[str] = Counter()
        self.wrong: list[str] = []

    def work(self, address: str, requests_to_do: int) -> None:
        """Send requests until they are done or the service is gone."""
        session = requests.Session()
        try:
            for _ in range(requests_to_do):
                self.step(session, address)
        except requests.RequestException:
            return

    def step(self, session: requests.Session, address: str) -> None:
        choice = self.random.random()
        self.count += 1

        def call(method: str, path: str, json: object = None) -> requests.Response:
            self.sent[f"{method} {'/'.join(path.split('/')[:3])}"] += 1
            answer = session.request(method, address + path, json=json, timeout=60)
            if answer.status_code != 200 and not (answer.status_code == 409 and "reload" in path):
                self.wrong.append(f"{method} {path}: {answer.status_code} {answer.text[:200]}")
            return answer

        if choice < 0.25:
            name = f"C{self.number}-{self.count}"
            title = f"tent {self.random.choice(NAMES)} {self.count}"
            self.open = {name}
            call("POST", "/api/item", {"ItemId": name, "Comment": title})
            self.items[name] = title
        elif choice < 0.35 and self.items:
            name = self.random.choice(list(self.items))
            self.open = {name, *(click for click in self.clicks if click[1] == name)}
            call("DELETE", f"/api/item/{name}")
            del self.items[name]
            self.clicks = {click for click in self.clicks if click[1] != name}
        elif choice < 0.65:
            user = f"U{self.number}-{self.random.randrange(5)}"
            item = self.random.choice([*NAMES, *list(self.items)[-3:]])
            self.open = {(user, item)}
            row = {"FeedbackType": "click", "UserId": user, "ItemId": item}
            call("POST", "/api/feedback", [row])
            self.clicks.add((user, item))
        elif choice < 0.998:
            user = f"U{self.number}-{self.random.randrange(5)}"
            found = call("GET", f"/api/recommend/{user}?n={ALL}").json()
            done = {item for who, item in self.clicks if who == user}
            missing = (set(self.items) | set(NAMES)) - done - set(found)
            if missing or done & set(found):
                self.wrong.append(f"{user}: {sorted(missing)} missing, {done & set(found)} offered")
        else:
            call("POST", "/v1/reload", {})
        self.open = set()

    def check(self, items: dict[str, str], clicks: set[tuple[str, str]]) -> None:
        """Compare what was acknowledged with what is there; take over what was open."""
        mine = {name: text for name, text in items.items() if name.startswith(f"C{self.number}-")}
        for name in set(mine) ^ set(self.items):
            assert name in self.open, name
        for name in set(mine) & set(self.items):
            assert mine[name] == self.items[name]
        my_clicks = {click for click in clicks if click[0].startswith(f"U{self.number}-")}
        for click in my_clicks ^ self.clicks:
            assert click in self.open, click
        self.items, self.clicks, self.open = mine, my_clicks, set()


def everything(service: Running, path: str, key: str) -> list[dict]:
    """All pages of a list."""
    found, cursor = [], ""
    while True:
        page = service.call("GET", path, params={"n": 1000, "cursor": cursor}).json()
        found += page[key]
        cursor = page["Cursor"]
        if not cursor:
            return found


def check(crew: list[Client], service: Running) -> None:
    """Hold what is there against what every client knows."""
    items = {row["ItemId"]: row["Comment"] for row in everything(service, "/api/items", "Items")}
    rows = everything(service, "/api/feedback", "Feedback")
    for client in crew:
        client.check(items, {(row["UserId"], row["ItemId"]) for row in rows})


def mixed(folder: Path, work: Path, total: int, kills: int, clients: int = 8) -> Counter[str]:
    """Send `total` requests of many kinds with kills between; returns those sent, by kind."""
    crew = [Client(number) for number in range(clients)]
    for turn in range(kills + 1):
        with running(folder, work, "--max_k", str(ALL)) as service:
            check(crew, service)
            share = total // (kills + 1) // clients
            threads = [
                threading.Thread(target=client.work, args=(service.address, share))
                for client in crew
            ]
            target = sum(client.count for client in crew) + share * clients * 9 // 10
            for thread in threads:
                thread.start()
            if turn < kills:
                while sum(client.count for client in crew) < target:
                    threads[0].join(0.02)
                assert service.stop(signal.SIGKILL) == -signal.SIGKILL
            for thread in threads:
                thread.join()
            if turn == kills:
                check(crew, service)
                assert service.stop(signal.SIGTERM) == 0
    assert [wrong for client in crew for wrong in client.wrong] == []
    return sum((client.sent for client in crew), Counter())


def test_nothing_acknowledged_is_lost(model_folder: Path, tmp_path: Path) -> None:
    assert mixed(model_folder, tmp_path, total=240, kills=1).total() > 200


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_nothing_acknowledged_is_lost_in_20000_requests(model_folder: Path, tmp_path: Path) -> None:
    sent = mixed(model_folder, tmp_path, total=20_800, kills=4)
    print(sent)
    assert sent.total() >= 19_000
    assert min(sent.values()) >= 20
