"""Pretraining steps with gradient caching against the batch in one piece: time, memory, loss.

Both sides take the same pairs in the same run, without the optimizer. A batch of 4,096 pairs, all
negatives of each other, is measured by ours alone: in one piece its activations do not fit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from benchmarks.encoder import DEVICE, SIZES, pack
from benchmarks.measure import REPEATS, Work, in_turns, row, run_alone
from recformer.config import RecformerConfig
from recformer.data.batches import PairBatch
from recformer.models import RecformerForPretraining

# model, tokens of side a and b, pairs of both sides of a row, pairs of ours alone, pairs at a time
SMALL = {
    "vocab_size": 5000,
    "hidden_size": 128,
    "num_hidden_layers": 2,
    "intermediate_size": 256,
}
FULL = (SMALL, 48, 12, 256, 4096, 32)
QUICK = (SIZES["tiny"], 12, 6, 8, 16, 4)


def rows(quick: bool) -> Iterator[dict[str, Any]]:
    model, *lengths, pairs, many, at_once = QUICK if quick else FULL
    memory = {
        (count, parts): run_alone(case, model, lengths, count, parts)["peak_memory_mb"]
        for count, parts in ((pairs, at_once), (pairs, 0), (many, at_once))
    }
    cached, plain = (step_of(model, lengths, pairs, parts) for parts in (at_once, 0))
    difference = abs(cached() - plain())
    seconds, peer_seconds = in_turns(REPEATS, cached, plain)
    yield row(
        f"step of {pairs} pairs, {at_once} at a time",
        seconds,
        "the batch in one piece",
        peer_seconds,
        amount=pairs,
        unit="pairs",
        peak_memory_mb=memory[pairs, at_once],
        peer_peak_memory_mb=memory[pairs, 0],
        note=f"losses differ by {difference:.1e}",
    )
    (seconds,) = in_turns(1, step_of(model, lengths, many, at_once))
    yield row(
        f"step of {many} pairs, {at_once} at a time",
        seconds,
        amount=many,
        unit="pairs",
        peak_memory_mb=memory[many, at_once],
    )


def case(model: dict[str, int], lengths: list[int], pairs: int, at_once: int) -> Work:
    """A step of `step_of`."""
    return Work(step_of(model, lengths, pairs, at_once))


def step_of(
    model: dict[str, int], lengths: list[int], pairs: int, at_once: int
) -> Callable[[], float]:
    """Loss and gradients of a batch with masked copies; `at_once` 0: in one piece."""
    torch.manual_seed(0)
    config = RecformerConfig(
        **{"num_attention_heads": model["hidden_size"] // 16, **model},
        attention_window=64,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    trained = RecformerForPretraining(config).to(DEVICE).train()
    a, b = (pack([length] * pairs, config.vocab_size) for length in lengths)
    masks = []
    for side in (a, b):
        chosen = torch.rand(side.num_tokens, device=DEVICE) < 0.15
        masks.append((side.input_ids, torch.where(chosen, side.input_ids, -100)))
    ids = torch.arange(pairs, device=DEVICE)
    batch = PairBatch(ids, a, b, ids, ids, *masks)

    def step() -> float:
        trained.zero_grad()
        loss = trained.training_loss(batch, at_once or None)["loss"]
        loss.backward()
        return loss.item()

    return step
