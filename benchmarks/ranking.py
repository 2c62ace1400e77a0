"""Exact ranking and the softmax over all items: time and memory against the plain forms in torch.

Ranking: `rank_by_vectors` against one full matrix of cosines, compared by > and ==. The ceiling is
the product of users and items alone, chunk by chunk. Ranks with the 50 best items, as a test needs
them: `rank_and_top_items` against a product, > and ==, and `topk` for some users at a time. Loss,
forward and backward: `full_softmax_loss` against cross-entropy over the published
`cosine_similarity`, broadcast to (batch, items, hidden).

Every case runs in a process of its own over the same item table, a float32 file mapped into memory
that is resident before the first call. A plain form that does not fit in memory gets as many items
as do, and its time counts in proportion.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.measure import REPEATS, Work, available_gb, row, run_alone
from recformer.evaluation.exact import CHUNK_ELEMENTS
from recformer.evaluation.ranking import rank_and_top_items, rank_by_vectors
from recformer.models.losses import full_softmax_loss

# items, hidden, users ranked at once, users in the loss
SIZES = ((15_000, 256, 1024, 16), (1_500_000, 384, 1024, 16))
QUICK = ((500, 16, 8, 4),)
# items, hidden, users of ours, users of the peer
JUDGED = ((1_000_000, 64, 10_000, 64), (10_000_000, 64, 256, 16))
QUICK_JUDGED = ((500, 16, 8, 4),)
BEST = 50
TEMPERATURE = 0.05
SPARE_GB = 2.0  # left to others


def rows(quick: bool) -> Iterator[dict[str, Any]]:
    for items, hidden, users, batch_size in QUICK if quick else SIZES:
        with tempfile.TemporaryDirectory() as folder:
            table = str(Path(folder) / "items")
            write_table(table, items, hidden)
            yield _ranking_row(table, items, hidden, users)
            yield _loss_row(table, items, hidden, batch_size)


def judging_rows(quick: bool) -> Iterator[dict[str, Any]]:
    for items, hidden, users, of_peer in QUICK_JUDGED if quick else JUDGED:
        with tempfile.TemporaryDirectory() as folder:
            table = str(Path(folder) / "items")
            write_table(table, items, hidden)
            yield _judging_row(table, items, hidden, users, of_peer)


def write_table(path: str, items: int, hidden: int) -> None:
    """A file of items x hidden float32 numbers from the normal distribution."""
    generator = torch.Generator().manual_seed(0)
    table = torch.from_file(path, shared=True, size=items * hidden).view(items, hidden)
    for part in table.split(10_000):
        part.copy_(torch.randn(part.shape, generator=generator))


def _ranking_row(table: str, items: int, hidden: int, users: int) -> dict[str, Any]:
    # the table with its norms divided out, the scores, and a mask of what is above
    fitting = _fitting(items, 4 * hidden + 5 * users)
    ours = run_alone(ranking_case, "ours", table, items, hidden, users, repeats=REPEATS)
    peer = run_alone(ranking_case, "plain", table, fitting, hidden, users, repeats=REPEATS)
    product = run_alone(ranking_case, "product", table, items, hidden, users, repeats=REPEATS)
    if fitting == items:
        same = sum(a == b for a, b in zip(ours["summary"], peer["summary"])) / users
        note = f"{same:.2%} of users with the same rank"
    else:
        note = f"the peer over {fitting:,} items, as many as fit"
    return row(
        f"rank {users:,} users over {items:,} items of {hidden}",
        ours["seconds"],
        "full matrix in torch",
        peer["seconds"] * items / fitting,
        amount=users,
        unit="users",
        share_of_ceiling=product["seconds"] / ours["seconds"],
        peak_memory_mb=ours["peak_memory_mb"],
        peer_peak_memory_mb=peer["peak_memory_mb"],
        note=note,
    )


def _judging_row(table: str, items: int, hidden: int, users: int, of_peer: int) -> dict[str, Any]:
    ours = run_alone(judging_case, "ours", table, items, hidden, users, repeats=REPEATS)
    peer = run_alone(judging_case, "plain", table, items, hidden, of_peer, repeats=REPEATS)
    product = run_alone(ranking_case, "product", table, items, hidden, users, repeats=REPEATS)
    return row(
        f"ranks and best {BEST} of {users:,} users over {items:,} items of {hidden}, mapped",
        ours["seconds"],
        "product, comparisons and topk in torch",
        peer["seconds"] * users / of_peer,
        amount=users,
        unit="users",
        share_of_ceiling=product["seconds"] / ours["seconds"],
        peak_memory_mb=ours["peak_memory_mb"],
        peer_peak_memory_mb=peer["peak_memory_mb"],
        note=f"{1000 * ours['seconds'] / users:.2f} ms a user; the peer with {of_peer} users",
    )


def _loss_row(table: str, items: int, hidden: int, batch_size: int) -> dict[str, Any]:
    # the broadcast product and what autograd keeps of it: five such tensors, and some room
    fitting = _fitting(items, 24 * batch_size * hidden)
    ours = run_alone(loss_case, "ours", table, items, hidden, batch_size, repeats=REPEATS)
    peer = run_alone(loss_case, "plain", table, fitting, hidden, batch_size, repeats=REPEATS)
    if fitting == items:
        note = f"loss {ours['summary']:.6f} against {peer['summary']:.6f}"
    else:
        note = f"the peer over {fitting:,} items, as many as fit"
    return row(
        f"softmax loss of {batch_size} users over {items:,} items of {hidden}",
        ours["seconds"],
        "broadcast in torch",
        peer["seconds"] * items / fitting,
        peak_memory_mb=ours["peak_memory_mb"],
        peer_peak_memory_mb=peer["peak_memory_mb"],
        note=note,
    )


def _fitting(items: int, bytes_an_item: int) -> int:
    """How many of the items a plain form has memory for."""
    table = 2e9  # in the page cache, mapped
    return min(items, int(max(available_gb() - SPARE_GB, 1) * 1e9 - table) // bytes_an_item)


def _read(table: str, items: int, hidden: int, users: int) -> tuple[Tensor, Tensor, Tensor]:
    """Items (N, H), all in memory, targets (B,) and user vectors (B, H)."""
    vectors = torch.from_file(table, shared=False, size=items * hidden).view(items, hidden)
    for part in vectors.split(10_000):
        part.view(torch.uint8).max()  # every page is resident from here on
    generator = torch.Generator().manual_seed(1)
    targets = torch.randint(items, (users,), generator=generator)
    # users lean towards their targets by 3.5 standard deviations of the cosines of chance, so that
    # ranks spread over the first thousands, as those of a model that has learned something
    noise = torch.randn(users, hidden, generator=generator)
    return vectors, targets, vectors[targets] + hidden**0.5 / 3.5 * noise


def ranking_case(side: str, table: str, items: int, hidden: int, users: int) -> Work:
    """Ranks by `side`: ours, plain, or the product alone."""
    vectors, targets, queries = _read(table, items, hidden, users)

    def ours() -> Tensor:
        return torch.from_numpy(rank_by_vectors(queries, vectors, targets).above)

    def plain() -> Tensor:
        scores = F.normalize(queries) @ F.normalize(vectors).T
        best = scores.gather(1, targets[:, None])
        above = (scores > best).sum(dim=1)
        tied = (scores == best).sum(dim=1) - 1
        assert len(tied) == users
        return above

    def product() -> Tensor:
        for part in vectors.split(max(1, CHUNK_ELEMENTS // max(hidden, users))):
            queries @ part.T
        return targets

    return Work({"ours": ours, "plain": plain, "product": product}[side], Tensor.tolist)


def judging_case(side: str, table: str, items: int, hidden: int, users: int) -> Work:
    """Ranks and best items by `side`: ours or plain."""
    vectors, targets, queries = _read(table, items, hidden, users)

    def ours() -> int:
        ranks, best = rank_and_top_items(queries, vectors, targets, BEST)
        return int(ranks.above.sum()) + best.size

    def plain() -> int:
        scores = F.normalize(queries) @ F.normalize(vectors).T
        mine = scores.gather(1, targets[:, None])
        above = (scores > mine).sum(dim=1)
        tied = (scores == mine).sum(dim=1) - 1
        assert len(tied) == users
        return int(above.sum()) + scores.topk(BEST, dim=1).indices.numel()

    return Work({"ours": ours, "plain": plain}[side], int)


def loss_case(side: str, table: str, items: int, hidden: int, batch_size: int) -> Work:
    """Loss and gradient of the users by `side`: ours or plain."""
    vectors, labels, queries = _read(table, items, hidden, batch_size)

    def ours() -> float:
        users = queries.clone().requires_grad_()
        loss = full_softmax_loss(users, vectors, labels, TEMPERATURE)
        loss.backward()
        return loss.item()

    def plain() -> float:
        users = queries.clone().requires_grad_()
        scores = F.cosine_similarity(users[:, None], vectors[None], dim=-1) / TEMPERATURE
        loss = F.cross_entropy(scores, labels)
        loss.backward()
        return loss.item()

    return Work({"ours": ours, "plain": plain}[side], float)
