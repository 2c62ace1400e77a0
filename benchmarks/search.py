"""The ten best items of a large catalogue: exact search beside FAISS's flat index, in turns.

Both sides find the items of largest cosine among the same float32 vectors with the same threads:
`top_items_by_vectors` over the table as it lies, with its norms computed before, and
`faiss.IndexFlatIP` over a copy of it that is divided by them. Ours decides near ties in float64.
The memory of our side is that of a call in a process of its own.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import partial
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.measure import Work, in_turns, left_out, row, run_alone
from recformer.evaluation.exact import item_norms
from recformer.evaluation.top_items import top_items_by_vectors

SIZES = ((1_000_000, 384, (1, 16, 256)),)
QUICK = ((2_000, 16, (1, 3)),)
BEST = 10
REPEATS = {1: 9, 16: 5, 256: 3}  # short calls more often


def rows(quick: bool) -> Iterator[dict[str, Any]]:
    if find_spec("faiss") is None:
        left_out("search", "faiss-cpu")
        return
    import faiss

    faiss.omp_set_num_threads(torch.get_num_threads())
    for items, hidden, users in QUICK if quick else SIZES:
        table, queries = vectors_of(items, hidden, max(users))
        norms = item_norms(table)
        index = faiss.IndexFlatIP(hidden)
        for part in table.split(100_000):
            index.add(F.normalize(part).numpy())
        for count in users:
            asked, units = queries[:count], F.normalize(queries[:count]).numpy()
            ours = partial(top_items_by_vectors, asked, table, BEST, norms=norms)
            peer = partial(index.search, units, BEST)
            ours_seconds, peer_seconds = in_turns(REPEATS.get(count, 3), ours, peer)
            same = sum(map(np.array_equal, ours()[0], peer()[1])) / count
            alone = run_alone(case, items, hidden, count)
            yield row(
                f"{BEST} of {items:,} items of {hidden}, {count} user{'s' * (count > 1)}",
                ours_seconds,
                "faiss.IndexFlatIP",
                peer_seconds,
                amount=count,
                unit="users",
                peak_memory_mb=alone["peak_memory_mb"],
                note=f"{same:.2%} of users with the same list",
            )


def vectors_of(items: int, hidden: int, users: int) -> tuple[Tensor, Tensor]:
    """Vectors of items and users, from the normal distribution."""
    generator = torch.Generator().manual_seed(0)
    table = torch.empty(items, hidden)
    for part in table.split(100_000):
        part.normal_(generator=generator)
    return table, torch.randn(users, hidden, generator=generator)


def case(items: int, hidden: int, users: int) -> Work:
    """One search by ours, for its memory."""
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", torch.get_num_threads())))
    table, queries = vectors_of(items, hidden, users)
    norms = item_norms(table)
    return Work(lambda: top_items_by_vectors(queries, table, BEST, norms=norms))
