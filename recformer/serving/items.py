"""Items as Gorse's API has them, and what the model reads of them.

The title is the comment, categories are the attribute `category`, further attributes stand in
labels that are an object. Labels in the form of a list are one attribute, `labels`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from recformer.serving.store import ItemRow
from recformer.serving.times import NO_TIME
from recformer.tokenization import Item

DEEPEST = 16  # levels of labels


@dataclass(frozen=True)
class Shape:
    """The attributes that items of a catalogue have.

    Attributes:
        names: in the order in which an item's sentence has them.
        title, category: those that Gorse has fields for.
    """

    names: tuple[str, ...]
    title: str = "title"
    category: str = "category"

    @classmethod
    def of(cls, texts: Mapping[str, Item]) -> Shape:
        """Of a catalogue."""
        names: dict[str, None] = {}
        for item in texts.values():
            names.update(dict.fromkeys(item))
        title = "title" if "title" in names or not names else next(iter(names))
        category = "categories" if "categories" in names and "category" not in names else "category"
        return cls(tuple(names), title, category)

    def attributes(self, row: ItemRow) -> dict[str, Any]:
        """Attributes that the model reads of an item; none where it has no text."""
        labels = row.labels if isinstance(row.labels, dict) else {}
        if isinstance(row.labels, list | str) and row.labels:
            labels = {"labels": row.labels}
        given = {self.title: row.comment or None, self.category: row.categories or None} | labels
        found = {name: _text(value) for name, value in given.items()}
        found = {name: value for name, value in found.items() if value}
        order = {name: place for place, name in enumerate(self.names)}
        return dict(sorted(found.items(), key=lambda pair: order.get(pair[0], len(order))))

    def row(self, name: str, attributes: Mapping[str, Any]) -> ItemRow:
        """An item of the folder in Gorse's form; `attributes` of it are the same again."""
        category = attributes.get(self.category)
        categories = category if isinstance(category, list) else [category] if category else []
        title = attributes.get(self.title)
        labels = {k: v for k, v in attributes.items() if k not in (self.title, self.category)}
        return ItemRow(
            item_id=name,
            is_hidden=False,
            categories=[str(each) for each in categories],
            timestamp=NO_TIME,
            labels=labels or None,
            comment=str(title) if title else "",
            deleted=False,
        )


def _text(value: Any) -> Any:
    """An attribute of labels as a text or a list of texts; None where it says nothing."""
    if isinstance(value, str):
        return value
    if isinstance(value, bool) or value is None:
        return None
    if isinstance(value, int | float):
        return str(value)
    if isinstance(value, list):
        texts = [_text(each) for each in value]
        return [each for each in texts if isinstance(each, str) and each]
    return None  # numbers by name, such as embeddings, are no text
