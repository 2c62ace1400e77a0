"""Names as codes, in the order in which they first appear."""

from __future__ import annotations

import numpy as np
import polars as pl


class Names:
    """Names met so far, each with a code.

    Polars keeps the table of names, in native code: half a million strings looked up in a dict of
    millions, a batch, were a third of the time that a large log took.

    Attributes:
        names: in the order in which they first appeared; the code of each is its place.
    """

    def __init__(self) -> None:
        self.names: list[str] = []
        # The table lives as long as a column that uses it, so one is kept.
        self._kept = pl.Series([], dtype=pl.Categorical(pl.Categories.random()))
        self._codes = np.full(1, -1, dtype=np.int32)  # by the number that polars gives a name

    def codes(self, column: pl.Series) -> np.ndarray:
        """Codes of a column of names, int32; new ones get the next codes."""
        numbers = column.cast(self._kept.dtype).to_physical().to_numpy()
        missing = 1 + int(numbers.max(initial=0)) - len(self._codes)
        if missing > 0:
            room = np.full(max(missing, len(self._codes)), -1, dtype=np.int32)
            self._codes = np.concatenate([self._codes, room])
        own = self._codes[numbers]
        new = np.flatnonzero(own < 0)
        if len(new):
            _, first = np.unique(numbers[new], return_index=True)
            rows = new[np.sort(first)]
            known = len(self.names)
            self._codes[numbers[rows]] = np.arange(known, known + len(rows), dtype=np.int32)
            self.names += column.gather(rows).to_list()
            own[new] = self._codes[numbers[new]]
        return own
