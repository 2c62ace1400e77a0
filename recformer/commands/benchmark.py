"""Speed and memory against named peers; the peers and their cases lie in a checkout."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

from recformer.files import UserError

CHECKOUT = Path(__file__).resolve().parents[2]  # where an editable installation lies


def main(argv: Sequence[str] | None = None) -> None:
    """Hand the flags to `python -m benchmarks`.

    Raises:
        UserError: there is no checkout here.
    """
    if not (CHECKOUT / "benchmarks" / "measure.py").is_file():
        raise UserError(
            "the benchmarks are not part of the installed package: run "
            "`python -m recformer benchmark` in a checkout of the project"
        )
    if str(CHECKOUT) not in sys.path:  # an editable installation finds the package alone
        sys.path.insert(0, str(CHECKOUT))
    import_module("benchmarks.__main__").main(argv)
