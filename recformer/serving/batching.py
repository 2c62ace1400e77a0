"""One thread that computes: requests that wait while it is busy become one batch.

A batch is never waited for: who asks alone is answered alone. All work of a model goes through its
thread, so that two computations do not fight for the same cores.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Hashable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

Kind = TypeVar("Kind", bound=Hashable)
Question = TypeVar("Question")
Answer = TypeVar("Answer")
Result = TypeVar("Result")


@dataclass
class _Waiting:
    """Work in the queue: a question of a kind, or a call of its own."""

    work: Any
    kind: Any = None
    call: bool = False
    future: Future = field(default_factory=Future)


class ModelThread(Generic[Kind, Question, Answer]):
    """Answers questions in batches, and does other work between them.

    Args:
        answer: of a kind and some questions of it: their answers, in order.
        most: questions in a batch; 1 answers each alone.
        name: of the thread.
    """

    def __init__(
        self,
        answer: Callable[[Kind, list[Question]], list[Answer]],
        most: int,
        name: str = "model",
    ) -> None:
        self._answer, self._most = answer, most
        self._queue: deque[_Waiting] = deque()
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def ask(self, kind: Kind, question: Question) -> Answer:
        """The answer, when it is there; questions of one kind may be answered together."""
        return self._wait(_Waiting(question, kind))

    def run(self, function: Callable[[], Result]) -> Result:
        """The result of `function`, called by the thread."""
        return self._wait(_Waiting(function, call=True))

    def close(self) -> None:
        """End the thread when all that waits is done; later work is done by who asks for it."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    def _wait(self, waiting: _Waiting) -> Any:
        with self._changed:
            closed = self._closed
            if not closed:
                self._queue.append(waiting)
                self._changed.notify()
        if closed:  # asked of a model that has just been replaced
            self._do([waiting])
        return waiting.future.result()

    def _run(self) -> None:
        while True:
            with self._changed:
                while not self._queue and not self._closed:
                    self._changed.wait()
                if not self._queue:
                    return
                batch = self._next()
            self._do(batch)

    def _next(self) -> list[_Waiting]:
        """The oldest, and with a question those that can be answered with it."""
        first = self._queue.popleft()
        if first.call:
            return [first]
        batch, others = [first], deque[_Waiting]()
        while self._queue and len(batch) < self._most:
            waiting = self._queue.popleft()
            alike = not waiting.call and waiting.kind == first.kind
            (batch if alike else others).append(waiting)
        self._queue.extendleft(reversed(others))
        return batch

    def _do(self, batch: list[_Waiting]) -> None:
        try:
            if batch[0].call:
                results = [batch[0].work()]
            else:
                results = self._answer(batch[0].kind, [waiting.work for waiting in batch])
            for waiting, result in zip(batch, results, strict=True):
                waiting.future.set_result(result)
        except Exception as error:  # the error of a question is its own: alone, each has its own
            if len(batch) > 1:
                for waiting in batch:
                    self._do([waiting])
            else:
                batch[0].future.set_exception(error)
