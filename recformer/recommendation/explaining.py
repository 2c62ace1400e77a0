"""Parts of a score: it is computed anew with one thing left out at a time.

Shapes: V variants of a history, W variants of an item's text, H hidden.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import islice

import numpy as np
import torch
from torch import Tensor

from recformer.evaluation.exact import of_length_one, pair_scores
from recformer.recommendation.answers import Explanation, HistoryItem, title_of
from recformer.recommendation.reading import Asked, ItemByItem, Sequences
from recformer.recommendation.view import View
from recformer.tokenization import Item
from recformer.tokenization.texts import item_texts


def explained(
    reader: Sequences | ItemByItem,
    asked: Asked,
    entries: Sequence[HistoryItem],
    item: HistoryItem,
    text: Item,
    row: int | None,
    view: View,
    max_attr_num: int,
) -> Explanation:
    """Leave out each item of a history, and each attribute of the item, all in one packed batch.

    Args:
        reader: of the model.
        asked: one history, of which something is known.
        entries: what was said for its known items.
        item, text, row: what was asked for, its attributes, and its row in the catalogue.
        view: of the same moment.
        max_attr_num: attributes that the encoder reads.
    """
    (history,) = asked.known
    shorter = [np.delete(history, place) for place in range(len(history))]
    kept = [variant for variant in (history, *shorter) if len(variant)]
    variants = replace(asked, known=kept, unknown=[0] * len(kept))

    read = islice(((n, v) for n, v in text.items() if item_texts([{n: v}])[1][0]), max_attr_num)
    whole = dict(read)
    texts = [whole, *({n: v for n, v in whole.items() if n != name} for name in whole)]
    # without its only attribute nothing is left to encode
    readable: list[Item] = [each for each in texts if each]

    users, vectors = reader.users_and_items(variants, readable, view)  # (V, H), (W, H)
    vector = vectors[:1] if row is None else view.at(np.array([row]))
    ages = [_age(asked, variant, row) for variant in kept]

    def scores(user: Tensor, items: Tensor, ages: list[int | None]) -> list[float]:
        count = max(len(user), len(items))
        units, _ = of_length_one(user, 0)
        cosines = pair_scores(units.expand(count, -1), items.float().expand(count, -1), True)
        return reader.scores(cosines, ages).tolist()

    with torch.no_grad():
        score, *without = scores(users, vector, ages)
        by_text = scores(users[:1], vectors, ages[:1] * len(vectors)) if readable else [0.0]
    without += [0.0] * (len(shorter) - len(without))  # nothing is left of a history of one item
    of_text, *less = by_text
    less += [0.0] * (len(whole) - len(less))
    carried = [score - each for each in without]
    carried_by_attributes = [of_text - each for each in less]
    return Explanation(
        item=item,
        score=score,
        history=list(zip(entries, carried, strict=True)),
        history_remainder=score - sum(carried),
        attributes=list(zip(whole, carried_by_attributes, strict=True)),
        attributes_remainder=score - sum(carried_by_attributes),
        num_unknown=asked.unknown[0],
        title=title_of(text, str(item)),
        titles=[
            title_of(asked.items[place], str(entry))
            for place, entry in zip(history.tolist(), entries, strict=True)
        ],
    )


def _age(asked: Asked, history: np.ndarray, row: int | None) -> int | None:
    """Number of items of a history after an item of the catalogue; None if it is not there."""
    if row is None:
        return None
    places = np.flatnonzero(asked.rows[history] == row)
    return len(history) - 1 - int(places[-1]) if len(places) else None
