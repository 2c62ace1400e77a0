"""Untrained baselines every model must beat: their contract, and how they are ranked."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from baselines.sequence.collators import ItemSequences
from recformer.data.processed import EvalExamples, ProcessedFolder, Sequences
from recformer.evaluation.evaluator import Evaluator
from recformer.evaluation.ranks import Pairs, TargetRanks, count_ranks, count_ranks_among
from recformer.evaluation.recommender import Recommender
from recformer.evaluation.top_items import top_items
from recformer.files import UserError

SCORES_AT_A_TIME = 2**23  # users x items: 64 MB in float64

# A slice of the examples -> their scores (C, N).
Scores = Callable[[slice], np.ndarray | torch.Tensor]


class Baseline(Protocol):
    """An untrained model: scores and ranks of evaluation examples."""

    folder: ProcessedFolder

    def scores(self, examples: EvalExamples) -> Scores:
        """Scores of all items for examples."""
        ...

    def rank(self, examples: EvalExamples, filter_seen: bool) -> TargetRanks:
        """Place the target of every example among all items."""
        ...


def evaluate(
    baseline: Baseline,
    split: Literal["val", "test"] = "test",
    metric_ks: Sequence[int] = (10, 50),
    ties: str = "expected",
    filter_seen: bool = False,
) -> Evaluator:
    """Rank every target of a split.

    Args:
        baseline: the model, made for a processed folder.
        split: "val" or "test".
        metric_ks: cut-offs of the metrics.
        ties: "expected", "pessimistic" or "optimistic" position of a tied target.
        filter_seen: take items of the history out of the candidates.

    Returns:
        The evaluator: `compute()` gives the figures, `write_parquet` the rank of every user.

    Raises:
        ValueError: an unknown split or tie rule, or nobody to evaluate.
    """
    evaluator = Evaluator(metric_ks, ties)
    examples = baseline.folder.eval_examples(split)
    evaluator.update(examples.user_ids, examples.targets, baseline.rank(examples, filter_seen))
    return evaluator


def rank_in_chunks(
    examples: EvalExamples,
    num_items: int,
    filter_seen: bool,
    scores: Scores,
) -> TargetRanks:
    """Rank by full rows of scores, a few users at a time.

    Args:
        examples: E of them.
        num_items: N.
        filter_seen: take items of the history out of the candidates.
        scores: gives the scores (C, N) of a slice of the examples.
    """
    size = max(1, SCORES_AT_A_TIME // num_items)
    parts = []
    for start in range(0, len(examples), size):
        chunk = slice(start, min(start + size, len(examples)))
        pairs = seen_pairs(examples, chunk) if filter_seen else None
        parts.append(count_ranks(scores(chunk), examples.targets[chunk], pairs))
    return TargetRanks(
        *(
            np.concatenate([getattr(part, name) for part in parts] or [np.empty(0, np.int64)])
            for name in ("above", "tied", "num_candidates")
        )
    )


def checked_history_factor(value: float) -> float:
    """The factor, if it is one.

    Raises:
        UserError: it is not from 0 to 1.
    """
    if not 0 <= value <= 1:
        raise UserError(f"--history_factor {value}: expected from 0 to 1")
    return value


def scale_history(scores: Scores, examples: EvalExamples, factor: float) -> Scores:
    """Scores of which those of items that stand in the user's history are multiplied by `factor`.

    An item of the history is most like the history, yet seldom bought again. The history term of
    `finetune --method head` learns this; untrained models get one factor.
    """
    if factor == 1:
        return scores

    def scaled(chunk: slice) -> np.ndarray | torch.Tensor:
        values = scores(chunk)
        rows, items = np.unique(np.stack(seen_pairs(examples, chunk)), axis=1)
        values[rows, items] *= factor
        return values

    return scaled


def seen_pairs(examples: EvalExamples, chunk: slice) -> tuple[np.ndarray, np.ndarray]:
    """(row within the chunk, item id) of every item in the histories of a slice of the examples."""
    histories = examples.histories
    offsets = histories.offsets[chunk.start : chunk.stop + 1]
    rows = np.repeat(np.arange(len(offsets) - 1), np.diff(offsets))
    return rows, histories.items[offsets[0] : offsets[-1]].astype(np.int64)


@dataclass(frozen=True)
class UntrainedUsers:
    """Users that `Untrained` has read: their histories as they are."""

    histories: Sequences
    seen: Pairs


class Untrained(nn.Module, Recommender[ItemSequences, UntrainedUsers]):
    """A baseline without weights as a model that Lightning evaluates."""

    def __init__(self, baseline: Baseline) -> None:
        super().__init__()
        self.baseline = baseline
        # Lightning asks every module for a device and an optimizer for something.
        self.nothing = nn.Parameter(torch.zeros(0), requires_grad=False)

    def read(self, history: ItemSequences, seen: Pairs) -> UntrainedUsers:
        items = history.items.cpu().numpy().astype(np.int32)
        return UntrainedUsers(Sequences(history.offsets.cpu().numpy(), items), seen)

    def rank(self, users: UntrainedUsers, targets: Tensor, filter_seen: bool) -> TargetRanks:
        return self.baseline.rank(_examples(users, targets.cpu().numpy()), filter_seen)

    def recommend(self, users: UntrainedUsers, k: int, filter_seen: bool) -> NDArray[np.int64]:
        return top_items(self._scores(users), k, users.seen if filter_seen else None)[0]

    def rank_among(
        self, users: UntrainedUsers, targets: Tensor, candidates: NDArray[np.int64]
    ) -> TargetRanks:
        return count_ranks_among(self._scores(users), targets, candidates)

    def _scores(self, users: UntrainedUsers) -> Tensor:
        examples = _examples(users, np.zeros(len(users.histories), dtype=np.int64))
        return torch.as_tensor(self.baseline.scores(examples)(slice(0, len(examples))))


def _examples(users: UntrainedUsers, targets: NDArray[np.int64]) -> EvalExamples:
    return EvalExamples(np.arange(len(targets)), users.histories, targets, 0)
