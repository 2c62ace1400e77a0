"""Attention over packed tokens against a plain implementation, sequence by sequence."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from recformer import PackedTokens, RecformerConfig
from recformer.models import band as band_module
from recformer.models.attention import CHUNK, RecformerSelfAttention, build_layout
from recformer.models.band import _BandAttention, fused_band_attention
from recformer.models.dropout import add_dropout, drop, dropout, keep_scale

HEADS, HIDDEN = 2, 8
CASES = [
    ([1], 2),
    ([1, 1, 3], 2),
    ([5, 1, 40, 90, 1, 130, 7], 8),
    ([64, 64, 65], 64),
    ([300], 16),
    ([70, 3, 150], 130),
    ([200, 2], 400),
]


def packed_of(lengths: list[int]) -> PackedTokens:
    zeros = torch.zeros(sum(lengths), dtype=torch.long)
    return PackedTokens(zeros, zeros, zeros, torch.tensor([0, *lengths]).cumsum(0))


def attention_of(window: int, dropout_p: float = 0.0) -> RecformerSelfAttention:
    config = RecformerConfig(
        hidden_size=HIDDEN, num_attention_heads=HEADS, attention_probs_dropout_prob=dropout_p
    )
    return RecformerSelfAttention(config, window).double()


def plain_attention(attention: RecformerSelfAttention, hidden: Tensor, window: int) -> Tensor:
    """Longformer's attention of one sequence (n, H), by definition."""

    def heads(x: Tensor) -> Tensor:
        return x.view(len(x), HEADS, -1).transpose(0, 1)  # (A, n, D)

    def attend(query: Tensor, key: Tensor, value: Tensor, visible: Tensor) -> Tensor:
        scores = query @ key.transpose(1, 2) / math.sqrt(query.shape[-1])
        weights = scores.masked_fill(~visible, -math.inf).softmax(dim=-1)
        return (weights @ value).transpose(0, 1).reshape(-1, HIDDEN)

    place = torch.arange(len(hidden))
    near = (place[:, None] - place[None, :]).abs() <= window // 2
    near[:, 0] = True
    a = attention
    local = attend(heads(a.query(hidden)), heads(a.key(hidden)), heads(a.value(hidden)), near)
    first = attend(
        heads(a.query_global(hidden[:1])),
        heads(a.key_global(hidden)),
        heads(a.value_global(hidden)),
        torch.ones(1, len(hidden), dtype=torch.bool),
    )
    return torch.cat([first, local[1:]])


def gradients(output: Tensor, weight: Tensor, inputs: list[Tensor]) -> list[Tensor]:
    grads = torch.autograd.grad((output * weight).sum(), inputs, allow_unused=True)
    return [
        torch.zeros_like(x) if grad is None else grad for x, grad in zip(inputs, grads, strict=True)
    ]


@pytest.mark.parametrize("known", [False, True])
@pytest.mark.parametrize(("lengths", "window"), [*CASES, ([38, 40, 37, 1, 40], 8)])
def test_outputs_and_gradients_are_those_of_the_definition(
    lengths: list[int], window: int, known: bool
) -> None:
    longest = max(lengths) if known else None
    attention = attention_of(window)
    hidden = torch.randn(sum(lengths), HIDDEN, dtype=torch.float64, requires_grad=True)
    inputs = [hidden, *attention.parameters()]
    weight = torch.randn_like(hidden)
    expected = torch.cat([plain_attention(attention, x, window) for x in hidden.split(lengths)])

    layout = build_layout(packed_of(lengths), [window], torch.float64, longest)
    got = attention(hidden, layout)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)
    for a, b in zip(
        gradients(got, weight, inputs), gradients(expected, weight, inputs), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10)

    with torch.no_grad():  # in place where it can be
        torch.testing.assert_close(attention(hidden, layout), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("lengths", "window"), CASES)
def test_fused_kernels_have_the_same_gradients(lengths: list[int], window: int) -> None:
    band = build_layout(packed_of(lengths), [window], torch.float64).bands[window]
    qkv = torch.randn(sum(lengths), 3 * HIDDEN, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(sum(lengths), HIDDEN, dtype=torch.float64)
    own = _BandAttention.apply(qkv, band, HEADS, 0.0)
    fused = fused_band_attention(qkv, band, HEADS)
    torch.testing.assert_close(own, fused, rtol=0, atol=1e-12)
    torch.testing.assert_close(
        *(gradients(x, weight, [qkv])[0] for x in (own, fused)), rtol=0, atol=1e-10
    )


@pytest.mark.parametrize(("lengths", "window"), CASES)
def test_first_tokens_alone_are_those_of_the_whole(lengths: list[int], window: int) -> None:
    attention = attention_of(window)
    hidden = torch.randn(sum(lengths), HIDDEN, dtype=torch.float64)
    layout = build_layout(packed_of(lengths), [window], torch.float64)
    whole = attention(hidden, layout)[layout.first]
    torch.testing.assert_close(attention(hidden, layout, first_only=True), whole)


def test_first_tokens_alone_leave_the_local_projections_a_zero_gradient() -> None:
    attention = attention_of(8)
    hidden = torch.randn(12, HIDDEN, dtype=torch.float64)
    layout = build_layout(packed_of([5, 7]), [8], torch.float64)
    attention(hidden, layout, first_only=True).sum().backward()
    grads = {name: p.grad for name, p in attention.named_parameters()}
    assert all(grad is not None for grad in grads.values())
    idle = {"query", "key", "value", "key_global.bias"}
    zero = {name for name, grad in grads.items() if grad is not None and not grad.any()}
    assert zero == {n for n in grads if n.split(".")[0] in idle or n in idle}


def test_long_work_in_pieces_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    band = build_layout(packed_of([200, 90]), [8], torch.float64).bands[8]
    qkv = torch.randn(290, 3 * HIDDEN, dtype=torch.float64, requires_grad=True)

    def run() -> tuple[Tensor, Tensor]:
        output = _BandAttention.apply(qkv, band, HEADS, 0.0)
        return output, torch.autograd.grad(output.square().sum(), qkv)[0]

    whole = run()
    monkeypatch.setattr(band_module, "SCORE_BYTES", 1)
    pieces = run()
    for a, b in zip(whole, pieces, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    detached = _BandAttention.apply(qkv.detach(), band, HEADS, 0.0)  # one room for all weights
    torch.testing.assert_close(detached, whole[0], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("score_bytes", [1, 1 << 20])
@pytest.mark.parametrize("window", [8, 130])
def test_gradient_with_dropout_is_the_slope(
    window: int, score_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(band_module, "SCORE_BYTES", score_bytes)
    lengths = [70, 1, 40]
    band = build_layout(packed_of(lengths), [window], torch.float64).bands[window]
    qkv = torch.randn(sum(lengths), 3 * HIDDEN, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(sum(lengths), HIDDEN, dtype=torch.float64)

    def value(x: Tensor) -> Tensor:
        torch.manual_seed(5)
        return (_BandAttention.apply(x, band, HEADS, 0.3) * weight).sum()

    (grad,) = torch.autograd.grad(value(qkv), qkv)
    direction, step = torch.randn_like(qkv), 1e-6
    slope = (value(qkv + step * direction) - value(qkv - step * direction)) / (2 * step)
    torch.testing.assert_close((grad * direction).sum(), slope, rtol=1e-6, atol=1e-7)


def test_dropout_keeps_the_mean_of_the_attention() -> None:
    """Local and global alike, with the value bias of `<s>` weighted by what was not dropped."""
    attention = attention_of(8, dropout_p=0.4)
    torch.nn.init.constant_(attention.value_global.bias, 3.0)
    hidden = torch.randn(30, HIDDEN, dtype=torch.float64)
    layout = build_layout(packed_of([19, 1, 10]), [8], torch.float64)
    exact = attention.eval()(hidden, layout)
    attention.train()
    hidden.requires_grad_()
    draws = torch.stack([attention(hidden, layout).detach() for _ in range(600)])
    error = draws.mean(dim=0) - exact
    spread = draws.std(dim=0)
    assert (spread > 0.01).all()
    assert (error.abs() < 5 * spread / math.sqrt(600)).all()
    # A sequence of one token sees itself or nothing: the dropped draws are 0, not the bias.
    alone = draws[:, 19]
    assert torch.allclose(alone[alone.abs().amax(dim=1) == 0], torch.zeros(()).double())
    assert ((alone.view(600, HEADS, -1) == 0).all(dim=2).double().mean() - 0.4).abs() < 0.05


def test_chunks_cover_every_token_once() -> None:
    lengths = [1, CHUNK, CHUNK + 1, 3, 5 * CHUNK - 1]
    packed = packed_of(lengths)
    layout = build_layout(packed, [4], torch.float32)
    assert sorted(layout.chunk_tokens[layout.chunk_valid].tolist()) == list(range(sum(lengths)))
    sequence = layout.chunk_sequence[:, None].expand_as(layout.chunk_valid)[layout.chunk_valid]
    token = layout.chunk_tokens[layout.chunk_valid]
    assert torch.equal(sequence, packed.sequence_ids[token])
    places = torch.arange(layout.chunk_valid.numel()).view_as(layout.chunk_valid)
    assert torch.equal(layout.token_places[token], places[layout.chunk_valid])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_dropout_drops_the_share_it_says(dtype: torch.dtype) -> None:
    x = torch.full((400, 501), 2.0, dtype=dtype, requires_grad=True)
    y = dropout(x, 0.1, training=True)
    kept = y != 0
    assert (1 - kept.float().mean()) == pytest.approx(0.1, abs=0.005)  # 6 sigma
    torch.testing.assert_close(y[kept], torch.full_like(y[kept], 2 / 0.9), rtol=5e-3, atol=0)
    y.sum().backward()
    torch.testing.assert_close(x.grad, y / 2, rtol=5e-3, atol=0)
    # neighbours are independent: both dropped one time in a hundred
    both = ~kept[:, 1:] & ~kept[:, :-1]
    assert both.float().mean() == pytest.approx(0.01, abs=0.0015)


def test_dropout_follows_the_seed_and_rests_outside_training() -> None:
    x = torch.randn(100, 7)
    torch.manual_seed(3)
    first = dropout(x, 0.5, training=True)
    second = dropout(x, 0.5, training=True)
    torch.manual_seed(3)
    assert torch.equal(dropout(x, 0.5, training=True), first)
    assert not torch.equal(first, second)
    assert dropout(x, 0.5, training=False) is x
    assert dropout(x, 0.0, training=True) is x


def test_added_dropout_is_dropout_added() -> None:
    residual, x = torch.randn(2, 50, 8).unbind()
    torch.manual_seed(3)
    got = add_dropout(residual, x, 0.2, training=True)
    torch.manual_seed(3)
    torch.testing.assert_close(got, residual + dropout(x, 0.2, training=True))
    torch.manual_seed(3)
    torch.testing.assert_close(got, residual + drop(x, 0.2) * keep_scale(0.2))
    torch.testing.assert_close(add_dropout(residual, x, 0.2, training=False), residual + x)


@pytest.mark.parametrize(
    ("lengths", "chunks"),
    [([38, 40, 37], 3), ([64, 60, 3], 3), ([5] * 20 + [64], 26), ([200, 100], 11), ([3], 1)],
)
def test_sequences_are_chunks_where_that_makes_fewer_places(
    lengths: list[int], chunks: int
) -> None:
    layout = build_layout(packed_of(lengths), [8], torch.float32, max(lengths))
    assert len(layout.chunk_tokens) == chunks
    assert layout.chunk_valid.sum() == sum(lengths)
