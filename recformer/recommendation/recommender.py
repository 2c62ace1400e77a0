"""Histories in, items out: a model with its catalogue, which may change."""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from recformer.data.catalogue import COUNT_FILE
from recformer.data.items import ItemsInMemory
from recformer.data.processed import ITEM_FILE
from recformer.evaluation.additions import Additions
from recformer.files import (
    UserError,
    alone,
    atomic_folder,
    check_folder,
    read_json,
    sha256_of,
    write_checksums,
    write_json,
)
from recformer.models import RecformerForCatalogue
from recformer.recommendation.answers import (
    Explanation,
    HistoryItem,
    Recommended,
    name_of,
)
from recformer.recommendation.approximate import ApproximateIndex
from recformer.recommendation.catalogue import KeptVectors, LiveCatalogue
from recformer.recommendation.diversity import (
    LEAST_POOL,
    POOL,
    check_diversity,
    marginally_relevant,
)
from recformer.recommendation.explaining import explained
from recformer.recommendation.folder import Model, model_key, model_of, names_of, stamp_of, texts_of
from recformer.recommendation.reading import ItemByItem, Remembered, Sequences
from recformer.recommendation.saving import (
    CATALOGUE_FILE,
    SavedCatalogue,
    catalogue_key,
    load_catalogue,
    save_catalogue,
)
from recformer.recommendation.search import best_rows
from recformer.recommendation.view import Offered, Rows, View
from recformer.tokenization import Item, RecformerTokenizer
from recformer.training.item_encoder import item_keys

# Beside the model: vectors of products that it was not finetuned on, keyed by content.
VECTORS_FOLDER = "vectors"


class CatalogueRecommender:
    """A model with its catalogue, which may change while others read it; see `load`.

    Args:
        model: encodes; its item table, if any, holds the vectors of the first items.
        tokenizer: the model's.
        texts: {name: attributes} of the catalogue; those of the item table first, in its order.
        counts: interactions in training by name, for histories of which nothing is known.
        cache_dir: where vectors of the other items are kept; None keeps none.
        saved: what the catalogue was changed to; `texts` are then the item table's.

    Examples:
        >>> recommender = CatalogueRecommender.load("result/best_model")
        >>> len(recommender), recommender.texts["tent-4"]["title"]
        (48, 'white tent number 4')
        >>> histories = [["tent-4", "tent-5"], ["tent-4", {"title": "a lamp that nobody sells"}]]
        >>> for best in recommender.recommend(histories, k=3, filter_seen=True):
        ...     print(len(best.items), best.num_unknown, "tent-4" in best.items)
        3 0 False
        3 0 False
        >>> recommender.add_items({"tent-new": {"title": "white tent number 4"}})
        1
        >>> (best,) = recommender.recommend([["lamp-1"]], k=1, allowed=["tent-new", "pan-0"])
        >>> best.items[0] in {"tent-new", "pan-0"}
        True
        >>> recommender.recommend([[]], k=1)[0].fallback  # nothing is known of this user
        'popular'
    """

    def __init__(
        self,
        model: Model,
        tokenizer: RecformerTokenizer,
        texts: Mapping[str, Item],
        counts: Mapping[str, int] | None = None,
        cache_dir: str | os.PathLike | None = None,
        saved: SavedCatalogue | None = None,
    ) -> None:
        self.model = model.eval()
        self.tokenizer = tokenizer
        self._cache_dir = cache_dir
        self._reader: Sequences | ItemByItem
        if isinstance(model, RecformerForCatalogue):
            self._reader = ItemByItem(model, tokenizer)
        else:
            self._reader = Sequences(model, tokenizer)
        self.counts = dict(counts or {})
        if model.item_embedding is None:
            base = torch.empty(0, model.config.hidden_size, device=model.device)
        else:
            base = model.item_embedding.weight.detach()
        if saved is None:
            others = list(texts)[len(base) :]
            store = ItemsInMemory.of([texts[name] for name in others], tokenizer)
            readable = store.lengths > 0
            store, others = store.subset(readable), [n for n, r in zip(others, readable) if r]
            vectors = self._reader.item_vectors(store, cache_dir) if len(store) else base[:0]
            names = [*list(texts)[: len(base)], *others]
            saved = SavedCatalogue(
                {name: texts[name] for name in names},
                np.empty(0, np.int64),
                vectors,
                item_keys(store).tolist(),
            )
        else:
            left = len(base) - len(saved.gone)
            names = [*list(texts)[: len(base)], *list(saved.texts)[left:]]
        self.catalogue = LiveCatalogue(
            names,
            dict(saved.texts),
            (base, saved.vectors.to(base.device)),
            saved.contents,
            saved.gone,
            tokenizer,
            self._reader.item_vectors,
        )
        row_of = self.catalogue.row_of
        self._popular = sorted(
            self.counts, key=lambda name: (-self.counts[name], row_of.get(name, -1))
        )
        self._home: tuple[Path, int, int] | None = None  # the model's file, as it was loaded
        self._index: ApproximateIndex | None = None

    @classmethod
    def load(
        cls, folder: str | os.PathLike, meta_file: str | os.PathLike | None = None
    ) -> CatalogueRecommender:
        """Read the folder of the best model that `recformer.finetune` leaves, or that `save` wrote.

        A Recformer folder without item vectors and without smap.json recommends as well: all items
        are then encoded.

        Args:
            folder: model with item vectors, tokenizer, smap.json and meta_data.json; a catalogue
                that `save` left there is taken as it was, and nothing is encoded.
            meta_file: texts of the items ({name: {attribute: text}}), where the folder has none or
                the catalogue has grown; takes the place of a saved catalogue.

        Raises:
            FileNotFoundError: the folder or one of its files is missing.
            UserError: files that do not belong together, or a damaged one.
        """
        folder = Path(folder)
        check_folder(folder)
        names = names_of(folder)
        changed = meta_file is None and (folder / CATALOGUE_FILE).exists()
        texts = {} if changed else texts_of(folder, meta_file, names)
        model = model_of(folder, len(names))
        saved = load_catalogue(folder, len(names), model_key(model)) if changed else None
        tokenizer = RecformerTokenizer.from_pretrained(folder, model.config)
        counts = folder / COUNT_FILE
        device = "cuda" if torch.cuda.is_available() else "cpu"
        recommender = cls(
            model.to(device),
            tokenizer,
            {name: texts.get(name, {}) for name in names} | texts,
            read_json(counts) if counts.is_file() else None,
            folder / VECTORS_FOLDER if os.access(folder, os.W_OK) else None,
            saved,
        )
        recommender._home = stamp_of(folder)
        return recommender

    def save(self, folder: str | os.PathLike) -> None:
        """Write the catalogue as it is now, for `load`; nothing has to be encoded there again.

        In the folder of this model the catalogue alone is written, elsewhere model and tokenizer
        too. Whoever loads the folder meanwhile has the catalogue of before or this one, whole.

        Args:
            folder: the model's own, one that does not exist, or one that `save` wrote.

        Raises:
            UserError: the folder holds another model, or something else.
        """
        folder = Path(folder)
        if (folder / "config.json").exists():
            self._check_model_of(folder)
            with alone(folder):
                save_catalogue(folder, self.catalogue.snapshot(), self._model_key)
            return
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise UserError(f"{folder} holds something else, expected a model or an empty folder")
        with atomic_folder(folder) as new:
            self.model.save_pretrained(new)
            self.tokenizer.save_pretrained(new)
            own = self.catalogue.view.names[: self.catalogue.base]
            if own:
                write_json(new / ITEM_FILE, {name: row for row, name in enumerate(own)})
            if self.counts:
                write_json(new / COUNT_FILE, self.counts)
            write_checksums(new)
            save_catalogue(new, self.catalogue.snapshot(), self._model_key)

    def content_key(self) -> str:
        """SHA-256 (hex) of what answers depend on: model, catalogue, way of searching."""
        index = "" if self._index is None else repr(self._index.manifest)
        counts = json.dumps(self.counts)
        key = catalogue_key(self.catalogue.snapshot(), self._model_key)
        return sha256_of(key, index, counts)

    @cached_property
    def _model_key(self) -> str:
        return model_key(self.model)

    def _check_model_of(self, folder: Path) -> None:
        stamp = stamp_of(folder)
        if stamp is not None and stamp == self._home:
            return
        if model_key(model_of(folder, len(names_of(folder)))) != self._model_key:
            raise UserError(
                f"{folder} holds another model than this catalogue's: save it elsewhere"
            )
        self._home = stamp

    def __len__(self) -> int:
        return len(self.catalogue)

    def __contains__(self, name: object) -> bool:
        return name in self.catalogue.row_of

    @property
    def texts(self) -> Mapping[str, Item]:
        """{name: attributes} of the catalogue as it is, not to be written to."""
        return self.catalogue.texts

    @property
    def dimension(self) -> int:
        """Numbers of a vector."""
        return int(self.catalogue.view.tables[0].shape[1])

    def rows(self, at_once: int = 8192) -> Iterator[tuple[list[str], Tensor, list[Item]]]:
        """All items that are offered, in the order in which ties fall, some at a time.

        Yields:
            names, vectors (n, H) as the model gives them, and attributes.
        """
        now = self.catalogue.snapshot()
        kept = np.setdiff1d(np.arange(len(now.view)), now.view.gone, assume_unique=True)
        table = Rows(now.view.tables, kept)
        for start in range(0, len(kept), at_once):
            names = [now.view.names[row] for row in kept[start : start + at_once]]
            vectors = table[start : start + at_once]
            yield names, vectors, [now.texts.get(name, {}) for name in names]

    def remember_users(self, most: int) -> None:
        """Keep the vectors of the last `most` histories that were read, by the tokens of them.

        A history that is asked again is then not read again. A model with a head has no use for
        this: it reads no texts of known items.
        """
        if isinstance(self._reader, Sequences):
            self._reader.remembered = Remembered(most)

    def search_in_bfloat16(self) -> None:
        """Look at vectors in bfloat16 first, half as many bytes; the answers are the same.

        For a processor that multiplies in bfloat16. Costs half the memory of the vectors again.
        """
        self.catalogue.keep_units()

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
        diversity: float = 0.0,
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
            diversity: from 0, the ranking as it is, to 1; each item is chosen by
                (1 - diversity) x its score - diversity x its largest cosine to an item chosen
                before it (maximal marginal relevance), among the best 10 k, at least 100.

        Returns:
            B of them, in order; a history of which nothing is known gets a marked fallback.

        Raises:
            UserError: a string in place of a history, k below 1, no item of the catalogue among
                `allowed`, an attribute in `where` that no item has.
        """
        if isinstance(histories, str | Mapping):
            raise UserError(f"histories is {histories!r:.60}, expected a list of lists of names")
        _check_k(k)
        check_diversity(diversity)
        with self.catalogue.lock:
            asked = self.catalogue.read_histories(histories)
            offered = self.catalogue.offered(allowed, blocked, where)
            view = self.catalogue.view
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
            best = self._best(view, users, k, offered, seen, additions, diversity)
            found = dict(zip(filled, best, strict=True))
        fallback = Recommended([], [])
        if len(filled) < len(asked.known):
            fallback = self._fallback(view, k, offered)
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
        _check_k(k)
        with self.catalogue.lock:
            row = self._row(item)
            offered = self.catalogue.offered(allowed, blocked, where)
            view = self.catalogue.view
        if row is None:
            assert isinstance(item, Mapping)
            store = ItemsInMemory.of([item], self.tokenizer)
            if not len(store.input_ids):
                raise UserError("the item has no text, expected attributes such as a title")
            return self._best(view, self._reader.item_vectors(store), k, offered)[0]
        itself = (np.zeros(1, np.int64), np.array([row]))
        return self._best(view, view.at(np.array([row])), k, offered, itself)[0]

    def use_index(self, index: ApproximateIndex | None) -> None:
        """Search through an approximate index from now on; None: exactly, as at first.

        Filters, scores, and products added since it was built are as without it; items of a true
        best list may be missed, see its recall. A request that few items may answer, and a user
        for whom the index finds too few, are searched exactly.
        """
        self._index = index

    def user_vectors(self, histories: Sequence[Sequence[HistoryItem]]) -> Tensor:
        """Vectors (B, H) float32 of the histories of which something is known."""
        with self.catalogue.lock:
            asked = self.catalogue.read_histories(histories)
            view = self.catalogue.view
        filled = [number for number, items in enumerate(asked.known) if len(items)]
        if not filled:
            return view.tables[0][:0].float()
        return self._reader.users(asked, filled, view)[0]

    def explain(self, history: Sequence[HistoryItem], item: HistoryItem) -> Explanation:
        """Share of a score that each item of the history, and each attribute of the item, carries.

        Args:
            history: as one of `recommend`.
            item: a name in the catalogue, or attributes.

        Returns:
            See `Explanation`: what is lost without each, and what is left over.

        Raises:
            UserError: an unknown name, an item without text that no row stands for, or a history of
                which nothing is known.
        """
        with self.catalogue.lock:
            asked = self.catalogue.read_histories([history])
            row = self._row(item)
            text = item if isinstance(item, Mapping) else self.catalogue.texts[name_of(item)]
            view = self.catalogue.view
            named = [e if isinstance(e, Mapping) else name_of(e) for e in history]
            entries = [e for e in named if (bool(e) if isinstance(e, Mapping) else e in self)]
        if not len(asked.known[0]):
            raise UserError("nothing of the history is known: there is nothing to explain")
        if row is None and not len(ItemsInMemory.of([text], self.tokenizer).input_ids):
            raise UserError("the item has no text, expected attributes such as a title")
        most = self.model.config.max_attr_num
        return explained(self._reader, asked, entries, item, text, row, view, most)

    def _row(self, item: HistoryItem) -> int | None:
        """The row of a name, None for attributes; under the catalogue's lock."""
        if isinstance(item, Mapping):
            return None
        row = self.catalogue.row_of.get(name_of(item))
        if row is None:
            raise UserError(f"{item!r} is not in the catalogue of {len(self):,} items")
        return row

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
        return self.catalogue.put(items, known=False)

    def update_items(self, items: Mapping[str, Item]) -> int:
        """Give products of the catalogue other attributes; only changed texts are encoded.

        Returns:
            Texts that were encoded.

        Raises:
            UserError: a name that the catalogue does not hold, or an item without text; nothing is
                changed.
        """
        return self.catalogue.put(items, known=True)

    def put_items(
        self, items: Mapping[str, Item], keep: bool = False, kept: KeptVectors | None = None
    ) -> int:
        """Add those of the products that are new, and update the others.

        Args:
            items: {name: attributes}.
            keep: keep their vectors in the model's folder, so that they are encoded once, whoever
                brings them again.
            kept: vectors of this model kept elsewhere, taken in place of encoding a text; gets
                those that it lacks.

        Returns:
            Texts that were encoded.

        Raises:
            UserError: an item without text; nothing is changed.
        """
        if not items:
            return 0
        return self.catalogue.put(items, cache_dir=self._cache_dir if keep else None, kept=kept)

    def remove_items(self, names: Iterable[str]) -> None:
        """Take products out: no longer recommended, unknown in a history.

        Raises:
            UserError: a name that the catalogue does not hold; nothing is removed.
        """
        self.catalogue.remove(names)

    # --- within -------------------------------------------------------------------------------

    def _best(
        self,
        view: View,
        users: Tensor,
        k: int,
        offered: Offered,
        seen: tuple[NDArray, NDArray] | None = None,
        additions: Additions | None = None,
        diversity: float = 0.0,
    ) -> list[Recommended]:
        """The best of what is offered for each user vector (B, H).

        `seen` and `additions` name items by their rows.
        """
        pool = max(POOL * k, LEAST_POOL) if diversity else k
        items, scores = best_rows(view, users, pool, offered, seen, additions, self._index)
        answers = []
        for found, values in zip(items, scores, strict=True):
            kept = found >= 0
            rows, best = found[kept], values[kept]
            if diversity:
                places = marginally_relevant(torch.from_numpy(best), view.at(rows), k, diversity)
                rows, best = rows[places], best[places]
            answers.append(Recommended([view.names[row] for row in rows], best.tolist()))
        return answers

    def _fallback(self, view: View, k: int, offered: Offered) -> Recommended:
        """Items offered to a user of whom nothing is known."""
        mask = offered.mask(len(view))
        if not self.counts:
            newest = np.flatnonzero(mask)[::-1][:k]
            names = [view.names[row] for row in newest]
            return Recommended(names, [0.0] * len(names), fallback="newest")
        rows: list[int] = []
        for name in self._popular:
            row = self.catalogue.row_of.get(name, len(mask))
            if row < len(mask) and mask[row]:
                rows.append(row)
                mask[row] = False
            if len(rows) == k:
                break
        rows += np.flatnonzero(mask)[: k - len(rows)].tolist()
        names = [view.names[row] for row in rows]
        scores = [float(self.counts.get(name, 0)) for name in names]
        return Recommended(names, scores, fallback="popular")


def _check_k(k: int) -> None:
    if k < 1:
        raise UserError(f"k is {k}, expected at least one item a user")
