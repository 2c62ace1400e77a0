"""`python -m baselines --model NAME --data_path FOLDER`: figures of a baseline by full ranking."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from transformers import HfArgumentParser

from baselines import evaluate
from baselines.popularity import Popularity
from baselines.text_neighbours import TextNeighbours
from recformer.data.processed import ProcessedFolder
from recformer.evaluation import detailed_figures, format_slices, format_table
from recformer.files import UserError, exit_with_message, write_json
from recformer.training.arguments import flag

MODELS = {"popularity": Popularity, "text_neighbours": TextNeighbours}
# The flags that are one model's own, by its name.
OWN_FLAGS = {"popularity": (), "text_neighbours": ("decay", "text_encoder")}


@dataclass
class BaselineArguments:
    """Evaluate a baseline on a processed folder by full ranking."""

    model: str = flag("popularity", "which baseline", choices=list(MODELS))
    data_path: str = flag("finetune_data/Scientific", "processed folder (finetune_data/process.py)")
    split: Literal["test", "val"] = flag("test", "whose targets are ranked")
    output_dir: str | None = flag(
        None, "folder for metrics.json and the ranks of all users (ranks_<split>.parquet)"
    )
    metric_ks: list[int] = flag([10, 50], "cut-offs of NDCG and Recall")
    ties: str = flag(
        "expected",
        "rank of a target that ties with other items",
        choices=["expected", "pessimistic", "optimistic"],
    )
    filter_seen: bool = flag(False, "take items of the history out of the candidates")
    decay: float | None = flag(
        None,
        "text_neighbours: weight of an item against the next newer one, 0 for the last item alone; "
        "unset: 0.6",
    )
    text_encoder: str | None = flag(
        None,
        "text_neighbours: folder or hub id of a sentence encoder, mean-pooled; unset: TF-IDF",
    )


def run(args: BaselineArguments) -> dict[str, Any]:
    """Evaluate, print, and write what was asked for; returns the figures.

    Raises:
        FileNotFoundError, UserError: as `ProcessedFolder.load`, or a flag the model does not have.
    """
    own = {name: getattr(args, name) for names in OWN_FLAGS.values() for name in names}
    own = {name: value for name, value in own.items() if value is not None}
    foreign = sorted(set(own) - set(OWN_FLAGS[args.model]))
    if foreign:
        raise UserError(f"--{foreign[0]} is no flag of --model {args.model}")
    started = time.monotonic()
    folder = ProcessedFolder.load(args.data_path)
    baseline = MODELS[args.model](folder, **own)
    evaluator = evaluate(baseline, args.split, args.metric_ks, args.ties, args.filter_seen)
    figures = detailed_figures(evaluator, folder, args.split)
    seen = "filtered" if args.filter_seen else "kept"
    print(
        f"{args.model}: {args.split}, {figures['num_users']:,} users, {folder.num_items:,} items, "
        f"full ranking, ties {args.ties}, seen items {seen}"
    )
    print(format_table({args.model: figures}))
    print(format_slices(figures, f"NDCG@{min(args.metric_ks)}"))
    if args.output_dir is not None:
        output_dir = Path(args.output_dir)
        evaluator.write_parquet(output_dir / f"ranks_{args.split}.parquet")
        result = {
            "model": args.model,
            **own,
            "test" if args.split == "test" else "validation": figures,
            "ties": args.ties,
            "filter_seen": args.filter_seen,
            "split_hash": folder.split_hash,
            "seconds": round(time.monotonic() - started, 1),
        }
        write_json(output_dir / "metrics.json", result, indent=1)  # last: names what is complete
        print(f"written to {output_dir}: metrics.json, ranks_{args.split}.parquet")
    return figures


def main(argv: Sequence[str] | None = None) -> None:
    """Parse flags and run."""
    parser = HfArgumentParser(
        BaselineArguments, prog="python -m baselines", description=BaselineArguments.__doc__
    )
    (args,) = parser.parse_args_into_dataclasses(argv)
    run(args)


if __name__ == "__main__":
    exit_with_message(main)
