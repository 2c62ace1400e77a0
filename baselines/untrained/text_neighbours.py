"""Text neighbours: items whose text is like that of the items a user had last. Nothing is trained.

A user is the sum of the vectors of the history's items, the newest with weight 1 and each older one
with `decay` times the weight of the next; all items are ranked by cosine similarity. The text of an
item is its attributes' values, joined by spaces. Vectors are TF-IDF, or those of a text encoder or
a Recformer (`baselines.text_vectors`).

Shapes: E evaluation examples, N items, V words, H hidden.
"""

from __future__ import annotations

from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from scipy import sparse  # type: ignore[import-untyped]
from sklearn.feature_extraction.text import TfidfVectorizer

from baselines.text_vectors import item_texts, text_vectors
from baselines.untrained.base import Scores, evaluate, rank_in_chunks, seen_pairs
from recformer.data.processed import EvalExamples, ProcessedFolder, Sequences
from recformer.evaluation.ranking import rank_by_vectors
from recformer.evaluation.ranks import TargetRanks
from recformer.files import UserError
from recformer.preparation.text import cut_words


class TextNeighbours:
    """Nearest texts to the recency-weighted history.

    Args:
        folder: the data.
        decay: weight of an item against the next newer one, from 0 (the last item alone) to 1.
        text_encoder: what `text_vectors` takes as its encoder; None for TF-IDF.

    Attributes:
        vectors: one row an item, of length 1, or 0 for an item without text; scipy sparse (N, V)
            float64 for TF-IDF, float32 (N, H) for a text encoder.

    Raises:
        UserError: `decay` is out of range, or no item has any text.
    """

    def __init__(
        self, folder: ProcessedFolder, decay: float = 0.6, text_encoder: str | None = None
    ) -> None:
        if not 0 <= decay <= 1:
            raise UserError(f"decay is {decay}, expected a weight from 0 to 1")
        self.folder = folder
        self.decay = decay
        texts = item_texts(folder)
        if not any(texts):
            raise UserError(f"no item of {folder.path} has any text, so none has neighbours")
        self.vectors: Any = (
            tfidf_vectors(texts) if text_encoder is None else text_vectors(folder, text_encoder)
        )

    def scores(self, examples: EvalExamples) -> Scores:
        """Products of users with item vectors: a user's length does not change the order."""
        users = self._users(examples)
        items = self.vectors.T.tocsr() if sparse.issparse(self.vectors) else self.vectors.T

        def scores(chunk: slice) -> np.ndarray:
            products = users[chunk] @ items
            return products.toarray() if sparse.issparse(products) else products

        return scores

    def rank(self, examples: EvalExamples, filter_seen: bool = False) -> TargetRanks:
        """Place the target of every example; items of the same text tie."""
        if sparse.issparse(self.vectors):
            return rank_in_chunks(
                examples, self.folder.num_items, filter_seen, self.scores(examples)
            )
        seen = seen_pairs(examples, slice(0, len(examples))) if filter_seen else None
        users, items = torch.from_numpy(self._users(examples)), torch.from_numpy(self.vectors)
        return rank_by_vectors(users, items, examples.targets, seen)

    def _users(self, examples: EvalExamples) -> Any:
        weights = history_weights(examples.histories, self.folder.num_items, self.decay)
        return weights @ self.vectors

    def evaluate(self, split: Literal["val", "test"] = "test", **options: Any) -> dict[str, float]:
        """Figures of a split; `options` as in `baselines.untrained.base.evaluate`."""
        return evaluate(self, split, **options).compute()


def history_weights(histories: Sequences, num_items: int, decay: float) -> sparse.csr_array:
    """Weights decay^age of the items of every history, sparse (E, N); the newest has age 0."""
    ages = histories.offsets[1:][histories.rows] - 1 - np.arange(len(histories.items))
    weights = decay ** ages.astype(np.float64)  # 0 ** 0 is 1
    shape = (len(histories), num_items)
    # A copy: adding up what was bought twice works in place, and the histories are not ours.
    matrix = sparse.csr_array((weights, histories.items, histories.offsets), shape, copy=True)
    matrix.sum_duplicates()
    return matrix


def tfidf_vectors(texts: list[str]) -> sparse.csr_matrix:
    """TF-IDF of every text as scikit-learn computes it by default, rows of length 1, (N, V).

    Where a script puts no spaces between words, pairs of neighbouring signs are the words.
    """
    words = TfidfVectorizer().build_analyzer()
    try:
        return TfidfVectorizer(analyzer=partial(cut_words, words=words)).fit_transform(texts)
    except ValueError as error:  # one-letter words and signs are no words to it
        raise UserError(f"the items' texts hold no words to compare: {error}") from error
