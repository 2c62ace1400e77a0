"""Texts that the sentences of items are made of."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from numbers import Number
from typing import Any

from recformer.files import UserError

# Texts longer than this, in characters, are cut before they are tokenised: behind so many words
# for every token that an attribute may have. A word makes a token or more, unless it is of
# characters that a tokenizer leaves out, so the first tokens are the same. A word longer than this,
# or a run of blanks, keeps its first characters: twice what the longest tokens could cover.
LONG_TEXT = 10_000
WORDS_A_TOKEN = 8

Item = Mapping[str, Any]


def item_texts(
    items: Iterable[Item], max_attr_num: int | None = None, first_index: int = 0
) -> tuple[list[str], list[int]]:
    """The texts that the sentences of `items` are made of.

    A value of None (or NaN) is an absent attribute, as if the key were not there. Lists are joined
    by one space, nested ones too; numbers become their text. The empty string stays: its attribute
    is its name alone, as published.

    Args:
        items: N dicts, attributes in order.
        max_attr_num: attributes kept of every item; None keeps all.
        first_index: number of the first item, for error messages.

    Returns:
        name, value, name, value, … of all items one after the other, and the number of attributes
        of each item (N).

    Raises:
        ValueError: an item is not a dict, or a name or a value cannot be made text of.
    """
    texts: list[str] = []
    counts: list[int] = []
    for index, item in enumerate(items, first_index):
        if not isinstance(item, Mapping):
            raise UserError(
                f"item {index} is {show(item)}, expected a dict of attributes such as "
                '{"title": "…", "brand": "…"}'
            )
        count = 0
        for name, value in item.items():
            if count == max_attr_num:
                break
            if type(name) is not str:
                raise UserError(f"item {index}: attribute name {show(name)} is not a string")
            if type(value) is not str:
                value = _value_text(value, name, index)
                if value is None:
                    continue
            texts.append(name)
            texts.append(value)
            count += 1
        counts.append(count)
    return texts, counts


def first_words(text: str, most: int) -> str:
    """`text` up to the end of word number `most`; words are what blanks divide."""
    words = text.split(None, most)
    return text[: len(text) - len(words[most])].rstrip() if len(words) > most else text


def _value_text(value: Any, name: str, index: int) -> str | None:
    """The text of an attribute's value, None where it is absent."""
    if value is None:
        return None
    if isinstance(value, str):
        return str(value)
    if isinstance(value, Number):
        # NaN is what data frames make of a missing value.
        return str(value) if value == value else None
    if isinstance(value, (list, tuple)):
        parts = (_value_text(part, name, index) for part in value)
        return " ".join(part for part in parts if part is not None)
    raise UserError(
        f"item {index}: the value of {name!r} is {show(value)}, expected a string, a number, "
        "a list of them, or None"
    )


def show(value: Any) -> str:
    text = repr(value)
    return f"{text if len(text) <= 60 else text[:57] + '…'} ({type(value).__name__})"
