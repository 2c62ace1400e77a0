"""What this processor's arithmetic reaches, and how near to it a product of the kernel comes.

    python -m benchmarks ceilings

One thread. "In registers" multiplies and adds numbers that never leave them, which nothing made of
products can go beyond. Then the two products of a feed-forward layer on 384 rows, the kernel's
beside torch's; its share of the ceiling is of what registers reach with the same instruction. With
AMX bfloat16 is multiplied in tiles, and float32 in three parts, six products of bfloat16 each.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.measure import REPEATS, in_turns, row
from recformer.models import kernel
from recformer.models.kernel import BFLOAT16, FLOAT, THREE_BFLOAT16

SOURCE = Path(__file__).with_suffix(".cpp")
ROWS = 384
PAST = 32  # rows past the last that a product may read and write
WIDTHS = {"MiniLM": (384, 1536), "base": (768, 3072)}
ROUNDS = 10_000_000
#: Operations of a round in registers, by whether it is in tiles.
OPERATIONS = {(FLOAT, False): 768, (BFLOAT16, False): 1536, (BFLOAT16, True): 65536}
NAMES = {FLOAT: "float32", BFLOAT16: "bfloat16", THREE_BFLOAT16: "float32 in three parts"}


def rows(quick: bool) -> Iterator[dict[str, Any]]:
    """Of every kind of numbers that the kernel multiplies here; none without it."""
    if kernel.library() is None:
        print("  left out: ceilings, which need AVX-512 and a C++ compiler", flush=True)
        return
    library = compiled()
    tiles = bool(library.use_amx())
    rounds = ROUNDS // 1000 if quick else ROUNDS
    kinds = [FLOAT]
    if "avx512_bf16" in kernel.cpu_flags() or tiles:
        kinds.append(BFLOAT16)
    speeds = {}
    for kind in kinds:
        operations = OPERATIONS[kind, tiles and kind == BFLOAT16] * rounds
        (seconds,) = in_turns(REPEATS, partial(library.registers, kind, rounds))
        speeds[kind] = operations / seconds
        where = "tiles" if tiles and kind == BFLOAT16 else "registers"
        yield row(f"{NAMES[kind]}, in {where}", seconds, amount=operations / 1e9, unit="GFLOP")
    if tiles:
        kinds.append(THREE_BFLOAT16)
        speeds[THREE_BFLOAT16] = speeds[BFLOAT16] / 6
    with one_thread():
        for size, (hidden, inner) in list(WIDTHS.items())[: 1 if quick else None]:
            for kind in kinds:
                for inputs, outputs in ((hidden, inner), (inner, hidden)):
                    yield _product(library, size, kind, inputs, outputs, speeds[kind])


def _product(
    library: ctypes.CDLL, size: str, kind: int, inputs: int, outputs: int, ceiling: float
) -> dict[str, Any]:
    """A product of the kernel beside torch's of the same numbers."""
    generator = torch.Generator().manual_seed(0)
    dtype = torch.bfloat16 if kind == BFLOAT16 else torch.float32
    states = torch.randn(ROWS, inputs, generator=generator).to(dtype)
    weight = torch.randn(outputs, inputs, generator=generator).to(dtype)
    ours, theirs = in_turns(
        3 * REPEATS,
        Multiplication(library, kind, states, weight),
        torch.no_grad()(partial(F.linear, states, weight)),
    )
    operations = 2 * ROWS * inputs * outputs
    return row(
        f"{size}, {NAMES[kind]}, {ROWS} x {inputs} x {outputs}",
        ours,
        "torch",
        theirs,
        amount=operations / 1e9,
        unit="GFLOP",
        share_of_ceiling=operations / ours / ceiling,
    )


class Multiplication:
    """states (R, K) times a weight (N, K) by the kernel: a call gives (R, N) sums of float32."""

    def __init__(self, library: ctypes.CDLL, kind: int, states: Tensor, weight: Tensor) -> None:
        rows, inputs = states.shape
        self.library, self.kind = library, kind
        self.shape = (rows, inputs, len(weight))
        padded = F.pad(states, (0, 0, 0, PAST))
        self.left = in_three_parts(padded) if kind == THREE_BFLOAT16 else padded
        self.right = kernel.panels(weight, kind)
        self.sums = torch.empty(rows + PAST, len(weight))

    def __call__(self) -> Tensor:
        pointers = (each.data_ptr() for each in (self.left, self.right, self.sums))
        self.library.multiply(self.kind, *self.shape, *pointers)
        return self.sums[: self.shape[0]]


def in_three_parts(states: Tensor) -> Tensor:
    """float32 (R, K) as `Three` of recformer/models/cpp/numbers.h: (R, K / 32, 3, 32) bfloat16."""
    parts, left = [], states.float()
    for _ in range(3):
        parts.append(left.bfloat16())
        left = left - parts[-1]
    return torch.stack(parts, 1).unflatten(2, (-1, 32)).transpose(1, 2).contiguous()


def compiled() -> ctypes.CDLL:
    """The library of `ceilings.cpp`, of this processor.

    Raises:
        subprocess.SubprocessError: the compiler fails.
    """
    options = [kernel.ISA[flag] for flag in kernel.ISA if flag in kernel.cpu_flags()]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "ceilings.so")
        compiler = os.environ.get("CXX", "c++")
        command = [compiler, *kernel.COMPILE, *options, f"-I{kernel.SOURCES}", "-o", str(file)]
        subprocess.run([*command, str(SOURCE)], check=True, timeout=kernel.COMPILE_SECONDS)
        library = ctypes.CDLL(str(file))
    library.registers.argtypes = (ctypes.c_int, ctypes.c_int64)
    library.registers.restype = ctypes.c_float
    library.multiply.argtypes = (
        ctypes.c_int,
        *(3 * [ctypes.c_int64]),
        *(3 * [ctypes.c_void_p]),
    )
    library.multiply.restype = None
    return library


@contextmanager
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
