"""A finetuned folder as something that recommends: histories in, items out.

>>> recommender = CatalogueRecommender.load("result/best_model")
>>> recommender.recommend([["B001", "B002"]], k=10)[0].items
>>> recommender.add_items({"B900": {"title": "Tent for two", "brand": "Acme"}})

Both methods of finetuning leave such a folder: `published`, whose model reads a history as one
sequence, and `head`, which reads items one by one.

The catalogue is every product of `meta_data.json`. Those that the model was finetuned on have the
vectors of its item table, which the evaluation ranks; the others, and what is added or changed
later, are encoded by the model, once a text.

Shapes: B users, N items, H hidden, k items recommended.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from numbers import Integral
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from recformer.checkpoints.names import few
from recformer.config import RecformerConfig
from recformer.data.catalogue import COUNT_FILE
from recformer.data.collators import pack_sequences
from recformer.data.histories import histories_of
from recformer.data.items import ItemsInMemory
from recformer.data.processed import ITEM_FILE, META_FILE
from recformer.evaluation.additions import Additions
from recformer.evaluation.top_items import top_items_by_vectors
from recformer.files import UserError, check_folder, read_json
from recformer.models import RecformerForCatalogue, RecformerForSeqRec
from recformer.models.catalogue import token_bags
from recformer.tokenization import Item, RecformerTokenizer
from recformer.training.item_encoder import (
    TOKENS_PER_BATCH,
    catalogue_vectors,
    encode_items,
    item_keys,
    token_budget_batches,
)

# Beside the model: vectors of products that it was not finetuned on, keyed by content.
VECTORS_FOLDER = "vectors"

PathLike = str | os.PathLike

# A name, or an item that no catalogue needs to know, by its attributes.
HistoryItem = str | int | Item


@dataclass(frozen=True)
class Recommended:
    """What one user is offered.

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


class _Rows:
    """Rows of tables laid end to end, read in slices: never copied as a whole.

    Args:
        tables: (N0, H), (N1, H), …, on one device.
        rows: ascending rows of them all to keep; None keeps all.
    """

    ndim = 2

    def __init__(self, tables: tuple[Tensor, ...], rows: NDArray[np.int64] | None) -> None:
        self.tables, self.rows = tables, rows
        self.starts = np.cumsum([0, *map(len, tables)])
        total = int(self.starts[-1]) if rows is None else len(rows)
        self.shape = (total, tables[0].shape[1])

    def __getitem__(self, part: slice) -> Tensor:
        start, stop, _ = part.indices(self.shape[0])
        pieces = []
        for table, first in zip(self.tables, self.starts.tolist(), strict=False):
            if self.rows is None:
                piece = table[max(start - first, 0) : max(stop - first, 0)]
            else:
                borders = np.searchsorted(self.rows, (first, first + len(table)))
                low, high = borders.clip(min=start, max=stop)
                index = torch.from_numpy(self.rows[low:high] - first)
                piece = table[index.to(table.device)]
            if len(piece):
                pieces.append(piece)
        return pieces[0] if len(pieces) == 1 else torch.cat([*pieces, self.tables[0][:0]])


@dataclass(frozen=True, eq=False)
class _View:
    """The catalogue as one reader sees it, from beginning to end of a request.

    Rows are added, never taken away or used again: an item whose text changes gets another row.

    Attributes:
        names: of every row, in the order in which ties fall.
        tables: vectors of the rows: of the model's item table, of the products beyond it that
            were there when it was loaded, and of what has been added since.
        gone: rows, ascending, that are no longer offered.
    """

    names: list[str]
    tables: tuple[Tensor, Tensor, Tensor]
    gone: NDArray[np.int64]

    def vectors(self, rows: NDArray[np.int64] | None) -> Any:
        """The vectors of ascending `rows`; None: of all."""
        if rows is None and sum(map(len, self.tables)) == len(self.tables[0]):
            return self.tables[0]
        return _Rows(self.tables, rows)

    def at(self, rows: NDArray[np.int64]) -> Tensor:
        """(K, H) float32 vectors of any rows, in their order."""
        distinct, inverse = np.unique(rows, return_inverse=True)
        if not len(rows):
            return self.tables[0][:0].float()
        found = _Rows(self.tables, distinct)[0 : len(distinct)].float()
        return found[torch.from_numpy(inverse).to(found.device)]


@dataclass(frozen=True)
class _Asked:
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


class _Sequences:
    """How a `RecformerForSeqRec` reads: a history is one sequence of texts."""

    def __init__(self, model: RecformerForSeqRec, tokenizer: RecformerTokenizer) -> None:
        self.model, self.tokenizer = model, tokenizer

    def item_vectors(self, store: ItemsInMemory, cache_dir: PathLike | None = None) -> Tensor:
        """(M, H) vectors of tokenised items, of which there is at least one."""
        return _encoded(self.model, store, cache_dir)

    @torch.no_grad()
    def users(
        self, asked: _Asked, numbers: list[int], view: _View
    ) -> tuple[Tensor, Additions | None]:
        """(B, H) vectors of some histories, and what is added to the scores of single items."""
        config = self.model.config
        most = config.max_item_embeddings - 1
        sequences = [asked.known[number][-most:] for number in numbers]
        store = ItemsInMemory.of(asked.items, self.tokenizer)
        lengths = np.array([1 + int(store.lengths[sequence].sum()) for sequence in sequences])
        lengths = np.minimum(lengths, config.max_token_num)
        users = torch.empty(len(sequences), config.hidden_size, device=self.model.device)
        for rows in token_budget_batches(lengths, TOKENS_PER_BATCH):
            packed = pack_sequences(store, [sequences[row] for row in rows], config)
            vectors = self.model.encode(packed.to(self.model.device))
            users[torch.from_numpy(rows).to(users.device)] = vectors.float()
        return users, None


class _ItemByItem:
    """How a `RecformerForCatalogue` reads: a history is the vectors of its items."""

    def __init__(self, model: RecformerForCatalogue, tokenizer: RecformerTokenizer) -> None:
        self.model, self.tokenizer = model, tokenizer

    @torch.no_grad()
    def item_vectors(self, store: ItemsInMemory, cache_dir: PathLike | None = None) -> Tensor:
        """As `_Sequences`: of texts alone, as of items that nobody has bought."""
        encoded = _encoded(self.model.longformer, store, cache_dir)
        return self.model.head.text_vectors(encoded, token_bags(store).to(encoded.device))

    @torch.no_grad()
    def users(
        self, asked: _Asked, numbers: list[int], view: _View
    ) -> tuple[Tensor, Additions | None]:
        """As `_Sequences`."""
        given = np.flatnonzero(asked.rows < 0)
        table = view.at(asked.rows.clip(min=0))
        if len(given):
            store = ItemsInMemory.of([asked.items[place] for place in given], self.tokenizer)
            table[torch.from_numpy(given).to(table.device)] = self.item_vectors(store)
        sequences = [asked.known[number] for number in numbers]
        histories = histories_of(sequences, self.model.head.options.max_history).to(table.device)
        users = self.model.head.user_vectors(histories, table)
        known = table[histories.distinct]
        cosines = (users[histories.rows].double() * known.double()).sum(dim=-1)
        added = self.model.head.history_additions(histories, cosines).double().cpu().numpy()
        items = asked.rows[histories.distinct.cpu().numpy()]
        mine = items >= 0  # what no catalogue knows cannot be recommended
        return users, (histories.rows.cpu().numpy()[mine], items[mine], added[mine])


def _encoded(model: Any, store: ItemsInMemory, cache_dir: PathLike | None) -> Tensor:
    """(M, H) of the encoder, kept in files where there is a folder for them."""
    if cache_dir is None:
        return encode_items(model, store, progress=False)
    return torch.from_numpy(catalogue_vectors(model, store, cache_dir)).to(model.device)


class CatalogueRecommender:
    """A model with its catalogue, which may change while others read it; see `load`.

    Args:
        model: encodes; its item table, if any, holds the vectors of the first items.
        tokenizer: the model's.
        texts: {name: attributes} of the catalogue; those of the item table first, in its order.
        counts: interactions in training by name, for histories of which nothing is known.
        cache_dir: where vectors of the other items are kept; None keeps none.
    """

    def __init__(
        self,
        model: RecformerForSeqRec | RecformerForCatalogue,
        tokenizer: RecformerTokenizer,
        texts: Mapping[str, Item],
        counts: Mapping[str, int] | None = None,
        cache_dir: str | os.PathLike | None = None,
    ) -> None:
        self.model = model.eval()
        self._reader: _Sequences | _ItemByItem
        if isinstance(model, RecformerForCatalogue):
            self._reader = _ItemByItem(model, tokenizer)
        else:
            self._reader = _Sequences(model, tokenizer)
        self.tokenizer = tokenizer
        self.counts = dict(counts or {})
        self._lock = threading.Lock()  # of those who change the catalogue
        if model.item_embedding is None:
            base = torch.empty(0, model.config.hidden_size, device=model.device)
        else:
            base = model.item_embedding.weight.detach()
        others = list(texts)[len(base) :]
        store = ItemsInMemory.of([texts[name] for name in others], tokenizer)
        readable = store.lengths > 0
        store, others = store.subset(readable), [n for n, r in zip(others, readable) if r]
        vectors = self._reader.item_vectors(store, cache_dir) if len(store) else base[:0]
        names = [*list(texts)[: len(base)], *others]
        self._view = _View(names, (base, vectors, base[:0].float()), np.empty(0, np.int64))
        self._popular: tuple[_View, NDArray[np.int64]] | None = None
        self._texts = {name: texts[name] for name in names}
        self._row_of = {name: row for row, name in enumerate(names)}
        self._row_of_content = dict(zip(item_keys(store).tolist(), range(len(base), len(names))))
        self._by_attribute: dict[str, dict[str, list[int]]] = {}

    @classmethod
    def load(
        cls, folder: str | os.PathLike, meta_file: str | os.PathLike | None = None
    ) -> CatalogueRecommender:
        """Read the folder of the best model that `recformer.finetune` leaves.

        A Recformer folder without item vectors and without smap.json recommends as well: all items
        are then encoded.

        Args:
            folder: model with item vectors, tokenizer, smap.json and meta_data.json.
            meta_file: texts of the items ({name: {attribute: text}}), where the folder has none or
                the catalogue has grown.

        Raises:
            FileNotFoundError: the folder or one of its files is missing.
            UserError: files that do not belong together.
        """
        folder = Path(folder)
        check_folder(folder, "model.safetensors", ITEM_FILE)
        meta = Path(meta_file) if meta_file is not None else folder / META_FILE
        finetuned = (folder / ITEM_FILE).exists()
        item_ids = read_json(folder / ITEM_FILE) if finetuned else {}
        if not meta.exists():
            raise FileNotFoundError(
                f"{meta} does not exist: the texts of the items are needed to read histories, name "
                f"the {META_FILE} of the processed folder"
            )
        texts = read_json(meta)
        if not isinstance(texts, dict) or not all(isinstance(x, dict) for x in texts.values()):
            raise UserError(f"{meta} is not as expected: {{name: {{attribute: text}}}}")
        config = RecformerConfig.from_pretrained(folder)
        headed = getattr(config, "head", None) is not None
        model_class = RecformerForCatalogue if headed else RecformerForSeqRec
        model = model_class.from_pretrained(folder)
        table = model.item_embedding
        if (0 if table is None else table.num_embeddings) != len(item_ids):
            found = "no item vectors" if table is None else f"{table.num_embeddings} item vectors"
            raise UserError(
                f"{folder} holds {found} and {len(item_ids)} items in {ITEM_FILE}, expected the "
                "folder of the best model of python -m recformer.finetune"
            )
        names = sorted(item_ids, key=item_ids.__getitem__)
        if names and not any(name in texts for name in names):
            raise UserError(f"{meta} has texts for none of the {len(names)} items of {folder}")
        tokenizer = RecformerTokenizer.from_pretrained(folder, model.config)
        counts = folder / COUNT_FILE
        device = "cuda" if torch.cuda.is_available() else "cpu"
        return cls(
            model.to(device),
            tokenizer,
            {name: texts.get(name, {}) for name in names} | texts,
            read_json(counts) if counts.is_file() else None,
            folder / VECTORS_FOLDER if os.access(folder, os.W_OK) else None,
        )

    def __len__(self) -> int:
        return len(self._row_of)

    def __contains__(self, name: object) -> bool:
        return name in self._row_of

    @property
    def dimension(self) -> int:
        """Numbers of a vector."""
        return int(self._view.tables[0].shape[1])

    def rows(self, at_once: int = 8192) -> Iterator[tuple[list[str], Tensor, list[Item]]]:
        """All items that are offered, in the order in which ties fall, some at a time.

        Yields:
            names, vectors (n, H) as the model gives them, and attributes.
        """
        view, texts = self._view, dict(self._texts)
        kept = np.setdiff1d(np.arange(len(view.names)), view.gone, assume_unique=True)
        table = view.vectors(kept)
        for start in range(0, len(kept), at_once):
            names = [view.names[row] for row in kept[start : start + at_once]]
            yield names, table[start : start + at_once], [texts.get(name, {}) for name in names]

    def user_vectors(self, histories: Sequence[Sequence[HistoryItem]]) -> Tensor:
        """What `recommend` compares items with, for a search elsewhere.

        Args:
            histories: as in `recommend`.

        Returns:
            (B, H) float32 of length 1, zeros for a history of which nothing is known. A model with
            a head scores items of the history by more than their cosines, see
            `recformer.export.vectors`.
        """
        asked, view = self._read_histories(histories), self._view
        filled = [number for number, items in enumerate(asked.known) if len(items)]
        vectors = torch.zeros(len(asked.known), self.dimension)
        if filled:
            users, _ = self._reader.users(asked, filled, view)
            vectors[filled] = torch.nn.functional.normalize(users.float(), dim=-1).cpu()
        return vectors

    # --- asking -------------------------------------------------------------------------------

    def recommend(
        self,
        histories: Sequence[Sequence[HistoryItem]],
        k: int = 10,
        filter_seen: bool = False,
        *,
        allowed: Iterable[str] | None = None,
        blocked: Iterable[str] = (),
        where: Mapping[str, str | Collection[str]] | None = None,
    ) -> list[Recommended]:
        """The k best items for each history.

        Args:
            histories: B lists, oldest first, of names or of items given by their attributes; names
                not in the catalogue are skipped and counted.
            k: items a user.
            filter_seen: leave out items of the history.
            allowed: names of the only items to offer, such as those in stock; None: all. Names that
                the catalogue does not hold do not count.
            blocked: names never to offer.
            where: {attribute: a text, or several}: only items that have one of them.

        Returns:
            B of them, in order; a history of which nothing is known gets a marked fallback.

        Raises:
            UserError: a string in place of a history, k below 1, no item of the catalogue among
                `allowed`, an attribute in `where` that no item has.
        """
        if isinstance(histories, str | Mapping):
            raise UserError(f"histories is {histories!r:.60}, expected a list of lists of names")
        asked = self._read_histories(histories)
        view = self._view  # behind the histories: it has every row that they name
        rows = self._candidates(view, allowed, blocked, where)
        filled = [number for number, items in enumerate(asked.known) if len(items)]
        found: dict[int, Recommended] = {}
        if filled:
            users, additions = self._reader.users(asked, filled, view)
            seen = None
            if filter_seen:
                items = [asked.rows[asked.known[number]] for number in filled]
                items = [each[each >= 0] for each in items]
                counts = [len(each) for each in items]
                seen = (np.repeat(np.arange(len(filled)), counts), np.concatenate(items))
            best = self._best(view, users, k, rows, seen, additions)
            found = dict(zip(filled, best, strict=True))
        fallback = Recommended([], [])
        if len(filled) < len(asked.known):
            fallback = self._fallback(view, k, rows)
        answers = [found.get(number, fallback) for number in range(len(asked.known))]
        return [
            Recommended(answer.items, answer.scores, missed, answer.fallback)
            for answer, missed in zip(answers, asked.unknown, strict=True)
        ]

    def similar_items(
        self,
        item: HistoryItem,
        k: int = 10,
        *,
        allowed: Iterable[str] | None = None,
        blocked: Iterable[str] = (),
        where: Mapping[str, str | Collection[str]] | None = None,
    ) -> Recommended:
        """The k items whose vectors are nearest to that of an item, by cosine.

        Args:
            item: a name in the catalogue, which is left out, or attributes.
            k, allowed, blocked, where: as in `recommend`.

        Raises:
            UserError: as `recommend`, or an unknown name.
        """
        row = None if isinstance(item, Mapping) else self._row_of.get(_name(item))
        view = self._view
        rows = self._candidates(view, allowed, blocked, where)
        if isinstance(item, Mapping):
            store = ItemsInMemory.of([item], self.tokenizer)
            if not len(store.input_ids):
                raise UserError("the item has no text, expected attributes such as a title")
            vector = self._reader.item_vectors(store)
            return self._best(view, vector, k, rows, None)[0]
        if row is None:
            raise UserError(f"{item!r} is not in the catalogue of {len(self):,} items")
        vector = view.at(np.array([row]))
        itself = (np.zeros(1, np.int64), np.array([row]))
        return self._best(view, vector, k, rows, itself)[0]

    # --- changing -----------------------------------------------------------------------------

    def add_items(self, items: Mapping[str, Item]) -> int:
        """Take products into the catalogue; they are recommended and read in histories at once.

        Args:
            items: {name: attributes}.

        Returns:
            Texts that were encoded; those that another added item has are not encoded again.

        Raises:
            UserError: a name that the catalogue holds, or an item without text; nothing is added.
        """
        known = [name for name in items if name in self._row_of]
        if known:
            raise UserError(f"{few(known)} are in the catalogue already: update_items changes them")
        return self._put(items)

    def update_items(self, items: Mapping[str, Item]) -> int:
        """Give products of the catalogue other attributes; only changed texts are encoded.

        Returns:
            Texts that were encoded.

        Raises:
            UserError: a name that the catalogue does not hold, or an item without text; nothing is
                changed.
        """
        self._refuse_unknown(items)
        return self._put(items)

    def remove_items(self, names: Iterable[str]) -> None:
        """Take products out: no longer recommended, unknown in a history.

        Raises:
            UserError: a name that the catalogue does not hold; nothing is removed.
        """
        if isinstance(names, str):
            raise UserError(f"names is the string {names!r}, expected a list of names")
        names = list(dict.fromkeys(names))
        with self._lock:
            self._refuse_unknown(names)
            gone = np.array([self._row_of[name] for name in names], np.int64)
            self._view = replace(self._view, gone=np.union1d(self._view.gone, gone))
            for name in names:
                del self._row_of[name], self._texts[name]
            self._by_attribute = {}

    def _refuse_unknown(self, names: Iterable[str]) -> None:
        unknown = [name for name in names if name not in self._row_of]
        if unknown:
            raise UserError(f"{few(unknown)} are not in the catalogue of {len(self):,} items")

    def _put(self, items: Mapping[str, Item]) -> int:
        """Encode what is new among `items` and give each name the row of its text's vector."""
        wrong = [name for name in items if not isinstance(name, str) or not name]
        if wrong:
            raise UserError(f"{wrong[0]!r} is no name of an item, expected a text")
        with self._lock:
            names = list(items)
            both = [*items.values(), *(self._texts.get(name, {}) for name in names)]
            store = ItemsInMemory.of(both, self.tokenizer)
            empty = np.flatnonzero(store.lengths[: len(names)] == 0)
            if len(empty):
                raise UserError(f"{names[empty[0]]!r} has no text, expected attributes as a title")
            contents = item_keys(store).tolist()
            # An item that reads as before keeps its row, and with it the vector.
            before = contents[len(names) :]
            changed = [i for i in range(len(names)) if contents[i] != before[i]]
            new: dict[bytes, int] = {}  # the first with each text
            for i in changed:
                if contents[i] not in self._row_of_content:
                    new.setdefault(contents[i], i)
            view = self._view
            first = len(view.names)
            known = np.array([self._row_of_content.get(contents[i], -1) for i in changed], np.int64)
            vectors = view.tables[2].new_empty(len(changed), view.tables[2].shape[1])
            vectors[torch.from_numpy(known >= 0)] = view.at(known[known >= 0])
            if new:
                kept = np.zeros(len(store), bool)
                kept[list(new.values())] = True  # `new` is in the order of the store
                encoded = self._reader.item_vectors(store.subset(kept)).float()
                place_of = {content: place for place, content in enumerate(new)}
                for j, i in enumerate(changed):
                    if known[j] < 0:
                        vectors[j] = encoded[place_of[contents[i]]]
            row_of = {names[i]: first + j for j, i in enumerate(changed)}
            gone = [self._row_of[name] for name in row_of if name in self._row_of]
            # Names and texts first: a reader may meet a row, once it is offered, by its name.
            self._texts |= {name: dict(items[name]) for name in names}
            self._view = _View(
                [*view.names, *row_of],
                (*view.tables[:2], torch.cat([view.tables[2], vectors])),
                np.union1d(view.gone, np.array(gone, np.int64)),
            )
            self._row_of |= row_of
            self._row_of_content |= {contents[i]: row_of[names[i]] for i in changed}
            self._by_attribute = {}
            return len(new)

    # --- within -------------------------------------------------------------------------------

    def _read_histories(self, histories: Sequence[Sequence[HistoryItem]]) -> _Asked:
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
                    name = _name(entry)
                    row, text = self._row_of.get(name, -1), self._texts.get(name, {})
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
        return _Asked(items, np.array(row_at, np.int64), known, unknown)

    def _best(
        self,
        view: _View,
        users: Tensor,
        k: int,
        rows: NDArray[np.int64] | None,
        seen: tuple[NDArray, NDArray] | None,
        additions: Additions | None = None,
    ) -> list[Recommended]:
        """The best of `rows` (None: of all) for each user vector (B, H).

        `seen` and `additions` name items by their rows.
        """
        if k < 1:
            raise UserError(f"k is {k}, expected at least one item a user")
        if rows is not None:  # rows of the catalogue become places among `rows`
            if seen is not None:
                inside, places = _places(rows, seen[1])
                seen = (seen[0][inside], places[inside])
            if additions is not None:
                users_of, items_of, values = map(np.asarray, additions)
                inside, places = _places(rows, items_of)
                additions = (users_of[inside], places[inside], values[inside])
        table = view.vectors(rows)
        k = min(k, max(table.shape[0], 1))
        items, scores = top_items_by_vectors(users, table, k, seen, additions=additions)
        answers = []
        for found, values in zip(items, scores, strict=True):
            kept = found >= 0
            chosen = found[kept] if rows is None else rows[found[kept]]
            answers.append(Recommended([view.names[row] for row in chosen], values[kept].tolist()))
        return answers

    def _candidates(
        self,
        view: _View,
        allowed: Iterable[str] | None,
        blocked: Iterable[str],
        where: Mapping[str, str | Collection[str]] | None,
    ) -> NDArray[np.int64] | None:
        """Ascending rows that may be offered; None where all may."""
        if isinstance(allowed, str) or isinstance(blocked, str):
            raise UserError("allowed and blocked are lists of names, got a string")
        keep = None
        if allowed is not None:
            names = list(allowed)
            keep = np.unique([self._row_of[name] for name in names if name in self._row_of])
            keep = keep.astype(np.int64)
            if not len(keep):
                raise UserError(f"none of the {len(names):,} allowed items is in the catalogue")
        for attribute, values in (where or {}).items():
            rows = self._rows_where(attribute, [values] if isinstance(values, str) else values)
            keep = rows if keep is None else np.intersect1d(keep, rows)
        out = [self._row_of[name] for name in blocked if name in self._row_of]
        gone = np.union1d(view.gone, np.array(out, np.int64))
        if keep is None and not len(gone):
            return None
        if keep is None:
            keep = np.arange(len(view.names))
        return np.setdiff1d(keep, gone, assume_unique=True)

    def _rows_where(self, attribute: str, values: Collection[str]) -> NDArray[np.int64]:
        if attribute not in self._by_attribute:
            rows_of: dict[str, list[int]] = {}
            for name, row in list(self._row_of.items()):
                value = self._texts.get(name, {}).get(attribute)
                for text in value if isinstance(value, list | tuple) else [value]:
                    if text is not None:
                        rows_of.setdefault(str(text), []).append(row)
            if not rows_of:
                raise UserError(f"where: no item of the catalogue has the attribute {attribute!r}")
            self._by_attribute[attribute] = rows_of
        rows_of = self._by_attribute[attribute]
        return np.unique([row for value in values for row in rows_of.get(str(value), ())]).astype(
            np.int64
        )

    def _fallback(self, view: _View, k: int, rows: NDArray[np.int64] | None) -> Recommended:
        """What is offered to a user of whom nothing is known."""
        if k < 1:
            raise UserError(f"k is {k}, expected at least one item a user")
        if not self.counts:
            order = np.arange(len(view.names))[::-1]
        else:
            cached = self._popular
            if cached is None or cached[0] is not view:
                counts = np.array([self.counts.get(name, 0) for name in view.names])
                cached = self._popular = (view, np.argsort(-counts, kind="stable"))
            order = cached[1]
        if rows is not None:
            offered = np.zeros(len(view.names), bool)
            offered[rows] = True
            order = order[offered[order]]
        names = [view.names[row] for row in order[:k]]
        if not self.counts:
            return Recommended(names, [0.0] * len(names), fallback="newest")
        scores = [float(self.counts.get(name, 0)) for name in names]
        return Recommended(names, scores, fallback="popular")


def _places(
    rows: NDArray[np.int64], wanted: NDArray[np.int64]
) -> tuple[NDArray[np.bool_], NDArray[np.int64]]:
    """Which of some rows stand in the ascending `rows`, and where those do."""
    if not len(rows):
        return np.zeros(len(wanted), bool), np.zeros(len(wanted), np.int64)
    places = np.searchsorted(rows, wanted).clip(max=len(rows) - 1)
    return rows[places] == wanted, places


def _name(entry: Any) -> str:
    """The name that an entry of a history is; numbers are their text."""
    if isinstance(entry, str):
        return entry
    if isinstance(entry, Integral) and not isinstance(entry, bool):
        return str(entry)
    raise UserError(
        f"a history holds {entry!r:.60}, expected names of items or their attributes "
        '({"title": …, …})'
    )
