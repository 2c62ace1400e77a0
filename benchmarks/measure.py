"""What the benchmarks share: taking turns, a process of its own, rows of the table, the machine.

A benchmark is a function `rows(quick)` that yields the dicts of `row` one after the other; `quick`
asks for sizes that show that it works and nothing else. A case is a function of plain arguments
that prepares some `Work`, for `run_alone` to measure.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import platform
import re
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import transformers

from benchmarks import tables
from recformer.cli import hide_bars_of_libraries
from recformer.files import UserError
from recformer.machine import cpuinfo, processor

ROOT = Path(__file__).resolve().parent.parent
REPEATS = 3
WHAT_WIDTH = 72  # of the table's first column
#: Whose versions are noted, where they are installed.
PACKAGES = (
    "torch",
    "transformers",
    "tokenizers",
    "numpy",
    "sentence-transformers",
    "faiss-cpu",
)
THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "RAYON_NUM_THREADS")
# What decides about matrix products.
ISA_FLAGS = (
    "avx2",
    "avx512f",
    "avx512_bf16",
    "avx512_fp16",
    "amx_tile",
    "amx_bf16",
    "asimd",
    "sve",
)


@dataclass(frozen=True)
class Work:
    """What a case measures.

    Attributes:
        call: the work.
        summary: of what `call` returned, for the two sides to be compared; values of JSON.
    """

    call: Callable[[], Any]
    summary: Callable[[Any], Any] = lambda result: None


def row(
    what: str,
    ours_seconds: float,
    peer: str = "",
    peer_seconds: float | None = None,
    *,
    amount: float | None = None,
    unit: str = "",
    share_of_ceiling: float | None = None,
    peak_memory_mb: float | None = None,
    peer_peak_memory_mb: float | None = None,
    note: str = "",
) -> dict[str, Any]:
    """One row of the table.

    Args:
        what: was done.
        ours_seconds, peer_seconds: for the same work, in one run.
        peer: name of what ours stands against.
        amount, unit: of the work: 5241, "tokens".
        share_of_ceiling: of the speed that torch's own matrix product reaches (in `ceilings`: that
            registers do).
        peak_memory_mb, peer_peak_memory_mb: of one call, beyond what the process held before (MB of
            10**6 bytes).
        note: said below the row.
    """
    return {
        "what": what,
        "ours_seconds": ours_seconds,
        "peer": peer,
        "peer_seconds": peer_seconds,
        "ratio": None if peer_seconds is None else peer_seconds / ours_seconds,
        "amount": amount,
        "unit": unit,
        "share_of_ceiling": share_of_ceiling,
        "peak_memory_mb": peak_memory_mb,
        "peer_peak_memory_mb": peer_peak_memory_mb,
        "note": note,
    }


def in_turns(repeats: int, *functions: Callable[[], object]) -> list[float]:
    """Median seconds of each function: A B A B …, after a round that warms up."""
    rounds = [[seconds_of(function) for function in functions] for _ in range(repeats + 1)]
    return [statistics.median(times) for times in zip(*rounds[1:])]


def seconds_of(function: Callable[[], object]) -> float:
    """Time of one call."""
    start = time.perf_counter()
    function()
    synchronize()
    return time.perf_counter() - start


def synchronize() -> None:
    """Wait for the GPU, if this process uses one."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def run_alone(case: Callable[..., Work], *args: Any, repeats: int = 0) -> dict[str, Any]:
    """Measure a case in a process of its own.

    Args:
        case: a function of a module, called there with `args` (values of JSON).
        repeats: calls to time after the first one; 0: memory alone.

    Returns:
        `peak_memory_mb` of the first call beyond what the process held before it, `seconds` (median
        of the repeats, None without) and `summary` of the first call.

    Raises:
        SystemExit: the case failed; its own message stands above.
    """
    # The module of a command is called __main__ here, but not there.
    module = getattr(sys.modules[case.__module__].__spec__, "name", case.__module__)
    name = f"{module}:{case.__name__}"
    command = [sys.executable, "-m", __spec__.name, name, json.dumps(args), str(repeats)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, cwd=ROOT, check=False)
    if done.returncode:
        raise SystemExit(f"error: {name} {args} ended with status {done.returncode}")
    return json.loads(done.stdout.splitlines()[-1])


def measure_case(name: str, args: Sequence[Any], repeats: int) -> dict[str, Any]:
    """The child's side of `run_alone`."""
    module, _, function = name.partition(":")
    work: Work = getattr(import_module(module), function)(*args)
    gc.collect()
    before = _peak_mb(reset=True)
    result = work.call()
    synchronize()
    peak = _peak_mb(reset=False) - before
    summary = work.summary(result)
    del result  # so that no two results are held at once
    seconds = [seconds_of(work.call) for _ in range(repeats)]
    return {
        "peak_memory_mb": peak,
        "seconds": statistics.median(seconds) if seconds else None,
        "summary": summary,
    }


def _peak_mb(reset: bool) -> float:
    """Peak memory of this process, or of its GPU: what it holds now, if the peak starts anew."""
    if torch.cuda.is_initialized():
        if reset:
            torch.cuda.reset_peak_memory_stats()
        return torch.cuda.max_memory_allocated() / 1e6
    if reset:
        # Not Linux, or a sandbox: the peak cannot start anew.
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")
    status = Path("/proc/self/status")
    text = status.read_text() if status.is_file() else ""
    lines = dict(line.split(":", 1) for line in text.splitlines())
    if "VmHWM" in lines:
        return int(lines["VmHWM"].split()[0]) * 1024 / 1e6
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e6 if sys.platform == "darwin" else peak * 1024 / 1e6


def give_back() -> None:
    """Let go of what is no longer needed, also where freed memory is kept."""
    gc.collect()  # optimizers are in cycles
    with suppress(OSError, AttributeError):  # not glibc
        ctypes.CDLL(None).malloc_trim(0)


def available_gb() -> float:
    """Memory that can still be had (10**9 bytes)."""
    meminfo = Path("/proc/meminfo")
    if meminfo.is_file():
        lines = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
        return int(lines["MemAvailable"].split()[0]) * 1024 / 1e9
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9


def pin_threads(count: int | None) -> int:
    """Tie this process and its children to `count` cores (None: all) and as many threads.

    Raises:
        UserError: `count` is less than 1.
    """
    if count is not None and count < 1:
        raise UserError(f"--threads {count}: must be at least 1")
    if hasattr(os, "sched_getaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        count = min(count or len(cores), len(cores))
        os.sched_setaffinity(0, cores[:count])
    count = count or os.cpu_count() or 1
    for name in THREAD_VARIABLES:
        os.environ[name] = str(count)
    torch.set_num_threads(count)
    return count


def _installed(package: str) -> bool:
    try:
        version(package)
    except PackageNotFoundError:
        return False
    return True


def machine(threads: int) -> dict[str, Any]:
    """What the figures were measured on, and how busy it was before."""
    listed = re.search(r"^(?:flags|Features)\s*:\s*(.+)$", cpuinfo(), re.MULTILINE)
    flags = set(listed[1].split()) if listed else set()
    return {
        "date": time.strftime("%Y-%m-%d"),
        "cpu": processor(),
        "isa": [flag for flag in ISA_FLAGS if flag in flags],
        "cores": os.cpu_count(),
        "threads": threads,
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "load_before": round(os.getloadavg()[0], 2),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        **{name: version(name) for name in PACKAGES if _installed(name)},
    }


def left_out(what: str, package: str) -> None:
    """Say what cannot be measured here."""
    print(f"  left out: {what}, without {package} (pip install {package})", flush=True)


def quiet() -> None:
    """No lines of libraries between the rows."""
    hide_bars_of_libraries()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of all benchmarks that make a `Report`."""
    parser.add_argument(
        "--json",
        metavar="FILE",
        help="write rows and machine to this file too, and tables beside it: .md, .tex, .csv",
    )
    parser.add_argument("--threads", type=int, help="default: the cores this process may use")


class Report:
    """Prints rows as they come and, if asked to, keeps them in files, whole after every row.

    Args:
        threads: of this process, as `pin_threads` says.
        file: to be written, with tables beside it, see `benchmarks.tables.write`; None: none.
    """

    def __init__(self, threads: int, file: str | None) -> None:
        quiet()
        self.machine, self.file, self.rows = machine(threads), file, list[dict[str, Any]]()
        self.commands: dict[str, str] = {}
        plain = {
            key: " ".join(value) if isinstance(value, list) else value
            for key, value in self.machine.items()
        }
        print(", ".join(f"{key} {value}" for key, value in plain.items() if value))
        print(header())
        self._save()

    def add(
        self, benchmark: str, rows: Iterable[dict[str, Any]], command: str | None = None
    ) -> None:
        """Rows of a benchmark, which `command` measures; the run may be stopped between them."""
        if command:
            self.commands[benchmark] = command
        for values in rows:
            print(line(values), flush=True)
            self.rows.append({"benchmark": benchmark, **values})
            self._save()

    def _save(self) -> None:
        if self.file:
            found = {"machine": self.machine, "commands": self.commands, "rows": self.rows}
            pieces = tables.by_benchmark(found)
            markdown = "\n".join(map(tables.markdown, pieces))
            latex = "\n".join(map(tables.latex, pieces))
            tables.write(self.file, found, markdown, latex)


def header() -> str:
    """Head of the table."""
    return (
        f"{'what':<{WHAT_WIDTH}}{'ours s':>9}{'a second':>17}{'peer s':>10}{'ratio':>7}"
        f"{'ceiling':>9}{'MB':>9}{'peer MB':>9}  peer"
    )


def line(values: dict[str, Any]) -> str:
    """A row as text, its note below it."""

    def number(name: str, form: str) -> str:
        return "" if values[name] is None else format(values[name], form)

    text = (
        f"{values['what']:<{WHAT_WIDTH}}{values['ours_seconds']:>9.4g}{tables.rate(values):>17}"
        f"{number('peer_seconds', '.4g'):>10}{number('ratio', '.2f'):>7}"
        f"{number('share_of_ceiling', '.0%'):>9}{number('peak_memory_mb', ',.0f'):>9}"
        f"{number('peer_peak_memory_mb', ',.0f'):>9}  {values['peer']}"
    ).rstrip()
    return text + (f"\n    {values['note']}" if values["note"] else "")


if __name__ == "__main__":
    quiet()
    print(json.dumps(measure_case(sys.argv[1], json.loads(sys.argv[2]), int(sys.argv[3]))))
