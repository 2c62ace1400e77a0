#!/usr/bin/env python3
"""The whole check of a CUDA machine, in at most eight minutes, as a report to paste.

    python scripts/gpu_check.py            # on a machine with a GPU
    python scripts/gpu_check.py --tiny     # the same on the CPU at toy sizes: shows that it works

Tests marked `gpu`; throughput of the encoder; a pretraining step of published size, plain, with
activation checkpointing, with gradient caching and compiled; ranking of a million items; ZeRO-2 on
one card. A part that fails or runs out of time says so, and the others go on: docs/gpu.md.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
SECONDS = 480
# Dense 16-bit tensor products a second that makers publish, in 10^12 operations.
PUBLISHED = {
    "H200": 989,
    "H100": 989,
    "A100": 312,
    "L40S": 362,
    "L4": 121,
    "4090": 165,
    "V100": 125,
}
PUBLISHED |= {"T4": 65, "A10": 125}


def main() -> int:
    """Run the parts and print the report; the number of parts that failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tiny", action="store_true", help="on the CPU, at toy sizes")
    parser.add_argument("--part", choices=list(PARTS), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.part:
        print(json.dumps(PARTS[args.part](args.tiny)))
        return 0
    import torch

    if not args.tiny and not torch.cuda.is_available():
        print("error: torch sees no CUDA device on this machine", file=sys.stderr)
        return 1
    end, failed, lines = time.monotonic() + SECONDS, 0, []
    parts: dict[str, Callable[[], list[str]]] = {
        name: partial(_alone, name, args.tiny, end) for name in PARTS
    }
    if not args.tiny:
        parts |= {"tests": lambda: _tests(end), "ZeRO-2": lambda: _zero2(end)}
    for name, part in parts.items():
        print(f"{name} …", file=sys.stderr, flush=True)
        try:
            lines += part()
        except (subprocess.SubprocessError, OSError, ValueError, IndexError) as error:
            failed += 1
            lines.append(f"| {name} | FAILED | {_short(error)} |")
    print("\n| what | result | |\n|---|---|---|\n" + "\n".join(lines))
    return failed


def _alone(name: str, tiny: bool, end: float) -> list[str]:
    """A part in a process of its own, so that none holds another's memory."""
    command = [sys.executable, __file__, "--part", name, *(["--tiny"] if tiny else [])]
    done = _run(command, end, 170)
    rows: list[list[str]] = json.loads(done.splitlines()[-1])
    return [f"| {what} | {result} | {note} |" for what, result, note in rows]


def _tests(end: float) -> list[str]:
    done = _run([sys.executable, "-m", "pytest", "-q", "-m", "gpu", "tests"], end, 150)
    return [f"| tests marked `gpu` | {done.strip().splitlines()[-1]} | |"]


def _zero2(end: float) -> list[str]:
    """A small pretraining on the generated sample, ZeRO stage 2 on one card."""
    with tempfile.TemporaryDirectory() as folder:
        variables = {"STRATEGY": "deepspeed_stage_2", "DEVICE": "1"}
        command = ["bash", "lightning_run.sh", "--output_dir", folder, "--num_train_epochs", "1"]
        started = time.monotonic()
        _run([*command, "--overwrite_output_dir"], end, 150, variables)
        result = json.loads((Path(folder) / "metrics.json").read_text())
    loss = result["last"]["val/loss"]
    return [f"| ZeRO-2, one card | loss {loss:.4f} | {time.monotonic() - started:.0f} s |"]


def _run(
    command: list[str], end: float, most: float, variables: dict[str, str] | None = None
) -> str:
    left = min(most, end - time.monotonic())
    if left < 5:
        raise subprocess.TimeoutExpired(command, 0)
    environment = os.environ | (variables or {})
    done = subprocess.run(
        command,
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=left,
        check=False,
    )
    if done.returncode:
        said = (done.stderr or done.stdout).strip()
        raise OSError(said.splitlines()[-1] if said else f"status {done.returncode}")
    return done.stdout


def _short(error: BaseException) -> str:
    if isinstance(error, subprocess.TimeoutExpired):
        return "no time left" if error.timeout == 0 else f"not done after {error.timeout:.0f} s"
    return str(error).replace("|", "/")[:300]


# --- parts, each in a process of its own: rows of what, result, note ----------------------------


def machine(tiny: bool) -> list[list[str]]:
    """Card and versions, and what its own matrix product reaches."""
    import torch

    name = "CPU"
    if not tiny:
        properties = torch.cuda.get_device_properties(0)
        name = f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"
    note = f"torch {torch.__version__}, CUDA {torch.version.cuda}, Python {sys.version.split()[0]}"
    ours = _product(tiny)
    return [["card", name, note], ["product in bfloat16", f"{ours / 1e12:.1f} TFLOP/s", ""]]


def throughput(tiny: bool) -> list[list[str]]:
    """Encoder in bfloat16 autocast: forward and training step, tokens a second and utilisation."""
    import torch

    from benchmarks.encoder import operations, pack
    from recformer.models import RecformerModel

    device = "cpu" if tiny else "cuda"
    model = RecformerModel(_config(tiny)).to(device)
    lengths = [20, 30] if tiny else [512] * 32
    packed = pack(lengths, model.config.vocab_size).to(device)
    adam = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)

    def forward() -> None:
        with torch.no_grad(), torch.autocast(device, torch.bfloat16):
            model.eval().encode(packed)

    def step() -> None:
        adam.zero_grad()
        with torch.autocast(device, torch.bfloat16):
            pooled = model.train().encode(packed)
        pooled.float().square().mean().backward()
        adam.step()

    rows, tokens = [], packed.num_tokens
    needed = operations(model.config, lengths, pooled=True)
    for what, call, share in (("forward", forward, 1), ("training step", step, 3)):
        seconds, memory = _measured(call, tiny)
        used = _utilisation(share * needed / seconds, tiny)
        note = f"{memory:.1f} GB; {used}"
        rows.append(
            [f"encoder, {tokens:,} tokens, {what}", f"{tokens / seconds:,.0f} tokens/s", note]
        )
    return rows


def pretraining(tiny: bool) -> list[list[str]]:
    """A pretraining step of published size, and what each flag makes of it."""
    import torch

    from benchmarks.encoder import operations, pack
    from recformer.data.batches import PairBatch
    from recformer.models import RecformerForPretraining

    device = "cpu" if tiny else "cuda"
    pairs, long, short = (4, 30, 10) if tiny else (8, 1024, 32)
    config = _config(tiny)
    a, b = (pack([n] * pairs, config.vocab_size).to(device) for n in (long, short))
    masks = []
    for side in (a, b):
        hidden = torch.rand(side.num_tokens, device=device) < 0.15
        masks.append((side.input_ids, torch.where(hidden, side.input_ids, -100)))
    ids = torch.arange(pairs, device=device)
    batch = PairBatch(ids, a, b, ids, ids, masks[0], masks[1])
    needed = 3 * 2 * operations(config, [long] * pairs + [short] * pairs, pooled=False)
    rows = []
    variants = ["plain", "--activation_checkpointing", "--grad_cache"]
    for variant in variants if tiny else [*variants, "torch.compile"]:
        torch.manual_seed(0)
        model: Any = RecformerForPretraining(config).to(device).train()
        if variant == "--activation_checkpointing":
            model.longformer.gradient_checkpointing_enable({"use_reentrant": False})
        if variant == "torch.compile":
            model.longformer.encode_tokens = torch.compile(model.longformer.encode_tokens)
        at_once = max(1, pairs // 4) if variant == "--grad_cache" else None
        adam = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)

        def step(model: Any = model, adam: Any = adam, at_once: Any = at_once) -> None:
            adam.zero_grad()
            with torch.autocast(device, torch.bfloat16):
                loss = model.training_loss(batch, at_once)["loss"]
            loss.backward()
            adam.step()

        what = f"pretraining step, {pairs} pairs of {long} + {short} tokens, {variant}"
        try:
            seconds, memory = _measured(step, tiny)
        except Exception as error:  # a card too small, or a compiler that fails, is a result
            rows.append([what, "FAILED", f"{type(error).__name__}: {_short(error)[:150]}"])
            continue
        note = f"{memory:.1f} GB; {_utilisation(needed / seconds, tiny)}"
        rows.append([what, f"{seconds:.3f} s", note])
        del model, adam, step
    return rows


def ranking(tiny: bool) -> list[list[str]]:
    """Ranks and the 50 best items of 4,096 users."""
    import torch

    from recformer.evaluation.ranking import rank_and_top_items

    device = "cpu" if tiny else "cuda"
    num_items, num_users = (1000, 20) if tiny else (1_000_000, 4096)
    items, users = torch.randn(num_items, 64), torch.randn(num_users, 64)
    targets = torch.arange(num_users)
    there = items.to(device), users.to(device)
    seconds, memory = _measured(lambda: rank_and_top_items(there[1], there[0], targets, 50), tiny)
    some = slice(0, 64)
    got = rank_and_top_items(there[1][some], there[0], targets[some], 50)
    expected = rank_and_top_items(users[some], items, targets[some], 50)
    same = (got[0].above == expected[0].above).all() and (got[1] == expected[1]).all()
    if not same:
        raise ValueError("ranks or best items of the device are not those of the CPU")
    result = f"{1000 * seconds / num_users:.3f} ms a user"
    note = f"{memory:.1f} GB; the same as the CPU's"
    return [[f"ranks and best 50, {num_users:,} x {num_items:,} x 64", result, note]]


def _config(tiny: bool) -> Any:
    from recformer.config import RecformerConfig

    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes |= {"vocab_size": 100, "intermediate_size": 32, "attention_window": 8}
    published = {"vocab_size": 50265, "attention_window": 64, "max_position_embeddings": 4098}
    given: dict[str, Any] = {**(sizes if tiny else published)}
    return RecformerConfig(**given)


def _measured(call: Callable[[], object], tiny: bool) -> tuple[float, float]:
    """Median seconds of three calls after a warm-up, and the peak memory in GB."""
    import statistics

    import torch

    cuda = not tiny
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    times = []
    for _ in range(4):
        started = time.perf_counter()
        call()
        if cuda:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    memory = torch.cuda.max_memory_allocated() / 1e9 if cuda else 0.0
    return statistics.median(times[1:]), memory


def _product(tiny: bool) -> float:
    """Operations a second of this device's own product of large bfloat16 matrices."""
    import torch

    size = 128 if tiny else 8192
    x = torch.ones(size, size, dtype=torch.bfloat16, device="cpu" if tiny else "cuda")
    seconds, _ = _measured(lambda: x @ x, tiny)
    return 2 * size**3 / seconds


def _utilisation(speed: float, tiny: bool) -> str:
    """Share of the published speed of the card, where it is known, and of its own product."""
    import torch

    text = f"{speed / _product(tiny):.0%} of its own product"
    name = "" if tiny else torch.cuda.get_device_name(0)
    known = next((peak for key, peak in PUBLISHED.items() if key in name), None)
    return text if known is None else f"MFU {speed / (known * 1e12):.0%}, {text}"


PARTS: dict[str, Callable[[bool], list[list[str]]]] = {
    "machine": machine,
    "ranking": ranking,
    "throughput": throughput,
    "pretraining": pretraining,
}

if __name__ == "__main__":
    sys.exit(main())
