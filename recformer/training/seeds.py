"""`--seeds 1 2 3`: one run a seed, each in a folder of its own, and what they have in common.

A run of seeds is the single runs `OUTPUT_DIR/seed_1`, `OUTPUT_DIR/seed_2`, …, each a command of its
own that gives its memory back, goes on where it was cut off, and is read by every other command.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from recformer.evaluation.runs import METRICS_FILE, RunResult, judged
from recformer.evaluation.seeds import mean_and_deviation
from recformer.evaluation.table import csv_table, latex_table, markdown_table
from recformer.files import UserError, atomic_write, write_json
from recformer.processes import environments_of_runs, is_first, say

FOLDERS = "seed_*"
SUMMARY = "seeds.json"
TABLES = ("md", "tex", "csv")  # endings of the same as tables


def split_flags(argv: Sequence[str]) -> tuple[list[int], list[str]]:
    """The numbers of `--seeds`, and all other flags.

    Raises:
        UserError: `--seed` beside it, a number twice, or none.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--seeds", type=int, nargs="*")
    parser.add_argument("--output_dir")
    known, rest = parser.parse_known_args(argv)
    seeds = known.seeds
    if not seeds:
        raise UserError("--seeds: give its numbers on the command line, e.g. --seeds 1 2 3")
    if len(set(seeds)) < len(seeds):
        raise UserError(f"--seeds {' '.join(map(str, seeds))}: a seed stands there twice")
    if any(word == "--seed" or word.startswith("--seed=") for word in rest):
        raise UserError("--seed and --seeds exclude each other")
    return seeds, rest


def run_seeds(
    command: str, argv: Sequence[str] | None, output_dir: str, num_nodes: int | None
) -> list[Path]:
    """Run `recformer COMMAND` once a seed; what is finished is read.

    Where a launcher started several of this process, each starts its own of every run, and the
    first alone (`is_first`) may look at what the runs wrote.

    Args:
        command: of the table of `recformer.__main__`.
        argv: its flags, `--seeds` among them; None: those of the program.
        output_dir: holds a folder a seed.
        num_nodes: the flag of that name.

    Returns:
        The folders, by the order of the seeds.

    Raises:
        UserError: flags that exclude each other, or a run that failed; the other seeds are run.
    """
    seeds, rest = split_flags(sys.argv[1:] if argv is None else argv)
    folders = [Path(output_dir) / f"seed_{seed}" for seed in seeds]
    environments = environments_of_runs(len(seeds), num_nodes)
    if is_first():  # of other runs, should one of these fail
        for path in (Path(output_dir) / SUMMARY, *_table_files(output_dir)):
            path.unlink(missing_ok=True)
    failed = []
    for seed, folder, environment in zip(seeds, folders, environments, strict=True):
        say(f"== seed {seed}")
        line = [sys.executable, "-m", "recformer", command, *rest]
        line += ["--seed", str(seed), "--output_dir", str(folder)]
        if run_command(line, environment) != 0:
            failed.append(str(seed))
    if failed:
        raise UserError(f"seeds {', '.join(failed)} failed, see above")
    return folders


def run_command(line: Sequence[str], environment: Mapping[str, str] | None = None) -> int:
    """Exit status of a command; if this process is stopped, so is the command, which may save."""
    with subprocess.Popen(line, env=environment) as process:
        try:
            return process.wait()
        except BaseException:
            process.terminate()
            process.wait()
            raise


def summarize(folders: Sequence[Path], output_dir: str) -> dict[str, Any]:
    """Mean and deviation over seeds of runs on a processed folder: their last test figures."""
    results = [RunResult.load(folder) for folder in folders]
    test = results[0].test
    of = "targets" if "num_sequences" in test else "test users"
    users = judged(test["num_users"], test.get("drawn_from"), of)
    return write_summary([r.seed for r in results], [r.test for r in results], output_dir, users)


def _table_files(output_dir: str) -> list[Path]:
    return [(Path(output_dir) / SUMMARY).with_suffix(f".{ending}") for ending in TABLES]


def write_summary(
    seeds: Sequence[int | None],
    figures: Sequence[Mapping[str, Any]],
    output_dir: str,
    users: str,
) -> dict[str, Any]:
    """Mean and deviation over seeds, printed and written to `seeds.json`, `.md`, `.tex` and `.csv`.

    Args:
        seeds: of the runs.
        figures: of each run; what is a number in all of them is summed up.
        output_dir: where to.
        users: whose figures they are, in words.

    Returns:
        `seeds`, `judged` (`users`), and by metric `mean`, `deviation` and `values`, as the file
        holds them.
    """
    names = [n for n in figures[0] if all(isinstance(f.get(n), float) for f in figures)]
    summary: dict[str, Any] = {"seeds": list(seeds), "judged": users}
    rows, records = [], []
    for name in names:
        values = [each[name] for each in figures]
        mean, deviation = mean_and_deviation(values)
        summary[name] = {"mean": mean, "deviation": deviation, "values": values}
        of_seeds = {f"seed {seed}": value for seed, value in zip(seeds, values, strict=True)}
        records.append({"metric": name, "mean": mean, "deviation": deviation, **of_seeds})
        rows.append([name, f"{mean:.4f}", f"{deviation:.4f}", *(f"{x:.4f}" for x in values)])
    write_json(Path(output_dir) / SUMMARY, summary, indent=1)
    heads = [users, "mean", "deviation", *(f"seed {seed}" for seed in seeds)]
    table = markdown_table(heads, rows)
    caption = f"% mean and standard deviation over seeds, {users}\n"
    contents = (table, caption + latex_table(heads, rows), csv_table(records))
    for path, content in zip(_table_files(output_dir), contents, strict=True):
        with atomic_write(path) as handle:
            handle.write(content)
    print("\n" + table, end="")
    print(
        f"written to {output_dir}: {SUMMARY}, .md, .tex, .csv, and {METRICS_FILE} in a folder a "
        "seed"
    )
    return summary
