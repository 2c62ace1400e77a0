"""Runs against each other, user by user: intervals, paired tests, a table and a picture.

`python -m recformer.compare RUN RUN [RUN ...] --output_dir DIR`

A RUN is the output folder of `recformer.finetune` or `python -m baselines`, with an evaluation of
it after a colon where it is not the last one (`result:zero_shot`), and a name before an equals sign
(`before=result:zero_shot`). Runs on different splits, users, tie rules or `filter_seen` are
refused.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from recformer.files import UserError, atomic_write, exit_with_message, write_json
from recformer.metrics import per_user_metrics
from recformer.runs import RULE, RankedRun
from recformer.statistics import LEVEL, bootstrap_interval, holm, permutation_p

METRICS = ("NDCG@10", "Recall@10", "NDCG@50", "Recall@50", "MRR")


def compare(
    runs: Sequence[RankedRun], metric: str = "NDCG@10", seed: int = 0
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Figures of each run and differences of each pair.

    Args:
        runs: two or more.
        metric: what pairs are tested on.
        seed: of bootstrap and permutations.

    Returns:
        A row a run: `name` and, by metric, `value`, `low`, `high` (95 % bootstrap over users). And
        a row a pair: `runs`, `difference` (first minus second), `low`, `high` (paired bootstrap),
        `p` (paired permutation test) and `p_holm` (corrected for the number of pairs).

    Raises:
        UserError: runs that cannot be compared, or an unknown metric.
    """
    first = runs[0]
    for run in runs[1:]:
        different = [name for name in RULE if run.rule[name] != first.rule[name]]
        if different:
            what = ", ".join(f"{n}: {first.rule[n]} and {run.rule[n]}" for n in different)
            raise UserError(f"{first.name} and {run.name} cannot be compared ({what})")
        same = np.array_equal(first.user_ids, run.user_ids)
        if not same or not np.array_equal(first.targets, run.targets):
            raise UserError(f"{first.name} and {run.name} ranked different users or targets")
    names = [run.name for run in runs]
    if len(set(names)) < len(names):
        raise UserError(f"runs of the same name: {', '.join(names)}; give names: NAME=FOLDER")
    cuts = {name.partition("@")[2] for name in (*METRICS, metric)}
    ks = sorted({int(cut) for cut in cuts if cut.isdecimal()})
    values = [per_user_metrics(run.ranks, ks, first.rule["ties"]) for run in runs]
    if metric not in values[0]:
        raise UserError(f"--metric {metric}: expected one of NDCG@k, Recall@k, MRR@k, MRR, AUC")
    rows = []
    for name, figures in zip(names, values, strict=True):
        row: dict[str, Any] = {"name": name}
        for each in dict.fromkeys((*METRICS, metric)):
            low, high = bootstrap_interval(figures[each], seed)
            row[each] = {"value": float(figures[each].mean()), "low": low, "high": high}
        rows.append(row)
    pairs: list[dict[str, Any]] = []
    for one, other in combinations(range(len(runs)), 2):
        difference = values[one][metric] - values[other][metric]
        low, high = bootstrap_interval(difference, seed)
        pairs.append(
            {
                "runs": [names[one], names[other]],
                "difference": float(difference.mean()),
                "low": low,
                "high": high,
                "p": permutation_p(difference, seed),
            }
        )
    for pair, corrected in zip(pairs, holm([pair["p"] for pair in pairs]), strict=True):
        pair["p_holm"] = corrected
    return rows, pairs


def markdown(
    rows: list[dict[str, Any]], pairs: list[dict[str, Any]], metric: str, run: RankedRun
) -> str:
    """Both tables, under the rules that all runs share with `run`."""
    metrics = [name for name in rows[0] if name != "name"]
    rule, users = run.rule, len(run.user_ids)
    seen = "filtered" if rule["filter_seen"] else "kept"
    lines = [
        f"Split {str(rule['split_hash'])[:12]}, {users:,} test users, full ranking, ties "
        f"{rule['ties']}, seen items {seen}; 95 % bootstrap intervals over users",
        "",
    ]
    lines += ["| |" + "|".join(metrics) + "|", "|---|" + "---|" * len(metrics)]
    for row in rows:
        cells = [
            f"{row[m]['value']:.4f} [{row[m]['low']:.4f}, {row[m]['high']:.4f}]" for m in metrics
        ]
        lines.append(f"|{row['name']}|" + "|".join(cells) + "|")
    lines += ["", f"Paired differences in {metric}; permutation test, p corrected by Holm", ""]
    lines += ["|pair|difference|95 % interval|p|corrected|", "|---|---|---|---|---|"]
    for pair in pairs:
        one, other = pair["runs"]
        lines.append(
            f"|{one} - {other}|{pair['difference']:+.4f}|[{pair['low']:+.4f}, "
            f"{pair['high']:+.4f}]|{pair['p']:.4f}|{pair['p_holm']:.4f}|"
        )
    return "\n".join(lines) + "\n"


def draw(rows: list[dict[str, Any]], metric: str, path: Path) -> None:
    """PNG of the metric of each run with its interval."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    size = (7, 1 + 0.45 * len(rows))
    figure, axis = pyplot.subplots(figsize=size, constrained_layout=True)
    for place, row in enumerate(rows):
        cell = row[metric]
        axis.plot([cell["low"], cell["high"]], [place, place], color="C0")
        axis.plot(cell["value"], place, "o", color="C0")
    axis.set_yticks(range(len(rows)), [row["name"] for row in rows])
    axis.invert_yaxis()
    axis.set_xlabel(f"{metric}, test, {LEVEL:.0%} interval")
    axis.grid(axis="x", alpha=0.3)
    with atomic_write(path, "wb") as handle:
        figure.savefig(handle, format="png", dpi=120)
    pyplot.close(figure)


def main(argv: Sequence[str] | None = None) -> None:
    """Parse flags, compare, print and write."""
    parser = argparse.ArgumentParser(
        prog="python -m recformer.compare",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("runs", nargs="+", metavar="[NAME=]FOLDER[:EVALUATION]")
    parser.add_argument("--metric", default="NDCG@10", help="of the paired test (NDCG@10)")
    parser.add_argument("--seed", type=int, default=0, help="of bootstrap and permutations")
    parser.add_argument(
        "--output_dir", type=Path, help="writes comparison.md, comparison.json and comparison.png"
    )
    args = parser.parse_args(argv)
    if len(args.runs) < 2:
        raise UserError(f"{len(args.runs)} run given, two or more can be compared")
    runs = [RankedRun.load(text) for text in args.runs]
    rows, pairs = compare(runs, args.metric, args.seed)
    text = markdown(rows, pairs, args.metric, runs[0])
    print(text, end="")
    if args.output_dir is not None:
        with atomic_write(args.output_dir / "comparison.md") as handle:
            handle.write(text)
        write_json(args.output_dir / "comparison.json", {"runs": rows, "pairs": pairs}, indent=1)
        draw(rows, args.metric, args.output_dir / "comparison.png")
        print(f"written to {args.output_dir}: comparison.md, comparison.json, comparison.png")


if __name__ == "__main__":
    exit_with_message(main)
