"""Versions, device, threads and C library, for a report of a fault: one screen, nothing private.

No path, host or account is in it; of variables only those that change speed or results are shown.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from importlib import metadata
from typing import Any

from recformer.cli import command_parser
from recformer.machine import cores, cpuinfo, processor

# Of the package itself, and then of extras, which are left out where they are not installed.
NEEDED = (
    "torch", "transformers", "tokenizers", "lightning", "numpy", "scipy", "polars", "pyarrow",
    "safetensors", "huggingface_hub",
)  # fmt: skip
OPTIONAL = ("deepspeed", "fastapi", "faiss-cpu", "onnxruntime", "optuna")
VARIABLES = (
    "OMP_NUM_THREADS", "MKL_NUM_THREADS", "GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "KMP_BLOCKTIME",
    "CUDA_VISIBLE_DEVICES", "HF_HUB_OFFLINE", "TOKENIZERS_PARALLELISM", "WORLD_SIZE",
    "SLURM_NTASKS",
)  # fmt: skip
GIB = 1 << 30


def environment() -> list[tuple[str, str]]:
    """What the figures and the speed of this installation may depend on: (what, value)."""
    import torch

    import recformer

    return [
        ("recformer", recformer.__version__),
        ("Python", f"{platform.python_version()} ({platform.python_implementation()})"),
        ("system", f"{platform.system()} {platform.release()} {platform.machine()}"),
        ("C library", " ".join(platform.libc_ver()).strip() or "unknown"),
        ("packages", ", ".join(_versions(NEEDED, missing=True))),
        ("extras", ", ".join(_versions(OPTIONAL, missing=False)) or "none"),
        ("processor", f"{processor()}, {torch.backends.cpu.get_cpu_capability()}"),
        ("cores", f"{cores()} of {os.cpu_count()} for this process"),
        ("threads", f"{torch.get_num_threads()} of torch, {torch.get_num_interop_threads()} between"
                    " operators"),
        ("memory", _memory()),
        ("device", "; ".join(_devices(torch)) or "CPU alone"),
        ("bfloat16", _bfloat16()),
        ("variables", ", ".join(f"{n}={os.environ[n]}" for n in VARIABLES if n in os.environ)
                      or "none of those that matter"),
    ]  # fmt: skip


def _versions(names: Sequence[str], missing: bool) -> list[str]:
    found = []
    for name in names:
        try:
            found.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            if missing:
                found.append(f"{name} missing")
    return found


def _bfloat16() -> str:
    """Which instructions multiply bfloat16, by the system's list of the processor's flags."""
    flags = cpuinfo().split()
    known = [name for name in ("amx_bf16", "avx512_bf16", "bf16") if name in flags]
    return ", ".join(known) or "no instructions of the processor known"


def _memory() -> str:
    try:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        return "unknown"
    return f"{total / GIB:.1f} GiB"


def _devices(torch: Any) -> list[str]:
    if not torch.cuda.is_available():
        return []
    every = [torch.cuda.get_device_properties(n) for n in range(torch.cuda.device_count())]
    version = torch.version.cuda
    return [f"{d.name}, {d.total_memory / GIB:.0f} GiB, CUDA {version}" for d in every]


def main(argv: Sequence[str] | None = None) -> None:
    """Print the facts, a line each."""
    command_parser("env", __doc__).parse_args(argv)
    for name, value in environment():
        print(f"{name:<10} {value}")
