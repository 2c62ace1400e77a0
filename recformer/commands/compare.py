"""Runs against each other, user by user: intervals, paired tests, a table and a picture.

A RUN is the output folder of `recformer finetune` or `recformer baseline`, or of a model from
outside (`recformer.evaluation.outside.write_run`), with an evaluation of it after a colon where it
is not the last one (`result:zero_shot`), and a name before an equals sign
(`before=result:zero_shot`). Runs on different splits, users, tie rules or `filter_seen` are
refused.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from recformer.cli import check_seed, command_parser
from recformer.evaluation.compare import compare
from recformer.evaluation.runs import RankedRun
from recformer.evaluation.statistics import LEVEL
from recformer.evaluation.table import csv_table, figure_text, latex_table, markdown_table
from recformer.files import UserError, atomic_write, write_json
from recformer.pictures import drawable


def verdict(pair: dict[str, Any], metric: str) -> str:
    """Conclusion from a paired difference, in one sentence."""
    one, other = pair["runs"]
    if pair["p_holm"] + LEVEL >= 1:
        said = f"{one} and {other} cannot be told apart on this many users"
    else:
        said = f"{one} {'beats' if pair['difference'] > 0 else 'falls behind'} {other}"
    interval = f"[{pair['low']:+.4f}, {pair['high']:+.4f}]"
    return f"{said}: {pair['difference']:+.4f} {metric} {interval}, p {pair['p_holm']:.4f}"


def figure_cells(rows: list[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Heads and cells of the table of runs."""
    metrics = [name for name in rows[0] if name != "name"]
    cells = [
        [
            row["name"],
            *(figure_text(row[m]["value"], row[m]["low"], row[m]["high"]) for m in metrics),
        ]
        for row in rows
    ]
    return ["", *metrics], cells


def pair_cells(pairs: list[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Heads and cells of the table of paired differences."""
    cells = [
        [
            " - ".join(pair["runs"]),
            f"{pair['difference']:+.4f}",
            f"[{pair['low']:+.4f}, {pair['high']:+.4f}]",
            f"{pair['p']:.4f}",
            f"{pair['p_holm']:.4f}",
        ]
        for pair in pairs
    ]
    return ["pair", "difference", "95 % interval", "p", "corrected"], cells


def captions(
    rule: Mapping[str, Any], judged: str, metric: str, resampled: str = "users"
) -> tuple[str, str]:
    """Text above both tables: the rules that all runs share, and the test.

    `judged` and `resampled` are those of `RankedRun`.
    """
    seen = "filtered" if rule["filter_seen"] else "kept"
    return (
        f"Split {str(rule['split_hash'])[:12]}, {judged}, full ranking, ties "
        f"{rule['ties']}, seen items {seen}; 95 % bootstrap intervals over {resampled}",
        f"Paired differences in {metric}; permutation test, p corrected by Holm",
    )


def markdown(
    rows: list[dict[str, Any]],
    pairs: list[dict[str, Any]],
    metric: str,
    run: RankedRun,
    sentences: bool = False,
) -> str:
    """Both tables; or the first, and pairs as sentences."""
    above, between = captions(run.rule, run.judged, metric, run.resampled)
    if sentences:
        below = "".join(f"- {verdict(pair, metric)}\n" for pair in pairs)
    else:
        below = markdown_table(*pair_cells(pairs))
    return f"{above}\n\n{markdown_table(*figure_cells(rows))}\n{between}\n\n{below}"


def latex(
    rows: list[dict[str, Any]], pairs: list[dict[str, Any]], metric: str, run: RankedRun
) -> str:
    """Both tables, their captions as comments."""
    above, between = captions(run.rule, run.judged, metric, run.resampled)
    figures, differences = latex_table(*figure_cells(rows)), latex_table(*pair_cells(pairs))
    return f"% {above}\n{figures}% {between}\n{differences}"


def flat(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows for CSV: a column a number."""
    found = []
    for row in rows:
        flat_row: dict[str, Any] = {"name": row["name"]}
        for metric, cell in row.items():
            if metric != "name":
                flat_row |= {metric: cell["value"]}
                flat_row |= {f"{metric} {end}": cell[end] for end in ("low", "high")}
        found.append(flat_row)
    return found


def plot(rows: list[dict[str, Any]], metric: str, path: Path) -> None:
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
    axis.set_yticks(range(len(rows)), drawable([row["name"] for row in rows]))
    axis.invert_yaxis()
    axis.set_xlabel(f"{metric}, test, {LEVEL:.0%} interval")
    axis.grid(axis="x", alpha=0.3)
    with atomic_write(path, "wb") as handle:
        figure.savefig(handle, format="png", dpi=120)
    pyplot.close(figure)


def main(argv: Sequence[str] | None = None) -> None:
    """Parse flags, compare, print and write."""
    parser = command_parser("compare", __doc__)
    parser.add_argument(
        "runs", nargs="+", metavar="RUN", help="[NAME=]FOLDER[:EVALUATION], two or more"
    )
    parser.add_argument("--metric", default="NDCG@10", help="metric of the paired test")
    parser.add_argument(
        "--against", metavar="NAME", help="pair each run with this one only (default: all pairs)"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of bootstrap and permutations")
    parser.add_argument(
        "--output_dir",
        type=Path,
        help="folder for comparison.md, .tex, .json and .png, and both tables as CSV",
    )
    args = parser.parse_args(argv)
    if len(args.runs) < 2:
        raise UserError(f"{len(args.runs)} run given, two or more can be compared")
    runs = [RankedRun.load(text) for text in args.runs]
    rows, pairs = compare(runs, args.metric, check_seed(args.seed), args.against)
    text = markdown(rows, pairs, args.metric, runs[0], sentences=args.against is not None)
    print(text, end="")
    if args.output_dir is not None:
        differences = [pair | {"runs": " - ".join(pair["runs"])} for pair in pairs]
        for name, content in (
            ("comparison.md", text),
            ("comparison.tex", latex(rows, pairs, args.metric, runs[0])),
            ("comparison.csv", csv_table(flat(rows))),
            ("differences.csv", csv_table(differences)),
        ):
            with atomic_write(args.output_dir / name) as handle:
                handle.write(content)
        about = {"metric": args.metric, "users": len(runs[0].user_ids), "rule": runs[0].rule}
        about |= {"judged": runs[0].judged, "resampled": runs[0].resampled}
        found = about | {"runs": rows, "pairs": pairs}
        write_json(args.output_dir / "comparison.json", found, indent=1)
        plot(rows, args.metric, args.output_dir / "comparison.png")
        print(f"written to {args.output_dir}: comparison.md, .tex, .csv, .json, .png, "
              "differences.csv")  # fmt: skip
