"""Beam search held to the items: against transformers' `generate`, and against no constraint.

    python -m benchmarks generation
    python -m benchmarks.generation --users 1024 --peer_users 1024   # the peer alone: minutes

A TIGER of the published size, with random weights, writes the 50 best of 12,000 items for each
user. The peer is `generate` of the same model with the same beams, held to the items by a
`prefix_allowed_tokens_fn` that looks prefixes up in a Python dict. The unconstrained search is that
of the same decoder, free to write any code of each level. All take turns batch by batch.

Decoding is the time inside the model (`start` and `step`), choosing the rest: looking up children,
gathering scores, top-k. The ceiling counts operations that the mathematics needs, linear layers
over real tokens and beams, at the speed of such products alone.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from baselines.generative.recommender import CodeHistoryCollator, Generated
from baselines.generative.tiger import Tiger
from baselines.settings import TigerSettings
from benchmarks.measure import Work, header, line, row, run_alone, seconds_of, synchronize
from recformer.data.collators import EvalExample

FULL = {"users": 1024, "peer_users": 128, "num_items": 12_000, "num_beams": 50, "batch_size": 32}
QUICK = {"users": 4, "peer_users": 2, "num_items": 200, "num_beams": 5, "batch_size": 2}
PEER = "transformers' generate over a dict"
CODEBOOK_SIZE = [256] * 4
MAX_ITEMS = 20  # of a history


def rows(quick: bool) -> Iterator[dict[str, Any]]:
    yield from search_rows(**(QUICK if quick else FULL))


def build(
    users: int, num_items: int, num_beams: int, batch_size: int
) -> tuple[Tiger, list[Tensor]]:
    """A model of items with random codes, and histories of 3 to 20 items, batch by batch."""
    torch.manual_seed(0)
    draw = np.random.default_rng(0)
    codes = draw.integers(0, CODEBOOK_SIZE, (num_items, len(CODEBOOK_SIZE)))
    model = Tiger(codes, CODEBOOK_SIZE, TigerSettings(num_beams=num_beams)).eval()
    examples = [
        EvalExample(user, draw.integers(num_items, size=draw.integers(3, MAX_ITEMS + 1)), 0)
        for user in range(users)
    ]
    collator = CodeHistoryCollator(MAX_ITEMS)
    starts = range(0, users, batch_size)
    return model, [collator(examples[start : start + batch_size]).history for start in starts]


def generate_freely(model: Tiger, batch: Tensor) -> Generated:
    """`CodeRecommender.generate` without a trie; `items` are the last codes."""
    logits, read = model.start(batch)
    scores = logits.new_zeros(len(logits), 1)
    for level, (first, size) in enumerate(zip(model.first_tokens, CODEBOOK_SIZE)):
        log_probs = logits.float().log_softmax(-1)[..., first : first + size]
        scores, place = (scores[..., None] + log_probs).flatten(1).topk(model.num_beams)
        codes = place % size
        if level < len(CODEBOOK_SIZE) - 1:
            logits, read = model.step(read, place // size, codes + first)
    return Generated(codes, scores)


class DictSearch:
    """transformers' constrained beam search."""

    def __init__(self, model: Tiger) -> None:
        self.model = model
        self.item_of = {tuple(row): item for item, row in enumerate(model.item_tokens.tolist())}
        allowed: dict[tuple[int, ...], set[int]] = {}
        for tokens in self.item_of:
            for length in range(len(tokens)):
                allowed.setdefault(tokens[:length], set()).add(tokens[length])
        self.allowed = {prefix: sorted(tokens) for prefix, tokens in allowed.items()}

    def __call__(self, batch: Tensor) -> Generated:
        model, beams = self.model, self.model.num_beams
        out = model.t5.generate(
            **model.encoder_inputs(batch),
            num_beams=beams,
            num_return_sequences=beams,
            max_new_tokens=model.trie.num_levels,
            do_sample=False,
            length_penalty=0.0,
            # A beam of probability 0 has a prefix of no item: it may go on as it likes.
            prefix_allowed_tokens_fn=lambda _, tokens: self.allowed.get(
                tuple(tokens.tolist()[1:]), [0]
            ),
            return_dict_in_generate=True,
            output_scores=True,
        )
        items = [self.item_of.get(tuple(row), -1) for row in out.sequences[:, 1:].tolist()]
        return Generated(
            torch.tensor(items).view(-1, beams), out.sequences_scores.cpu().view(-1, beams)
        )


class Clock:
    """Adds up the seconds spent in a model's `start` and `step`."""

    def __init__(self, model: Tiger) -> None:
        self.seconds = 0.0
        self._running = False
        for name in ("start", "step"):
            setattr(model, name, self._timed(getattr(model, name)))

    def _timed(self, function: Callable) -> Callable:
        def call(*args: Any) -> Any:
            if self._running:  # `start` calls `step`
                return function(*args)
            self._running = True
            began = time.perf_counter()
            result = function(*args)
            synchronize()
            self.seconds += time.perf_counter() - began
            self._running = False
            return result

        return call


@torch.no_grad()
def search_rows(
    users: int, peer_users: int, num_items: int, num_beams: int, batch_size: int
) -> Iterator[dict[str, Any]]:
    """Rows of the search against `generate` and against the search without a constraint."""
    model, batches = build(users, num_items, num_beams, batch_size)
    peer = DictSearch(model)
    product, product_operations = products(model, batches[0])
    ours, theirs = model.generate(batches[0]), peer(batches[0])  # warms up, and tells if they agree
    generate_freely(model, batches[0])
    same = float((ours.items == theirs.items).float().mean())
    error = float((ours.log_probs - theirs.log_probs).abs().max())
    memory = {
        side: run_alone(memory_case, side, num_items, num_beams, batch_size)["peak_memory_mb"]
        for side in ("items", "free", "peer")
    }
    what = f"best {num_beams} of {num_items:,} items by TIGER, {{:,}} users"

    few = batches[: -(-peer_users // batch_size)]
    times = [
        [seconds_of(call) for call in (partial(model.generate, b), partial(peer, b), product)]
        for b in few
    ]
    ours_seconds, peer_seconds, product_seconds = map(sum, zip(*times))
    speed = product_operations * len(few) / product_seconds
    yield row(
        what.format(users_of(few)),
        ours_seconds,
        PEER,
        peer_seconds,
        amount=users_of(few),
        unit="users",
        share_of_ceiling=sum(operations(model, batch) for batch in few) / ours_seconds / speed,
        peak_memory_mb=memory["items"],
        peer_peak_memory_mb=memory["peer"],
        note=f"{same:.2%} of the places hold the same item, largest difference {error:.1e}",
    )

    clock = Clock(model)
    total = {"items": 0.0, "free": 0.0}
    inside = {"items": 0.0, "free": 0.0}
    for batch in batches:
        for side, search in (("items", model.generate), ("free", partial(generate_freely, model))):
            clock.seconds = 0.0
            total[side] += seconds_of(partial(search, batch))
            inside[side] += clock.seconds
    yield row(
        what.format(users),
        total["items"],
        "any codes",
        total["free"],
        amount=users,
        unit="users",
        peak_memory_mb=memory["items"],
        peer_peak_memory_mb=memory["free"],
        note="; ".join(
            f"{name}: decoding {inside[side]:.2f} s, choosing {total[side] - inside[side]:.2f} s"
            for name, side in (("items", "items"), ("any codes", "free"))
        ),
    )


def users_of(batches: list[Tensor]) -> int:
    return sum(len(batch) for batch in batches)


def memory_case(side: str, num_items: int, num_beams: int, batch_size: int) -> Work:
    """One batch searched by `side`: among the items, free, or by the peer."""
    model, (batch,) = build(batch_size, num_items, num_beams, batch_size)
    searches: dict[str, Callable[[Tensor], Generated]] = {
        "items": model.generate,
        "free": partial(generate_freely, model),
        "peer": DictSearch(model),
    }
    return Work(torch.no_grad()(lambda: searches[side](batch)))


def operations(model: Tiger, batch: Tensor) -> float:
    """Floating-point operations of the linear layers for a batch, attention's own left out."""
    config = model.t5.config
    attention = config.d_model * config.num_heads * config.d_kv  # weights of one of q, k, v, o
    feed_forward = 2 * config.d_model * config.d_ff
    levels = model.trie.num_levels
    tokens = int((batch >= 0).sum()) * levels
    beams = len(batch) * (1 + (levels - 1) * model.num_beams)
    encoder = config.num_layers * (4 * attention + feed_forward)
    history = config.num_layers * 2 * attention  # its keys and values for the decoder
    decoder = config.num_layers * (6 * attention + feed_forward) + config.d_model * model.num_tokens
    return 2.0 * (tokens * (encoder + history) + beams * decoder)


def products(model: Tiger, batch: Tensor) -> tuple[Callable[[], None], float]:
    """The linear layers of one decoder block over all beams of a batch, and their operations."""
    block, num_rows = model.t5.decoder.block[0], len(batch) * model.num_beams
    weights = [m.weight for m in block.modules() if isinstance(m, torch.nn.Linear)]
    inputs = {w.shape[1]: torch.randn(num_rows, w.shape[1]) for w in weights}

    def product() -> None:
        for weight in weights:
            F.linear(inputs[weight.shape[1]], weight)

    return product, 2.0 * num_rows * sum(w.numel() for w in weights)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.generation",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    for name, value in FULL.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    print(header())
    for values in search_rows(**vars(parser.parse_args(argv))):
        print(line(values), flush=True)


if __name__ == "__main__":
    main()
