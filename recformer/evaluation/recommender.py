"""The contract of a recommender, which every model keeps to be evaluated and to recommend.

A model reads histories once; what it has read is then ranked, recommended from, or ranked among a
few items, in any order and as often as one likes:

    users = model.read(batch.history, batch.seen)
    ranks = model.rank(users, batch.labels, filter_seen)
    items = model.recommend(users, k, filter_seen)
    both = model.rank_and_recommend(users, batch.labels, k, filter_seen)
    few = model.rank_among(users, batch.labels, candidates)

Where many users cost little more than few (`users_at_once`), what was read of several batches is
joined first.

Most models score by vectors (`VectorRecommender`) or give a score for every item
(`ScoreRecommender`). How a model is trained is no part of it (`recformer.training.lit.Trainable`).

Shapes: B users, N items, H hidden size, K candidates of a user, k items recommended.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from recformer.evaluation.additions import Additions, _float64
from recformer.evaluation.ranking import (
    rank_among_by_vectors,
    rank_and_top_items,
    rank_by_vectors,
)
from recformer.evaluation.ranks import (
    Pairs,
    TargetRanks,
    _int64,
    count_ranks,
    count_ranks_among,
)
from recformer.evaluation.top_items import top_items, top_items_by_vectors

MANY_USERS = 4096  # that share a pass over the item table

H = TypeVar("H")  # histories in the form that a model reads
U = TypeVar("U")  # what a model has read of users


class Recommender(ABC, Generic[H, U]):
    """A model that can be evaluated: users are read once, then ranked and recommended to.

    Models are `torch.nn.Module`s as well, which this class leaves to them.

    Attributes:
        users_at_once: so many users or more are asked about in one call, if there are as many.
    """

    users_at_once: int = 1

    def join(self, parts: Sequence[U]) -> U:
        """Users that were read in several calls as if it had been one.

        Raises:
            TypeError: several parts, and the model does not join them.
        """
        if len(parts) != 1:
            raise TypeError(f"{type(self).__name__} does not join users")
        return parts[0]

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

    def rank_and_recommend(
        self, users: U, targets: Tensor, k: int, filter_seen: bool
    ) -> tuple[TargetRanks, NDArray[np.int64]]:
        """The answers of `rank` and `recommend`, which may cost less together."""
        return self.rank(users, targets, filter_seen), self.recommend(users, k, filter_seen)

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

    users_at_once = MANY_USERS

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

    def join(self, parts: Sequence[UserVectors]) -> UserVectors:
        starts = np.cumsum([0, *(len(part.vectors) for part in parts)])
        added = [(i, part.additions) for i, part in enumerate(parts) if part.additions is not None]
        return UserVectors(
            torch.cat([part.vectors for part in parts]),
            joined_pairs([part.seen for part in parts], starts),
            (
                *joined_pairs([(a[0], a[1]) for _, a in added], starts[[i for i, _ in added]]),
                np.concatenate([_float64(a[2]) for _, a in added]),
            )
            if added
            else None,
        )

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

    def rank_and_recommend(
        self, users: UserVectors, targets: Tensor, k: int, filter_seen: bool
    ) -> tuple[TargetRanks, NDArray[np.int64]]:
        return rank_and_top_items(
            users.vectors,
            self.item_vectors(),
            targets,
            k,
            users.seen if filter_seen else None,
            cosine=self.cosine,
            additions=users.additions,
        )

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


def joined_pairs(parts: Sequence[Pairs], starts: NDArray[np.int64]) -> Pairs:
    """Pairs (rows, items) of several batches as pairs of all their users.

    Args:
        parts: pairs of each batch, whose rows count from its first user.
        starts: the row, among all, of the first user of each batch.
    """
    rows = [_int64(rows, "rows") + start for (rows, _), start in zip(parts, starts, strict=False)]
    items = [_int64(items, "items") for _, items in parts]
    return np.concatenate(rows), np.concatenate(items)


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
