"""Sampling of negatives by popularity, its correction, and ranking losses over sampled items.

Shapes: P predictions, N items, K negatives of a prediction.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

SCORE_PENALTY = 1.0  # `bpreg` of the published GRU4Rec


class ItemSampler(nn.Module):
    """Draws items in proportion to how often they were bought, to some power, never the target.

    q(j) = count_j ^ power / sum over items of count ^ power; the power of 0.75 is that of word2vec
    (Mikolov et al., 2013) and of GRU4Rec (Hidasi and Karatzoglou, 2018, section 3.2), 0 uniform.

    Args:
        counts: (N,) training interactions of every item, of two items at least more than 0.
        power: at least 0.
    """

    ends: Tensor

    def __init__(self, counts: Tensor, power: float) -> None:
        super().__init__()
        weights = counts.double() ** power
        self.register_buffer("ends", (weights / weights.sum()).cumsum(0), persistent=False)

    def forward(self, labels: Tensor, count: int) -> Tensor:
        """Item ids (P, count), none of a row its label (P,).

        Draws are made on a line without the label's stretch, then moved past it: none is rejected.
        """
        end = self.ends[labels][:, None]
        begin = end - self._share(labels)[:, None]
        total = self.ends[-1]
        size = (len(labels), count)
        drawn = torch.rand(size, dtype=total.dtype, device=labels.device) * (total - end + begin)
        drawn = torch.where(drawn >= begin, end + (drawn - begin), drawn)
        return torch.searchsorted(self.ends, drawn, right=True).clamp(max=len(self.ends) - 1)

    def log_probability(self, labels: Tensor, items: Tensor) -> Tensor:
        """log of q(item) / (1 - q(label)), how likely one draw is each of items (P, K); float32."""
        others = 1 - self._share(labels)
        return (self._share(items).log() - others.log()[:, None]).float()

    def _share(self, items: Tensor) -> Tensor:
        before = self.ends[(items - 1).clamp(min=0)]
        return self.ends[items] - torch.where(items > 0, before, 0.0)


def log_expected_count(log_probability: Tensor, draws: int) -> Tensor:
    """log(draws * q), what is taken off the scores of sampled negatives (the logQ correction).

    The softmax over all items has Z = exp(s_y) + sum over j != y of exp(s_j). With K draws from q
    over the items but y, (1 / K) sum of exp(s_k) / q_k estimates that sum without bias (importance
    sampling: Bengio and Senécal, 2008, section III), so that each negative's score loses log(K q).
    Yi et al. (RecSys 2019, section 3) take log q off the target's score as well; the target is not
    drawn but always there, and so keeps its score here.
    """
    return log_probability + torch.tensor(float(draws)).log().item()


def log_inclusion(shares: Tensor, draws: int) -> Tensor:
    """log(1 - (1 - p)^draws), how likely an item is among so many targets of a batch.

    Args:
        shares: (N,), p of items among training interactions.
        draws: the batch's other targets. For rare items this is log(draws * p), the correction of
            Yi et al. (2019) up to a constant; each item of a batch is a candidate once.
    """
    return torch.log(-torch.expm1(draws * torch.log1p(-shares.double()))).float()


def bpr_max_loss(positive: Tensor, negatives: Tensor) -> Tensor:
    """BPR-max (Hidasi and Karatzoglou, CIKM 2018, section 3.3), mean over predictions.

    -log(sum over j of w_j sigmoid(s_y - s_j)) + sum over j of w_j s_j^2, w the softmax of the
    negatives' scores; the second term is weighed by `SCORE_PENALTY`.

    Args:
        positive: scores of the targets, (P,).
        negatives: scores of sampled items, (P, K).
    """
    log_weights = negatives.log_softmax(dim=1)
    ranked = torch.logsumexp(log_weights + F.logsigmoid(positive[:, None] - negatives), dim=1)
    penalty = (log_weights.exp() * negatives.square()).sum(dim=1)
    return (SCORE_PENALTY * penalty - ranked).mean()


def top1_max_loss(positive: Tensor, negatives: Tensor) -> Tensor:
    """TOP1-max (as `bpr_max_loss`): sum over j of w_j (sigmoid(s_j - s_y) + sigmoid(s_j^2))."""
    weights = negatives.softmax(dim=1)
    terms = (negatives - positive[:, None]).sigmoid() + negatives.square().sigmoid()
    return (weights * terms).sum(dim=1).mean()
