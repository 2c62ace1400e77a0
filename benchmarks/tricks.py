"""What each trick of the encoder brings: with it, and with it switched off from outside.

"Ours" is the encoder as it is, the peer the same encoder without the trick.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from benchmarks.encoder import LENGTHS, build_ours, pack, step_of
from benchmarks.measure import REPEATS, Work, in_turns, row, run_alone
from recformer import PackedTokens, RecformerModel
from recformer.cli import keep_freed_memory
from recformer.models import attention, band, dropout, encoder, kernel
from recformer.models.attention import AttentionLayout, RecformerSelfAttention
from recformer.models.encoder import RecformerLayer

Call = Callable[[], object]
Off = Callable[[], AbstractContextManager]


def rows(quick: bool) -> Iterator[dict[str, Any]]:
    size = "tiny" if quick else "base"
    yield from _kernel_rows(size)
    with _without_kernel():
        yield from _forward_rows(size)
    yield from _training_rows("tiny" if quick else "MiniLM")
    yield _memory_row(size)


def _row(what: str, call: Call, without: Call, off: Off = nullcontext) -> dict[str, Any]:
    """`call` against `without`, the latter inside the context that `off` gives."""

    def switched_off() -> None:
        with off():
            without()

    ours, peer = in_turns(REPEATS, call, switched_off)
    return row(what, ours, "without", peer)


def _without_kernel() -> AbstractContextManager:
    """The encoder in torch, which the other tricks are in."""
    return patch.object(kernel, "switched_on", lambda: False)


def _kernel_rows(size: str) -> Iterator[dict[str, Any]]:
    """The C++ kernel, if there is one here, beside the encoder in torch."""
    if kernel.library() is None:
        return
    model = build_ours(size).eval()
    items = pack(LENGTHS["items"], model.config.vocab_size)
    for dtype in ("float32", "bfloat16"):
        call = torch.no_grad()(partial(model.to(getattr(torch, dtype)).encode, items))
        yield _row(f"{size}, items, {dtype}: C++ kernel", call, call, _without_kernel)


def _forward_rows(size: str) -> Iterator[dict[str, Any]]:
    model = build_ours(size).eval()
    vocab_size = model.config.vocab_size
    sequences = pack(LENGTHS["sequences"], vocab_size)
    items = pack(LENGTHS["items"], vocab_size)
    padded = pack([max(LENGTHS["sequences"])] * len(LENGTHS["sequences"]), vocab_size)

    @torch.no_grad()
    def tokens_of_sequences() -> None:
        model.encode_tokens(sequences)

    @torch.no_grad()
    def tokens_of_items() -> None:
        model.encode_tokens(items)

    yield _row(
        f"{size}, sequences, float32: no padding",
        tokens_of_sequences,
        torch.no_grad()(lambda: model.encode_tokens(padded)),
    )
    yield _row(
        f"{size}, sequences, float32: projections of <s> for <s> alone",
        tokens_of_sequences,
        tokens_of_sequences,
        lambda: patch.object(RecformerSelfAttention, "_attend_from_first", _project_every_token),
    )
    yield _row(
        f"{size}, items, float32: last layer for <s> alone",
        torch.no_grad()(lambda: model.encode(items)),
        tokens_of_items,
    )

    def masked_anew(qkv: Tensor, _: Any, num_heads: int, dropout_p: float) -> Tensor:
        window = model.config.layer_windows[0]
        own = band.build_band(items.sequence_ids, items.cu_seqlens[:-1], window, qkv.dtype)
        return band.band_attention(qkv, own, num_heads, dropout_p)

    yield _row(
        f"{size}, items, float32: masks once a batch",
        tokens_of_items,
        tokens_of_items,
        lambda: patch.object(attention, "band_attention", masked_anew),
    )

    model.bfloat16()
    for what, off in (
        (
            "own attention",
            lambda: patch.object(attention, "band_attention", band.fused_band_attention),
        ),
        (
            "feed-forward in place and in pieces",
            lambda: patch.object(RecformerLayer, "forward", _whole_layer),
        ),
    ):
        yield _row(f"{size}, items, bfloat16: {what}", tokens_of_items, tokens_of_items, off)
    # No two batches of the same number of tokens, as in training.
    lengths = LENGTHS["items"]
    batches = [pack([*lengths[:-1], 1 + n], vocab_size) for n in range(2 * (REPEATS + 1))]

    @torch.no_grad()
    def another_batch() -> None:
        model.encode_tokens(batches.pop())

    yield _row(
        f"{size}, items, bfloat16: tokens in multiples of {encoder.CPU_TOKEN_MULTIPLE}",
        another_batch,
        another_batch,
        lambda: patch.object(encoder, "CPU_TOKEN_MULTIPLE", 1),
    )


def _whole_layer(
    self: RecformerLayer, hidden: Tensor, layout: AttentionLayout, first_only: bool
) -> Tensor:
    """A layer over all rows at once, each of its steps in new memory."""
    hidden = self.attention(hidden, layout, first_only)
    inner = self.intermediate.activation(self.intermediate.dense(hidden))
    return self.output.LayerNorm(hidden + self.output.dense(inner))


def memory_case(size: str, keep: bool) -> Work:
    """A training step in a process that keeps freed memory, or in one left as it was."""
    if keep:
        keep_freed_memory()
    model = build_ours(size)
    return Work(step_of(model, pack(LENGTHS["sequences"], model.config.vocab_size), "float32"))


def _memory_row(size: str) -> dict[str, Any]:
    kept, left = (run_alone(memory_case, size, keep, repeats=REPEATS) for keep in (True, False))
    return row(
        f"{size}, sequences, training, float32: freed memory kept",
        kept["seconds"],
        "without",
        left["seconds"],
        peak_memory_mb=kept["peak_memory_mb"],
        peer_peak_memory_mb=left["peak_memory_mb"],
    )


def _project_every_token(
    self: RecformerSelfAttention, hidden: Tensor, layout: AttentionLayout
) -> Tensor:
    """What `<s>` gathers by keys and values that every token is projected to: (B, H)."""
    heads, width = self.num_heads, hidden.shape[1]
    dim = width // heads
    query = self.query_global(hidden[layout.first]) * dim**-0.5
    query = query[layout.chunk_sequence].view(-1, 1, heads, dim)  # (C, 1, A, D)
    key, value = (
        layout.gather_chunks(project(hidden)).unflatten(2, (heads, dim))  # (C, S, A, D)
        for project in (self.key_global, self.value_global)
    )
    scores = (query * key).sum(dim=3)  # (C, S, A)
    weights = (scores - scores.amax()).exp() * layout.chunk_valid[:, :, None]
    total = layout.sum_chunks(weights.sum(dim=1))  # (B, A)
    summed = layout.sum_chunks((weights[:, :, :, None] * value).sum(dim=1))  # (B, A, D)
    return (summed / total[:, :, None]).flatten(1)


def _training_rows(size: str) -> Iterator[dict[str, Any]]:
    model = build_ours(size)
    items = pack(LENGTHS["items"], model.config.vocab_size)
    for dtype in ("float32", "bfloat16"):
        step = step_of(model, items, dtype)
        what = f"{size}, items, training, {dtype}"
        if kernel.library() is not None:
            yield _row(f"{what}: parts of the layers in C++", step, step, _without_kernel)
        with _without_kernel():
            yield from _training_tricks(what, model, items, dtype)


def _training_tricks(
    case: str, model: RecformerModel, items: PackedTokens, dtype: str
) -> Iterator[dict[str, Any]]:
    step = step_of(model, items, dtype)
    for what, off in (
        (
            "own attention, forward and backward",
            lambda: patch.object(attention, "band_attention", band.fused_band_attention),
        ),
        (
            "attention in pieces of cache size",
            lambda: patch.object(band, "SCORE_BYTES", 2**62),
        ),
        ("dropout from 16 random bits", _bernoulli),
        (
            "gradient of a gather as a gather",
            lambda: patch.object(AttentionLayout, "gather_chunks", _gather_chunks),
        ),
    ):
        yield _row(f"{case}: {what}", step, step, off)
    plain = step_of(model, items, dtype, fused=False)
    yield _row(f"{case}: fused AdamW", step, plain)


@contextmanager
def _bernoulli() -> Iterator[None]:
    """Dropout by torch's own draws, one after the other."""

    def draw_keep(shape: torch.Size, p: float, dtype: torch.dtype) -> Tensor:
        return torch.empty(shape).bernoulli_(1 - p).to(dropout.BITS[dtype]).neg_()

    with patch.object(dropout, "draw_keep", draw_keep), patch.object(band, "draw_keep", draw_keep):
        yield


def _gather_chunks(layout: AttentionLayout, values: Tensor) -> Tensor:
    """As the layout's own, with the gradient that torch gives to indexing."""
    return values.index_select(0, layout.chunk_tokens.flatten()).view(
        *layout.chunk_tokens.shape, -1
    )
