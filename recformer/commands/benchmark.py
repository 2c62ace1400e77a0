"""Speed and memory against named peers; the peers and their cases lie in a checkout."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec

from recformer.files import UserError


def main(argv: Sequence[str] | None = None) -> None:
    """Hand the flags to `python -m benchmarks`.

    Raises:
        UserError: there is no checkout here.
    """
    if find_spec("benchmarks.measure") is None:
        raise UserError(
            "the benchmarks are not part of the installed package: run `recformer benchmark` in a "
            "checkout of the project"
        )
    import_module("benchmarks.__main__").main(argv)
