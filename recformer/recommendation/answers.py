"""Questions to a recommender, and its answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any

from recformer.files import UserError
from recformer.tokenization import Item

# A name, or an item that no catalogue needs to know, by its attributes.
HistoryItem = str | int | Item

NAMED = 2  # items and attributes that a sentence names


@dataclass(frozen=True)
class Recommended:
    """Items offered to one user.

    Attributes:
        items: names of the items, best first; fewer than asked for where the catalogue ends.
        scores: their cosine similarities to the history (with --method head also its term for
            items of the history); of a fallback what it is ordered by, interactions in training
            ("popular") or 0 ("newest").
        num_unknown: items of the history that are not in the catalogue, so were not read.
        fallback: None, or what stands in where nothing of a history is known: "popular", or
            "newest" (the last of the catalogue first) where nothing was counted.
    """

    items: list[str]
    scores: list[float]
    num_unknown: int = 0
    fallback: str | None = None


@dataclass(frozen=True)
class Explanation:
    """Parts of a score, found by leaving one thing out at a time.

    An item of the history carries what the score loses without it: s(h, i) - s(h without j, i),
    where nothing left to read scores 0. An attribute of the item carries what the score of the
    item's text loses without it: s(h, text of i) - s(h, text of i without a). Together with the
    remainder, which is what the parts carry jointly (and, of attributes, what was learned of the
    item beyond its text), each list adds up to the score:

        sum of history + history_remainder = score = sum of attributes + attributes_remainder

    Attributes:
        item: the name or the attributes that were asked for.
        score: as in `Recommended`.
        history: (name or attributes, what it carries) of every item that was known, oldest first.
        history_remainder: see above.
        attributes: (attribute, what it carries) of the item, in its order.
        attributes_remainder: see above.
        num_unknown: items of the history that are not in the catalogue.
        title: the item's first attribute, or its name.
        titles: the same of the items in `history`.
    """

    item: HistoryItem
    score: float
    history: list[tuple[HistoryItem, float]]
    history_remainder: float
    attributes: list[tuple[str, float]]
    attributes_remainder: float
    num_unknown: int
    title: str
    titles: list[str]

    def sentence(self) -> str:
        """The score and what carries most of it, in words."""
        titled = [
            (f"“{title}”", carried)
            for title, (_, carried) in zip(self.titles, self.history, strict=True)
        ]
        text = f"“{self.title}” has a score of {self.score:.3f}: "
        text += _most("of the history", titled)
        return text + f"; {_most('of its own text', self.attributes)}."


def _most(whose: str, parts: Sequence[tuple[str, float]]) -> str:
    speaking = sorted((part for part in parts if part[1] > 0), key=lambda part: -part[1])[:NAMED]
    if not speaking:
        return f"{whose} nothing carries it alone"
    named = " and ".join(f"{name} ({carried:+.3f})" for name, carried in speaking)
    return f"{whose} it is carried most by {named}"


def name_of(entry: Any) -> str:
    """The name that an entry of a history is; numbers are their text."""
    if isinstance(entry, str):
        return entry
    if isinstance(entry, Integral) and not isinstance(entry, bool):
        return str(entry)
    raise UserError(
        f"a history holds {entry!r:.60}, expected names of items or their attributes "
        '({"title": …, …})'
    )


def title_of(attributes: Mapping[str, Any], otherwise: str) -> str:
    """The first attribute of an item that has a text, or something else."""
    for value in attributes.values():
        text = value[0] if isinstance(value, list | tuple) and value else value
        if isinstance(text, str) and text.strip():
            return text.strip()
    return otherwise
