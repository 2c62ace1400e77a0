"""Terms added to the scores of single pairs (user, item), such as a bonus for items of a history.

Shapes: B users, N items, P pairs.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from recformer.evaluation.ranks import _to_numpy, check_length, checked_ids
from recformer.files import UserError

#: (rows, items, values), each (P,): the score of item `items[j]` for the user in row `rows[j]` is
#: raised by `values[j]`. Pairs may repeat; their values are summed.
Additions = tuple[ArrayLike, ArrayLike, ArrayLike]

MAX_ADDITION = 1e37  # as for vectors: beyond it float32 could overflow


@dataclass(frozen=True)
class PairTerms:
    """Checked `Additions`: each pair once, sorted by user and item.

    Attributes:
        rows, cols: int64 (P,).
        values: float64 (P,), the sum of the additions of a pair.
        num_items: N.
    """

    rows: NDArray[np.int64]
    cols: NDArray[np.int64]
    values: NDArray[np.float64]
    num_items: int

    @classmethod
    def of(cls, additions: Additions | None, num_users: int, num_items: int) -> PairTerms:
        """Check additions and sum those of the same pair, in an order that depends on them alone.

        Raises:
            UserError: ids out of range, lengths that differ, a value that is not finite.
        """
        if additions is None:
            nothing = np.empty(0, dtype=np.int64)
            return cls(nothing, nothing, np.empty(0), num_items)
        rows = checked_ids(additions[0], "rows of additions", num_users)
        cols = checked_ids(additions[1], "items of additions", num_items)
        values = _float64(additions[2])
        check_length("items of additions", len(cols), len(rows))
        if values.shape != rows.shape:
            raise UserError(
                f"values of additions have shape {values.shape}, expected {rows.shape}, one a pair"
            )
        bad = (~(np.abs(values) <= MAX_ADDITION)).nonzero()[0]
        if len(bad):
            raise UserError(
                f"the addition to item {cols[bad[0]]} for the user in row {rows[bad[0]]} is "
                f"{values[bad[0]]}: expected a finite number of at most {MAX_ADDITION:g}"
            )
        order = np.lexsort((values, cols, rows))
        keys, pair = np.unique((rows * num_items + cols)[order], return_inverse=True)
        # one after the other
        sums = np.bincount(pair, values[order], len(keys)).astype(np.float64, copy=False)
        rows, cols = np.divmod(keys, max(num_items, 1))
        return cls(rows, cols, sums, num_items)

    def at(self, rows: NDArray[np.int64], cols: NDArray[np.int64]) -> NDArray[np.float64]:
        """The terms (Q,) of any pairs (Q,), 0 where there is none."""
        if not len(self.rows):
            return np.zeros(len(rows))
        keys, wanted = self.rows * self.num_items + self.cols, rows * self.num_items + cols
        places = np.searchsorted(keys, wanted).clip(max=len(keys) - 1)
        return np.where(keys[places] == wanted, self.values[places], 0.0)

    def without(self, rows: NDArray[np.int64], cols: NDArray[np.int64]) -> PairTerms:
        """The terms of all pairs but these."""
        keys, gone = self.rows * self.num_items + self.cols, rows * self.num_items + cols
        return self._chosen(~np.isin(keys, gone))

    def where(self, kept: NDArray[np.bool_]) -> PairTerms:
        """The terms of the pairs (P,) that are kept."""
        return self._chosen(kept)

    def _chosen(self, which: NDArray) -> PairTerms:
        return PairTerms(self.rows[which], self.cols[which], self.values[which], self.num_items)


def _float64(values: ArrayLike) -> NDArray[np.float64]:
    if isinstance(values, torch.Tensor):
        values = _to_numpy(values.double())  # numpy has no bfloat16
    return np.asarray(values, dtype=np.float64)
