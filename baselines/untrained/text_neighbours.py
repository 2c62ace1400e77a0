"""Text neighbours: items whose text is like that of the items a user had last. Nothing is trained.

A user is the sum of the vectors of the history's items, the newest with weight 1 and each older one
with `decay` times the weight of the next; all items are ranked by cosine similarity. The text of an
item is its attributes' values, joined by spaces. Vectors are those of words (TF-IDF, BM25), or of a
text encoder or a Recformer (`baselines.text_vectors`).

Shapes: E evaluation examples, N items, V words, H hidden.
"""

from __future__ import annotations

from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from scipy import sparse  # type: ignore[import-untyped]
from sklearn.feature_extraction.text import CountVectorizer, TfidfVectorizer
from sklearn.preprocessing import normalize

from baselines.settings import WEIGHTINGS, TextNeighboursSettings
from baselines.text_vectors import item_texts, text_vectors
from baselines.untrained.base import (
    Scores,
    checked_history_factor,
    evaluate,
    rank_in_chunks,
    scale_history,
    seen_pairs,
)
from recformer.data.processed import EvalExamples, ProcessedFolder, Sequences
from recformer.evaluation.ranking import rank_by_vectors
from recformer.evaluation.ranks import TargetRanks
from recformer.files import UserError
from recformer.preparation.text import cut_words

BM25_K1, BM25_B = 1.2, 0.75


class TextNeighbours:
    """Nearest texts to the recency-weighted history.

    Args:
        folder: the data.
        decay: weight of an item against the next newer one, from 0 (the last item alone) to 1.
        text_encoder: what `text_vectors` takes as its encoder; None for words.
        weighting: of words: `tfidf`, or `bm25` (Robertson and Zaragoza, 2009; k1 1.2, b 0.75).
        history_factor: scores of items of the history are multiplied by it.

    Attributes:
        vectors: one row an item, of length 1, or 0 for an item without text; scipy sparse (N, V)
            float64 for words, float32 (N, H) for a text encoder.

    Raises:
        UserError: `decay` or `history_factor` is out of range, an unknown weighting, or no item has
            any text.
    """

    def __init__(
        self,
        folder: ProcessedFolder,
        decay: float = TextNeighboursSettings.decay,
        text_encoder: str | None = None,
        weighting: str = TextNeighboursSettings.weighting,
        history_factor: float = TextNeighboursSettings.history_factor,
    ) -> None:
        if weighting not in WEIGHTINGS:
            raise UserError(f"--weighting {weighting}: expected one of {', '.join(WEIGHTINGS)}")
        self.history_factor = checked_history_factor(history_factor)
        if not 0 <= decay <= 1:
            raise UserError(f"decay is {decay}, expected a weight from 0 to 1")
        self.folder = folder
        self.decay = decay
        texts = item_texts(folder)
        if not any(texts):
            raise UserError(f"no item of {folder.path} has any text, so none has neighbours")
        self.vectors: Any = (
            word_vectors(texts, weighting)
            if text_encoder is None
            else text_vectors(folder, text_encoder)
        )

    def scores(self, examples: EvalExamples) -> Scores:
        """Products of users with item vectors: a user's length does not change the order."""
        users = self._users(examples)
        items = self.vectors.T.tocsr() if sparse.issparse(self.vectors) else self.vectors.T

        def scores(chunk: slice) -> np.ndarray:
            products = users[chunk] @ items
            return products.toarray() if sparse.issparse(products) else products

        return scale_history(scores, examples, self.history_factor)

    def rank(self, examples: EvalExamples, filter_seen: bool = False) -> TargetRanks:
        """Place the target of every example; items of the same text tie."""
        if sparse.issparse(self.vectors) or self.history_factor != 1:
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


def word_vectors(texts: list[str], weighting: str = "tfidf") -> sparse.csr_matrix:
    """Words of every text, rows of length 1, (N, V).

    Where a script puts no spaces between words, pairs of neighbouring signs are the words.

    Args:
        texts: N of them.
        weighting: `tfidf` as scikit-learn computes it by default, or `bm25`.

    Raises:
        UserError: no text has a word.
    """
    words = TfidfVectorizer().build_analyzer()
    analyzer = partial(cut_words, words=words)
    try:
        if weighting == "bm25":
            return _bm25(CountVectorizer(analyzer=analyzer).fit_transform(texts))
        return TfidfVectorizer(analyzer=analyzer).fit_transform(texts)
    except ValueError as error:  # one-letter words and signs are no words to it
        raise UserError(f"the items' texts hold no words to compare: {error}") from error


def _bm25(counts: sparse.csr_matrix) -> sparse.csr_matrix:
    """BM25 weights of word counts (N, V), rows of length 1."""
    matrix = counts.astype(np.float64).tocsr()
    lengths = np.asarray(matrix.sum(axis=1)).ravel()
    found = np.bincount(matrix.indices, minlength=matrix.shape[1])
    rarity = np.log1p((len(lengths) - found + 0.5) / (found + 0.5))
    rows = np.repeat(np.arange(len(lengths)), np.diff(matrix.indptr))
    saturation = BM25_K1 * (1 - BM25_B + BM25_B * lengths / lengths.mean())
    matrix.data *= (BM25_K1 + 1) / (matrix.data + saturation[rows]) * rarity[matrix.indices]
    return normalize(matrix)
