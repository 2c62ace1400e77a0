"""Any model window after window: train up to one, judge on the next, move on.

output_dir/windows/003/     the run that is judged on window 3, as any run's folder
output_dir/metrics.json     figures of every window and their average, as `RunResult` has them
output_dir/windows.md, .tex, .csv       the table
output_dir/windows.png      the curve over time
output_dir/ranks/*.parquet  ranks of the targets of all windows, for `recformer compare`

A window that is finished is not computed again, so that the same command goes on where it stopped.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

from baselines.arguments import BaselineRunArguments
from recformer.data.windows import Windows, WindowView
from recformer.evaluation.evaluator import Evaluator
from recformer.evaluation.over_time import (
    WindowRanks,
    cells_over_time,
    figures_over_time,
    format_over_time,
    records_over_time,
)
from recformer.evaluation.ranks import TargetRanks
from recformer.evaluation.runs import METRICS_FILE, RunResult, ranks_file, read_ranks
from recformer.evaluation.table import csv_table, latex_table
from recformer.files import (
    CHECKSUMS_FILE,
    UserError,
    atomic_write,
    check_folder,
    read_checked_json,
)
from recformer.processes import is_first, say
from recformer.training.run_folder import RunFolder

# Trains and evaluates on one window's view: (flags, view, best_model folder to go on from).
RunOne = Callable[[BaselineRunArguments, WindowView, Path | None], RunResult]
FOLDER, TABLE, PICTURE = "windows", "windows.md", "windows.png"
TABLES = (TABLE, "windows.tex", "windows.csv")


def run_windows(args: BaselineRunArguments, windows: Windows, run_one: RunOne) -> RunResult:
    """Train and judge on every window but the first, and sum up.

    Args:
        args: flags of the run; `args.windows` says whether weights go on.
        windows: of the processed folder.
        run_one: does one window.

    Raises:
        UserError: as `RunFolder.claim`, what `run_one` refuses, or a sample of test users.
    """
    if args.test_users is not None:
        raise UserError("--test_users: windows are judged by all their targets, leave it out")
    started = time.monotonic()
    settings = {k: v for k, v in asdict(args).items() if k != "data_path" and v is not None}
    output = RunFolder.claim(
        args.output_dir,
        settings | {"split_hash": windows.folder.split_hash, "windows_hash": windows.hash},
        (METRICS_FILE, "ranks", FOLDER, *TABLES, PICTURE),
        args.overwrite_output_dir,
    )
    with output:
        if output.has(METRICS_FILE, "ranks", TABLE):
            finished = RunResult.load(output.path)
            if is_first() and not output.has(*TABLES):  # earlier versions wrote the first alone
                _write_tables(finished, args.metric_ks, output.path)
            return finished
        results, before = {}, None
        for number in range(1, len(windows)):
            view = windows.view(number, args.windows == "incremental")
            folder = output.path / FOLDER / f"{number:03d}"
            own = replace(args, output_dir=str(folder), overwrite_output_dir=False)
            results[number] = run_one(own, view, before)
            if (folder / "best_model").is_dir() and args.windows == "incremental":
                before = folder / "best_model"
            figures, about = results[number].test, windows.about[number]
            say(
                f"window {number} of {len(windows) - 1} ({about['starts']}): test {args.metric} "
                f"{figures[args.metric]:.4f}, {figures['num_users']:,.0f} targets"
            )
        result = _sum_up(args, windows, results, output.path)
        result.seconds = round(time.monotonic() - started, 1)
        if is_first():
            (shown,) = (name for name in result.evaluations)
            _write_tables(result, args.metric_ks, output.path)
            draw_over_time({shown: result.test}, args.metric, output.path / PICTURE)
            result.save(output.path)
        return result


def _write_tables(result: RunResult, ks: Sequence[int], path: Path) -> None:
    metrics = [f"{name}@{k}" for k in ks for name in ("NDCG", "Recall")]
    contents = (
        format_over_time(result.test, metrics),
        latex_table(*cells_over_time(result.test, metrics)),
        csv_table(records_over_time(result.test, metrics)),
    )
    for name, content in zip(TABLES, contents, strict=True):
        with atomic_write(path / name) as handle:
            handle.write(content)


def _sum_up(
    args: BaselineRunArguments, windows: Windows, results: dict[int, RunResult], path: Path
) -> RunResult:
    """Figures of all windows, and their ranks in one file a split."""
    last = results[max(results)]
    name = list(last.evaluations)[-1]
    figures = {}
    for split in ("val", "test"):
        found = []
        evaluator = Evaluator(args.metric_ks, args.ties)
        for number in results:
            columns = read_ranks(ranks_file(path / FOLDER / f"{number:03d}", name, split))
            known = int(windows.about[number - 1]["items_known"])
            places, targets = columns["user_id"], columns["target"]
            ranks = TargetRanks(columns["above"], columns["tied"], columns["num_candidates"])
            sequences = np.searchsorted(windows.joined.offsets, places, side="right") - 1
            starts = windows.about[number]["starts"]
            found.append(
                WindowRanks(number, starts, places, targets, sequences, targets >= known, ranks)
            )
            evaluator.update(places, targets, ranks)
        figures[split] = figures_over_time(found, args.metric_ks, args.ties)
        if is_first():
            every = np.searchsorted(
                windows.joined.offsets, evaluator.state()["user_id"], side="right"
            )
            evaluator.write_parquet(ranks_file(path, name, split), {"sequence": every - 1})
    stages = {
        f"{stage} {number}": entry
        for number, result in results.items()
        for stage, entry in result.stages.items()
    }
    return replace(
        last,
        evaluations={name: figures},
        stages=stages,
        split_hash=windows.folder.split_hash,
        seconds_a_user=float(np.mean([r.seconds_a_user or 0.0 for r in results.values()])),
        train_seconds=float(sum(r.train_seconds or 0.0 for r in results.values())),
    )


def go_on_from(model: torch.nn.Module, path: Path) -> None:
    """Put the weights of an earlier window into a model that may know more items by now.

    Tables grow at their end: items are numbered as they appeared, and so are categories. New rows
    keep their random weights.

    Raises:
        UserError: the folder holds another model, or is damaged.
    """
    check_folder(path, "model.safetensors")
    state, before = model.state_dict(), load_file(path / "model.safetensors")
    if set(state) != set(before):
        odd = sorted(set(state) ^ set(before))[0]
        raise UserError(f"{path} holds another model than this one ({odd})")
    for name, tensor in before.items():
        own = state[name]
        if own.shape[1:] != tensor.shape[1:] or len(own.shape) != len(tensor.shape):
            shapes = f"{tuple(tensor.shape)}, in this model {tuple(own.shape)}"
            raise UserError(f"{path}: {name} has shape {shapes}")
        if own.ndim and len(own) < len(tensor):
            raise UserError(f"{path}: {name} has {len(tensor)} rows, this model {len(own)}")
        (own[: len(tensor)] if own.ndim else own).copy_(tensor)


def weights_checksum(path: Path) -> int:
    """CRC-32 of a best_model's weights."""
    return int(read_checked_json(path / CHECKSUMS_FILE)["model.safetensors"])


def draw_over_time(rows: dict[str, dict[str, Any]], metric: str, path: Path) -> None:
    """PNG of a metric over the windows, a line a run, with intervals by session where it is one."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(8, 4), constrained_layout=True)
    for name, figures in rows.items():
        windows = figures["windows"]
        numbers = [row["number"] for row in windows]
        axis.plot(numbers, [row[metric] for row in windows], ".-", label=name)
        if len(rows) == 1:
            ends = np.array([row["intervals"][metric] for row in windows])
            axis.fill_between(numbers, ends[:, 0], ends[:, 1], alpha=0.2)
    first = next(iter(rows.values()))["windows"][0]["starts"][:10]
    axis.set(xlabel=f"window (1 begins {first})", ylabel=f"{metric}, test")
    axis.grid(alpha=0.3)
    if len(rows) > 1:
        axis.legend(fontsize="small", ncols=2)
    with atomic_write(path, "wb") as handle:
        figure.savefig(handle, format="png", dpi=120)
    pyplot.close(figure)
