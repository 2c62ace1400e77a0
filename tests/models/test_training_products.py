"""Products of training layers in C++ against their definition in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from recformer.models import fused, kernel
from recformer.packing import PackedTokens
from tests.models.test_fused import (
    DTYPES,
    compare,
    gradients,
    make,
    numbers,
    one_thread_again,  # noqa: F401
)


@pytest.fixture(autouse=True)
def slow_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a processor on which torch's products of float32 are slow."""
    monkeypatch.setattr(fused, "torch_is_slow", lambda: True)


@pytest.mark.parametrize(
    ("tokens", "inputs", "outputs"),
    [(1, 32, 32), (13, 64, 50), (97, 96, 7), (300, 32, 96), (2100, 64, 77)],
)
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_linear(
    tokens: int, inputs: int, outputs: int, with_bias: bool, dtype: torch.dtype
) -> None:
    outputs += outputs % 2 if dtype == torch.bfloat16 else 0
    values = [numbers(tokens, inputs, dtype=dtype, seed=1)]
    values.append(numbers(outputs, inputs, dtype=dtype, seed=2))
    if with_bias:
        values.append(numbers(outputs, dtype=dtype, seed=3))
    compare(fused.linear, F.linear, values)

    def call() -> list[Tensor]:
        leaves = [each.clone().requires_grad_() for each in values]
        fused.linear(*leaves).square().sum().backward()
        return [each.grad for each in leaves if each.grad is not None]

    torch.set_num_threads(1)
    alone = call()
    torch.set_num_threads(3)
    assert all(torch.equal(a, b) for a, b in zip(alone[:2], call()))


def test_only_gradients_that_are_asked_for_are_made(monkeypatch: pytest.MonkeyPatch) -> None:
    called = []
    call = fused._call

    def noted(name: str, *values: Any) -> None:
        called.append(name)
        call(name, *values)

    monkeypatch.setattr(fused, "_call", noted)
    x, weight = numbers(5, 32), numbers(64, 32)
    fused.linear(x, weight.clone().requires_grad_()).sum().backward()
    fused.linear(x.clone().requires_grad_(), weight).sum().backward()
    assert called == ["linear", "linear_back_weight", "linear", "linear_back"]


def test_products_of_other_numbers_and_sizes_are_torchs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "_call", None)  # fails if it is called
    for x, weight in (
        (numbers(5, 48), numbers(64, 48)),  # no whole panels
        (numbers(2, 5, 32), numbers(64, 32)),
        (numbers(0, 32), numbers(64, 32)),
        (numbers(5, 32).half(), numbers(64, 32).half()),
        (numbers(5, 32).bfloat16(), numbers(7, 32).bfloat16()),  # pairs of outputs on the way back
    ):
        assert torch.equal(fused.linear(x, weight), F.linear(x, weight))
    for sizes in ([5, 64], [8, 32], [8]), ([5, 32], [8, 32], [3]), ([5, 32], [32], []):
        values = [numbers(*each) for each in sizes]
        with pytest.raises(RuntimeError):  # of torch, which says what is wrong
            fused.linear(*values)
    with torch.autocast("cpu", torch.float16):
        assert fused.linear(numbers(5, 32), numbers(64, 32)).dtype == torch.float16
    monkeypatch.setattr(kernel, "cpu_flags", lambda: frozenset({"avx512f"}))
    with torch.autocast("cpu", torch.bfloat16):
        assert fused.linear(numbers(5, 32), numbers(64, 32)).dtype == torch.bfloat16


@pytest.mark.parametrize("x_dtype", DTYPES)
@pytest.mark.parametrize("tokens", [13, 2100, 4150])
def test_linear_under_autocast(
    tokens: int, x_dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Products of bfloat16, of weights that are float32 and get gradients that are not rounded."""
    if "avx512_bf16" not in kernel.cpu_flags():
        pytest.skip("no AVX512_BF16")
    values = [numbers(tokens, 64, seed=1).to(x_dtype), numbers(38, 64, seed=2), numbers(38, seed=3)]
    short = [each.bfloat16().double().requires_grad_() for each in values[:2]]
    expected = F.linear(*short, values[2].double())
    expected.backward(torch.ones_like(expected))

    def call() -> list[Tensor]:
        leaves = [each.clone().requires_grad_() for each in values]
        with torch.autocast("cpu", torch.bfloat16):
            y = fused.linear(*leaves)
        assert y.dtype == torch.bfloat16
        y.backward(torch.ones_like(y))
        return [y, *(each.grad for each in leaves if each.grad is not None)]

    torch.set_num_threads(1)
    y, of_x, of_weight, of_bias = alone = call()
    assert [of_x.dtype, of_weight.dtype, of_bias.dtype] == [each.dtype for each in values]
    for found, exact, near in (
        (y, expected, 3e-3),
        (of_x, short[0].grad, 3e-3),
        (of_weight, short[1].grad, 1e-6),
        (of_bias, torch.full((38,), float(tokens)), 4e-3),
    ):
        assert exact is not None
        assert (found.double() - exact).norm() <= near * exact.norm()
    torch.set_num_threads(3)
    assert all(torch.equal(a, b) for a, b in zip(alone[:3], call()))
    monkeypatch.setattr(fused, "_call", None)  # fails if it is called
    with pytest.raises(TypeError):
        call()


def test_filler_is_added_where_torch_multiplies_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """For its products of 16 bits; not in float32, nor where `fused` makes all of them."""
    if "avx512_bf16" not in kernel.cpu_flags():
        pytest.skip("no AVX512_BF16")
    filled = []
    add = PackedTokens.with_filler

    def noted(packed: PackedTokens, multiple: int, longest: int) -> PackedTokens:
        filled.append(multiple)
        return add(packed, multiple, longest)

    monkeypatch.setattr(PackedTokens, "with_filler", noted)
    model = make()
    without = gradients(model, torch.bfloat16)
    gradients(model)
    assert filled == []
    dense = model.encoder.layer[1].output.dense
    hook = dense.register_forward_hook(lambda *_: None)  # torch multiplies what it wraps
    gradients(model, torch.bfloat16)
    hook.remove()
    gradients(make(hidden_act="relu"), torch.bfloat16)
    wrapped = make()
    first = wrapped.encoder.layer[0].intermediate
    first.dense = nn.Sequential(first.dense)
    gradients(wrapped, torch.bfloat16)
    wrapped.encoder.layer[0].intermediate = nn.Sequential(first)
    gradients(wrapped, torch.bfloat16)
    other = make()
    attention = other.encoder.layer[0].attention.self
    attention.forward = lambda *given: type(attention).forward(attention, *given)
    gradients(other, torch.bfloat16)
    assert filled == [256] * 5
    monkeypatch.setattr(fused, "torch_is_slow", lambda: False)
    with_filler = gradients(model, torch.bfloat16)
    assert filled == [256] * 6
    for name, expected in with_filler.items():
        if name.endswith("key.bias"):  # rounding alone
            continue
        difference = (without[name] - expected).float().norm()
        assert difference <= 0.05 * expected.float().norm() + 1e-3, name


def test_what_torch_compiles_is_torchs() -> None:
    compiled = torch.compile(fused.linear, fullgraph=True, backend="eager")
    x, weight = numbers(5, 32), numbers(64, 32)
    assert torch.equal(compiled(x, weight), F.linear(x, weight))
