"""Test users of a processed folder, to see what a model says beside what really came next."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from recformer.data.processed import EvalExamples, ProcessedFolder


@dataclass(frozen=True)
class ExampleUser:
    """A user of the test split.

    Attributes:
        history: names of the items before the last, oldest first.
        target: the last one.
    """

    history: list[str]
    target: str


class ExampleUsers:
    """Those of a processed folder, by number."""

    def __init__(self, folder: Path) -> None:
        processed = ProcessedFolder.load(folder)
        self._names = processed.asins
        self._examples: EvalExamples = processed.eval_examples("test")

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, number: int) -> ExampleUser:
        history = [self._names[item] for item in self._examples.histories[number].tolist()]
        return ExampleUser(history, self._names[int(self._examples.targets[number])])
