"""Parts of a training layer in C++ against their definitions in float64, with dropout."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from recformer.config import RecformerConfig
from recformer.models import RecformerModel, fused, kernel
from recformer.models.threads import use_torchs
from recformer.packing import PackedTokens

HEADS, HIDDEN = 2, 64
LENGTHS = [1, 2, 17, 40, 12, 100, 33]
DTYPES = (torch.float32, torch.bfloat16)
# Relative (norm of the difference by that of the exact result).
NEAR = {torch.float32: 1e-6, torch.bfloat16: 6e-3}


@pytest.fixture(autouse=True)
def one_thread_again() -> Iterator[None]:
    if kernel.library() is None:
        pytest.skip("no AVX-512, or no C++ compiler")
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    use_torchs()


def _mixed(x: int) -> int:
    wide = (1 << 64) - 1
    x = (x + 0x9E3779B97F4A7C15) & wide
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & wide
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & wide
    return x ^ (x >> 31)


def kept(seed: int, rows: int, columns: int, p: float) -> Tensor:
    """(rows, columns) what each number is multiplied by, as `cpp/training.h` has it."""
    dropped = round(p * 65536)
    if dropped == 0:
        return torch.ones(rows, columns, dtype=torch.float64)
    keys = [_mixed(seed ^ _mixed(row)) for row in range(rows)]
    low = np.array([key & 0xFFFFFFFF for key in keys], np.uint32)[:, None]
    high = np.array([key >> 32 for key in keys], np.uint32)[:, None]
    x = np.arange(columns, dtype=np.uint32) * np.uint32(0x9E3779B1) + low
    x ^= x >> np.uint32(16)
    x = (x * np.uint32(0x85EBCA6B)) ^ high
    x ^= x >> np.uint32(13)
    x *= np.uint32(0xC2B2AE35)
    x ^= x >> np.uint32(16)
    stays = torch.from_numpy(x >= np.uint32(dropped << 16)).double()
    return stays * (65536 / (65536 - dropped))


def next_seed() -> int:
    """The seed that the next call takes from torch's generator."""
    torch.manual_seed(5)
    seed = int(torch.randint(1 << 62, ()))
    torch.manual_seed(5)
    return seed


def compare(
    ours: Callable[..., Tensor], exact: Callable[..., Tensor], inputs: list[Tensor]
) -> None:
    """Outputs and the gradients of all inputs; `exact` gets them in float64."""
    near = NEAR[inputs[0].dtype]
    mine = [x.clone().requires_grad_() for x in inputs]
    theirs = [x.double().requires_grad_() for x in inputs]
    got, expected = ours(*mine), exact(*theirs)
    weight = torch.randn(got.shape, generator=torch.Generator().manual_seed(9)).to(got.dtype)
    (got * weight).sum().backward()
    (expected * weight.double()).sum().backward()
    for a, b in [(got, expected), *((x.grad, y.grad) for x, y in zip(mine, theirs))]:
        assert a is not None
        assert b is not None
        assert (a.double() - b).norm() <= near * b.norm() + 1e-12


def numbers(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def starts_of(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0)


def test_bits_of_dropout_come_as_often_as_they_should() -> None:
    """Of rows, columns, neighbours and two seeds; the tests below show that they are these."""
    rows, columns, p = 700, 96, 0.3
    stays, others = (kept(seed, rows, columns, p) > 0 for seed in (5, 6))
    both = stays & others, stays[:, 1::2] & stays[:, ::2], stays[1::2] & stays[::2]
    for each, expected in [(stays, 1 - p), (others, 1 - p), *((x, (1 - p) ** 2) for x in both)]:
        share, spread = each.double(), 5 * math.sqrt(expected * (1 - expected))
        assert abs(share.mean() - expected) < spread / math.sqrt(share.numel())
        assert (share.mean(dim=0) - expected).abs().max() < spread / math.sqrt(len(share))
        assert (share.mean(dim=1) - expected).abs().max() < spread / math.sqrt(share.shape[1])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("p", [0.0, 0.25])
def test_residual_norm(dtype: torch.dtype, p: float) -> None:
    norm = nn.LayerNorm(96, eps=1e-5)
    factors = kept(next_seed(), 300, 96, p)

    def ours(x: Tensor, bias: Tensor, residual: Tensor, weight: Tensor, shift: Tensor) -> Tensor:
        own = nn.LayerNorm(96, eps=norm.eps)
        del own.weight, own.bias
        own.weight, own.bias = weight, shift
        return fused.residual_norm(x, bias, residual, own, p)

    def exact(x: Tensor, bias: Tensor, residual: Tensor, weight: Tensor, shift: Tensor) -> Tensor:
        return F.layer_norm(residual + factors * (x + bias), (96,), weight, shift, norm.eps)

    rows = [numbers(300, 96, dtype=dtype, seed=seed) for seed in (1, 2)]
    row = [numbers(96, dtype=dtype, seed=seed) for seed in (3, 4, 5)]
    compare(ours, exact, [rows[0], row[0], rows[1], row[1], row[2]])


@pytest.mark.parametrize("dtype", DTYPES)
def test_bias_gelu(dtype: torch.dtype) -> None:
    x = 3 * numbers(300, 160, dtype=dtype, seed=1)
    compare(fused.bias_gelu, lambda x, bias: F.gelu(x + bias), [x, numbers(160, dtype=dtype)])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("p", [0.0, 0.25])
@pytest.mark.parametrize("window", [8, 64])
def test_attention_within_the_window(dtype: torch.dtype, p: float, window: int) -> None:
    starts, total = starts_of(LENGTHS), sum(LENGTHS)
    # a row for each head of each token, a column for each key of its sequence
    factors = kept(next_seed(), total * HEADS, max(LENGTHS), p).view(total, HEADS, -1)

    def exact(qkv: Tensor, firsts: Tensor) -> Tensor:
        contexts = []
        for number, rows in enumerate(qkv.split(LENGTHS)):
            query, key, value = rows.view(len(rows), 3, HEADS, -1).permute(1, 2, 0, 3)
            place = torch.arange(len(rows))
            seen = (place[:, None] - place[None, :]).abs() <= window // 2
            seen[:, 0] = True
            scores = query @ key.mT / math.sqrt(HIDDEN // HEADS)
            weights = scores.masked_fill(~seen, -math.inf).softmax(dim=-1)
            own = factors[starts[number] : starts[number + 1], :, : len(rows)].transpose(0, 1)
            context = ((weights * own) @ value).transpose(0, 1).reshape(-1, HIDDEN)
            contexts.append(torch.cat([firsts[number : number + 1], context[1:]]))
        return torch.cat(contexts)

    def ours(qkv: Tensor, firsts: Tensor) -> Tensor:
        return fused.band_attention(qkv, firsts, starts, HEADS, window, p)

    qkv = numbers(total, 3 * HIDDEN, dtype=dtype, seed=1)
    compare(ours, exact, [qkv, numbers(len(LENGTHS), HIDDEN, dtype=dtype, seed=2)])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("p", [0.0, 0.25])
def test_attention_to_what_came_before(dtype: torch.dtype, p: float) -> None:
    lengths = [*LENGTHS, 0, 5]  # one is empty
    starts, total = starts_of(lengths), sum(lengths)
    factors = kept(next_seed(), total * HEADS, max(lengths), p).view(total, HEADS, -1)

    def exact(qkv: Tensor) -> Tensor:
        contexts = []
        for number, rows in enumerate(qkv.split(lengths)):
            query, key, value = rows.view(len(rows), 3, HEADS, HIDDEN // HEADS).permute(1, 2, 0, 3)
            scores = query @ key.mT / math.sqrt(HIDDEN // HEADS)
            later = torch.ones(len(rows), len(rows)).triu(1).bool()
            weights = scores.masked_fill(later, -math.inf).softmax(dim=-1)
            own = factors[starts[number] : starts[number + 1], :, : len(rows)].transpose(0, 1)
            contexts.append(((weights * own) @ value).transpose(0, 1).reshape(-1, HIDDEN))
        return torch.cat(contexts)

    qkv = numbers(total, 3 * HIDDEN, dtype=dtype, seed=1)
    compare(lambda qkv: fused.causal_attention(qkv, starts, HEADS, p), exact, [qkv])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("p", [0.0, 0.25])
@pytest.mark.parametrize("heads", [2, 12, 20])
def test_what_the_first_tokens_gather(dtype: torch.dtype, p: float, heads: int) -> None:
    starts = starts_of(LENGTHS)
    factors = kept(next_seed(), sum(LENGTHS), heads, p)

    def joined(summed: Tensor, mass: Tensor) -> Tensor:
        return torch.cat([summed.flatten(), mass.flatten().to(summed.dtype)])

    def exact(asked: Tensor, states: Tensor) -> Tensor:
        sums, masses = [], []
        for number, rows in enumerate(states.split(LENGTHS)):
            weights = (asked[:, number] @ rows.T).softmax(dim=-1)  # (A, L)
            weights = weights * factors[starts[number] : starts[number + 1]].T
            sums.append(weights @ rows)
            masses.append(weights.sum(dim=1))
        return joined(torch.stack(sums, 1), torch.stack(masses, 1))

    def ours(asked: Tensor, states: Tensor) -> Tensor:
        return joined(*fused.gather(asked, states, starts, p))

    asked = 0.2 * numbers(heads, len(LENGTHS), HIDDEN, seed=1)
    compare(ours, exact, [asked.to(dtype), numbers(sum(LENGTHS), HIDDEN, dtype=dtype, seed=2)])


# --- the encoder ----------------------------------------------------------------------------------


def make(**values: Any) -> RecformerModel:
    sizes = {
        "vocab_size": 90,
        "hidden_size": HIDDEN,
        "num_attention_heads": HEADS,
        "intermediate_size": 160,
        "num_hidden_layers": 2,
        "max_position_embeddings": 130,
        "max_item_embeddings": 5,
        "attention_window": 16,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    }
    torch.manual_seed(0)
    model = RecformerModel(RecformerConfig(**(sizes | values))).train()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def batch() -> PackedTokens:
    generator = torch.Generator().manual_seed(1)
    ids = [torch.randint(top, (sum(LENGTHS),), generator=generator) for top in (90, 3, 5)]
    return PackedTokens(*ids, starts_of(LENGTHS))


def gradients(model: RecformerModel, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Of every parameter, and the vectors."""
    model.zero_grad()
    torch.manual_seed(3)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        vectors = model.encode(batch())
    (vectors.float() * numbers(*vectors.shape)).sum().backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"vectors": vectors.detach(), **grads}


@pytest.mark.parametrize(("pooler", "slow"), [("cls", True), ("avg", True), ("avg", False)])
def test_gradients_of_the_encoder_are_those_of_torch(
    pooler: str, slow: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fused, "torch_is_slow", lambda: slow)
    model = make(pooler_type=pooler)
    ours = gradients(model)
    half = gradients(model, torch.bfloat16)
    monkeypatch.setenv("RECFORMER_KERNEL", "0")
    in_torch, torch_half = gradients(model), gradients(model, torch.bfloat16)
    exact = gradients(model.double())
    assert ours.keys() == in_torch.keys()
    for name, expected in exact.items():
        # A softmax does not see what is added to all keys: that gradient is rounding alone.
        other = exact["embeddings.LayerNorm.bias"].norm()
        size = expected.norm() + (1 if name.endswith("key.bias") else 1e-6) * other
        error, torch_error = ((each[name] - expected).norm() / size for each in (ours, in_torch))
        assert error < 2 * torch_error + 1e-6, name
        error, torch_error = ((each[name] - expected).norm() / size for each in (half, torch_half))
        assert error < 1.5 * torch_error + 1e-3, name


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("torchs", [True, False])
def test_a_seed_decides_and_threads_do_not(dtype: torch.dtype, torchs: bool) -> None:
    assert use_torchs(torchs) == torchs
    model = make(hidden_dropout_prob=0.2, attention_probs_dropout_prob=0.2)
    torch.set_num_threads(1)
    first = gradients(model, dtype)
    vectors = [model.encode(batch()).detach() for _ in range(2)]
    assert not torch.equal(*vectors)
    again = gradients(model, dtype)
    assert all(torch.equal(first[name], again[name]) for name in first)
    x, bias = numbers(1000, 96, dtype=dtype).requires_grad_(), torch.zeros(96, requires_grad=True)
    found = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        torch.manual_seed(3)
        y = fused.residual_norm(x, bias, x.detach(), nn.LayerNorm(96), 0.2)
        found.append([y, *torch.autograd.grad(y.square().sum(), (x, bias))])
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_heads_are_attended_to_alike_however_they_are_shared(
    causal: bool, dtype: torch.dtype
) -> None:
    """40 sequences of one thread are taken whole, of three threads head by head."""
    lengths = [1 + n % 23 for n in range(40)]
    qkv = numbers(sum(lengths), 3 * HIDDEN, dtype=dtype)
    first = numbers(len(lengths), HIDDEN, dtype=dtype, seed=2)
    found = []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        torch.manual_seed(4)
        x = qkv.clone().requires_grad_()
        if causal:
            y = fused.causal_attention(x, starts_of(lengths), HEADS, 0.2)
        else:
            y = fused.band_attention(x, first, starts_of(lengths), HEADS, 16, 0.2)
        found.append((y, *torch.autograd.grad(y.float().square().sum(), x)))
    assert all(torch.equal(a, b) for a, b in zip(*found))
    assert all((part != 0).any(0).all() for part in found[0])  # of every head


def test_checkpointed_layers_drop_the_same() -> None:
    model = make(hidden_dropout_prob=0.2, attention_probs_dropout_prob=0.2)
    plain = gradients(model)
    model.gradient_checkpointing_enable()
    checkpointed = gradients(model)
    for name, expected in plain.items():
        torch.testing.assert_close(checkpointed[name], expected, msg=name)


def test_the_default_dtype_does_not_matter() -> None:
    starts, norm = starts_of(LENGTHS), nn.LayerNorm(HIDDEN)
    tokens, bias = numbers(sum(LENGTHS), HIDDEN), numbers(HIDDEN)
    qkv, asked = numbers(len(tokens), 3 * HIDDEN), numbers(HEADS, len(LENGTHS), HIDDEN)
    first = numbers(len(LENGTHS), HIDDEN)
    inputs = [each.requires_grad_() for each in (tokens, bias, qkv, asked, first)]

    def found() -> list[Tensor]:
        y = fused.residual_norm(fused.bias_gelu(tokens, bias), bias, tokens, norm, 0.0)
        y = y + fused.band_attention(qkv, first, starts, HEADS, 16, 0.0)
        summed, mass = fused.gather(asked, y, starts, 0.0)
        loss = (summed.square().sum() + mass.sin().sum()).square()
        return list(torch.autograd.grad(loss, [*inputs, norm.weight]))

    expected = found()
    for default in (torch.bfloat16, torch.float64):
        torch.set_default_dtype(default)
        try:
            grads = found()
        finally:
            torch.set_default_dtype(torch.float32)
        for grad, own in zip(grads, expected, strict=True):
            assert torch.equal(grad, own)


def test_borders_of_other_tokens_are_refused() -> None:
    qkv, context = numbers(6, 3 * 64), numbers(2, 64)
    for starts in ([0, 3, 6], [0, 3, 5], [0, 0, 6]):
        borders = torch.tensor(starts, dtype=torch.int32)
        if starts == [0, 3, 6]:
            given = fused.band_attention(qkv, context, borders, 2, 4, 0.0)
            same = fused.band_attention(qkv, context, borders.long(), 2, 4, 0.0)
            assert torch.equal(given, same)
            continue
        with pytest.raises(ValueError, match="of 6 tokens"):
            fused.band_attention(qkv, context, borders, 2, 4, 0.0)


def test_layers_with_hooks_or_adapters_are_called() -> None:
    model = make()
    expected = gradients(model)
    seen: list[str] = []
    layer = model.encoder.layer[0]
    layer.intermediate.dense.register_forward_hook(lambda *_: seen.append("inner"))
    model.encoder.layer[1].intermediate.activation.register_forward_hook(
        lambda *_: seen.append("gelu")
    )
    layer.output.LayerNorm.register_forward_hook(lambda *_: seen.append("norm"))
    wrapped = layer.attention.output.dense
    forward = wrapped.forward
    wrapped.forward = lambda hidden: seen.append("out") or forward(hidden)
    found = gradients(model)
    assert seen == ["out", "inner", "norm", "gelu"]
    for name, grad in expected.items():
        torch.testing.assert_close(found[name], grad, atol=1e-4, rtol=1e-4, msg=name)


def test_other_sizes_and_numbers_are_computed_by_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    assert fused.usable(numbers(3, 64))
    assert fused.attends(numbers(3, 64), 2)
    assert not fused.usable(numbers(3, 64).double())
    assert not fused.usable(numbers(3, 48))
    assert not fused.attends(numbers(3, 64), 4)  # 16 numbers a head
    monkeypatch.setenv("RECFORMER_KERNEL", "0")
    assert not fused.usable(numbers(3, 64))
