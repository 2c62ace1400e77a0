"""Text neighbours: items whose text is like that of the items a user had last. Nothing is trained.

A user is the sum of the vectors of the history's items, the newest with weight 1 and each older one
with `decay` times the weight of the next; all items are ranked by cosine similarity. The text of an
item is its attributes' values, joined by spaces. Vectors are those of words (TF-IDF, BM25), or of a
text encoder or a Recformer (`baselines.text_vectors`).

Shapes: B users, C of them at a time, N items, V words, H hidden.
"""

from __future__ import annotations

from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import sparse  # type: ignore[import-untyped]
from sklearn.feature_extraction.text import CountVectorizer, TfidfVectorizer
from sklearn.preprocessing import normalize
from torch import Tensor

from baselines.settings import TextNeighboursSettings
from baselines.text_vectors import item_texts, keyed_text_vectors
from baselines.untrained.base import Scores, Untrained, UntrainedUsers
from recformer.data.processed import ProcessedFolder, Sequences
from recformer.evaluation.ranking import rank_and_top_items, rank_by_vectors
from recformer.evaluation.ranks import TargetRanks
from recformer.evaluation.recommender import MANY_USERS
from recformer.evaluation.top_items import top_items_by_vectors
from recformer.files import UserError, sha256_of
from recformer.preparation.text import cut_words

BM25_K1, BM25_B = 1.2, 0.75


class TextNeighbours(Untrained):
    """Nearest texts to the recency-weighted history.

    Args:
        folder: the data.
        settings: `decay` and `history_factor`; `text_encoder`, as `text_vectors` takes it, None for
            words; `weighting` of words: `tfidf`, or `bm25` (Robertson and Zaragoza, 2009; k1 1.2,
            b 0.75).

    Attributes:
        vectors: one row an item, of length 1, or 0 for an item without text; scipy sparse (N, V)
            float64 for words, float32 (N, H) for a text encoder.
        content_hash: of what the vectors follow from: texts, and the encoder.

    Raises:
        UserError: no item has any text.
    """

    def __init__(
        self, folder: ProcessedFolder, settings: TextNeighboursSettings | None = None
    ) -> None:
        settings = settings or TextNeighboursSettings()
        super().__init__(folder, settings.history_factor)
        self.decay = settings.decay
        texts = item_texts(folder)
        if not any(texts):
            raise UserError(f"no item of {folder.path} has any text, so none has neighbours")
        self.vectors: Any
        if settings.text_encoder is None:
            self.vectors = word_vectors(texts, settings.weighting)
            self.content_hash = sha256_of(*texts)
        else:
            self.vectors, self.content_hash = keyed_text_vectors(folder, settings.text_encoder)
        if not self._has_scores_only:
            self.users_at_once = MANY_USERS

    def scores(self, histories: Sequences) -> Scores:
        """Products of users with item vectors: a user's length does not change the order."""
        users = self._users(histories)
        return self.scaled(lambda chunk: users[chunk] @ self._by_word, histories)

    @cached_property
    def _by_word(self) -> Any:
        """`vectors` turned around, (V, N) or (H, N)."""
        return self.vectors.T.tocsr() if sparse.issparse(self.vectors) else self.vectors.T

    def rank(self, users: UntrainedUsers, targets: Tensor, filter_seen: bool) -> TargetRanks:
        """Rank each user's target among all items; items of the same text tie.

        Vectors of an encoder are compared exactly, see `rank_by_vectors`.
        """
        if self._has_scores_only:
            return super().rank(users, targets, filter_seen)
        seen = users.seen if filter_seen else None
        return rank_by_vectors(*self._both(users.histories), targets, seen)

    def recommend(self, users: UntrainedUsers, k: int, filter_seen: bool) -> NDArray[np.int64]:
        if self._has_scores_only:
            return super().recommend(users, k, filter_seen)
        seen = users.seen if filter_seen else None
        return top_items_by_vectors(*self._both(users.histories), k, seen)[0]

    def rank_and_recommend(
        self, users: UntrainedUsers, targets: Tensor, k: int, filter_seen: bool
    ) -> tuple[TargetRanks, NDArray[np.int64]]:
        if self._has_scores_only:
            return super().rank_and_recommend(users, targets, k, filter_seen)
        seen = users.seen if filter_seen else None
        return rank_and_top_items(*self._both(users.histories), targets, k, seen)

    @property
    def _has_scores_only(self) -> bool:
        return sparse.issparse(self.vectors) or self.history_factor != 1

    def _both(self, histories: Sequences) -> tuple[Tensor, Tensor]:
        return torch.from_numpy(self._users(histories)), torch.from_numpy(self.vectors)

    def _users(self, histories: Sequences) -> Any:
        return history_weights(histories, self.folder.num_items, self.decay) @ self.vectors


def history_weights(histories: Sequences, num_items: int, decay: float) -> sparse.csr_array:
    """Weights decay^age of the items of every history, sparse (B, N); the newest has age 0."""
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
