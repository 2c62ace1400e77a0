"""The encoder against transformers' `LongformerModel`: tokens a second, same weights, one run.

    python -m benchmarks.encoder
    python -m benchmarks.encoder --size minilm --dtype bfloat16 --train

Two batches: 16 user sequences and 64 single items, of fixed lengths and random token ids. The peer
gets them right-padded, as it must. Forward passes give the hidden states of all tokens ("hidden")
and the pooled vectors alone ("pooled", which the peer has no shorter way to); a training step
(--train) is forward, backward and AdamW on the pooled vectors, with dropout, under autocast where
the dtype is bfloat16. The two take turns; the best of `--repeats` counts. Tokens are real ones.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
from transformers import LongformerConfig, LongformerModel

from recformer import PAPER, PackedTokens, RecformerConfig, RecformerModel
from recformer.files import write_json

# fmt: off
LENGTHS = {
    "sequences": [
        256, 347, 156, 284, 430, 221, 840, 88, 260, 218, 321, 231, 512, 312, 404, 361,
    ],
    "items": [
        41, 49, 31, 18, 50, 44, 35, 38, 44, 65, 60, 23, 49, 43, 67, 36, 32, 34, 33, 42, 38, 37,
        43, 27, 34, 39, 39, 46, 26, 38, 45, 47, 32, 64, 33, 36, 45, 10, 53, 35, 49, 22, 18, 47,
        27, 31, 54, 54, 37, 32, 43, 34, 18, 54, 25, 51, 44, 37, 24, 32, 30, 28, 27, 15,
    ],
}
# fmt: on
SIZES = {
    "base": {"vocab_size": 50265},
    "minilm": {
        "vocab_size": 30522,
        "hidden_size": 384,
        "num_hidden_layers": 6,
        "intermediate_size": 1536,
    },
    "tiny": {
        "vocab_size": 1000,
        "hidden_size": 48,
        "num_hidden_layers": 2,
        "intermediate_size": 96,
    },
}


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    dtype = getattr(torch, args.dtype)
    print(
        f"{args.size} size, {args.dtype}, {torch.get_num_threads()} threads, torch "
        f"{torch.__version__}, best of {args.repeats}"
    )
    print(f"{'':<22}{'tokens':>8}{'ours tok/s':>12}{'peer tok/s':>12}{'ratio':>8}{'error':>10}")
    results = {}
    for name in args.batches:
        rows = compare_training(args, name, dtype) if args.train else compare(args, name, dtype)
        for what, ours, peer, error in rows:
            tokens = sum(LENGTHS[name])
            print(
                f"{name + ', ' + what:<22}{tokens:>8}{tokens / ours:>12,.0f}{tokens / peer:>12,.0f}"
                f"{peer / ours:>8.2f}{error:>10.1e}",
                flush=True,
            )
            results[f"{name}, {what}"] = {"tokens": tokens, "ours_s": ours, "peer_s": peer}
    if args.json:
        write_json(args.json, results, indent=1)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=SIZES, default="base")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--batches", nargs="+", choices=LENGTHS, default=list(LENGTHS))
    parser.add_argument("--train", action="store_true", help="training steps, not forward passes")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=0, help="0: as torch chooses")
    parser.add_argument("--json", default="", help="write seconds to this file too")
    return parser.parse_args(argv)


def build(size: str) -> tuple[RecformerModel, LongformerModel]:
    """Our model and the peer with the same random weights, the two extra embeddings zero."""
    torch.manual_seed(0)
    values = {**SIZES[size], "max_position_embeddings": 1026}
    ours = RecformerModel(RecformerConfig(**PAPER, **values))
    peer = LongformerModel(
        LongformerConfig(**values, attention_window=PAPER["attention_window"]),
        add_pooling_layer=False,
    )
    with torch.no_grad():
        ours.embeddings.token_type_embeddings.weight.zero_()
        ours.embeddings.item_position_embeddings.weight.zero_()
    state = ours.state_dict()
    del state["embeddings.item_position_embeddings.weight"]
    state["embeddings.token_type_embeddings.weight"] = torch.zeros(2, ours.config.hidden_size)
    peer.load_state_dict(state)
    return ours, peer


def batch(name: str, vocab_size: int) -> tuple[PackedTokens, dict[str, torch.Tensor]]:
    """The batch in either form."""
    lengths = LENGTHS[name]
    ids = torch.randint(5, vocab_size, (sum(lengths),))
    zeros = torch.zeros_like(ids)
    packed = PackedTokens(ids, zeros, zeros, torch.tensor([0, *lengths]).cumsum(0))
    mask = packed.to_padded(torch.ones_like(ids))
    first = torch.zeros_like(mask)
    first[:, 0] = 1
    return packed, {
        "input_ids": packed.to_padded(ids - 1) + 1,
        "attention_mask": mask,
        "global_attention_mask": first,
    }


def best_of(repeats: int, *functions: Callable[[], object]) -> list[float]:
    """Least seconds of each, the functions taking turns after one round to warm up."""
    best = [float("inf")] * len(functions)
    for turn in range(repeats + 1):
        for index, function in enumerate(functions):
            start = time.perf_counter()
            function()
            if turn:
                best[index] = min(best[index], time.perf_counter() - start)
    return best


@torch.no_grad()
def compare(
    args: argparse.Namespace, name: str, dtype: torch.dtype
) -> list[tuple[str, float, float, float]]:
    """Forward passes: (what, our seconds, the peer's, largest difference) of each form."""
    ours, peer = (model.to(dtype).eval() for model in build(args.size))
    packed, padded = batch(name, ours.config.vocab_size)
    hidden, _ = ours.encode_tokens(packed)
    expected = peer(**padded).last_hidden_state
    error = (packed.to_padded(hidden) - expected * padded["attention_mask"][:, :, None]).abs().max()
    pooled_error = (ours.encode(packed) - expected[:, 0]).abs().max()
    whole, short, theirs = best_of(
        args.repeats,
        lambda: ours.encode_tokens(packed),
        lambda: ours.encode(packed),
        lambda: peer(**padded),
    )
    return [
        ("hidden", whole, theirs, float(error)),
        ("pooled", short, theirs, float(pooled_error)),
    ]


def compare_training(
    args: argparse.Namespace, name: str, dtype: torch.dtype
) -> list[tuple[str, float, float, float]]:
    """Training steps, and how far the gradients of the query weights are apart without dropout."""
    ours, peer = build(args.size)
    packed, padded = batch(name, ours.config.vocab_size)
    autocast = dtype is not torch.float32

    def pooled_of_ours() -> torch.Tensor:
        return ours.encode(packed)

    def pooled_of_peer() -> torch.Tensor:
        return peer(**padded).last_hidden_state[:, 0]

    def step(
        model: torch.nn.Module,
        encode: Callable[[], torch.Tensor],
        optimizer: torch.optim.Optimizer | None = None,
    ) -> None:
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            pooled = encode()
        pooled.float()[:, 0].sum().backward()
        if optimizer is not None:
            optimizer.step()

    grads = []
    for model, encode in ((ours, pooled_of_ours), (peer, pooled_of_peer)):
        step(model.eval(), encode)
        grads.append(model.encoder.layer[0].attention.self.query.weight.grad)
    error = (grads[0] - grads[1]).norm() / grads[1].norm()

    adams = [torch.optim.AdamW(m.parameters(), lr=1e-6, fused=True) for m in (ours, peer)]
    ours.train()
    peer.train()
    seconds = best_of(
        args.repeats,
        lambda: step(ours, pooled_of_ours, adams[0]),
        lambda: step(peer, pooled_of_peer, adams[1]),
    )
    return [("step", seconds[0], seconds[1], float(error))]


if __name__ == "__main__":
    main()
