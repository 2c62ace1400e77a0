"""Speed and memory against named peers, on this machine, as one table.

    python -m benchmarks                      # everything: about an hour on two cores
    python -m benchmarks --quick              # tiny sizes: shows that it works, measures nothing
    python -m benchmarks encoder ranking --json speed.json

Both sides of a row run in this run, in turns, after a warm-up; seconds are medians. "ratio" is how
many times the peer's seconds are ours, "ceiling" our share of the speed that torch's own matrix
product reaches on this machine (in `ceilings`: of what registers do), MB the peak memory of one
call beyond what its process held before, each measured in a process of its own. `--json speed.json`
keeps the figures, and the tables as speed.md, speed.tex and speed.csv. Peers: `pip install
-c constraints.txt -e ".[peers]"`; those that need an environment of their own are measured by
`python -m benchmarks.sentences --onnx_python` and `python -m benchmarks.sequence_models`.
docs/performance.md says more.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from importlib import import_module
from typing import Any

from benchmarks.measure import Report, add_flags, pin_threads
from recformer.cli import exit_with_message

# Imported when they run: some need what the others do not.
BENCHMARKS = {
    "encoder": "benchmarks.encoder:forward_rows",
    "training": "benchmarks.encoder:training_rows",
    "lengths": "benchmarks.encoder:length_rows",
    "sentences": "benchmarks.sentences:rows",
    "stages": "benchmarks.stages:rows",
    "ceilings": "benchmarks.ceilings:rows",
    "tricks": "benchmarks.tricks:rows",
    "items": "benchmarks.item_encoding:rows",
    "ranking": "benchmarks.ranking:rows",
    "judging": "benchmarks.ranking:judging_rows",
    "search": "benchmarks.search:rows",
    "catalogue": "benchmarks.catalogue:rows",
    "gradient_caching": "benchmarks.gradient_caching:rows",
    "loader": "benchmarks.loader:rows",
    "tokenization": "benchmarks.tokenization:rows",
    "data_preparation": "benchmarks.data_preparation:rows",
    "gsasrec": "benchmarks.sequence_models:rows",
    "objectives": "benchmarks.objectives:rows",
    "generation": "benchmarks.generation:rows",
    "serving": "benchmarks.serving:rows",
}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(BENCHMARKS)}")
    parser.add_argument("--quick", action="store_true", help="tiny sizes")
    add_flags(parser)
    args = parser.parse_args(argv)
    for name in args.names:
        if name not in BENCHMARKS:
            parser.error(f"no benchmark {name!r}, expected some of {', '.join(BENCHMARKS)}")

    report = Report(pin_threads(args.threads), args.json)
    for name in args.names or BENCHMARKS:
        module, _, function = BENCHMARKS[name].partition(":")
        benchmark: Callable[[bool], Iterator[dict[str, Any]]] = getattr(
            import_module(module), function
        )
        command = f"python -m benchmarks {name} --quick" if args.quick else None
        report.add(name, benchmark(args.quick), command)


if __name__ == "__main__":
    exit_with_message(main)
