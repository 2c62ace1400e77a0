"""Whole histories out of files that hold lists of items.

    `user item item …` a line                                  S3-Rec, FMLP, CL4SRec
    {user: [item, …]}                                          UniSRec's, LC-Rec's NAME.inter.json
    a column of lists                                          Transformers4Rec, any JSON Lines
    a column of lists beside the item that comes after them    RecBole's, UniSRec's `token_seq`,
                                                               MiniOneRec's `history_item_id`

The last are training examples: a user has one line an item, and the history of each is the ones
before it, often cut to the newest few. `rebuild` joins them to the one history they were cut from.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

NOT_ONE_HISTORY = "the histories of its user do not fit together"


class Example(NamedTuple):
    """An example to train on: items that a user met, oldest first, and the item after them."""

    line: int
    history: list[str]
    target: str


def split_list(value: Any) -> list[Any] | None:
    """Items of a field: `a b c` as RecBole writes them, or a list in Python's, JSON's or NumPy's
    writing; None: it is no list.
    """
    if isinstance(value, list):
        return value
    if not isinstance(value, str):
        return None
    text = value.strip()
    if not text.startswith("["):
        return text.split()
    try:
        found = ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        inside = text[1:-1]  # `[1 2 3]`
        plain = text.endswith("]") and not set("[]'\",") & set(inside)
        return inside.split() if plain else None
    return found if isinstance(found, list) else None


def item_name(value: Any) -> str | None:
    """An id as text; None: it is none. Whole numbers lose their fraction (`6.0`), and lone
    surrogates, which no file can hold, become question marks.
    """
    if isinstance(value, str):
        text = value if value.isascii() else value.encode("utf-8", "replace").decode("utf-8")
        return text or None
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else None


def rebuild(examples: Iterable[Example], longest: int) -> list[str] | None:
    """The history that all examples of a user were cut from, oldest first, in whatever order they
    stand; None: there is no such one, or more than one.

    Args:
        examples: of one user, whole from the beginning or from some item on.
        longest: items of the longest history of the file: one of so many may be cut.
    """
    own = [(tuple(example.history), example.target) for example in examples]
    whole: tuple[str, ...] = ()
    for history, target in sorted({*own}, key=lambda example: len(example[0])):
        if len(history) == longest:
            break  # and so are those that follow
        found = (*history, target)
        if found[: len(whole)] != whole:
            return None
        whole = found
    return _chain(whole, [example for example in own if len(example[0]) == longest])


def _chain(whole: tuple[str, ...], cut: Sequence[tuple[tuple[str, ...], str]]) -> list[str] | None:
    """Lay histories of one length on from `whole`, each a step after the one before it."""
    if not cut:
        return list(whole)
    after: dict[tuple[str, ...], str] = {}
    for history, target in cut:
        if history in after:
            return None  # after the same items something else, or the same once more
        after[history] = target
    reached = {(*history[1:], target) for history, target in cut}
    starts = [history for history in after if history[: len(whole)] == whole]
    if len(starts) > 1:
        starts = [history for history in starts if history not in reached]
    if len(starts) != 1:
        return None
    here = starts[0]
    found = list(here)
    while here in after:
        target = after.pop(here)
        found.append(target)
        here = (*here[1:], target)
    return None if after else found


def rebuild_all(
    examples: dict[str, list[Example]],
) -> Iterator[tuple[int, str, list[str] | None]]:
    """`(line of the first example, user, items)` of every user; items None: see `rebuild`."""
    longest = max((len(example.history) for own in examples.values() for example in own), default=0)
    for user, own in examples.items():
        yield own[0].line, user, rebuild(own, longest)
