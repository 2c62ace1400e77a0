"""Codes of names, batch by batch."""

from __future__ import annotations

import polars as pl
from hypothesis import given
from hypothesis import strategies as st

from recformer.preparation.names import Names


@given(st.lists(st.lists(st.text(max_size=2), max_size=9), max_size=5))
def test_codes_are_in_order_of_appearance(batches: list[list[str]]) -> None:
    names, others, expected = Names(), Names(), {}
    for batch in batches:
        others.codes(pl.Series([*batch, "another table"], dtype=pl.String))
        codes = [expected.setdefault(name, len(expected)) for name in batch]
        found = names.codes(pl.Series(batch, dtype=pl.String))
        assert (found.dtype, found.tolist()) == ("int32", codes)
    assert names.names == list(expected)
