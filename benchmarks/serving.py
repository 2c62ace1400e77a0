"""`recformer serve` under load, beside the same service that answers every request alone.

    python -m benchmarks.serving                         # published method, 100,000 items
    python -m benchmarks.serving --method head --repeats 0.5

A model of MiniLM's size with random weights, generated products, histories of 10 items drawn anew
for every request (or, --repeats, asked again). The load comes from one process over loopback with
connections that stay open; it shares the cores with the service, which gets none of its own.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.measure import ROOT, row
from recformer.cli import exit_with_message
from recformer.config import RecformerConfig
from recformer.files import write_json
from recformer.models import HeadOptions, RecformerForCatalogue, RecformerForSeqRec
from recformer.tokenization import train_tokenizer

HISTORY = 10  # items
MINILM = {
    "hidden_size": 384,
    "num_hidden_layers": 6,
    "num_attention_heads": 12,
    "intermediate_size": 1536,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
VOCABULARY = 8192
# Words of made-up products; a title has eight, which makes about thirty tokens an item.
KINDS = ("tent", "lamp", "stove", "rope", "boots", "torch", "knife", "pump", "saddle", "helmet")
WORDS = ("light", "steel", "compact", "outdoor", "junior", "carbon", "green", "blue", "set", "pro")
BRANDS = ("Acme", "Borex", "Northfell", "Hallgate", "Oak & Vale", "Terracore", "Hydrajet")


def products(count: int, seed: int = 0) -> dict[str, dict[str, str]]:
    """Made-up products by name."""
    drawn = random.Random(seed)
    return {
        f"P{number:07d}": {
            "title": " ".join(
                [drawn.choice(KINDS), *drawn.choices(WORDS, k=6), f"{drawn.randrange(10**4)}"]
            ),
            "brand": drawn.choice(BRANDS),
            "category": f"Outdoor {drawn.choice(KINDS)}",
        }
        for number in range(count)
    }


def make_folder(folder: Path, method: str, items: int, sizes: dict[str, Any] = MINILM) -> None:
    """A folder as finetuning leaves it, with random weights and item vectors."""
    texts = products(items)
    names = list(texts)
    sample = [value for name in names[:2000] for value in texts[name].values()]
    train_tokenizer([*sample, "title", "brand", "category"], VOCABULARY, folder)
    torch.manual_seed(0)
    config = RecformerConfig(
        vocab_size=VOCABULARY, max_token_num=1024, max_item_embeddings=51, **sizes
    )
    model: RecformerForSeqRec | RecformerForCatalogue
    if method == "head":
        config.head, config.item_num = HeadOptions(bag_size=0).as_dict(), items
        model = RecformerForCatalogue(config)
        model.item_embedding.weight.normal_()
    else:
        model = RecformerForSeqRec(config)
        model.init_item_embedding(torch.randn(items, config.hidden_size))
    model.save_pretrained(folder)
    write_json(folder / "smap.json", {name: place for place, name in enumerate(names)})
    write_json(folder / "meta_data.json", texts)


async def load(
    address: tuple[str, int], clients: int, seconds: float, items: int, repeats: float
) -> list[float]:
    """Seconds of every request of `clients` that ask one after the other for some time."""
    drawn = random.Random(clients)
    names = [f"P{number:07d}" for number in range(items)]
    asked_before: list[bytes] = []
    times: list[float] = []
    end = time.perf_counter() + seconds

    def request() -> bytes:
        if asked_before and drawn.random() < repeats:
            return drawn.choice(asked_before[-1000:])
        body = json.dumps({"history": drawn.choices(names, k=HISTORY), "k": 10}).encode()
        head = "POST /v1/recommend HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json"
        asked_before.append(f"{head}\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body)
        return asked_before[-1]

    async def client() -> None:
        reader, writer = await asyncio.open_connection(*address)
        while time.perf_counter() < end:
            sent = request()
            start = time.perf_counter()
            writer.write(sent)
            head = await reader.readuntil(b"\r\n\r\n")
            length = re.search(rb"content-length: (\d+)", head)
            if not head.startswith(b"HTTP/1.1 200") or length is None:
                raise SystemExit(f"error: the service answered {head[:100]!r}")
            await reader.readexactly(int(length[1]))
            times.append(time.perf_counter() - start)
        writer.close()

    await asyncio.gather(*(client() for _ in range(clients)))
    return times


def measured(
    folder: Path, flags: list[str], clients: int, seconds: float, items: int, repeats: float
) -> dict[str, float]:
    """Requests a second, percentiles (ms) and time of cores a request, with some flags."""
    with tempfile.TemporaryDirectory() as work:
        command = [sys.executable, "-m", "recformer", "serve", str(folder), "--port", "0"]
        command += ["--database", f"{work}/serve.sqlite3", *flags]
        env = os.environ | {"PYTHONPATH": str(ROOT)}
        with (
            open(f"{work}/log", "w") as log,
            subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=log, text=True, cwd=ROOT, env=env
            ) as service,
        ):
            assert service.stdout is not None
            found = re.search(r"http://([\d.]+):(\d+)", service.stdout.readline())
            if found is None:
                raise SystemExit(f"error: no service: {Path(log.name).read_text()[-2000:]}")
            address = (found[1], int(found[2]))
            asyncio.run(load(address, clients, min(seconds, 3), items, 0.0))  # warms up
            start, before, own = time.perf_counter(), cpu_seconds(service.pid), time.process_time()
            times = asyncio.run(load(address, clients, seconds, items, repeats))
            took, spent = time.perf_counter() - start, cpu_seconds(service.pid) - before
            own = time.process_time() - own
            service.terminate()
    p50, p99 = (1000 * float(np.quantile(times, share)) for share in (0.5, 0.99))
    return {
        "requests": len(times),
        "a_second": len(times) / took,
        "p50_ms": p50,
        "p99_ms": p99,
        "cpu_ms": 1000 * spent / len(times),
        "client_ms": 1000 * own / len(times),
    }


def cpu_seconds(process: int) -> float:
    """Time of cores spent on a process: it says more than the clock where others work too."""
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def said(figures: dict[str, float]) -> str:
    """Figures as words."""
    return (
        f"{figures['a_second']:.0f} requests a second, p50 {figures['p50_ms']:.1f} ms, "
        f"p99 {figures['p99_ms']:.1f} ms, {figures['cpu_ms']:.1f} ms of one core a request, "
        f"{figures['client_ms']:.1f} ms of it the load generator's own beside"
    )


def rows(quick: bool) -> Iterator[dict[str, Any]]:
    """Rows of the table of `python -m benchmarks`: one client and 32, both methods."""
    items, seconds = (500, 1.0) if quick else (100_000, 15.0)
    sizes = MINILM | ({"num_hidden_layers": 1, "hidden_size": 48} if quick else {})
    for method in ("published",) if quick else ("published", "head"):
        with tempfile.TemporaryDirectory() as work:
            folder = Path(work)
            make_folder(folder, method, items, sizes)
            for clients in (4,) if quick else (1, 32):
                batched = measured(folder, [], clients, seconds, items, 0.0)
                alone = measured(folder, ["--max_batch", "1"], clients, seconds, items, 0.0)
                yield row(
                    f"serving: {method}, {items:,} items, {clients} clients",
                    1 / batched["a_second"],
                    "without batching",
                    1 / alone["a_second"],
                    amount=1,
                    unit="requests",
                    note=f"{said(batched)}; without batching {said(alone)}",
                )


def main(argv: list[str] | None = None) -> None:
    """One setting, said in words."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.serving",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--method", choices=("published", "head"), default="published")
    parser.add_argument("--items", type=int, default=100_000)
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 32])
    parser.add_argument("--seconds", type=float, default=15.0)
    parser.add_argument("--repeats", type=float, default=0.0, help="share of requests asked again")
    parser.add_argument("--folder", type=Path, help="made here and kept, or used if it is there")
    parser.add_argument("--unbatched", action="store_true", help="measure --max_batch 1 too")
    parser.add_argument("flags", nargs="*", help="of `recformer serve`, behind --")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as work:
        folder = args.folder or Path(work)
        if not (folder / "model.safetensors").exists():
            folder.mkdir(parents=True, exist_ok=True)
            make_folder(folder, args.method, args.items)
        for clients in args.clients:
            for extra in ([], ["--max_batch", "1"]) if args.unbatched else ([],):
                figures = measured(
                    folder, args.flags + extra, clients, args.seconds, args.items, args.repeats
                )
                what = " ".join([f"{clients} clients", *args.flags, *extra])
                print(f"{what}: {said(figures)}; load {os.getloadavg()[0]:.1f}", flush=True)


if __name__ == "__main__":
    exit_with_message(main)
