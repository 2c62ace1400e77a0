"""Objectives over similarities: full and sampled softmax over items, (g)BCE, in-batch contrastive.

Cosine similarity is computed as one product of normalised matrices, never broadcast to
(B, N, H), and always in float32, whatever autocast says: divided by the published temperature of
0.05 it reaches 20, where bfloat16 steps by 0.06 to 0.125 - more than what tells good items apart.

Shapes: B users, N items, C items of a chunk, H hidden size, K candidates of a user.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from recformer import products
from recformer.files import UserError

MIN_NORM = 1e-8  # least norm a vector is divided by, as in F.cosine_similarity
CHUNK_ELEMENTS = 2**24  # of a chunk of items, and of users x items: 64 MB in float32
# The same of a CPU, 4 MB: a softmax over scores that stay in the cache took half the time, and with
# fewer users or items than these at a time products were slower.
CACHE_ELEMENTS, LEAST_USERS, LEAST_ITEMS = 2**20, 128, 256


def cosine_scores(users: Tensor, items: Tensor, temperature: float) -> Tensor:
    """Cosine similarity divided by the temperature, float32 (B, N) (paper, section 2.2.4).

    Items are not copied: the product is divided by their norms instead.

    Args:
        users: (B, H), any floating dtype, not necessarily normalised.
        items: (N, H), likewise.
        temperature: above 0.
    """
    with torch.autocast(users.device.type, enabled=False):
        items = items.float()
        return _normalised(users) @ items.T * (1 / (_norms(items) * temperature))


def full_softmax_loss(
    users: Tensor,
    item_table: Tensor,
    labels: Tensor,
    temperature: float = 0.05,
    chunk_size: int | None = None,
    cosine: bool = True,
) -> Tensor:
    """Mean cross-entropy of each user's target against all items (paper, section 2.3.2).

    Users are taken in parts that have a few MB of scores against all items, and gradients are made
    with them, so scores are computed once and never kept. A large catalogue is passed chunk by
    chunk, twice: forward keeps a running log-sum-exp, backward computes the scores again. Memory
    beyond the arguments and their gradients is that of a few chunks, below 1 GB whatever B and N.
    Only what requires a gradient has one made.

    Args:
        users: (B, H), any floating dtype, not necessarily normalised.
        item_table: (N, H), likewise, on the same device.
        labels: item ids of the targets, int64 (B,).
        temperature: above 0.
        chunk_size: items a chunk; by default all at once, up to 131,072 and a table of 64 MB, and
            above it as many as make 64 MB of scores, a few MB on a CPU.
        cosine: score by cosine similarity; otherwise by the dot product.

    Returns:
        The loss, a float32 scalar.

    Raises:
        UserError: shapes that do not fit, labels out of range, temperature or chunk_size not
            positive.
    """
    _check(users, item_table, labels, temperature)
    num_items, hidden = item_table.shape
    if chunk_size is not None and chunk_size < 1:
        raise UserError(f"chunk_size is {chunk_size}, expected at least 1")
    elements = CACHE_ELEMENTS if users.device.type == "cpu" else CHUNK_ELEMENTS
    if chunk_size is None:
        chunk_size = max(LEAST_ITEMS, elements // max(hidden, len(users)))
        if num_items * max(LEAST_USERS, hidden) <= CHUNK_ELEMENTS:
            chunk_size = num_items
    with torch.autocast(users.device.type, enabled=False):
        users = _normalised(users) if cosine else users.float()
        if chunk_size < num_items:
            losses: Tensor = _ChunkedCrossEntropy.apply(
                users, item_table, labels, temperature, chunk_size, cosine
            )
            return losses.mean()
        loss: Tensor = _CrossEntropy.apply(
            users / temperature,
            item_table,
            labels,
            max(LEAST_USERS, elements // num_items),
            cosine,
            torch.is_grad_enabled(),
        )
        return loss


def softmax_loss_with_terms(
    users: Tensor,
    table: Tensor,
    labels: Tensor,
    pairs: tuple[Tensor, Tensor],
    rescored: Callable[[Tensor, Tensor], Tensor],
    scale: Tensor | float,
    log_weights: Tensor | None = None,
) -> Tensor:
    """Mean cross-entropy of targets among all items, where some pairs have a score of their own.

    Memory is that of `CHUNK_ELEMENTS` scores beyond the arguments and their gradients: users are
    taken in parts, whose scores backward computes again.

    Args:
        users: (P, D).
        table: (N, D); scores are products of both.
        labels: (P,) item ids.
        pairs: (rows, items), both (U,), each pair once: those of another score.
        rescored: products (V,) of some pairs and their places (V,) among `pairs` -> their scores.
        scale: all scores are multiplied by it.
        log_weights: (N,), added to the scores: how much of a negative each item is; -inf: none, and
            no label. None: all alike.
    """
    step = max(1, CHUNK_ELEMENTS // len(table))

    def part(users: Tensor, first: int) -> Tensor:
        scores = (users[first : first + step] @ table.T).float()  # in 16 bits under autocast
        inside = torch.arange(len(pairs[0]), device=labels.device)  # all, where one part is all
        if step < len(labels):
            inside = ((pairs[0] >= first) & (pairs[0] < first + step)).nonzero()[:, 0]
        own = pairs[0][inside] - first, pairs[1][inside]
        scores = scores.index_put(own, rescored(scores[own], inside)) * scale
        if log_weights is not None:
            scores = scores + log_weights
        return F.cross_entropy(scores, labels[first : first + step], reduction="sum")

    if step >= len(labels):
        return part(users, 0) / len(labels)
    firsts = range(0, len(labels), step)
    parts = [checkpoint(part, users, first, use_reentrant=False) for first in firsts]
    return torch.stack(parts).sum() / len(labels)


def mean_over_processes(loss: Tensor, count: int) -> Tensor:
    """A mean loss over `count` predictions, weighed so that several processes train as one would.

    They average their gradients, but have different numbers of predictions: each counts by its own.
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return loss
    total = torch.tensor(float(count), device=loss.device)
    torch.distributed.all_reduce(total)
    return loss * count * torch.distributed.get_world_size() / total


def scores_of_all(users: Tensor, items: Tensor, temperature: float, cosine: bool) -> Tensor:
    """Cosine similarities or dot products, divided by the temperature, float32 (B, N)."""
    if cosine:
        return cosine_scores(users, items, temperature)
    with torch.autocast(users.device.type, enabled=False):
        return users.float() @ items.float().T * (1 / temperature)


class _CrossEntropy(torch.autograd.Function):
    """Mean cross-entropy of scores, `step` users at a time, whose gradients are made with them.

    users (B, H) float32, of length 1 / temperature with `cosine`; item_table (N, H) of any norm and
    dtype. Without `gradients` none are made.
    """

    @staticmethod
    def forward(
        ctx: Any,
        users: Tensor,
        item_table: Tensor,
        labels: Tensor,
        step: int,
        cosine: bool,
        gradients: bool,
    ) -> Tensor:
        items = item_table.float()
        inverse = 1 / _norms(items) if cosine else None
        need_users, need_items = (gradients and need for need in ctx.needs_input_grad[:2])
        user_grad = torch.empty_like(users) if need_users else None
        item_grad = torch.zeros_like(items) if need_items else None
        losses = users.new_empty(len(users))
        slow = (
            users.device.type == "cpu"
            and not torch.compiler.is_compiling()
            and products.torch_is_slow()
        )
        for start in range(0, len(users), step):
            part = slice(start, start + step)
            own, columns = users[part], labels[part, None]
            mm: Callable[..., Tensor] = torch.mm
            addmm_: Callable[..., Tensor] = Tensor.addmm_
            if slow and len(own) == step:  # the size of the last part seldom comes back
                mm, addmm_ = products.mm, products.addmm_
            scores = mm(own, items.T)  # (P, N), and below what is made of them in their place
            if inverse is not None:
                scores.mul_(inverse)
            scores.sub_(scores.amax(dim=1, keepdim=True))
            target = scores.gather(1, columns)
            weights = scores.exp_()
            total = weights.sum(dim=1, keepdim=True)
            losses[part] = (total.log() - target)[:, 0]
            if user_grad is None and item_grad is None:
                continue
            # d loss / d score = softmax - one-hot; the softmax's sum divides the smaller factors
            grad = weights.scatter_add_(1, columns, -total)
            if inverse is not None:
                grad.mul_(inverse)
            if user_grad is not None:
                mm(grad, items, out=user_grad[part]).div_(total)
            if item_grad is not None:
                addmm_(item_grad, grad.T, own / total)
        if item_grad is not None and inverse is not None:  # a step along an item changes its norm
            along = (item_grad * items).sum(dim=1) * inverse.square() * (inverse < 1 / MIN_NORM)
            item_grad.addcmul_(along[:, None], items, value=-1)
        ctx.save_for_backward(user_grad, item_grad)
        ctx.dtype, ctx.count = item_table.dtype, len(users)
        return losses.mean()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        user_grad, item_grad = ctx.saved_tensors
        if user_grad is not None:
            user_grad = user_grad * (upstream / ctx.count)
        if item_grad is not None:
            item_grad = (item_grad * (upstream / ctx.count)).to(ctx.dtype)
        return user_grad, item_grad, None, None, None, None


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Cross-entropy (B,) of scores / temperature, items in chunks.

    users (B, H) float32, of length 1 with `cosine`; item_table (N, H) of any norm and dtype.
    """

    @staticmethod
    def forward(
        ctx: Any,
        users: Tensor,
        item_table: Tensor,
        labels: Tensor,
        temperature: float,
        chunk_size: int,
        cosine: bool,
    ) -> Tensor:
        total = users.new_full((len(users),), -math.inf)  # log-sum-exp of the scores so far
        target = users.new_zeros(len(users))  # score of the label
        # what products are multiplied by: 1 / (norm * temperature), or 1 / temperature
        inverse = users.new_full((len(item_table),), 1 / temperature)
        for start in range(0, len(item_table), chunk_size):
            part = slice(start, start + chunk_size)
            items = item_table[part].float()  # (C, H)
            if cosine:
                inverse[part] /= _norms(items)
            scores = (users @ items.T).mul_(inverse[part])  # (B, C)
            total = torch.logaddexp(total, scores.logsumexp(dim=1))
            columns, inside = _inside(labels, start, len(items))
            own = scores.gather(1, columns[:, None])[:, 0]
            target = torch.where(inside, own, target)
        ctx.save_for_backward(users, item_table, labels, total, inverse)
        ctx.temperature, ctx.chunk_size, ctx.cosine = temperature, chunk_size, cosine
        return total - target

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        users, item_table, labels, total, inverse = ctx.saved_tensors
        need_users, need_items = ctx.needs_input_grad[:2]
        user_grad = torch.zeros_like(users) if need_users else None
        item_grad = torch.empty_like(item_table) if need_items else None
        with torch.autocast(users.device.type, enabled=False):  # backward may run inside it
            for start in range(0, len(item_table), ctx.chunk_size):
                part = slice(start, start + ctx.chunk_size)
                items = item_table[part].float()
                # d loss / d score = softmax - one-hot, times upstream
                grad = (users @ items.T).mul_(inverse[part]).sub_(total[:, None]).exp_()  # (B, C)
                columns, inside = _inside(labels, start, len(items))
                grad.scatter_add_(1, columns[:, None], -inside.to(grad)[:, None])
                grad.mul_(upstream[:, None]).mul_(inverse[part])
                if user_grad is not None:
                    user_grad.addmm_(grad, items)
                if item_grad is not None:
                    step = grad.T @ users  # (C, H)
                    if ctx.cosine:  # through item / norm: a step along it changes its norm only
                        length = inverse[part] * ctx.temperature
                        unit = items * length[:, None]
                        along = (step * unit).sum(dim=1) * (length < 1 / MIN_NORM)
                        step.addcmul_(along[:, None], unit, value=-1)
                    item_grad[part] = step.to(item_grad.dtype)
        return user_grad, item_grad, None, None, None, None


def sampled_softmax_loss(
    users: Tensor,
    item_table: Tensor,
    labels: Tensor,
    num_negatives: int,
    temperature: float = 0.05,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Mean cross-entropy of each user's target against items drawn uniformly, never the target.

    Draws are independent, one set a user, as published. Where the catalogue holds no more than
    `num_negatives` other items, each of them is a negative once: the full softmax.

    Args:
        users, item_table, labels, temperature: as in `full_softmax_loss`.
        num_negatives: negatives a user, at least 1.
        generator: source of the draws, on any device; None is torch's global one.

    Raises:
        UserError: as `full_softmax_loss`, or `num_negatives` below 1.
    """
    _check(users, item_table, labels, temperature)
    if num_negatives < 1:
        raise UserError(f"num_negatives is {num_negatives}, expected at least 1")
    num_items = len(item_table)
    if num_negatives >= num_items - 1:
        return full_softmax_loss(users, item_table, labels, temperature)
    negatives = sample_negatives(labels, num_items, num_negatives, generator)
    candidates = torch.cat([labels[:, None], negatives], dim=1)  # (B, 1 + K), the target first
    with torch.autocast(users.device.type, enabled=False):
        vectors = F.embedding(candidates, item_table).float()  # (B, 1 + K, H)
        scores = (vectors @ _normalised(users)[:, :, None])[..., 0]  # (B, 1 + K)
        scores = scores / (_norms(vectors) * temperature)
        return F.cross_entropy(scores, torch.zeros_like(labels))


def gbce_loss(
    positive: Tensor, negatives: Tensor, num_items: int, calibration: float = 0.75
) -> Tensor:
    """Generalised binary cross-entropy (Petrov and Macdonald, RecSys 2023, section 5).

    -(beta log sigma(s+) + sum log(1 - sigma(s-))) / (k + 1), mean over users, with
    beta = a (t (1 - 1/a) + 1/a) and a = k / (N - 1). It is written with softplus, which needs no
    clamping and no float64: the published code takes a power of a float64 sigmoid and clamps it.

    Args:
        positive: scores of the targets, (B,).
        negatives: scores of k sampled items each, (B, k).
        num_items: N, items that negatives were drawn from, the target among them.
        calibration: t in [0, 1]; 0 gives plain binary cross-entropy, 1 calibrated probabilities.

    Returns:
        A float32 scalar.

    Raises:
        UserError: `calibration` outside [0, 1], no negatives, or a catalogue of one item.
    """
    if not 0 <= calibration <= 1:
        raise UserError(f"the calibration t is {calibration}, expected a number from 0 to 1")
    num_negatives = negatives.shape[1]
    if num_negatives < 1 or num_items < 2:
        raise UserError(f"{num_negatives} negatives of {num_items} items: both are needed")
    alpha = num_negatives / (num_items - 1)
    beta = alpha * (calibration * (1 - 1 / alpha) + 1 / alpha)
    losses = beta * F.softplus(-positive.float()) + F.softplus(negatives.float()).sum(dim=1)
    return losses.mean() / (num_negatives + 1)


def sample_negatives(
    labels: Tensor,
    num_items: int,
    num_negatives: int,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Item ids (B, num_negatives), int64, uniform over all items but the label of the row.

    Ids are drawn among one fewer and shifted past the label, so no draw is rejected or repeated.
    """
    device = labels.device if generator is None else generator.device
    size = (len(labels), num_negatives)
    drawn = torch.randint(num_items - 1, size, generator=generator, device=device)
    drawn = drawn.to(labels.device)
    return drawn + (drawn >= labels[:, None])


def contrastive_scores(
    a: Tensor,
    b: Tensor,
    temperature: float = 0.05,
    target_ids: Tensor | None = None,
    first: int = 0,
) -> Tensor:
    """Scores of the in-batch contrastive loss: a[i] against every b, b[first + i] is right.

    Its cross-entropy is the item-item contrastive loss (paper, section 2.3.2).

    Args:
        a: sequence vectors (B, H), any floating dtype, not necessarily normalised.
        b: vectors of target items (G, H): those of this batch, or of all processes.
        temperature: above 0.
        target_ids: ids of the items in `b`, (G,). A row whose item is that of a[i] is no negative
            of it: -inf. Without them every other row is one.
        first: row of `b` that belongs to a[0].

    Returns:
        (B, G) float32.

    Raises:
        UserError: shapes that do not fit, or a temperature that is not positive.
    """
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1] or first + len(a) > len(b):
        raise UserError(
            f"a and b have shapes {tuple(a.shape)} and {tuple(b.shape)}, expected (B, H) and "
            f"(G, H) with G at least {first} + B"
        )
    own = torch.arange(first, first + len(a), device=a.device)
    _check(a, b, own, temperature)
    scores = cosine_scores(a, b, temperature)  # (B, G)
    if target_ids is None:
        return scores
    if target_ids.shape != b.shape[:1]:
        raise UserError(f"target_ids have shape {tuple(target_ids.shape)}, expected ({len(b)},)")
    same = target_ids[own][:, None] == target_ids[None, :]
    same[torch.arange(len(a), device=a.device), own] = False
    return scores.masked_fill(same, -math.inf)


def _norms(vectors: Tensor) -> Tensor:
    return torch.linalg.vector_norm(vectors, dim=-1).clamp(min=MIN_NORM)


def _normalised(vectors: Tensor) -> Tensor:
    return F.normalize(vectors.float(), dim=-1, eps=MIN_NORM)


def _inside(labels: Tensor, start: int, count: int) -> tuple[Tensor, Tensor]:
    """Columns (B,) of the labels in the chunk of `count` items from `start`, and whether they stand
    there: of the others the column is any. Nobody waits for the device."""
    inside = (labels >= start) & (labels < start + count)
    return (labels - start).clamp(0, count - 1), inside


def _check(users: Tensor, items: Tensor, labels: Tensor, temperature: float) -> None:
    if users.ndim != 2 or items.ndim != 2 or users.shape[1] != items.shape[1]:
        raise UserError(
            f"users have shape {tuple(users.shape)} and items {tuple(items.shape)}, expected "
            "(B, H) and (N, H)"
        )
    if labels.shape != users.shape[:1]:
        raise UserError(f"labels have shape {tuple(labels.shape)}, expected ({len(users)},)")
    if not temperature > 0:
        raise UserError(f"temperature is {temperature}, expected a number above 0")
    if labels.device.type != "cpu":
        return  # a device checks labels by itself, and asking for them here would wait for it
    if len(labels) and not (labels.min() >= 0 and labels.max() < len(items)):
        raise UserError(
            f"labels reach from {int(labels.min())} to {int(labels.max())}, expected item ids "
            f"from 0 to {len(items) - 1}"
        )
