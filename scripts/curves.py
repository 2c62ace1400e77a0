"""Validation figures of several runs over the seconds they trained, as one picture.

    python scripts/curves.py [NAME=]RUN [[NAME=]RUN ...] --output curves.png

A run is the output folder of `recformer finetune` or `recformer baseline`, also one that is not
finished. A curve starts at zero where the run was evaluated before training (zero-shot). Time is
that of the epochs, the validations within them included.
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Sequence
from pathlib import Path

from recformer.cli import exit_with_message
from recformer.evaluation.runs import METRICS_FILE, RunResult, StageResult
from recformer.files import UserError, atomic_write


def load(folder: Path) -> RunResult:
    """The result of a run, or what the histories of an unfinished one hold of it.

    Raises:
        FileNotFoundError: neither is there.
    """
    histories = sorted(folder.glob("*/history.csv"), key=lambda path: path.stat().st_mtime)
    if (folder / METRICS_FILE).exists() or not histories:
        return RunResult.load(folder)
    stages = {}
    for path in histories:
        with path.open(newline="") as handle:
            rows = [
                {name: float(value) for name, value in row.items() if value and name != "stage"}
                for row in csv.DictReader(handle)
            ]
        stages[path.parent.name] = StageResult(None, rows, 0.0)
    return RunResult(evaluations={}, stages=stages)


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


def draw(
    runs: Sequence[tuple[str, RunResult]], metric: str, path: Path, minutes: bool = False
) -> None:
    """Write the picture (PNG), over seconds or minutes."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(8, 5), constrained_layout=True)
    for name, result in runs:
        times, values = zip(*points(result, metric), strict=True)
        axis.plot([t / (60 if minutes else 1) for t in times], values, ".-", label=name)
    unit = "minutes" if minutes else "seconds"
    axis.set(xlabel=f"{unit} of training", ylabel=f"validation {metric}")
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
    parser.add_argument("--minutes", action="store_true", help="over minutes, not seconds")
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args(argv)
    runs = []
    for text in args.runs:
        name, _, folder = text.rpartition("=")
        result = load(Path(folder))
        if not points(result, args.metric):
            raise UserError(f"{folder} holds no validation by {args.metric}: nothing to draw")
        runs.append((name or Path(folder).name, result))
    draw(runs, args.metric, args.output, args.minutes)


if __name__ == "__main__":
    exit_with_message(main)
