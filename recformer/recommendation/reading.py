"""From histories to vectors of users, by either method of finetuning.

Shapes: B users, or histories, M items, H hidden.
"""

from __future__ import annotations

import os
import threading
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from recformer.data.collators import pack_sequences
from recformer.data.histories import histories_of
from recformer.data.items import ItemsInMemory
from recformer.evaluation.additions import Additions
from recformer.models import RecformerForCatalogue, RecformerForSeqRec
from recformer.models.catalogue import token_bags
from recformer.recommendation.view import View
from recformer.tokenization import Item, RecformerTokenizer
from recformer.training.item_encoder import (
    TOKENS_PER_BATCH,
    catalogue_vectors,
    encode_items,
    token_budget_batches,
)

PathLike = str | os.PathLike

# Rows of the catalogue whose tokens are kept at most; some 30 MB.
ROWS_REMEMBERED = 65_536


@dataclass(frozen=True)
class Asked:
    """The histories of a request.

    Attributes:
        items: attributes of every item that one of them holds.
        rows: (M,) the row in the catalogue of each, -1 of those that are given by attributes.
        known: of each history the places in `items` of what is known, oldest first.
        unknown: how many items of each history are not.
    """

    items: list[Item]
    rows: NDArray[np.int64]
    known: list[NDArray[np.int64]]
    unknown: list[int]


class Sequences:
    """Reader of a `RecformerForSeqRec`: a history is one sequence of texts."""

    def __init__(self, model: RecformerForSeqRec, tokenizer: RecformerTokenizer) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.remembered = Remembered(0)
        self._tokens_of_row: dict[int, _Tokens] = {}

    def item_vectors(self, store: ItemsInMemory, cache_dir: PathLike | None = None) -> Tensor:
        """(M, H) vectors of tokenised items, of which there is at least one."""
        return _encoded(self.model, store, cache_dir)

    @torch.no_grad()
    def users(
        self, asked: Asked, numbers: list[int], view: View
    ) -> tuple[Tensor, Additions | None]:
        """(B, H) vectors of some histories, and what is added to the scores of single items."""
        config = self.model.config
        most = config.max_item_embeddings - 1
        sequences = [asked.known[number][-most:] for number in numbers]
        store = self._tokenised(asked)
        # The tokens of a history are all that its vector depends on.
        keys = [_tokens(store, sequence) for sequence in sequences]
        read = {key: self.remembered.get(key) for key in dict.fromkeys(keys)}
        found = {key: vector for key, vector in read.items() if vector is not None}
        first = {key: place for place, key in reversed(list(enumerate(keys)))}
        new = sorted(place for key, place in first.items() if key not in found)
        lengths = np.array([1 + int(store.lengths[sequences[place]].sum()) for place in new])
        lengths = np.minimum(lengths, config.max_token_num)
        for rows in token_budget_batches(lengths, TOKENS_PER_BATCH):
            places = [new[row] for row in rows]
            packed = pack_sequences(store, [sequences[place] for place in places], config)
            vectors = self.model.encode(packed.to(self.model.device)).float()
            for place, vector in zip(places, vectors, strict=True):
                found[keys[place]] = vector
                self.remembered.put(keys[place], vector)
        users = torch.stack([found[key] for key in keys])
        return users, None

    def _tokenised(self, asked: Asked) -> ItemsInMemory:
        """The items of a request; the text of a row never changes, so its tokens are kept."""
        rows = asked.rows.tolist()
        known = [self._tokens_of_row.get(row) for row in rows]
        new = [place for place, tokens in enumerate(known) if tokens is None]
        store = ItemsInMemory.of([asked.items[place] for place in new], self.tokenizer)
        if len(new) == len(rows):
            tokens = [_tokens_of(store, number) for number in range(len(new))]
        else:
            found = iter(_tokens_of(store, number) for number in range(len(new)))
            tokens = [next(found) if each is None else each for each in known]
            lengths = [0, *(len(ids) for ids, _ in tokens)]
            store = ItemsInMemory(
                np.concatenate([ids for ids, _ in tokens]),
                np.concatenate([types for _, types in tokens]),
                np.cumsum(lengths, dtype=np.int64),
            )
        if len(self._tokens_of_row) + len(new) > ROWS_REMEMBERED:
            self._tokens_of_row = {}
        self._tokens_of_row.update(
            (rows[place], tokens[place]) for place in new if rows[place] >= 0
        )
        return store

    def users_and_items(self, asked: Asked, items: list[Item], view: View) -> tuple[Tensor, Tensor]:
        """Vectors of all histories (B, H) and of some texts (M, H), out of the same batch."""
        alone = [np.array([len(asked.items) + number]) for number in range(len(items))]
        joined = Asked(
            [*asked.items, *items],
            np.append(asked.rows, np.full(len(items), -1)),
            [*asked.known, *alone],
            [*asked.unknown, *[0] * len(items)],
        )
        vectors, _ = self.users(joined, list(range(len(joined.known))), view)
        return vectors[: len(asked.known)], vectors[len(asked.known) :]

    def scores(self, cosines: Tensor, ages: list[int | None]) -> Tensor:
        """Scores (B,) of one item for each history, from its cosines.

        Args:
            cosines: (B,) float64.
            ages: how many items came after it where the history holds it.
        """
        return cosines


_Tokens = tuple[NDArray[Any], NDArray[np.uint8]]  # ids and token types of an item


def _tokens_of(store: ItemsInMemory, item: int) -> _Tokens:
    part = slice(store.offsets[item], store.offsets[item + 1])
    return store.input_ids[part].copy(), store.token_type_ids[part].copy()


def _tokens(store: ItemsInMemory, sequence: NDArray[np.int64]) -> bytes:
    """The tokens of some items end to end, with the border of each."""
    parts = [(store.offsets[item], store.offsets[item + 1]) for item in sequence]
    ids = [store.input_ids[start:stop].tobytes() for start, stop in parts]
    types = [store.token_type_ids[start:stop].tobytes() for start, stop in parts]
    return b"".join([*ids, *types, store.lengths[sequence].tobytes()])


class Remembered:
    """Vectors of the histories that were read last, by their tokens; from any thread.

    Args:
        most: vectors kept, the least recently used forgotten first; 0 keeps none.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._vectors: dict[bytes, Tensor] = {}
        self._lock = threading.Lock()

    def get(self, key: bytes) -> Tensor | None:
        """The vector, which counts as used; None where there is none."""
        with self._lock:
            vector = self._vectors.pop(key, None)
            if vector is not None:
                self._vectors[key] = vector
            return vector

    def put(self, key: bytes, vector: Tensor) -> None:
        """Keep a vector."""
        if self._most < 1:
            return
        with self._lock:
            self._vectors[key] = vector.clone()  # not the batch that it is a row of
            if len(self._vectors) > self._most:
                del self._vectors[next(iter(self._vectors))]


class ItemByItem:
    """Reader of a `RecformerForCatalogue`: a history is the vectors of its items."""

    def __init__(self, model: RecformerForCatalogue, tokenizer: RecformerTokenizer) -> None:
        self.model, self.tokenizer = model, tokenizer

    @torch.no_grad()
    def item_vectors(self, store: ItemsInMemory, cache_dir: PathLike | None = None) -> Tensor:
        """As `Sequences`: of texts alone, as of items that nobody has bought."""
        encoded = _encoded(self.model.longformer, store, cache_dir)
        return self.model.head.text_vectors(encoded, token_bags(store).to(encoded.device))

    @torch.no_grad()
    def users(
        self, asked: Asked, numbers: list[int], view: View
    ) -> tuple[Tensor, Additions | None]:
        """As `Sequences`."""
        table = self._vectors(asked.items, asked.rows, view)
        sequences = [asked.known[number] for number in numbers]
        histories = histories_of(sequences, self.model.head.options.max_history).to(table.device)
        users = self.model.head.user_vectors(histories, table, torch.from_numpy(asked.rows))
        known = table[histories.distinct]
        cosines = (users[histories.rows].double() * known.double()).sum(dim=-1)
        added = self.model.head.history_additions(histories, cosines).double().cpu().numpy()
        items = asked.rows[histories.distinct.cpu().numpy()]
        mine = items >= 0  # what no catalogue knows cannot be recommended
        return users, (histories.rows.cpu().numpy()[mine], items[mine], added[mine])

    @torch.no_grad()
    def users_and_items(self, asked: Asked, items: list[Item], view: View) -> tuple[Tensor, Tensor]:
        """As `Sequences`."""
        rows = np.append(asked.rows, np.full(len(items), -1))
        table = self._vectors([*asked.items, *items], rows, view)
        histories = histories_of(asked.known, self.model.head.options.max_history)
        users = self.model.head.user_vectors(
            histories.to(table.device), table, torch.from_numpy(rows)
        )
        return users, table[len(asked.items) :]

    @torch.no_grad()
    def scores(self, cosines: Tensor, ages: list[int | None]) -> Tensor:
        """As `Sequences`."""
        read = self.model.head.options.max_history
        scores = cosines.clone()
        for number, age in enumerate(ages):
            if age is not None and age < read:
                place = slice(number, number + 1)
                newest = torch.tensor([age], device=cosines.device)
                scores[place] += self.model.head.addition(cosines[place], newest)
        return scores

    def _vectors(self, items: list[Item], rows: NDArray[np.int64], view: View) -> Tensor:
        """(M, H) of the catalogue's rows, and of the texts of those that have none."""
        found = view.at(rows[rows >= 0])
        table = found.new_empty(len(rows), found.shape[1])
        table[torch.from_numpy(rows >= 0).to(table.device)] = found
        given = np.flatnonzero(rows < 0)
        if len(given):
            store = ItemsInMemory.of([items[place] for place in given], self.tokenizer)
            table[torch.from_numpy(given).to(table.device)] = self.item_vectors(store)
        return table


def _encoded(model: Any, store: ItemsInMemory, cache_dir: PathLike | None) -> Tensor:
    """(M, H) of the encoder, kept in files where there is a folder for them."""
    if cache_dir is None:
        return encode_items(model, store, progress=False)
    return torch.from_numpy(catalogue_vectors(model, store, cache_dir)).to(model.device)
