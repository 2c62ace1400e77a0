"""Where the time of the encoder goes: of its C++ kernel, and of a training step.

    python -m benchmarks stages

The kernel is compiled once more with counters of processor ticks around its stages, which cost a
few percent; a training step is read from torch's profiler. Seconds are of the median call without
profiler, shared out as the ticks or the operators' own times are.
"""

from __future__ import annotations

import ctypes
import os
import statistics
from collections import Counter
from collections.abc import Iterator
from typing import Any
from unittest.mock import patch

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.encoder import DTYPES, LENGTHS, build_ours, pack, step_of
from benchmarks.measure import REPEATS, in_turns, row, seconds_of
from recformer.models import kernel

#: Of `cpp/stages.h`, in its order.
STAGES = (
    "the rest",
    "embeddings",
    "products of the linear layers",
    "biases and copies",
    "GELU",
    "residuals and LayerNorm",
    "products of attention",
    "softmax",
    "what <s> gathers",
    "waiting for each other",
)
#: Operators of a training step: the first whose name begins like one of these.
OPERATORS = {
    "products of the linear layers": (
        "aten::mm",
        "aten::addmm",
        "mkldnn",
        "aten::mkldnn",
        "_Linear",
    ),
    "batched products": ("aten::bmm", "aten::baddbmm"),
    "GELU": ("aten::gelu",),
    "residuals and LayerNorm": ("aten::native_layer_norm", "aten::native_batch_norm"),
    "softmax": ("aten::_softmax", "aten::softmax"),
    "dropout": (
        "_Drop",
        "aten::bitwise",
        "aten::random_",
        "aten::bernoulli",
        "aten::native_dropout",
    ),
    # Its own functions, which draw the bits of its dropout.
    "the rest of attention": ("_BandAttention", "aten::clamp"),
    "dropout, residual and LayerNorm": ("_ResidualNorm",),
    "bias and GELU": ("_BiasGelu",),
    "AdamW": ("aten::_fused_adamw", "aten::_foreach"),
    "copies": (
        "_GatherChunks",
        "aten::copy_",
        "aten::cat",
        "aten::index",
        "aten::clone",
        "aten::gather",
        "aten::embedding",
        "aten::select",
        "aten::slice",
    ),
    "attention in C++": ("_Band", "_Gather"),
    "zeros and new memory": ("aten::empty", "aten::zero", "aten::fill_", "aten::resize_"),
    "sums and other arithmetic": (
        "aten::add",
        "aten::mul",
        "aten::sum",
        "aten::sub",
        "aten::div",
        "aten::where",
        "aten::mas",
        "aten::sgn",
        "aten::abs",
        "aten::copysign",
        "aten::exp",
        "aten::amax",
    ),
}


def rows(quick: bool) -> Iterator[dict[str, Any]]:
    """Items by the kernel, where it runs, and a training step on them, in both dtypes."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # no lines of the profiler between rows
    sizes = ("tiny",) if quick else ("MiniLM", "base")
    if kernel.library() is not None and not quick:
        for size in sizes:
            for dtype in DTYPES:
                yield from kernel_rows(size, dtype)
    for dtype in DTYPES:
        yield from training_rows(sizes[0], dtype)


@torch.no_grad()
def kernel_rows(size: str, dtype: str) -> Iterator[dict[str, Any]]:
    """All states of 64 items of about 38 tokens; a row for each stage."""
    with patch.object(kernel, "COMPILE", (*kernel.COMPILE, "-DRECFORMER_TIMES")):
        counting = kernel.library.__wrapped__()
    assert counting is not None
    model = build_ours(size).to(getattr(torch, dtype)).eval()
    packed = pack(LENGTHS["items"], model.config.vocab_size)

    def encode() -> None:
        assert kernel.encode(model, packed, getattr(torch, dtype), None) is not None

    (seconds,) = in_turns(2 * REPEATS, encode)
    ticks = (ctypes.c_uint64 * len(STAGES))()
    with patch.object(kernel, "library", lambda: counting):
        encode()
        counting.recformer_times(ticks)
        for _ in range(REPEATS):
            encode()
        counting.recformer_times(ticks)
    times = dict(zip(STAGES, ticks))
    yield from _shares(f"{size}, items, {dtype}", seconds, times, packed.num_tokens)


def training_rows(size: str, dtype: str) -> Iterator[dict[str, Any]]:
    """A training step on the same items; a row for each kind of operators."""
    model = build_ours(size)
    packed = pack(LENGTHS["items"], model.config.vocab_size)
    step = step_of(model, packed, dtype)
    step()
    seconds = statistics.median(seconds_of(step) for _ in range(REPEATS))
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        step()
    times: Counter[str] = Counter()
    for event in profiled.key_averages():
        times[_kind(event.key)] += event.self_cpu_time_total
    yield from _shares(
        f"{size}, items, training step, {dtype}", seconds, dict(times), packed.num_tokens
    )


def _kind(operator: str) -> str:
    for kind, beginnings in OPERATORS.items():
        if operator.startswith(beginnings):
            return kind
    return "the rest"


def _shares(
    what: str, seconds: float, times: dict[str, float], tokens: int
) -> Iterator[dict[str, Any]]:
    yield row(what, seconds, amount=tokens, unit="tokens")
    total = sum(times.values())
    for kind, time in sorted(times.items(), key=lambda each: -each[1]):
        if time > 0:
            note = f"{time / total:.1%}"
            yield row(f"{what}: {kind}", seconds * time / total, note=note)
