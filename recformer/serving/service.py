"""The service behind the routes: models, the database, and how the two stay the same.

A change is written to the database, then taken over by every model, then acknowledged; one change
of the catalogue at a time. A model that is being loaded takes over what is in the database and,
before it takes its place, what was changed meanwhile.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from recformer.files import UserError
from recformer.recommendation import HistoryItem, Recommended
from recformer.serving.metrics import Metrics
from recformer.serving.served import Question, Served
from recformer.serving.store import FeedbackRow, ItemRow, Store, bare_item
from recformer.serving.times import now

logger = logging.getLogger("recformer.serving")

# Feedback may come from a clock that is ahead (microseconds).
CLOCK_ERROR = 5_000_000

ModelName = Literal["main", "beside"]
MAIN: ModelName = "main"
BESIDE: ModelName = "beside"


class BusyError(Exception):
    """A model is being loaded already."""


@dataclass(frozen=True)
class Limits:
    """Of single requests.

    Attributes:
        body: bytes.
        k: items asked for, with those that are skipped.
        rows: items, users or pieces of feedback sent at once.
        history: items of a history; of longer ones the newest count.
        batch: histories in a batch; 1 answers each alone.
    """

    body: int = 16 * 2**20
    k: int = 1000
    rows: int = 10_000
    history: int = 1000
    batch: int = 64


class Service:
    """Models with the database behind them; methods may be called from any thread.

    Args:
        folders: of the models by name, `MAIN` and perhaps `BESIDE`.
        store: the database.
        limits: of single requests.
        shown_types: kinds of feedback that say that an item was shown and nothing else: it is not
            offered again, and not read as history.
        meta_file: as `CatalogueRecommender.load` has it, for the main model.
        bf16: see `Served`.
    """

    def __init__(
        self,
        folders: dict[str, Path],
        store: Store,
        limits: Limits | None = None,
        shown_types: Sequence[str] = ("read",),
        meta_file: Path | None = None,
        bf16: bool = False,
    ) -> None:
        self.bf16 = bf16
        self.cores = torch.get_num_threads()
        self.folders, self.store, self.meta_file = folders, store, meta_file
        self.limits = limits or Limits()
        self.shown_types = frozenset(shown_types)
        self.metrics = Metrics()
        self.stopping = False
        self._changing = threading.Lock()  # of the catalogue, database and models alike
        self._loading = threading.Lock()
        self._changes: list[ItemRow] | None = None  # while a model is being loaded
        self._served: dict[str, Served] = {}
        for name in folders:
            served = self._load(name)
            served.apply(store.items(), asked=False)
            self._served[name] = served
        self._forget_vectors()

    @property
    def main(self) -> Served:
        """The model that Gorse's routes ask."""
        return self._served[MAIN]

    def model(self, name: str) -> Served:
        """A model by its name.

        Raises:
            UserError: there is none.
        """
        if name not in self._served:
            raise UserError(f"there is no model {name!r}, expected one of {', '.join(self.names)}")
        return self._served[name]

    @property
    def names(self) -> list[str]:
        """Of the models."""
        return list(self._served)

    def _load(self, name: str) -> Served:
        meta = self.meta_file if name == MAIN else None
        most = self.limits.batch
        return Served(
            self.folders[name],
            name,
            self.metrics,
            meta,
            most,
            self.bf16,
            self.store,
            self.cores,
        )

    def _forget_vectors(self) -> None:
        """Forget the vectors of texts that no item has any more, and of models that are gone."""
        used: dict[str, set[bytes]] = {}
        for served in self._served.values():
            assert served.kept is not None
            contents = served.recommender.catalogue.used_contents()
            used.setdefault(served.kept.model, set()).update(contents)
        self.store.keep_vectors_of(used)

    def reload(self, name: str) -> Served:
        """Load a model's folder again beside the model that answers, then put it in its place.

        Raises:
            BusyError: one is being loaded.
            UserError, OSError: the folder cannot be served; the model stays.
        """
        if not self._loading.acquire(blocking=False):
            raise BusyError("a model is being loaded already")
        try:
            self.model(name)
            with self._changing:  # from here on changes are noted
                rows, self._changes = self.store.items(), []
            try:
                served = self._load(name)
                served.apply(rows, asked=False)
                with self._changing:
                    served.apply(self._changes)
                    served.version = self._served[name].version + 1
                    old, self._served[name] = self._served[name], served
            finally:
                self._changes = None
            old.close()  # answers what it was asked before
            self.metrics.reloads.labels("done").inc()
            return served
        except BaseException:
            self.metrics.reloads.labels("failed").inc()
            raise
        finally:
            self._loading.release()

    def close(self) -> None:
        """End the threads of the models and the connections of the database."""
        for served in self._served.values():
            served.close()
        self.store.close()

    # --- items --------------------------------------------------------------------------------

    def item(self, name: str) -> ItemRow | None:
        """An item as it is now, None where there is none."""
        row = self.store.item(name)
        return self._shown(name, row)

    def _shown(self, name: str, row: ItemRow | None) -> ItemRow | None:
        """The row of an item; where it gives no text the folder's counts."""
        base = self.main.base.get(name)
        if row is None:
            return None if base is None else self.main.shape.row(name, base)
        if row.deleted:
            return None
        if base is not None and not self.main.shape.attributes(row):
            shown = self.main.shape.row(name, base)
            shown.is_hidden, shown.timestamp = row.is_hidden, row.timestamp
            return shown
        return row

    def items_after(self, cursor: str, n: int) -> list[ItemRow]:
        """The next n items by name."""
        changed, start, more = deque[ItemRow](), cursor, True
        base = self.main.names_after(cursor)
        pending = next(base, None)
        found: list[ItemRow] = []
        while len(found) < n:
            if not changed and more:
                changed.extend(self.store.items_after(start, n))
                more = len(changed) == n
                start = changed[-1].item_id if changed else start
            if not changed and pending is None:
                break
            row: ItemRow | None = None
            if changed and (pending is None or changed[0].item_id <= pending):
                row = changed.popleft()
            name = row.item_id if row is not None else str(pending)
            if name == pending:
                pending = next(base, None)
            shown = self._shown(name, row)
            if shown is not None:
                found.append(shown)
        return found

    def put_items(self, rows: Sequence[ItemRow]) -> None:
        """Add items or replace them."""
        rows = list({row.item_id: row for row in rows}.values())
        with self._changing:
            self.store.put_items(rows)
            self._take_over(rows)

    def change_item(self, name: str, **values: object) -> bool:
        """Give an item other values for some columns; False where there is none."""
        with self._changing:
            row = self.item(name)
            if row is None:
                return False
            for column, value in values.items():
                setattr(row, column, value)
            self.store.put_items([row])
            self._take_over([row])
        return True

    def delete_item(self, name: str) -> None:
        """Remove an item and its feedback."""
        with self._changing:
            self.store.delete_item(name)
            self._take_over([bare_item(name, deleted=True)])

    def _take_over(self, rows: Sequence[ItemRow]) -> None:
        if self._changes is not None:
            self._changes += rows
        for served in self._served.values():
            served.apply(rows)

    # --- feedback and users -------------------------------------------------------------------

    def put_feedback(self, rows: Sequence[FeedbackRow], overwrite: bool) -> None:
        """Take feedback in; items that nobody knows are made, without a text so far."""
        unknown = {row.item_id for row in rows if row.item_id not in self.main.base}
        new = [bare_item(name) for name in unknown]
        self.store.put_feedback(rows, overwrite, new)
        self.metrics.feedback.inc(len(rows))

    def history(self, user_id: str) -> tuple[list[str], frozenset[str]]:
        """Items of a user's history, oldest first, and those that are not to be offered again."""
        rows = self.store.feedback(
            user_id=user_id, until=now() + CLOCK_ERROR, newest=self.limits.history
        )
        read = [row.item_id for row in rows if row.feedback_type not in self.shown_types]
        return read, frozenset(row.item_id for row in rows)

    # --- recommendations ----------------------------------------------------------------------

    def recommend_to(
        self, user_id: str, k: int, categories: Sequence[str] = ()
    ) -> tuple[Recommended, list[str]]:
        """Recommendations for a user of the database; also the history that they follow from."""
        history, left_out = self.history(user_id)
        return self.recommend(history, k, left_out, categories), history

    def recommend(
        self,
        history: Sequence[HistoryItem],
        k: int,
        left_out: frozenset[str] = frozenset(),
        categories: Sequence[str] = (),
    ) -> Recommended:
        """Of the main model; items that are in all of the categories alone."""
        filters = self.main.in_categories(categories)
        if filters is None:
            return Recommended([], [])
        question = Question(history[-self.limits.history :], k, left_out)
        return self.main.recommend(question, filters)
