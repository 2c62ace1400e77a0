"""Exact ranking and the softmax over all items: time and memory against the plain forms.

    python -m benchmarks.ranking
    python -m benchmarks.ranking --items 1500000 --hidden 768 --dtype bfloat16

Ranking: `rank_by_vectors` against one full matrix of cosines in torch, compared by > and ==.
Loss, forward and backward: `full_softmax_loss` against cross-entropy over the published
`cosine_similarity` broadcast to (batch, items, hidden).

Every case runs in a process of its own over the same item table, a file mapped into memory.
Seconds are the best of `--repeats`; memory is the process's peak (ru_maxrss) less what it held
before the first call, when the whole table was already resident. A plain form that would need more
than `--memory_gb` is not run.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

# torch is imported by the cases only: a child's ru_maxrss starts from the size of its parent.

TEMPERATURE = 0.05
CASES = {
    "rank_by_vectors": "ranking, chunked",
    "plain_ranks": "ranking, full matrix",
    "full_softmax_loss": "loss, chunked",
    "broadcast_loss": "loss, broadcast",
}
PAIRS = (("rank_by_vectors", "plain_ranks"), ("full_softmax_loss", "broadcast_loss"))


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    if args.case:
        run_case(args)
        return
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        table = str(Path(folder) / "items")
        start_case(argv, "write_table", table)
        results: dict[str, dict[str, Any]] = {}
        for case in CASES:
            needed = plain_gigabytes(args).get(case, 0.0)
            if needed > args.memory_gb:
                results[case] = {"skipped": f"needs about {needed:.0f} GB, not run"}
            else:
                results[case] = start_case(argv, case, table)
    size = args.items * args.hidden * (4 if args.dtype == "float32" else 2)
    print(
        f"{args.items:,} items x {args.hidden} {args.dtype} ({size / 1e6:,.0f} MB), "
        f"{args.users} users ranked, loss over a batch of {args.batch_size}"
    )
    print(f"{'':<24}{'seconds':>10}{'MB beyond the table':>22}")
    for case, name in CASES.items():
        result = results[case]
        if "skipped" in result:
            print(f"{name:<24}  {result['skipped']}")
        else:
            print(f"{name:<24}{result['seconds']:>10.3f}{result['megabytes']:>22,.0f}")
    for ours, plain in PAIRS:
        if "skipped" in results[plain]:
            continue
        faster = results[plain]["seconds"] / results[ours]["seconds"]
        smaller = results[plain]["megabytes"] / max(results[ours]["megabytes"], 1)
        print(f"{ours}: {faster:.2f} x the speed, 1/{smaller:.1f} of the memory, ", end="")
        if ours == "rank_by_vectors":
            pairs = zip(results[ours]["above"], results[plain]["above"])
            same = sum(a == b for a, b in pairs) / args.users
            print(f"{same:.2%} of users with the same rank")
        else:
            print(f"loss {results[ours]['loss']:.6f} against {results[plain]['loss']:.6f}")


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--items", type=int, default=15_000)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--users", type=int, default=1024, help="users ranked in one call")
    parser.add_argument("--batch_size", type=int, default=16, help="users in the loss")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--memory_gb", type=float, default=8.0)
    parser.add_argument("--folder", help="where the item table is written; default: a temp folder")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    parser.add_argument("--table", help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def plain_gigabytes(args: argparse.Namespace) -> dict[str, float]:
    """Memory of the plain forms: a float32 table and its norms' copy with the scores; the broadcast
    product with what autograd keeps of it."""
    table = args.items * args.hidden * 4
    scores = args.items * args.users * 4
    product = args.batch_size * args.items * args.hidden * 4
    return {"plain_ranks": (2 * table + 2 * scores) / 1e9, "broadcast_loss": 4 * product / 1e9}


def start_case(argv: list[str] | None, case: str, table: str) -> dict[str, Any]:
    """Run one case in a process of its own and read the figures it prints."""
    flags = sys.argv[1:] if argv is None else argv
    command = [sys.executable, "-m", "benchmarks.ranking", *flags, "--case", case, "--table", table]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"error: the case {case} ended with status {done.returncode}")
    return json.loads(done.stdout or "{}")


def run_case(args: argparse.Namespace) -> None:
    import torch
    from torch.nn import functional as F

    from recformer.losses import full_softmax_loss
    from recformer.metrics import rank_by_vectors

    dtype = getattr(torch, args.dtype)
    shape = (args.items, args.hidden)
    size = args.items * args.hidden
    generator = torch.Generator().manual_seed(0)
    if args.case == "write_table":
        table = torch.from_file(args.table, shared=True, size=size, dtype=dtype).view(shape)
        for part in table.split(10_000):
            part.copy_(torch.randn(part.shape, generator=generator))
        return
    items = torch.from_file(args.table, shared=False, size=size, dtype=dtype).view(shape)
    targets = torch.randint(args.items, (args.users,), generator=generator)
    # users lean towards their targets by 3.5 standard deviations of the cosines of chance, so that
    # ranks spread over the first thousands, as those of a model that has learned something
    noise = torch.randn(args.users, args.hidden, generator=generator)
    users = items[targets].float() + args.hidden**0.5 / 3.5 * noise
    labels = targets[: args.batch_size]

    def ranks() -> dict[str, Any]:
        return {"above": rank_by_vectors(users, items, targets).above.tolist()}

    def plain_ranks() -> dict[str, Any]:
        scores = F.normalize(users) @ F.normalize(items.float()).T
        best = scores.gather(1, targets[:, None])
        above, tied = (scores > best).sum(dim=1), (scores == best).sum(dim=1) - 1
        assert len(tied) == args.users
        return {"above": above.tolist()}

    def loss() -> dict[str, Any]:
        batch = users[: args.batch_size].clone().requires_grad_()
        value = full_softmax_loss(batch, items, labels, TEMPERATURE)
        value.backward()
        return {"loss": value.item()}

    def broadcast_loss() -> dict[str, Any]:
        batch = users[: args.batch_size].clone().requires_grad_()
        scores = F.cosine_similarity(batch[:, None], items.float()[None], dim=-1) / TEMPERATURE
        value = F.cross_entropy(scores, labels)
        value.backward()
        return {"loss": value.item()}

    call = {
        "rank_by_vectors": ranks,
        "plain_ranks": plain_ranks,
        "full_softmax_loss": loss,
        "broadcast_loss": broadcast_loss,
    }[args.case]
    for part in items.split(10_000):
        part.view(torch.uint8).max()  # every page of the table is resident from here on
    before = peak_megabytes()
    seconds = []
    for _ in range(args.repeats):
        start = time.perf_counter()
        result = call()
        seconds.append(time.perf_counter() - start)
    result |= {"seconds": min(seconds), "megabytes": peak_megabytes() - before}
    print(json.dumps(result))


def peak_megabytes() -> float:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e6 if sys.platform == "darwin" else peak * 1024 / 1e6


if __name__ == "__main__":
    main()
