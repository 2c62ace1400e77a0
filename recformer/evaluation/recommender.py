"""The contract of a recommender, which every model keeps to be evaluated and to recommend.

A model reads histories once; what it has read is then ranked, recommended from, or ranked among a
few items, in any order and as often as one likes:

    users = model.read(batch.history, batch.seen)
    ranks = model.rank(users, batch.labels, filter_seen)
    items = model.recommend(users, k, filter_seen)
    few = model.rank_among(users, batch.labels, candidates)

Most models score by vectors (`VectorRecommender`) or give a score for every item
(`ScoreRecommender`). How a model is trained is no part of it (`recformer.training.lit.Trainable`).

Shapes: B users, N items, H hidden size, K candidates of a user, k items recommended.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from recformer.evaluation.additions import Additions
from recformer.evaluation.ranking import rank_among_by_vectors, rank_by_vectors
from recformer.evaluation.ranks import Pairs, TargetRanks, count_ranks, count_ranks_among
from recformer.evaluation.top_items import top_items, top_items_by_vectors

H = TypeVar("H")  # histories in the form that a model reads
U = TypeVar("U")  # what a model has read of users


class Recommender(ABC, Generic[H, U]):
    """A model that can be evaluated: users are read once, then ranked and recommended to.

    Models are `torch.nn.Module`s as well, which this class leaves to them.
    """

    @abstractmethod
    def read(self, history: H, seen: Pairs) -> U:
        """Read B users, once for `rank`, `recommend` and `rank_among`.

        Args:
            history: `history` of a batch of the model's evaluation collator.
            seen: (rows, items), every item of the histories.
        """

    @abstractmethod
    def rank(self, users: U, targets: Tensor, filter_seen: bool) -> TargetRanks:
        """Rank each user's target, item ids (B,), among all items.

        With `filter_seen` items of the history are no candidates; the target always is one.
        """

    @abstractmethod
    def recommend(self, users: U, k: int, filter_seen: bool) -> NDArray[np.int64]:
        """The k best items of each user, best first, int64 (B, k); -1 where there are no more.

        With `filter_seen` none of them is an item of the history.
        """

    @abstractmethod
    def rank_among(self, users: U, targets: Tensor, candidates: NDArray[np.int64]) -> TargetRanks:
        """Rank each user's target among items (B, K) of that user's own."""


@dataclass(frozen=True)
class UserVectors:
    """Users that a `VectorRecommender` has read.

    Attributes:
        vectors: (B, H).
        seen: (rows, items), every item of the histories.
        additions: terms of single pairs (row, item) beside the similarity, or None.
    """

    vectors: Tensor
    seen: Pairs
    additions: Additions | None = None


class VectorRecommender(Recommender[H, UserVectors], Generic[H]):
    """A recommender whose scores are similarities of user and item vectors.

    Terms of single pairs, such as a bonus for items of the history, may be added to them
    (`history_terms`). Ranks are exact: see `recformer.evaluation.ranking.rank_by_vectors`.
    """

    @abstractmethod
    def user_vectors(self, history: H) -> Tensor:
        """Vectors (B, H) of users."""

    @abstractmethod
    def item_vectors(self) -> Tensor:
        """Vectors (N, H) of all items by item id."""

    def history_terms(self, history: H, vectors: Tensor) -> Additions | None:
        """Terms added to the similarity of single pairs (row, item); by default none.

        Args:
            history: as in `user_vectors`.
            vectors: (B, H), its answer.
        """
        return None

    @property
    def cosine(self) -> bool:
        """Whether similarity is the cosine; otherwise it is the dot product."""
        return True

    def read(self, history: H, seen: Pairs) -> UserVectors:
        vectors = self.user_vectors(history)
        return UserVectors(vectors, seen, self.history_terms(history, vectors))

    def rank(self, users: UserVectors, targets: Tensor, filter_seen: bool) -> TargetRanks:
        return rank_by_vectors(
            users.vectors,
            self.item_vectors(),
            targets,
            users.seen if filter_seen else None,
            cosine=self.cosine,
            additions=users.additions,
        )

    def top_items(
        self, users: UserVectors, k: int, filter_seen: bool
    ) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """The items of `recommend` and their scores, both (B, k)."""
        return top_items_by_vectors(
            users.vectors,
            self.item_vectors(),
            k,
            users.seen if filter_seen else None,
            cosine=self.cosine,
            additions=users.additions,
        )

    def recommend(self, users: UserVectors, k: int, filter_seen: bool) -> NDArray[np.int64]:
        return self.top_items(users, k, filter_seen)[0]

    def rank_among(
        self, users: UserVectors, targets: Tensor, candidates: NDArray[np.int64]
    ) -> TargetRanks:
        return rank_among_by_vectors(
            users.vectors,
            self.item_vectors(),
            targets,
            candidates,
            cosine=self.cosine,
            additions=users.additions,
        )


@dataclass(frozen=True)
class UserScores:
    """Users that a `ScoreRecommender` has read.

    Attributes:
        scores: (B, N), of all items.
        seen: (rows, items), every item of the histories.
    """

    scores: Tensor
    seen: Pairs


class ScoreRecommender(Recommender[H, UserScores], Generic[H]):
    """A recommender that gives a score for every item."""

    @abstractmethod
    def scores(self, history: H) -> Tensor:
        """Scores (B, N) of all items; of equal scores the items tie."""

    def read(self, history: H, seen: Pairs) -> UserScores:
        return UserScores(self.scores(history), seen)

    def rank(self, users: UserScores, targets: Tensor, filter_seen: bool) -> TargetRanks:
        return count_ranks(users.scores, targets, users.seen if filter_seen else None)

    def recommend(self, users: UserScores, k: int, filter_seen: bool) -> NDArray[np.int64]:
        return top_items(users.scores, k, users.seen if filter_seen else None)[0]

    def rank_among(
        self, users: UserScores, targets: Tensor, candidates: NDArray[np.int64]
    ) -> TargetRanks:
        return count_ranks_among(users.scores, targets, candidates)
