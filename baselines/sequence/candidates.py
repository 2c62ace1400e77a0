"""Scores of candidates of each user, by all items at once or by the candidates alone.

Shapes: B users, N items, H hidden size, K candidates of a user, C users of a chunk.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F


def candidate_scores(users: Tensor, item_table: Tensor, candidates: Tensor) -> Tensor:
    """Dot products of each user with its own candidates, float32 (B, K).

    Gathering K vectors a user moves K x H numbers about, and their gradients back; where the
    catalogue is not much larger than K, a matrix product with all of it and a gather of single
    scores is an order of magnitude faster, at the same result. Neither keeps more than a chunk of
    users beside the scores.

    Args:
        users: (B, H), any floating dtype.
        item_table: (N, H), likewise.
        candidates: item ids, int64 (B, K); an item may repeat.
    """
    with torch.autocast(users.device.type, enabled=False):
        scores: Tensor = _CandidateScores.apply(users.float(), item_table.float(), candidates)
        return scores


class _CandidateScores(torch.autograd.Function):
    """users (B, H) float32, table (N, H) float32, candidates (B, K) -> scores (B, K)."""

    @staticmethod
    def forward(ctx: Any, users: Tensor, table: Tensor, candidates: Tensor) -> Tensor:
        ctx.save_for_backward(users, table, candidates)
        scores = users.new_empty(candidates.shape)
        for part in _user_chunks(len(users), table, candidates):
            if _all_items_pay(table, candidates):
                scores[part] = (users[part] @ table.T).gather(1, candidates[part])
            else:
                vectors = F.embedding(candidates[part], table)  # (C, K, H)
                scores[part] = torch.bmm(vectors, users[part, :, None])[..., 0]
        return scores

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        users, table, candidates = ctx.saved_tensors
        user_grad = torch.empty_like(users)
        table_grad = torch.zeros_like(table)
        upstream = upstream.float()
        with torch.autocast(users.device.type, enabled=False):
            for part in _user_chunks(len(users), table, candidates):
                ids, grad = candidates[part], upstream[part]  # (C, K)
                if _all_items_pay(table, candidates):
                    dense = grad.new_zeros(len(ids), len(table)).scatter_add_(1, ids, grad)
                    torch.mm(dense, table, out=user_grad[part])
                    table_grad.addmm_(dense.T, users[part])
                else:
                    vectors = F.embedding(ids, table)
                    user_grad[part] = torch.bmm(grad[:, None], vectors)[:, 0]
                    steps = grad[..., None] * users[part, None]  # (C, K, H)
                    table_grad.index_add_(0, ids.flatten(), steps.flatten(0, 1))
        return user_grad, table_grad, None


# Measured on CPU and assumed elsewhere: below this many items for each candidate, all items at once
# (products at full speed) are faster than the candidates one by one (memory at random).
ITEMS_PER_CANDIDATE = 32
CANDIDATE_ELEMENTS = 2**21  # of a chunk, 8 MB: what caches hold; 64 MB took 1.8 times as long


def _all_items_pay(table: Tensor, candidates: Tensor) -> bool:
    return len(table) <= ITEMS_PER_CANDIDATE * candidates.shape[1]


def _user_chunks(num_users: int, table: Tensor, candidates: Tensor) -> list[slice]:
    """Users so many at a time that what they need beside the scores is 8 MB."""
    width = len(table) if _all_items_pay(table, candidates) else candidates.shape[1] * len(table[0])
    step = max(1, CANDIDATE_ELEMENTS // max(1, width))
    return [slice(start, start + step) for start in range(0, num_users, step)]
