"""A finetuned folder as something that recommends: histories of item names in, items out.

>>> recommender = CatalogueRecommender.load("result/best_model")
>>> recommender.recommend([["B001", "B002"]], k=10)[0].items

Shapes: B users, N items, k items recommended.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from recformer.data.collators import pack_sequences
from recformer.data.items import TokenizedItems
from recformer.data.processed import ITEM_FILE, META_FILE
from recformer.evaluation.top_items import top_items_by_vectors
from recformer.files import UserError, read_json
from recformer.models import RecformerForSeqRec
from recformer.tokenization import RecformerTokenizer


@dataclass(frozen=True)
class Recommended:
    """What one user is offered.

    Attributes:
        items: names of the items, best first; fewer than asked for where the catalogue ends, none
            where nothing of the history is known.
        scores: their cosine similarities to the history.
        num_unknown: items of the history that are not in the catalogue, so were not read.
    """

    items: list[str]
    scores: list[float]
    num_unknown: int


class CatalogueRecommender:
    """A model with its catalogue; see `load`."""

    def __init__(
        self, model: RecformerForSeqRec, store: TokenizedItems, item_ids: Mapping[str, int]
    ) -> None:
        self.model = model
        self.store = store
        self.item_ids = item_ids
        self.names = sorted(item_ids, key=item_ids.__getitem__)

    @classmethod
    def load(
        cls, folder: str | os.PathLike, meta_file: str | os.PathLike | None = None
    ) -> CatalogueRecommender:
        """Read the folder of the best model that `recformer.finetune` leaves.

        Args:
            folder: model with item vectors, tokenizer, smap.json and meta_data.json.
            meta_file: texts of the items ({name: {attribute: text}}), where the folder has none.

        Raises:
            FileNotFoundError: the folder or one of its files is missing.
            UserError: files that do not belong together.
        """
        folder = Path(folder)
        item_ids = read_json(folder / ITEM_FILE)
        meta = Path(meta_file) if meta_file is not None else folder / META_FILE
        if not meta.is_file():
            raise FileNotFoundError(
                f"{meta} does not exist: the texts of the items are needed to read histories, name "
                f"the {META_FILE} of the processed folder"
            )
        texts = read_json(meta)
        model = RecformerForSeqRec.from_pretrained(folder)
        table = model.item_embedding
        if table is None or table.num_embeddings != len(item_ids):
            found = "no item vectors" if table is None else f"{table.num_embeddings} item vectors"
            raise UserError(
                f"{folder} holds {found} and {len(item_ids)} items in {ITEM_FILE}, expected the "
                "folder of the best model of python -m recformer.finetune"
            )
        names = sorted(item_ids, key=item_ids.__getitem__)
        if not any(name in texts for name in names):
            raise UserError(f"{meta} has texts for none of the {len(names)} items of {folder}")
        tokenizer = RecformerTokenizer.from_pretrained(folder, model.config)
        where = folder if os.access(folder, os.W_OK) else Path(tempfile.mkdtemp())
        store = TokenizedItems.open_or_build(
            [texts.get(name, {}) for name in names], tokenizer, where / "tokenized"
        )
        device = "cuda" if torch.cuda.is_available() else "cpu"
        return cls(model.to(device).eval(), store, item_ids)

    @torch.no_grad()
    def recommend(
        self, histories: Sequence[Sequence[str]], k: int = 10, filter_seen: bool = False
    ) -> list[Recommended]:
        """The k best items for each history.

        Args:
            histories: B lists of item names, oldest first; names not in the catalogue are skipped.
            k: items a user.
            filter_seen: leave out items of the history.

        Returns:
            B of them, in order.
        """
        known = [
            np.array([self.item_ids[name] for name in names if name in self.item_ids], np.int64)
            for names in histories
        ]
        filled = [row for row, items in enumerate(known) if len(items)]
        found: dict[int, tuple[Any, Any]] = {}
        if filled:
            sequences = [known[row] for row in filled]
            packed = pack_sequences(self.store, sequences, self.model.config)
            users = self.model.encode(packed.to(self.model.device))
            seen = None
            if filter_seen:
                rows = np.repeat(np.arange(len(filled)), [len(items) for items in sequences])
                seen = (rows, np.concatenate(sequences))
            assert self.model.item_embedding is not None  # `load` refused it
            table = self.model.item_embedding.weight
            top = top_items_by_vectors(users, table, min(k, len(table)), seen)
            found = dict(zip(filled, zip(*top, strict=True), strict=True))
        answers = []
        for row, names in enumerate(histories):
            items, scores = found.get(row, ((), ()))
            best = [(int(i), float(s)) for i, s in zip(items, scores, strict=True) if i >= 0]
            answers.append(
                Recommended(
                    [self.names[item] for item, _ in best],
                    [score for _, score in best],
                    len(names) - len(known[row]),
                )
            )
        return answers
