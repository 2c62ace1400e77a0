"""The table that ends the quickstart: rows of `metrics.json` files on one split, compared by user.

`python scripts/quickstart_report.py --recformer DIR --untrained DIR --lines NAME=DIR [NAME=DIR …]`
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from recformer.cli import exit_with_message
from recformer.evaluation.metrics import per_user_metrics
from recformer.evaluation.ranks import TargetRanks
from recformer.evaluation.report import format_table
from recformer.files import UserError, read_json


def ndcg_by_user(path: Path, ties: str) -> tuple[np.ndarray, np.ndarray]:
    """User ids and NDCG@10 of each, from a file of ranks."""
    table = pq.read_table(path)
    columns = {name: table[name].to_numpy() for name in table.column_names}
    ranks = TargetRanks(columns["above"], columns["tied"], columns["num_candidates"])
    return columns["user_id"], per_user_metrics(ranks, (10,), ties)["NDCG@10"]


def verdict(ours: np.ndarray, theirs: np.ndarray, name: str, who: str = "Recformer") -> str:
    """What the paired difference in NDCG@10 allows to say, in one sentence."""
    difference = ours - theirs
    margin = 1.96 * difference.std(ddof=1) / np.sqrt(len(difference))
    gain = f"{difference.mean():+.4f} NDCG@10, 95 % interval ±{margin:.4f}"
    if difference.mean() > margin:
        return f"{who} beats {name} ({gain}; {ours.mean() / theirs.mean():.1f} times)."
    if difference.mean() < -margin:
        return f"{who} falls behind {name} ({gain})."
    return f"{who} and {name} cannot be told apart on this many users ({gain})."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--recformer", type=Path, required=True, help="its output folder")
    parser.add_argument("--untrained", type=Path, required=True, help="of the random model, ranked")
    parser.add_argument("--lines", nargs="+", required=True, help="NAME=output folder of baselines")
    args = parser.parse_args()
    ours = read_json(args.recformer / "metrics.json")
    rule = {name: ours[name] for name in ("split_hash", "ties", "filter_seen")}
    last = list(ours["evaluations"])[-1]
    if ours["stages"].get("stage2", {}).get("best", 0) is None:
        last = "stage1"
    user_ids, mine = ndcg_by_user(args.recformer / "ranks" / f"{last}_test.parquet", ours["ties"])
    rows, verdicts = {}, []
    for line in args.lines:
        name, _, folder = line.partition("=")
        theirs = read_json(Path(folder) / "metrics.json")
        if {key: theirs.get(key) for key in rule} != rule:
            raise UserError(f"{folder} and {args.recformer} differ in split, ties or filter_seen")
        rows[name] = theirs["test"]
        users, gains = ndcg_by_user(Path(folder) / "ranks" / "untrained_test.parquet", ours["ties"])
        if not np.array_equal(users, user_ids):
            raise UserError(f"{folder} and {args.recformer} ranked different users")
        verdicts.append(verdict(mine, gains, name))
    before = read_json(args.untrained / "metrics.json")
    if {key: before.get(key) for key in rule} != rule:
        raise UserError(
            f"{args.untrained} and {args.recformer} differ in split, ties or filter_seen"
        )
    rows["Recformer, random weights"] = before["test"]
    names = {"zero_shot": "Recformer, pretrained", "stage1": "  finetuned, stage 1"}
    names["stage2"] = "  finetuned, stage 2"
    rows |= {names[name]: entry["test"] for name, entry in ours["evaluations"].items()}
    print(format_table(rows))
    start = "zero_shot_test.parquet"
    _, untrained = ndcg_by_user(args.untrained / "ranks" / start, ours["ties"])
    _, pretrained = ndcg_by_user(args.recformer / "ranks" / start, ours["ties"])
    verdicts.append(verdict(pretrained, untrained, "random weights", "Recformer, only pretrained,"))
    print("\n".join(verdicts))


if __name__ == "__main__":
    exit_with_message(main)
