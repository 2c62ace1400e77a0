"""recformer compare: paired tests of two or more runs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from recformer.cli import command_parser
from recformer.evaluation.compare import compare
from recformer.evaluation.runs import RankedRun
from recformer.evaluation.statistics import LEVEL
from recformer.files import UserError, atomic_write, write_json


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
    parser = command_parser("compare", __doc__)
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
