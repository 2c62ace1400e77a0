"""Untrained baselines every model must beat: their contract, and how they are ranked."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import nn

from recformer.data.processed import EvalExamples, ProcessedFolder, Sequences
from recformer.evaluation.evaluator import Evaluator
from recformer.evaluation.ranks import TargetRanks, count_ranks, count_ranks_among
from recformer.evaluation.top_items import top_items
from recformer.files import UserError

SCORES_AT_A_TIME = 2**23  # users x items: 64 MB in float64

# A slice of the examples -> their scores (C, N).
Scores = Callable[[slice], np.ndarray | torch.Tensor]


class Baseline(Protocol):
    """What `evaluate` needs of a baseline."""

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

    What a user has is most like what he has, and he seldom buys it again; this is what the history
    term of `finetune --method head` does, for lines without one of their own.
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


class Untrained(nn.Module):
    """A baseline without weights as a `recformer.training.lit.Recommender`."""

    def __init__(self, baseline: Baseline) -> None:
        super().__init__()
        self.baseline = baseline
        # Lightning asks every module for a device and an optimizer for something.
        self.nothing = nn.Parameter(torch.zeros(0), requires_grad=False)

    def rank(self, batch: dict[str, Any], filter_seen: bool) -> TargetRanks:
        """Where the targets of a batch of `HistoryCollator` stand among all items."""
        return self.baseline.rank(_examples(batch), filter_seen)

    def recommend(self, batch: dict[str, Any], k: int, filter_seen: bool) -> np.ndarray:
        """The k best items for each user of a batch, best first, int64 (B, k)."""
        return top_items(self._scores(batch), k, batch["seen"] if filter_seen else None)[0]

    def rank_among(self, batch: dict[str, Any], candidates: np.ndarray) -> TargetRanks:
        """Where the targets of a batch stand among items (B, K) of each user's own."""
        return count_ranks_among(self._scores(batch), batch["labels"], candidates)

    def _scores(self, batch: dict[str, Any]) -> torch.Tensor:
        examples = _examples(batch)
        return torch.as_tensor(self.baseline.scores(examples)(slice(0, len(examples))))


def _examples(batch: dict[str, Any]) -> EvalExamples:
    histories = Sequences(
        batch["offsets"].cpu().numpy(), batch["items"].cpu().numpy().astype(np.int32)
    )
    users, targets = batch["user_ids"].cpu().numpy(), batch["labels"].cpu().numpy()
    return EvalExamples(users, histories, targets, 0)
