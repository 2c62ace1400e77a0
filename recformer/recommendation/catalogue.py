"""Items of a recommender, changed by some while others read.

Shapes: N items, H hidden, K items of a change.
"""

from __future__ import annotations

import bisect
import threading
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from recformer.checkpoints.names import few
from recformer.data.items import ItemsInMemory
from recformer.evaluation.exact import bfloat16_units, item_norms
from recformer.files import UserError
from recformer.recommendation.answers import HistoryItem, name_of
from recformer.recommendation.reading import Asked, PathLike
from recformer.recommendation.view import Blocks, Offered, View
from recformer.tokenization import Item, RecformerTokenizer
from recformer.training.item_encoder import item_keys


class KeptVectors(Protocol):
    """Vectors of texts of one model that somebody keeps, by content hash."""

    def find(self, contents: list[bytes]) -> Mapping[bytes, NDArray[np.float32]]:
        """Those (H,) of some contents that are there."""
        ...

    def keep(self, vectors: Mapping[bytes, NDArray[np.float32]]) -> None:
        """Take newly encoded ones (H,)."""
        ...


@dataclass(frozen=True, eq=False)
class Snapshot:
    """A catalogue at one moment.

    Attributes:
        view: names and vectors of its rows.
        row_of, texts: row and attributes by name, of what is offered.
        contents: content hashes of the rows beyond the model's own.
    """

    view: View
    row_of: dict[str, int]
    texts: dict[str, Item]
    contents: list[bytes]


class LiveCatalogue:
    """Names, texts and vectors of items.

    A reader takes what it needs of the present state, its `View` with it, under `lock`, which is
    held for moments; texts are encoded outside of it.

    Args:
        names: N of them, in the order of the rows.
        texts: {name: attributes} of those that are offered.
        tables: vectors of the rows, a table (N0, H) of the model and the others (N - N0, H).
        contents: (N - N0) content hashes of the others' texts.
        gone: ascending rows that are not offered.
        tokenizer: the model's.
        encode: vectors (K, H) of K tokenised items, kept in a folder or not.
    """

    def __init__(
        self,
        names: list[str],
        texts: dict[str, Item],
        tables: tuple[Tensor, Tensor],
        contents: list[bytes],
        gone: NDArray[np.int64],
        tokenizer: RecformerTokenizer,
        encode: Callable[[ItemsInMemory, PathLike | None], Tensor],
    ) -> None:
        self.tokenizer, self._encode = tokenizer, encode
        self.texts = texts
        self.base = len(tables[0])
        self.contents = contents
        self.lock = threading.Lock()
        self._changing = threading.Lock()  # one change at a time
        self._tables = tables
        self._norms = tuple(item_norms(table) for table in tables)
        self._added, self._added_norms = Blocks(tables[0]), Blocks(self._norms[0])
        self._units: tuple[Tensor, ...] | None = None
        self._added_units = Blocks(tables[0][:0].bfloat16())
        self.row_of = {name: row for row, name in enumerate(names) if name in texts}
        self._row_of_content = {
            content: row for row, content in enumerate(contents, start=self.base)
        }
        self._by_attribute: dict[str, dict[str, list[int]]] = {}
        self.view = View(names, tables, self._norms, None, gone)

    def __len__(self) -> int:
        return len(self.row_of)

    def snapshot(self) -> Snapshot:
        """All of it as it is now."""
        with self.lock:
            contents = self.contents[: len(self.view) - self.base]
            return Snapshot(self.view, dict(self.row_of), dict(self.texts), contents)

    def used_contents(self) -> set[bytes]:
        """Content hashes of what is offered beyond the model's own rows."""
        with self.lock:
            rows = [row - self.base for row in self.row_of.values() if row >= self.base]
            return {self.contents[row] for row in rows}

    # --- asking -------------------------------------------------------------------------------

    def read_histories(self, histories: Sequence[Sequence[HistoryItem]]) -> Asked:
        """Knowledge about the items of histories; under `lock`.

        Raises:
            UserError: what is no list of names or items.
        """
        items: list[Item] = []
        row_at: list[int] = []
        place_of: dict[str, int] = {}
        known: list[NDArray[np.int64]] = []
        unknown: list[int] = []
        for number, history in enumerate(histories):
            if isinstance(history, str | Mapping) or not hasattr(history, "__iter__"):
                raise UserError(
                    f"history {number} is {history!r:.60}, expected a list of names or items, "
                    "oldest first"
                )
            places: list[int] = []
            missed = 0
            for entry in history:
                if isinstance(entry, Mapping):
                    place, text, row = len(items), entry, -1
                    found = bool(entry)
                else:
                    name = name_of(entry)
                    row, text = self.row_of.get(name, -1), self.texts.get(name, {})
                    found = row >= 0
                    place = place_of.setdefault(name, len(items)) if found else -1
                if not found:
                    missed += 1
                    continue
                if place == len(items):
                    items.append(text)
                    row_at.append(row)
                places.append(place)
            known.append(np.array(places, np.int64))
            unknown.append(missed)
        return Asked(items, np.array(row_at, np.int64), known, unknown)

    def offered(
        self,
        allowed: Iterable[str] | None = None,
        blocked: Iterable[str] = (),
        where: Mapping[str, str | Collection[str]] | None = None,
    ) -> Offered:
        """Rows of the present view that may be offered; under `lock`.

        Raises:
            UserError: a string in place of a list, no allowed item in the catalogue, an attribute
                that no item has.
        """
        if isinstance(allowed, str) or isinstance(blocked, str):
            raise UserError("allowed and blocked are lists of names, got a string")
        only = None
        if allowed is not None:
            names = list(allowed)
            only = np.unique(self._rows(names))
            if not len(only):
                raise UserError(f"none of the {len(names):,} allowed items is in the catalogue")
        for attribute, values in (where or {}).items():
            rows = self._rows_where(attribute, [values] if isinstance(values, str) else values)
            only = rows if only is None else np.intersect1d(only, rows)
        out = np.union1d(self.view.gone, self._rows(blocked))
        if only is None:
            return Offered(None, out)
        return Offered(np.setdiff1d(only, out, assume_unique=True), out[:0])

    def _rows(self, names: Iterable[str]) -> NDArray[np.int64]:
        return np.array([self.row_of[name] for name in names if name in self.row_of], np.int64)

    def _rows_where(self, attribute: str, values: Collection[str]) -> NDArray[np.int64]:
        if attribute not in self._by_attribute:
            rows_of: dict[str, list[int]] = {}
            for name, row in self.row_of.items():
                for value in _values(self.texts[name], attribute):
                    rows_of.setdefault(value, []).append(row)
            if not rows_of:
                raise UserError(f"where: no item of the catalogue has the attribute {attribute!r}")
            self._by_attribute[attribute] = rows_of
        rows_of = self._by_attribute[attribute]
        rows = [np.array(rows_of.get(str(value), ()), np.int64) for value in values]
        return np.unique(np.concatenate([np.empty(0, np.int64), *rows]))

    def refuse_unknown(self, names: Iterable[str]) -> None:
        """Refuse names that the catalogue does not hold.

        Raises:
            UserError: names them.
        """
        unknown = [name for name in names if name not in self.row_of]
        if unknown:
            raise UserError(f"{few(unknown)} are not in the catalogue of {len(self):,} items")

    # --- changing -----------------------------------------------------------------------------

    def put(
        self,
        items: Mapping[str, Item],
        known: bool | None = None,
        cache_dir: PathLike | None = None,
        kept: KeptVectors | None = None,
    ) -> int:
        """Encode what is new among `items` and give each name the row of its text's vector.

        Args:
            items: {name: attributes}.
            known: whether the names must be in the catalogue, or must not; None: either.
            cache_dir: where vectors are kept in files; None keeps none.
            kept: vectors that are taken in place of encoding a text; it gets those that it lacks.

        Returns:
            Texts that were encoded.

        Raises:
            UserError: see `CatalogueRecommender.add_items` and `update_items`; nothing is changed.
        """
        wrong = [name for name in items if not isinstance(name, str) or not name]
        if wrong:
            raise UserError(f"{wrong[0]!r} is no name of an item, expected a text")
        names = list(items)
        with self._changing:
            if known:
                self.refuse_unknown(names)
            there = [name for name in names if name in self.row_of]
            if there and known is False:
                raise UserError(
                    f"{few(there)} are in the catalogue already: update_items changes them"
                )
            both = [*items.values(), *(self.texts.get(name, {}) for name in names)]
            store = ItemsInMemory.of(both, self.tokenizer)
            empty = np.flatnonzero(store.lengths[: len(names)] == 0)
            if len(empty):
                raise UserError(f"{names[empty[0]]!r} has no text, expected attributes as a title")
            contents = item_keys(store).tolist()
            # An item that reads as before keeps its row, and with it the vector.
            before = contents[len(names) :]
            changed = [i for i in range(len(names)) if contents[i] != before[i]]
            vectors, encoded = self._vectors_of(store, contents, changed, cache_dir, kept)
            with self.lock:
                self._publish(items, changed, [contents[i] for i in changed], vectors)
            return encoded

    def _vectors_of(
        self,
        store: ItemsInMemory,
        contents: list[bytes],
        changed: list[int],
        cache_dir: PathLike | None,
        kept: KeptVectors | None,
    ) -> tuple[Tensor, int]:
        """Vectors (K, H) of the changed items of a store, and how many of them were encoded."""
        new: dict[bytes, int] = {}  # the first with each text
        for i in changed:
            if contents[i] not in self._row_of_content:
                new.setdefault(contents[i], i)
        rows = np.array([self._row_of_content.get(contents[i], -1) for i in changed], np.int64)
        old = self.view.at(rows[rows >= 0])
        vectors = old.new_empty(len(changed), self._tables[0].shape[1])
        vectors[torch.from_numpy(rows >= 0)] = old
        found = dict(kept.find(list(new))) if new and kept is not None else {}
        there = {content: torch.from_numpy(vector) for content, vector in found.items()}
        new = {content: i for content, i in new.items() if content not in found}
        if new:
            chosen = np.zeros(len(store), bool)
            chosen[list(new.values())] = True  # `new` is in the order of the store
            encoded = self._encode(store.subset(chosen), cache_dir).float()
            there |= dict(zip(new, encoded, strict=True))
            if kept is not None:
                kept.keep(dict(zip(new, encoded.cpu().numpy(), strict=True)))
        for j, i in enumerate(changed):
            if rows[j] < 0:
                vectors[j] = there[contents[i]]
        return vectors, len(new)

    def _publish(
        self,
        items: Mapping[str, Item],
        changed: list[int],
        contents: list[bytes],
        vectors: Tensor,
    ) -> None:
        names, first = list(items), len(self.view)
        row_of = {names[i]: first + j for j, i in enumerate(changed)}
        gone = [self.row_of[name] for name in row_of if name in self.row_of]
        for name in names:
            self._index(name, items[name], row_of.get(name))
        self._added.append(vectors)
        self._added_norms.append(item_norms(vectors))
        if self._units is not None:
            self._added_units.append(bfloat16_units(vectors))
        all_names = self.view.names
        assert isinstance(all_names, list)
        all_names.extend(row_of)  # behind what the views of others reach
        self.contents.extend(contents)
        self.texts.update({name: dict(item) for name, item in items.items()})
        self.row_of.update(row_of)
        self._row_of_content.update(zip(contents, row_of.values(), strict=True))
        self._see(np.union1d(self.view.gone, np.array(gone, np.int64)))

    def remove(self, names: Iterable[str]) -> None:
        """Take items out.

        Raises:
            UserError: a string, or a name that the catalogue does not hold; nothing is removed.
        """
        if isinstance(names, str):
            raise UserError(f"names is the string {names!r}, expected a list of names")
        names = list(dict.fromkeys(names))
        with self._changing, self.lock:
            self.refuse_unknown(names)
            gone = self._rows(names)
            for name in names:
                del self.row_of[name], self.texts[name]
            self._see(np.union1d(self.view.gone, gone))

    def _see(self, gone: NDArray[np.int64]) -> None:
        tables = (*self._tables, *self._added.tables())
        norms = (*self._norms, *self._added_norms.tables())
        units = None
        if self._units is not None:
            units = (*self._units, *self._added_units.tables())
        self.view = View(self.view.names, tables, norms, units, gone)

    def keep_units(self) -> None:
        """Keep the vectors in bfloat16 as well, which a search then looks at first."""
        with self._changing, self.lock:
            if self._units is None:
                self._units = tuple(bfloat16_units(table) for table in self._tables)
                for table in self._added.tables():
                    self._added_units.append(bfloat16_units(table))
                self._see(self.view.gone)

    def _index(self, name: str, item: Item, new_row: int | None) -> None:
        """Keep the lists of rows by attribute, whose old rows `gone` takes away, up to date."""
        row = self.row_of.get(name) if new_row is None else new_row
        assert row is not None
        for attribute, rows_of in self._by_attribute.items():
            now = set(_values(item, attribute))
            before = set(_values(self.texts[name], attribute)) if new_row is None else set()
            for value in before - now:
                rows_of[value].remove(row)
            for value in now - before:
                bisect.insort(rows_of.setdefault(value, []), row)


def _values(item: Item, attribute: str) -> list[str]:
    """The texts that an item has for an attribute, each once."""
    value: Any = item.get(attribute)
    texts = value if isinstance(value, list | tuple) else [value]
    return list(dict.fromkeys(str(text) for text in texts if text is not None))
