"""Names as codes, in the order in which they first appear."""

from __future__ import annotations

import numpy as np
import polars as pl


class Names:
    """Names met so far, each with a code.

    Attributes:
        names: in the order in which they first appeared; the code of each is its place.
    """

    def __init__(self) -> None:
        self.names: list[str] = []
        self._codes: dict[str, int] = {}

    def codes(self, column: pl.Series) -> np.ndarray:
        """Codes of a column of names, int32; new ones get the next codes."""
        distinct = column.unique(maintain_order=True)
        codes = self._codes
        known = len(codes)
        own = [codes.setdefault(name, len(codes)) for name in distinct.to_list()]
        if len(codes) > known:
            self.names += [name for name, code in zip(distinct, own, strict=True) if code >= known]
        places = column.cast(pl.Enum(distinct)).to_physical().to_numpy()
        return np.array(own, dtype=np.int32)[places]
