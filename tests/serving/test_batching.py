"""Requests that wait become one batch."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from recformer.serving.batching import ModelThread


class Busy:
    """Answers with the batch that a question was in; the first call waits to be let go."""

    def __init__(self) -> None:
        self.started, self.go = threading.Event(), threading.Event()
        self.batches: list[tuple[str, list[int]]] = []

    def __call__(self, kind: str, questions: list[int]) -> list[int]:
        self.started.set()
        assert self.go.wait(10)
        self.batches.append((kind, questions))
        if any(question < 0 for question in questions):
            raise ValueError("negative")
        return [question * 10 for question in questions]


def queued(thread: ModelThread, count: int) -> None:
    """Wait until so many are in the queue."""
    for _ in range(1000):
        if len(thread._queue) == count:
            return
        threading.Event().wait(0.005)
    raise AssertionError(f"{len(thread._queue)} wait, not {count}")


def test_what_waits_is_answered_together() -> None:
    busy = Busy()
    thread: ModelThread[str, int, int] = ModelThread(busy, most=3)
    with ThreadPoolExecutor(8) as pool:
        futures = [pool.submit(thread.ask, "a", 0)]
        assert busy.started.wait(10)
        for count, (kind, question) in enumerate([("a", 1), ("b", 2), ("a", 3), ("a", 4)], 1):
            futures.append(pool.submit(thread.ask, kind, question))
            queued(thread, count)
        done = pool.submit(thread.run, lambda: len(busy.batches))
        queued(thread, 5)
        futures.append(pool.submit(thread.ask, "b", 5))
        queued(thread, 6)
        busy.go.set()
        assert [future.result(10) for future in futures] == [0, 10, 20, 30, 40, 50]
        # What is alike overtakes, so that no kind waits for another; calls stand in the queue.
        assert busy.batches == [("a", [0]), ("a", [1, 3, 4]), ("b", [2, 5])]
        assert done.result(10) == 3
    thread.close()


def test_a_wrong_question_fails_alone() -> None:
    busy = Busy()
    thread: ModelThread[str, int, int] = ModelThread(busy, most=8)
    with ThreadPoolExecutor(8) as pool:
        futures = [pool.submit(thread.ask, "a", 0)]
        assert busy.started.wait(10)
        for count, question in enumerate([1, -2, 3], 1):
            futures.append(pool.submit(thread.ask, "a", question))
            queued(thread, count)
        busy.go.set()
        with pytest.raises(ValueError, match="negative"):
            futures[2].result(10)
        assert [futures[i].result(10) for i in (0, 1, 3)] == [0, 10, 30]
    thread.close()


def test_a_closed_thread_finishes_what_waits_and_serves_latecomers() -> None:
    busy = Busy()
    thread: ModelThread[str, int, int] = ModelThread(busy, most=1)
    with ThreadPoolExecutor(8) as pool:
        futures = [pool.submit(thread.ask, "a", 0)]
        assert busy.started.wait(10)
        futures.append(pool.submit(thread.ask, "a", 1))
        queued(thread, 1)
        closing = pool.submit(thread.close)
        busy.go.set()
        closing.result(10)
        assert [future.result(10) for future in futures] == [0, 10]
        assert thread.ask("a", 2) == 20
        assert thread.run(lambda: "late") == "late"
