"""Ranks of all users, gathered over batches and processes."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch.distributed as dist
from numpy.typing import ArrayLike, NDArray

from recformer.evaluation.metrics import _check_options, coverage, gini, per_user_metrics
from recformer.evaluation.ranks import TargetRanks, _int64, check_length, columns_checksum
from recformer.files import CHECKSUM, UserError, atomic_write


class Evaluator:
    """Collects the rank of every user's target and computes figures over users.

    Rows are kept a user, 40 bytes each, and a user counts once: rows that come twice (the padding
    of a distributed sampler) are dropped by user id. Figures are sums over users in the order of
    their ids: the same to the last bit for any batch size, order and number of processes.

    Recommendations (`count_recommended`) are kept as counts of each item among the first k, without
    users, so these must not come twice.

    Args:
        ks: cut-offs of NDCG, Recall and MRR, and of what is recommended.
        ties: "expected" (mean over the positions of a tie), "pessimistic" or "optimistic".

    Raises:
        UserError: as in `per_user_metrics`.

    Examples:
        >>> from recformer.evaluation.ranks import TargetRanks
        >>> evaluator = Evaluator(ks=(10,))
        >>> first = TargetRanks(above=[0, 4], tied=[0, 0], num_candidates=[20, 20])
        >>> evaluator.update(user_ids=[7, 8], targets=[3, 5], ranks=first)
        >>> second = TargetRanks(above=[12], tied=[0], num_candidates=[20])
        >>> evaluator.update(user_ids=[9], targets=[1], ranks=second)
        >>> figures = evaluator.compute()  # of three users at the places 1, 5 and 13
        >>> round(figures["Recall@10"], 4), round(figures["MRR"], 4)
        (0.6667, 0.4256)
    """

    COLUMNS = ("user_id", "target", "above", "tied", "num_candidates")

    def __init__(self, ks: Sequence[int] = (10, 50), ties: str = "expected") -> None:
        _check_options(ks, ties)
        self.ks = tuple(ks)
        self.ties = ties
        self._parts: list[NDArray[np.int64]] = []  # each (5, n), rows in the order of COLUMNS
        self._recommended: NDArray[np.int64] | None = None  # (K, N)

    def update(self, user_ids: ArrayLike, targets: ArrayLike, ranks: TargetRanks) -> None:
        """Add users: their ids (B,), the item ids of their targets (B,) and where these stand."""
        users, items = _int64(user_ids, "user_ids"), _int64(targets, "targets")
        check_length("user_ids", len(users), len(ranks))
        check_length("targets", len(items), len(ranks))
        self._parts.append(np.stack([users, items, ranks.above, ranks.tied, ranks.num_candidates]))

    def count_recommended(self, items: NDArray[np.int64], num_items: int) -> None:
        """Count what is recommended to users.

        Args:
            items: ids of the items, best first, int64 (B, max(ks)); -1 where there is none.
            num_items: N.
        """
        if items.shape[1:] != (max(self.ks),):
            raise UserError(f"items have shape {items.shape}, expected (users, {max(self.ks)})")
        first = [items[:, :k] for k in self.ks]
        counts = [np.bincount(part[part >= 0], minlength=num_items) for part in first]
        before = 0 if self._recommended is None else self._recommended
        self._recommended = before + np.stack(counts)

    def state(self) -> dict[str, NDArray[np.int64]]:
        """One row a user by ascending id: columns user_id, target, above, tied, num_candidates."""
        return dict(zip(self.COLUMNS, self._rows(), strict=True))

    def merge(self, state: Mapping[str, ArrayLike]) -> None:
        """Add the users of another evaluator's `state()`; users already here stay as they are."""
        ranks = TargetRanks(*(np.asarray(state[name]) for name in self.COLUMNS[2:]))
        self.update(state["user_id"], state["target"], ranks)

    def gather(self) -> None:
        """Merge the users of all processes into every process.

        All processes must call it, also those without users; where `torch.distributed` is not
        initialised it does nothing.
        """
        if not (dist.is_available() and dist.is_initialized()):
            return
        parts: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(parts, (self._rows(), self._recommended))
        # by process, so every process keeps the same row of a repeated user
        self._parts = [rows for rows, _ in parts]
        counted = [counts for _, counts in parts if counts is not None]
        self._recommended = np.sum(counted, axis=0) if counted else None

    def compute(self) -> dict[str, float]:
        """Means over users of `per_user_metrics`, with `tie_rate` (the share of users whose target
        is tied with another item) and `num_users`. In several processes call `gather` first.

        Where recommendations were counted also `Coverage@k`, the share of the catalogue that is
        recommended to anybody, and `Gini@k` over the catalogue.

        Raises:
            UserError: there are no users, or one user has two different targets.
        """
        ranks = TargetRanks(*self._rows()[2:])
        if not len(ranks):
            raise UserError("no users were ranked: there is nothing to compute figures from")
        figures = per_user_metrics(ranks, self.ks, self.ties)
        means: dict[str, float] = {name: float(x.sum()) / len(ranks) for name, x in figures.items()}
        means["tie_rate"] = int((ranks.tied > 0).sum()) / len(ranks)
        means["num_users"] = len(ranks)
        if self._recommended is not None:
            for k, counts in zip(self.ks, self._recommended, strict=True):
                means |= {f"Coverage@{k}": coverage(counts), f"Gini@{k}": gini(counts)}
        return means

    def write_parquet(
        self, path: str | os.PathLike, further: Mapping[str, NDArray[Any]] | None = None
    ) -> None:
        """Write one row a user: the columns of `state()` (int64) and `rank` (float64), the expected
        position above + 1 + tied / 2. The file appears whole or not at all.

        Args:
            path: of the file.
            further: more columns, a value a user by ascending id.
        """
        import pyarrow as pa
        import pyarrow.parquet as pq

        columns: dict[str, NDArray[Any]] = dict(self.state())
        columns["rank"] = columns["above"] + 1 + columns["tied"] / 2
        columns |= further or {}
        # Pages have checksums; what says how many rows there are has none.
        table = pa.table(columns).replace_schema_metadata({CHECKSUM: columns_checksum(columns)})
        with atomic_write(path, "wb") as handle:
            pq.write_table(table, handle, write_page_checksum=True)

    def _rows(self) -> NDArray[np.int64]:
        """All rows (5, users), each user once, by ascending user id."""
        parts = self._parts or [np.empty((5, 0), dtype=np.int64)]
        rows = np.concatenate(parts, axis=1)
        rows = rows[:, np.argsort(rows[0], kind="stable")]  # stable: the first row of a user stays
        again = np.concatenate([[False], rows[0, 1:] == rows[0, :-1]])[: rows.shape[1]]
        moved = (again[1:] & (rows[1, 1:] != rows[1, :-1])).nonzero()[0]
        if len(moved):
            user, one, other = rows[0, moved[0]], rows[1, moved[0]], rows[1, moved[0] + 1]
            raise UserError(
                f"user {user} has two targets, items {one} and {other}: an evaluator holds one "
                "split, one target a user"
            )
        self._parts = [rows[:, ~again]]
        return self._parts[0]
