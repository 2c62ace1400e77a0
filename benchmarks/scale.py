"""Preparation of logs larger than memory: seconds and memory by the number of interactions.

    python -m benchmarks.scale --output_dir scale
    python -m benchmarks.scale --output_dir scale --interactions 1e6 1e7 1e8 --memory 4GB

A log of a given size is generated once (Parquet, users and items by popularity, times in no order),
and `recformer process` runs over it as a user would run it, audit included, in a process of its
own. Peak memory is what the process held for itself (`RssAnon`): files that are mapped are given
back by the system when others need the room; all that was resident stands beside it. Then another
process opens what was written, as training does: seconds (of files that were just written and so
are in memory), its own memory, and what it maps, libraries that reading needs among it. Writes
scale.json, its table as scale.md, .tex and .csv, and scale.png. docs/scale.md says more.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from benchmarks import tables
from benchmarks.measure import machine, pin_threads
from recformer.cli import exit_with_message
from recformer.evaluation.table import latex_table
from recformer.files import atomic_write, read_json

ROWS_A_FILE = 5_000_000
USERS, ITEMS = 10, 50  # interactions a user and an item, on average
KEY = ("interactions", "an_item", "memory")  # of a row
LOOKS = 0.2  # seconds between two looks at the memory of the process

# What a process that opens a folder prints: seconds, and MB of its own and of mapped files.
OPEN = """
import json, sys, time
from recformer.data.processed import ProcessedFolder

def memory():
    fields = dict(line.split(":", 1) for line in open("/proc/self/status") if ":" in line)
    return [int(fields[name].split()[0]) * 1024 / 1e6 for name in ("RssAnon", "RssFile")]

before, started = memory(), time.perf_counter()
data = ProcessedFolder.load(sys.argv[1])
seconds = time.perf_counter() - started
own, mapped = (round(now - then) for now, then in zip(memory(), before))
print(json.dumps({"open_seconds": round(seconds, 2), "open_mb": own, "open_mapped_mb": mapped}))
"""


def write_log(folder: Path, number: int, an_item: int = ITEMS) -> None:
    """Write log/ and items.parquet for `number` interactions, from a fixed seed."""
    draw = np.random.default_rng(number)
    users, items = max(number // USERS, 10), max(number // an_item, 20)
    (folder / "log").mkdir(parents=True)
    for place, start in enumerate(range(0, number, ROWS_A_FILE)):
        rows = min(ROWS_A_FILE, number - start)
        # Squares of uniform draws: a few users and items have many, and every one has some.
        frame = {
            "user_id": (draw.random(rows) ** 1.5 * users).astype(np.int64) + 10**9,
            "item_id": (draw.random(rows) ** 2 * items).astype(np.int64) + 10**8,
            "timestamp": draw.integers(1_500_000_000, 1_700_000_000, rows),
        }
        pl.DataFrame(frame).write_parquet(folder / "log" / f"part-{place:05d}.parquet")
    words = pl.Series([f"word{n}" for n in range(5000)])
    columns = [words.gather(draw.integers(0, len(words), items)) for _ in range(6)]
    texts = pl.DataFrame([own.alias(str(n)) for n, own in enumerate(columns)]).select(
        item_id=pl.Series(np.arange(items) + 10**8),
        title=pl.concat_str([str(n) for n in range(4)], separator=" "),
        brand=pl.col("4"),
        category=pl.concat_str([pl.lit("Home"), pl.col("5")], separator=" "),
    )
    texts.write_parquet(folder / "items.parquet")


def measured(command: list[str]) -> dict[str, float]:
    """Seconds, on the clock and of processors, and peak memory (GB) of a program.

    Raises:
        SystemExit: it failed; its own message stands above.
    """
    started, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    process = subprocess.Popen(command, stdout=sys.stderr)
    anonymous = resident = 0
    while process.poll() is None:
        try:
            status = Path(f"/proc/{process.pid}/status").read_text()
        except OSError:
            break
        fields = dict(line.split(":", 1) for line in status.splitlines())
        if "RssAnon" in fields:
            anonymous = max(anonymous, int(fields["RssAnon"].split()[0]))
            resident = max(resident, int(fields["VmHWM"].split()[0]))
        time.sleep(LOOKS)
    if process.wait():
        raise SystemExit(f"error: {' '.join(command)} ended with status {process.returncode}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {
        "seconds": round(time.perf_counter() - started, 1),
        "cpu_seconds": round(used, 1),
        "own_gb": round(anonymous * 1024 / 1e9, 2),
        "resident_gb": round(resident * 1024 / 1e9, 2),
    }


def run(
    number: int, an_item: int, memory: str | None, output: Path, flags: list[str]
) -> dict[str, Any]:
    """One size: the log is made where it is not there yet, what is written is removed again."""
    log, made = _log(output, number, an_item), output / "processed"
    if not (log / "items.parquet").is_file():
        shutil.rmtree(log, ignore_errors=True)
        write_log(log, number, an_item)
    shutil.rmtree(made, ignore_errors=True)
    command = [sys.executable, "-m", "recformer", "process", "--file_path", str(log / "log")]
    command += ["--meta_file_path", str(log / "items.parquet"), "--output_path", str(made), *flags]
    command += [] if memory is None else ["--memory", memory]
    found = measured(command)
    about = read_json(made / "dataset.json")
    written = sum(path.stat().st_size for path in made.rglob("*") if path.is_file())
    if sys.platform == "linux":
        opened = subprocess.run(
            [sys.executable, "-c", OPEN, str(made)], check=True, capture_output=True, text=True
        )
        found |= json.loads(opened.stdout)
    shutil.rmtree(made)
    return {
        "interactions": number,
        "an_item": an_item,
        "memory": memory or "",
        **found,
        "seconds_a_million": round(found["seconds"] / number * 1e6, 2),
        "users": about["num_users"],
        "items": about["num_items"],
        "kept": about["num_interactions"],
        "written_gb": round(written / 1e9, 2),
        "split_hash": about["split_hash"],
    }


def _log(output: Path, number: int, an_item: int) -> Path:
    return output / (f"log-{number}" if an_item == ITEMS else f"log-{number}-{an_item}")


def cells_of(rows: list[dict[str, Any]]) -> tables.Table:
    """Heads and cells of the table; columns that no row has are left out."""
    names = {
        "interactions": "interactions",
        "memory": "--memory",
        "seconds": "seconds",
        "cpu_seconds": "of CPU",
        "seconds_a_million": "s a million",
        "own_gb": "own memory, GB",
        "resident_gb": "with mapped files, GB",
        "users": "users",
        "items": "items",
        "written_gb": "written, GB",
        "open_seconds": "opened in, s",
        "open_mb": "with own memory, MB",
        "open_mapped_mb": "and mapped, MB",
    }
    names = {name: head for name, head in names.items() if any(name in each for each in rows)}
    cells = [
        [f"{v:,}" if isinstance(v := each.get(name, ""), int) else str(v) for name in names]
        for each in rows
    ]
    return list(names.values()), cells


def table(rows: list[dict[str, Any]]) -> str:
    """Rows as Markdown."""
    heads, cells = cells_of(rows)
    first, *others = ("| " + " | ".join(line) + " |\n" for line in (heads, *cells))
    return "".join([first, "|---" * len(heads) + "|\n", *others])


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Seconds and memory by the number of interactions, both on scales of powers of ten."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    rows = [each for each in rows if each.get("an_item", ITEMS) == ITEMS]
    for memory in sorted({each["memory"] for each in rows}):
        own = [each for each in rows if each["memory"] == memory]
        numbers = [each["interactions"] for each in own]
        label = f"--memory {memory}" if memory else "in memory"
        axes[0].plot(numbers, [each["seconds"] for each in own], marker="o", label=label)
        timed = [each for each in own if "cpu_seconds" in each]
        used = [each["cpu_seconds"] for each in timed]
        axes[0].plot(
            [each["interactions"] for each in timed], used, "x--", label=f"{label}, of CPU"
        )
        axes[1].plot(numbers, [each["own_gb"] for each in own], marker="o", label=label)
    for axis, name in zip(axes, ("seconds", "own memory, GB"), strict=True):
        axis.set(xscale="log", yscale="log", xlabel="interactions", ylabel=name)
        axis.grid(alpha=0.3)
        axis.legend()
    with atomic_write(path, "wb") as handle:
        figure.savefig(handle, dpi=120)
    plt.close(figure)


def main(argv: list[str] | None = None) -> None:
    """Parse, run every size, and write table and picture after each."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.scale",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--output_dir", required=True, type=Path)
    parser.add_argument(
        "--interactions", nargs="+", type=float, default=[1e6, 1e7, 1e8], metavar="M"
    )
    parser.add_argument(
        "--interactions_an_item", type=int, default=ITEMS, metavar="N", help="on average"
    )
    parser.add_argument("--memory", default="4GB", help="of the program; '' for none")
    parser.add_argument("--threads", type=int, help="default: the cores this process may use")
    parser.add_argument("--keep_logs", action="store_true", help="for the next run")
    args, flags = parser.parse_known_args(argv)
    described = machine(pin_threads(args.threads))
    os.environ.setdefault("POLARS_MAX_THREADS", str(args.threads or os.cpu_count()))
    result = args.output_dir / "scale.json"
    rows = read_json(result)["rows"] if result.is_file() else []
    rows = [{"an_item": ITEMS} | row for row in rows]  # of files of before
    for number in map(int, args.interactions):
        an_item = args.interactions_an_item
        row = run(number, an_item, args.memory or None, args.output_dir, flags)
        rows = [
            each for each in rows if [each.get(name) for name in KEY] != [row[name] for name in KEY]
        ] + [row]
        rows.sort(key=lambda each: (each["memory"], each["interactions"]))
        if not args.keep_logs:
            shutil.rmtree(_log(args.output_dir, number, an_item))
        content = {"machine": described, "rows": rows}
        tables.write(result, content, table(rows), latex_table(*cells_of(rows)))
        plot(rows, args.output_dir / "scale.png")
        print(table([row]), flush=True)


if __name__ == "__main__":
    exit_with_message(main)
