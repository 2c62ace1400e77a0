"""Lines that cannot be used: the first ends the run, or all are left out and counted."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from recformer.files import UserError


class BadLineError(ValueError):
    """A line that cannot be used.

    Attributes:
        reason: why, in a few words.
        got: what stands there, where that helps.
    """

    def __init__(self, reason: str, got: Any = None) -> None:
        super().__init__(reason)
        self.reason, self.got = reason, got


@dataclass
class BadLines:
    """Unusable lines: the first one ends the run, or all of them are left out and counted.

    Attributes:
        skip: leave bad lines out instead of ending the run.
        reasons: how many lines were left out for which reason.
        first: file, line number and reason of the first few.
    """

    skip: bool = False
    reasons: Counter[str] = field(default_factory=Counter)
    first: list[str] = field(default_factory=list)

    def add(
        self, path: Path, number: int, reason: str, got: Any = None, what: str = "line"
    ) -> None:
        """Note a bad line.

        Args:
            path: the file.
            number: of the line, from 1.
            reason: why it cannot be used, in a few words.
            got: what stands there, where that helps.
            what: "line", or "row", "entry" where the file has no lines.

        Raises:
            UserError: bad lines are not to be skipped.
        """
        said = reason if got is None else f"{reason}, got {_shown(got)}"
        if not self.skip:
            raise UserError(
                f"{path}, {what} {number}: {said}. Mend the file, or pass --skip_bad_lines to "
                f"leave such lines out and count them"
            )
        self.reasons[reason] += 1
        if len(self.first) < 5:
            self.first.append(f"{path.name}, {what} {number}: {said}")

    def why(self) -> str:
        """The commonest reasons and the first line, for the error where nothing is left."""
        if not self.reasons:
            return ""
        counts = ", ".join(f"{number} {why}" for why, number in self.reasons.most_common(3))
        return f" ({counts}; the first: {self.first[0]})"

    def summary(self) -> dict[str, Any]:
        """For dataset.json: how many, why, and where the first ones are."""
        return {
            "total": self.reasons.total(),
            "reasons": dict(self.reasons),
            "first": list(self.first),
        }


def _shown(value: Any) -> str:
    """A value in a message: short, and on one line."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # a number of thousands of digits, a list a mile deep
        return f"a {type(value).__name__} too large to show"
    return text if len(text) <= 60 else f"{text[:57]}…"
