"""The study of sessions: objectives, architectures, side features and other lines, day after day.

python experiments/sessions.py --output_dir DIR [--ml100k FOLDER] [--seeds 1 2 3]

Three data sets: the generated season; the same season with categories, brands and prices exchanged
between products, where features must not help; and MovieLens-100K in weekly windows, where FOLDER
holds RecBole's `ml-100k.inter` (or `.inter.gz`) and `ml-100k.item`. Each model is trained up to
every window and judged on the next, with and without features, once a seed; `study.md`, `.tex`
and `.json` have means and deviations over seeds, and paired tests over sessions of each model with
features against itself without, and of each against co-occurrence; `study.csv` has the figures.
What is finished is not done again.
"""

from __future__ import annotations

import argparse
import platform
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from baselines.__main__ import main as baseline
from baselines.windows import draw_over_time
from recformer.cli import exit_with_message, keep_freed_memory
from recformer.commands.process import main as process
from recformer.evaluation.compare import by_sequence
from recformer.evaluation.metrics import per_user_metrics
from recformer.evaluation.runs import RankedRun, RunResult
from recformer.evaluation.seeds import mean_and_deviation
from recformer.evaluation.statistics import holm, permutation_p
from recformer.evaluation.table import csv_table, latex_table, markdown_table
from recformer.files import UserError, atomic_write, write_json
from recformer.preparation.sample_season import FILE, write_season

METRICS = ("NDCG@20", "Recall@20")
UNTRAINED = ("popularity", "cooccurrence", "sknn", "vsknn")
TRAINED: dict[str, list[str]] = {
    "GRU4Rec": ["--model", "gru4rec"],
    "SASRec": ["--model", "sasrec"],
    "CLM GPT-2": ["--model", "transformer", "--arch", "gpt2", "--objective", "clm"],
    "CLM XLNet": ["--model", "transformer", "--arch", "xlnet", "--objective", "clm"],
    "MLM BERT": ["--model", "transformer", "--arch", "bert", "--objective", "mlm"],
    "MLM XLNet": ["--model", "transformer", "--arch", "xlnet", "--objective", "mlm"],
    "PLM XLNet": ["--model", "transformer", "--arch", "xlnet", "--objective", "plm"],
    "RTD ELECTRA": ["--model", "transformer", "--arch", "electra", "--objective", "rtd"],
    "RTD XLNet": ["--model", "transformer", "--arch", "xlnet", "--objective", "rtd"],
    "CLM Llama": ["--model", "transformer", "--arch", "llama", "--objective", "clm"],
    "MLM ALBERT": ["--model", "transformer", "--arch", "albert", "--objective", "mlm"],
    "MLM ModernBERT": ["--model", "transformer", "--arch", "modernbert", "--objective", "mlm"],
}
OF_THE_SEASON = ("CLM Llama", "MLM ALBERT", "MLM ModernBERT")  # not trained on the others
SIZES = [
    "--hidden_size", "64", "--num_layers", "1", "--batch_size", "32", "--learning_rate", "3e-3",
    "--patience", "2",
]  # fmt: skip
MAX_LENGTH = {"ml100k": "50"}  # sequences of 100 films; sessions of 5 products are within 20
# A step of MLM and RTD asks for a fifth of the items, one of PLM for a sixth: all go on until two
# validations in a row were no better.
EPOCHS = {"MLM": 96, "RTD": 96, "PLM": 64}
CAUSAL_EPOCHS = 32
FEATURES = ["--features", "concat", "--feature_dropout", "0.1"]


def prepare(name: str, folder: Path, ml100k: Path | None) -> None:
    """Write a processed folder, if it is not there."""
    if (folder / "dataset.json").is_file():
        return
    if name == "ml100k":
        assert ml100k is not None
        log = next(path for path in sorted(ml100k.glob("ml-100k.inter*")))
        process(
            ["--file_path", str(log), "--meta_file_path", str(ml100k / "ml-100k.item")]
            + ["--output_path", str(folder), "--split", "windows", "--window", "1w"]
            + ["--min_interactions", "2", "--features", "class:list", "release_year:float", "hour"]
            + ["--skip_bad_lines"]  # one year is "unkonwn"
        )
        return
    raw = folder.with_name(f"{name}_raw")
    write_season(raw, shuffled=name == "shuffled_season")
    process(
        ["--file_path", str(raw / FILE), "--output_path", str(folder)]
        + ["--split", "windows", "--window", "1d", "--targets", "every"]  # more of them than "last"
        + ["--session_column", "user_session", "--min_interactions", "2"]
        + ["--drop_consecutive_repeats"]
        + ["--features", "price:float:item", "category_code:cat", "brand:cat", "hour"]
    )


def plan(data: str, seeds: list[int]) -> Iterator[tuple[str, int, list[str]]]:
    """(row, seed, flags) of every run of a data set."""
    shuffled = data == "shuffled_season"  # without features it is the season, run by run
    for name in () if shuffled else UNTRAINED:
        yield name, seeds[0], ["--model", name]
    for seed in seeds:  # a seed of everything before the next one
        for name, flags in TRAINED.items():
            if name in OF_THE_SEASON and data != "season":
                continue
            epochs = EPOCHS.get(name.split()[0], CAUSAL_EPOCHS)
            own = ["--num_train_epochs", str(epochs), "--verbose", str(epochs // 8)]
            own += ["--max_length", MAX_LENGTH.get(data, "20"), "--seed", str(seed)]
            for ending, more in (("", []), (" + features", FEATURES))[shuffled:]:
                yield name + ending, seed, [*flags, *SIZES, *own, *more]


def run_all(data: Path, runs: Path, seeds: list[int], models: list[str] | None) -> int:
    """Do what is not done, of some models or all; returns how many runs failed."""
    failed = 0
    for name, seed, flags in plan(runs.name, seeds):
        if models is not None and name.removesuffix(" + features") not in models:
            continue
        folder = runs / name / f"seed_{seed}"
        if (folder / "metrics.json").is_file() and (folder / "windows.md").is_file():
            continue
        print(f"== {runs.name}, {name}, seed {seed}", flush=True)
        try:
            baseline(
                ["--data_path", str(data), "--output_dir", str(folder), *flags]
                + ["--metric_ks", "10", "20", "50"]
            )
        except UserError as error:
            print(f"error: {error}", file=sys.stderr, flush=True)
            failed += 1
    return failed


@dataclass(frozen=True)
class Row:
    """A row of a table: one model, a run a seed.

    Attributes:
        figures: of the test, by seed.
        values: NDCG@20 of every target, by seed.
        sequences: the session of each target.
        seconds: of training, mean over seeds.
        draws: whether anything of it depends on a seed.
    """

    figures: list[dict[str, Any]]
    values: dict[str, np.ndarray]
    sequences: np.ndarray
    seconds: float
    draws: bool

    def over_seeds(self, metric: str) -> tuple[float, float]:
        """Mean and standard deviation of a metric."""
        return mean_and_deviation([each[metric] for each in self.figures])

    def less(self, other: Row) -> np.ndarray:
        """Differences of each target's NDCG@20, means over the seeds that both have; over all of
        them where there are none, or where one draws nothing."""
        both = self.values.keys() & other.values.keys() if self.draws and other.draws else set()
        one, two = (
            np.mean([row.values[seed] for seed in sorted(both or row.values)], axis=0)
            for row in (self, other)
        )
        return one - two


def rows_of(runs: Path) -> dict[str, Row]:
    """The rows of a data set that have a finished run."""
    rows = {}
    for name in [*UNTRAINED, *(n + ending for n in TRAINED for ending in ("", " + features"))]:
        folders = sorted(path.parent for path in (runs / name).glob("seed_*/metrics.json"))
        if not folders:
            continue
        results = [RunResult.load(folder) for folder in folders]
        ranked = [RankedRun.read(folder) for folder in folders]
        ties, sequences = ranked[0].rule["ties"], ranked[0].sequences
        assert sequences is not None  # they are runs over windows
        values = {
            folder.name: per_user_metrics(run.ranks, (20,), ties)["NDCG@20"]
            for folder, run in zip(folders, ranked, strict=True)
        }
        seconds = float(np.mean([result.train_seconds or 0.0 for result in results]))
        figures, draws = [result.test for result in results], name not in UNTRAINED
        rows[name] = Row(figures, values, sequences, seconds, draws)
    return rows


def figures_of(rows: dict[str, Row]) -> list[dict[str, Any]]:
    """A record a row, best first; of a metric mean and standard deviation over seeds."""
    records = []
    for name, row in rows.items():
        found = {metric: row.over_seeds(metric) for metric in METRICS}
        new = [f["slices"].get("new target", {}).get("NDCG@20", 0) for f in row.figures]
        records.append(
            {"name": name, **found, "new items": float(np.mean(new))}
            | {"seeds": len(row.figures), "seconds": row.seconds}
        )
    return sorted(records, key=lambda record: -record[METRICS[0]][0])


def tests_of(title: str, pairs: dict[str, tuple[Row, Row]]) -> list[dict[str, Any]]:
    """Differences of pairs of rows over the same targets; permutation tests over sessions."""
    differences = {name: one.less(other) for name, (one, other) in pairs.items()}
    p_values = holm(
        [permutation_p(by_sequence(d, pairs[n][0].sequences)[0]) for n, d in differences.items()]
    )
    rows = [
        {"name": name, "difference": float(difference.mean()), "p": p}
        for (name, difference), p in zip(differences.items(), p_values, strict=True)
    ]
    return [{"title": title, "rows": rows}] if rows else []


def study(output: Path, names: list[str]) -> dict[str, Any]:
    """What was found so far, and a picture a data set.

    Returns:
        `figures`, a list of records for each data set, `tests`, a list of tables for each, and what
        it was computed with.
    """
    found = {name: rows_of(output / "runs" / name) for name in names}
    figures = {name: figures_of(rows) for name, rows in found.items() if rows}
    tests: dict[str, list[dict[str, Any]]] = {}
    for name in figures:
        rows = found[name]
        without = found.get("season", {}) if name == "shuffled_season" else rows
        own = {
            n: (rows[f"{n} + features"], without[n])
            for n in TRAINED
            if f"{n} + features" in rows and n in without
        }
        tests[name] = tests_of(f"{name}: with features against without", own)
        simple = without.get("cooccurrence")
        against = {n: (row, simple) for n, row in rows.items() if simple and n not in UNTRAINED}
        tests[name] += tests_of(f"{name}: against co-occurrence", against)
        curves = {n: row.figures[0] for n, row in rows.items()}
        shown = {n: f for n, f in curves.items() if n in UNTRAINED or n.endswith("features")}
        draw_over_time(shown or curves, "NDCG@20", output / f"{name}.png")
    if {"season", "shuffled_season"} <= set(figures):  # the same sessions: what the values say
        one, other = found["season"], found["shuffled_season"]
        both = {n: (one[n], other[n]) for n in one if n.endswith("features") and n in other}
        title = "features of the products against those of others"
        tests["shuffled_season"] += tests_of(title, both)
    return {
        "machine": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
        "date": time.strftime("%Y-%m-%d"),
        "versions": {name: version(name) for name in ("recformer", "torch", "transformers")},
        "figures": figures,
        "tests": tests,
    }


def cells_of(content: dict[str, Any], name: str) -> list[tuple[list[str], list[list[str]]]]:
    """Heads and rows of the tables of a data set, from what `study` returned."""
    cells = []
    for record in content["figures"][name]:
        row = [record["name"]]
        for metric in METRICS:
            mean, deviation = record[metric]
            row.append(f"{mean:.4f} ± {deviation:.4f}" if deviation else f"{mean:.4f}")
        row += [f"{record['new items']:.4f}", str(record["seeds"]), f"{record['seconds']:.0f} s"]
        cells.append(row)
    tables = [([name, *METRICS, "new items", "seeds", "training"], cells)]
    for test in content["tests"][name]:
        rows = [[r["name"], f"{r['difference']:+.4f}", f"{r['p']:.4f}"] for r in test["rows"]]
        tables.append(([test["title"], "NDCG@20 of all targets", "p (Holm)"], rows))
    return tables


def tables_of(content: dict[str, Any], name: str) -> list[str]:
    """Tables of a data set, as Markdown."""
    return [markdown_table(*table) for table in cells_of(content, name)]


def csv_of(content: dict[str, Any]) -> str:
    """Figures of all data sets, numbers in full."""
    lines = []
    for name, records in content["figures"].items():
        for record in records:
            line = {"data": name, "name": record["name"]}
            for metric in METRICS:
                line[metric], line[f"{metric} deviation"] = record[metric]
            lines.append(line | {key: record[key] for key in ("new items", "seeds", "seconds")})
    return csv_table(lines)


def main() -> None:
    """Parse, prepare, run, tabulate."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--ml100k", type=Path, metavar="FOLDER")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--only", nargs="+", metavar="DATA", help="season shuffled_season ml100k")
    parser.add_argument(
        "--models", nargs="+", metavar="NAME", help="rows of the table, such as sknn 'MLM BERT'"
    )
    parser.add_argument("--table", action="store_true", help="tabulate what is there, run nothing")
    args = parser.parse_args()
    keep_freed_memory()
    names = ["season", "shuffled_season"]
    if args.ml100k or (args.output_dir / "runs" / "ml100k").is_dir():
        names.append("ml100k")
    failed = 0
    for name in names if not args.table else ():
        if (name != "ml100k" or args.ml100k) and (not args.only or name in args.only):
            data = args.output_dir / "data" / name
            prepare(name, data, args.ml100k)
            failed += run_all(data, args.output_dir / "runs" / name, args.seeds, args.models)
    content = study(args.output_dir, names)
    if not content["figures"]:
        raise UserError(f"no run is finished in {args.output_dir / 'runs'}")
    tables = [table for name in content["figures"] for table in cells_of(content, name)]
    text = "\n".join(markdown_table(*table) for table in tables)
    latex = "\n".join(latex_table(*table) for table in tables)
    write_json(args.output_dir / "study.json", content, indent=1)
    for ending, words in (("md", text), ("tex", latex), ("csv", csv_of(content))):
        with atomic_write(args.output_dir / f"study.{ending}") as handle:
            handle.write(words)
    print(text)
    if failed:
        raise UserError(f"{failed} runs failed, see above; the others are in the table")


if __name__ == "__main__":
    exit_with_message(main)
