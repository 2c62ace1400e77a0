"""Validation figures of several runs over the seconds they trained, as one picture.

    python scripts/curves.py [NAME=]RUN [[NAME=]RUN ...] --output curves.png

A run is the output folder of `recformer finetune` or `recformer baseline`. A curve starts at zero
seconds where the run was evaluated before training (zero-shot). Seconds are those of training
epochs, without validations.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from recformer.cli import exit_with_message
from recformer.evaluation.runs import RunResult
from recformer.files import UserError, atomic_write


def points(result: RunResult, metric: str) -> list[tuple[float, float]]:
    """(seconds, figure) of every validation of a run."""
    found = []
    seconds = 0.0
    if "zero_shot" in result.evaluations:
        found.append((0.0, result.evaluations["zero_shot"]["val"][metric]))
    for stage in result.stages.values():
        for row in stage.rows:
            seconds += row["seconds"]
            if row.get(f"val/{metric}") is not None:
                found.append((seconds, row[f"val/{metric}"]))
    return found


def draw(runs: Sequence[tuple[str, RunResult]], metric: str, path: Path) -> None:
    """Write the picture (PNG)."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(8, 5), constrained_layout=True)
    for name, result in runs:
        axis.plot(*zip(*points(result, metric), strict=True), ".-", label=name)
    axis.set(xlabel="seconds of training", ylabel=f"validation {metric}")
    axis.grid(alpha=0.3)
    axis.legend()
    with atomic_write(path, "wb") as handle:
        figure.savefig(handle, format="png", dpi=120)
    pyplot.close(figure)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", metavar="[NAME=]RUN")
    parser.add_argument("--metric", default="NDCG@10")
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args(argv)
    runs = []
    for text in args.runs:
        name, _, folder = text.rpartition("=")
        result = RunResult.load(Path(folder))
        if not points(result, args.metric):
            raise UserError(f"{folder} holds no validation by {args.metric}: nothing to draw")
        runs.append((name or Path(folder).name, result))
    draw(runs, args.metric, args.output)


if __name__ == "__main__":
    exit_with_message(main)
