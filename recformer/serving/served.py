"""A model that is being served: its catalogue with what came over HTTP, its thread, its search."""

from __future__ import annotations

import logging
import threading
import time
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sqlalchemy.exc import SQLAlchemyError

from recformer.data.items import ItemsInMemory
from recformer.files import UserError
from recformer.models import kernel
from recformer.recommendation import CatalogueRecommender, Explanation, HistoryItem, Recommended
from recformer.serving.batching import ModelThread
from recformer.serving.items import Shape
from recformer.serving.metrics import Metrics
from recformer.serving.search import TextSearch
from recformer.serving.store import ItemRow, Store
from recformer.tokenization import Item
from recformer.training.item_encoder import vectors_key

logger = logging.getLogger("recformer.serving")

# Up to so many items are left out of a longer answer; more of them narrow the candidates.
FEW_LEFT_OUT = 256
# Histories whose vectors are kept, for users who ask again; some MB.
USERS_REMEMBERED = 10_000
# Newest entries of a history that are left out, one at a time, to say what carries a score.
REASONS_TRIED = 20
# Items taken over at a time: between requests, or while nobody asks.
FEW_ROWS, MANY_ROWS = 16, 1024


@dataclass(frozen=True)
class Filters:
    """Filters that all questions of one batch have in common."""

    filter_seen: bool = False
    allowed: tuple[str, ...] | None = None
    blocked: tuple[str, ...] = ()
    where: tuple[tuple[str, tuple[str, ...]], ...] = ()
    diversity: float = 0.0


@dataclass(frozen=True)
class Question:
    """One history to be answered."""

    history: Sequence[HistoryItem]
    k: int
    left_out: frozenset[str] = frozenset()


class DatabaseVectors:
    """Vectors of texts in the database, so that a restarted service encodes none of them again.

    Args:
        store: the database.
        model: key of all that a vector depends on beside its text.
    """

    def __init__(self, store: Store, model: str) -> None:
        self.store, self.model = store, model
        self._new: dict[bytes, NDArray[np.float32]] = {}

    def find(self, contents: list[bytes]) -> Mapping[bytes, NDArray[np.float32]]:
        """As `KeptVectors`."""
        return self.store.vectors(self.model, contents)

    def keep(self, vectors: Mapping[bytes, NDArray[np.float32]]) -> None:
        """As `KeptVectors`; `flush` writes them, outside of the thread of the model."""
        self._new |= vectors

    def flush(self) -> None:
        """Write them. A failure is logged: they can be made again."""
        new, self._new = self._new, {}
        if not new:
            return
        try:
            self.store.put_vectors(self.model, new)
        except SQLAlchemyError as error:
            fields = {"vectors": len(new), "error": str(error).splitlines()[0]}
            logger.warning("vectors not kept", extra={"fields": fields})


class Served:
    """One loaded model; changes and questions go through its thread.

    Args:
        folder: of the model.
        name: "main" or "beside".
        meta_file: as `CatalogueRecommender.load` has it.
        metrics: counts batches.
        most: questions in a batch.
        bf16: compute in bfloat16 what reads texts; scores move in the fourth digit.
        store: the database, which keeps vectors of items that are added; None keeps none.
        cores: that compute; None: torch's number of threads, of which threads that begin after
            a model was loaded see 1.

    Attributes:
        recommender: the model with its catalogue.
        base: attributes by name of the folder's own catalogue.
        shape: which attributes items have.
        version: raised by every change.
    """

    def __init__(
        self,
        folder: Path,
        name: str,
        metrics: Metrics,
        meta_file: Path | None = None,
        most: int = 64,
        bf16: bool = False,
        store: Store | None = None,
        cores: int | None = None,
    ) -> None:
        if not (folder / "model.safetensors").is_file():
            raise UserError(
                f"{folder} has no model.safetensors: the server opens no pickled weights; name the "
                "best_model folder of `recformer finetune`, or convert the checkpoint first"
            )
        self.folder, self.name, self.metrics = folder, name, metrics
        self.recommender = CatalogueRecommender.load(folder, meta_file)
        self.recommender.remember_users(USERS_REMEMBERED)
        self.kept: DatabaseVectors | None = None
        if store is not None:
            precision = "bf16-mixed" if bf16 else "32-true"
            self.kept = DatabaseVectors(store, vectors_key(self.recommender.model, precision))
        if bf16 and computes_in_bfloat16() and not torch.cuda.is_available():
            self.recommender.search_in_bfloat16()
        self.base: dict[str, Any] = dict(self.recommender.texts)
        self._names = sorted(self.base)
        self.shape = Shape.of(self.base)
        self.search = TextSearch({n: self._words(item) for n, item in self.base.items()})
        self.hidden: frozenset[str] = frozenset()
        self.version = 0
        self.thread: ModelThread[Filters, Question, Recommended]
        self.thread = ModelThread(self._answers, most, name)
        # A batch is cut into a part a core, each computed by one thread: parts never wait for each
        # other, where the threads of an operation wait after every one of hundreds, for a core
        # that another request may hold (docs/guides/serving.md). A question alone has one thread
        # too, but for the encoder's kernel, which is one operation.
        self.cores = torch.get_num_threads() if cores is None else cores
        self._here = threading.local()
        self._parts = ThreadPoolExecutor(self.cores, name, self._begin_part)
        self._wrap_encoder(bf16)
        self.thread.run(lambda: torch.set_num_threads(1))
        metrics.catalogue.labels(name).set(len(self.recommender))

    def close(self) -> None:
        """End its threads when all that waits is done."""
        self.thread.close()
        self._parts.shutdown()

    def _begin_part(self) -> None:
        torch.set_num_threads(1)
        self._here.part = True

    def _wrap_encoder(self, bf16: bool) -> None:
        """Encode in bfloat16, or not, and with all cores where no other part of a batch runs."""
        encoder: Any = self.recommender.model.longformer
        encode, device = encoder.encode, encoder.device.type
        in_kernel = device == "cpu" and kernel.runs(
            encoder, torch.bfloat16 if bf16 else torch.float32
        )
        if bf16 and not in_kernel:  # which keeps weights of its own
            for module in encoder.modules():
                if isinstance(module, torch.nn.Linear):  # else autocast converts them every time
                    module.to(torch.bfloat16)

        def wrapped(packed: Any) -> Any:
            threads = torch.get_num_threads()
            if in_kernel and not getattr(self._here, "part", False):
                torch.set_num_threads(self.cores)
            try:
                with torch.autocast(device, torch.bfloat16, enabled=bf16):
                    return encode(packed)
            finally:
                torch.set_num_threads(threads)

        encoder.encode = wrapped

    def _words(self, attributes: Mapping[str, Any]) -> str:
        values = [attributes.get(self.shape.title), attributes.get("brand")]
        return " ".join(str(value) for value in values if value)

    # --- changes ------------------------------------------------------------------------------

    def apply(self, rows: Sequence[ItemRow], asked: bool = True) -> None:
        """Take changed items over; of an item without text those of the folder hold.

        Args:
            rows: of the items.
            asked: requests may come meanwhile and are answered between a few items; else all
                cores encode many at a time.
        """
        threads = torch.get_num_threads()
        if not asked:  # the thread that loads a model later has one
            torch.set_num_threads(self.cores)
        try:
            self._apply_all(rows, asked)
        finally:
            torch.set_num_threads(threads)

    def _apply_all(self, rows: Sequence[ItemRow], asked: bool) -> None:
        at_once = FEW_ROWS if asked else MANY_ROWS
        for start in range(0, len(rows), at_once):
            part = rows[start : start + at_once]
            if asked:
                self.thread.run(lambda part=part: self._apply(part))  # type: ignore[misc]
            else:
                self._apply(part)
            if self.kept is not None:
                self.kept.flush()

    def effective(self, row: ItemRow) -> dict[str, Any] | None:
        """The attributes an item has from now on; None where it is not in the catalogue."""
        if row.deleted:
            return None
        attributes = self.shape.attributes(row)
        if attributes:
            store = ItemsInMemory.of([attributes], self.recommender.tokenizer)
            if not store.lengths[0]:
                attributes = {}
        return attributes or self.base.get(row.item_id)

    def _apply(self, rows: Sequence[ItemRow]) -> None:
        wanted = {row.item_id: self.effective(row) for row in rows}
        texts = {name: item for name, item in wanted.items() if item}
        # An item of the folder may have a learned vector and no text: it stays as it is.
        gone = [name for name, item in wanted.items() if item is None and name in self.recommender]
        if gone:
            self.recommender.remove_items(gone)
            self.search.remove(gone)
        if texts:
            self.recommender.put_items(texts, kept=self.kept)
        self.search.put({name: self._words(item) for name, item in texts.items()})
        names = set(wanted)
        hidden = {row.item_id for row in rows if row.is_hidden and wanted[row.item_id] is not None}
        self.hidden = frozenset((self.hidden - names) | hidden)
        self.version += 1
        self.metrics.catalogue.labels(self.name).set(len(self.recommender))

    # --- questions ----------------------------------------------------------------------------

    @property
    def label(self) -> str:
        """The end of the folder's path, for people."""
        return "/".join(self.folder.absolute().parts[-2:])

    @property
    def method(self) -> str:
        """Of finetuning."""
        headed = getattr(self.recommender.model.config, "head", None) is not None
        return "head" if headed else "published"

    def names_after(self, cursor: str) -> Iterator[str]:
        """Names of the folder's own items behind `cursor`, ascending."""
        start = bisect_right(self._names, cursor)
        return (self._names[place] for place in range(start, len(self._names)))

    def in_categories(self, categories: Sequence[str]) -> Filters | None:
        """Filters of what is in all of some categories; None where nothing is."""
        wanted = {each for each in categories if each}
        if not wanted:
            return Filters()
        if len(wanted) == 1 and self.shape.category in self.shape.names:
            return Filters(where=((self.shape.category, tuple(wanted)),))
        found = []
        for name, item in list(self.recommender.texts.items()):
            value = item.get(self.shape.category)
            if wanted <= set(value if isinstance(value, list) else [value]):
                found.append(name)
        return Filters(allowed=tuple(found)) if found else None

    def attributes(self, name: str) -> Item | None:
        """Of an item of the catalogue as it is now."""
        return self.recommender.texts.get(name)

    def recommend(self, question: Question, filters: Filters) -> Recommended:
        """As `CatalogueRecommender.recommend`, of one history; hidden items are not offered."""
        if filters.allowed is not None:
            known = [name for name in filters.allowed if name in self.recommender]
            if not known:
                raise UserError(
                    f"none of the {len(filters.allowed)} allowed items is in the catalogue"
                )
        answer = self.thread.ask(filters, question)
        if answer.fallback:
            self.metrics.fallbacks.labels(self.name, answer.fallback).inc()
        return answer

    def similar(self, item: HistoryItem, k: int, filters: Filters) -> Recommended:
        """As `CatalogueRecommender.similar_items`; hidden items are not offered."""
        hidden = self.hidden
        found = self.thread.run(
            lambda: self.recommender.similar_items(
                item,
                k + len(hidden),
                allowed=filters.allowed,
                blocked=filters.blocked,
                where=dict(filters.where),
            )
        )
        return _without(found, hidden, k)

    def reasons(
        self, history: Sequence[HistoryItem], items: Sequence[str]
    ) -> dict[str, tuple[int, float]]:
        """For each item the place in the history of what carries most of its score, and how much.

        An entry carries the part of the score that is lost without it; the newest alone are tried.
        All shortened histories are read in one batch, whatever the number of items.
        """
        known = [name for name in items if name in self.recommender]
        tried = range(max(0, len(history) - REASONS_TRIED), len(history))
        if not known or len(history) < 2:
            return {name: (0, 0.0) for name in known if history}
        shorter = [[*history[:place], *history[place + 1 :]] for place in tried]

        def scores() -> list[dict[str, float]]:
            answers = self.recommender.recommend([history, *shorter], len(known), allowed=known)
            return [dict(zip(answer.items, answer.scores, strict=True)) for answer in answers]

        whole, *without = self.thread.run(scores)
        found = {}
        for name in known:
            carried = [whole[name] - each.get(name, 0.0) for each in without]
            best = max(range(len(carried)), key=carried.__getitem__)
            found[name] = (tried[best], carried[best])
        return found

    def explain(self, history: Sequence[HistoryItem], item: HistoryItem) -> Explanation:
        """As `CatalogueRecommender.explain`."""
        return self.thread.run(lambda: self.recommender.explain(history, item))

    def _answers(self, filters: Filters, questions: list[Question]) -> list[Recommended]:
        start = time.perf_counter()
        parts = np.array_split(np.arange(len(questions)), min(self.cores, len(questions)))
        cut = [[questions[place] for place in part] for part in parts]
        each = map if len(cut) == 1 else self._parts.map
        found = each(lambda part: self._answers_of_part(filters, part), cut)
        answers = [answer for part in found for answer in part]
        self.metrics.batches.labels(self.name).observe(len(questions))
        self.metrics.computing.labels(self.name).observe(time.perf_counter() - start)
        return answers

    def _answers_of_part(self, filters: Filters, questions: list[Question]) -> list[Recommended]:
        hidden = self.hidden
        many = len(hidden) > FEW_LEFT_OUT
        blocked = (*filters.blocked, *hidden) if many else filters.blocked
        left_out = [question.left_out | (frozenset() if many else hidden) for question in questions]
        histories = [question.history for question in questions]
        if filters.diversity:  # what is left out would change what is chosen behind it
            answers = [
                self.recommender.recommend(
                    [question.history],
                    question.k,
                    filters.filter_seen,
                    allowed=filters.allowed,
                    blocked=(*blocked, *names),
                    where=dict(filters.where),
                    diversity=filters.diversity,
                )[0]
                for question, names in zip(questions, left_out, strict=True)
            ]
        else:
            answers = self.recommender.recommend(
                histories,
                max(question.k + len(names) for question, names in zip(questions, left_out)),
                filters.filter_seen,
                allowed=filters.allowed,
                blocked=blocked,
                where=dict(filters.where),
            )
        return [
            _without(answer, names, question.k)
            for answer, names, question in zip(answers, left_out, questions, strict=True)
        ]


def computes_in_bfloat16() -> bool:
    """True where bfloat16 is the quicker form: the GPU, or a processor with instructions for it."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return not kernel.cpu_flags().isdisjoint(("amx_bf16", "avx512_bf16"))


def _without(answer: Recommended, names: frozenset[str], k: int) -> Recommended:
    """The first k of an answer, some items left out."""
    kept = [place for place, name in enumerate(answer.items) if name not in names][:k]
    return replace(
        answer,
        items=[answer.items[place] for place in kept],
        scores=[answer.scores[place] for place in kept],
    )
