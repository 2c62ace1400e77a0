"""The encoder's C++ kernel gives what torch gives, and torch computes where it cannot."""

from __future__ import annotations

import gc
import re
import shutil
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from recformer.config import RecformerConfig
from recformer.models import RecformerModel, kernel
from recformer.models.threads import use_torchs
from recformer.packing import PackedTokens

LENGTHS = [1, 2, 17, 40, 12, 100, 33]
SIZES = {
    "vocab_size": 90,
    "hidden_size": 64,
    "num_attention_heads": 2,
    "intermediate_size": 160,
    "num_hidden_layers": 3,
    "max_position_embeddings": 130,
    "max_item_embeddings": 5,
    "attention_window": 16,
}
DTYPES = (torch.float32, torch.bfloat16)


@pytest.fixture(scope="module", autouse=True)
def library() -> Any:
    built = kernel.library()
    if built is None:
        pytest.skip("no AVX-512, or no C++ compiler")
    return built


@pytest.fixture(autouse=True)
def amx_again(library: Any) -> Iterator[None]:
    yield
    library.recformer_use_amx(1)


def make(**values: Any) -> RecformerModel:
    """Every parameter away from its initial value."""
    model = RecformerModel(RecformerConfig(**(SIZES | values))).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.15)
    return model


def batch(lengths: list[int], seed: int = 1) -> PackedTokens:
    generator = torch.Generator().manual_seed(seed)

    def ids(top: int) -> Tensor:
        return torch.randint(top, (sum(lengths),), generator=generator)

    starts = torch.tensor([0, *lengths]).cumsum(0)
    return PackedTokens(ids(90), ids(3), ids(5), starts)


@torch.no_grad()
def by_kernel(model: RecformerModel, packed: PackedTokens, pooler: str | None = None) -> Tensor:
    dtype = model.embeddings.word_embeddings.weight.dtype
    found = kernel.encode(model, packed, dtype, pooler)
    assert found is not None
    return found


@torch.no_grad()
def exact(model: RecformerModel, packed: PackedTokens) -> Tensor:
    """By torch, in float64."""
    dtype = next(model.parameters()).dtype
    hidden = model.double().encode_tokens(packed)[0]
    model.to(dtype)
    return hidden


@pytest.mark.parametrize("values", [{}, {"attention_window": 64}, {"num_attention_heads": 1}])
@torch.no_grad()
def test_states_are_those_of_torch(values: dict[str, Any]) -> None:
    model, packed = make(**values), batch(LENGTHS)
    expected = exact(model, packed)
    states = by_kernel(model, packed)
    torch.testing.assert_close(states.double(), expected, atol=2e-5, rtol=0)
    firsts = by_kernel(model, packed, pooler="cls")
    assert torch.equal(firsts, states[packed.cu_seqlens[:-1]])
    for pooler in ("avg", "avg_published"):
        model.config.pooler_type = pooler
        vectors = model.double().encode_tokens(packed)[1]
        found = by_kernel(model.float(), packed, pooler)
        torch.testing.assert_close(found.double(), vectors, atol=2e-5, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("amx", [1, 0])
def test_float32_is_as_exact_as_that_of_torch(
    amx: int, library: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With AMX it is computed in three parts of eight bits: all of 24 have to count."""
    model, packed = make(), batch(LENGTHS)
    expected = exact(model, packed)
    library.recformer_use_amx(amx)
    states = by_kernel(model, packed)
    monkeypatch.setattr(kernel, "switched_on", lambda: False)
    in_torch = model.encode_tokens(packed)[0]
    error, torch_error = ((each - expected).norm() for each in (states, in_torch))
    assert error < 1.5 * torch_error


@pytest.mark.parametrize("amx", [1, 0])
def test_bfloat16_is_as_near_as_that_of_torch(
    amx: int, library: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    if "avx512_bf16" not in kernel.cpu_flags():
        pytest.skip("no AVX512_BF16")
    model, packed = make(), batch(LENGTHS)
    model.bfloat16().float()  # weights without rounding in bfloat16
    expected = exact(model, packed)
    library.recformer_use_amx(amx)
    states = by_kernel(model.bfloat16(), packed)
    monkeypatch.setattr(kernel, "switched_on", lambda: False)
    with torch.no_grad():
        in_torch = model.encode_tokens(packed)[0]
    error, torch_error = ((each - expected).norm() for each in (states, in_torch))
    assert error < 1.25 * torch_error
    assert error < 0.1 * expected.norm()


def test_an_encoder_that_nobody_uses_is_let_go() -> None:
    model = make()
    by_kernel(model, batch(LENGTHS))
    seen = weakref.ref(model)
    del model
    gc.collect()
    assert seen() is None


def test_autocast_is_bfloat16() -> None:
    if "avx512_bf16" not in kernel.cpu_flags():
        pytest.skip("no AVX512_BF16")
    model, packed = make(), batch(LENGTHS)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        found = model.encode_tokens(packed)[0]
    with torch.no_grad():
        assert torch.equal(found, kernel.encode(model, packed, torch.bfloat16, None))


def alone(packed: PackedTokens, number: int) -> PackedTokens:
    """One of the sequences."""
    start, end = packed.cu_seqlens[number : number + 2].tolist()
    part = slice(start, end)
    return PackedTokens(
        packed.input_ids[part],
        packed.token_type_ids[part],
        packed.item_position_ids[part],
        torch.tensor([0, end - start]),
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("amx", [1, 0])
@pytest.mark.parametrize("torchs", [True, False])
def test_neither_batch_nor_threads_change_a_bit(
    dtype: torch.dtype, amx: int, torchs: bool, library: Any
) -> None:
    if "avx512_bf16" not in kernel.cpu_flags() and dtype == torch.bfloat16:
        pytest.skip("no AVX512_BF16")
    model = make(max_position_embeddings=500).to(dtype)
    packed = batch([*LENGTHS, 430, 25, 90])  # those of 24 tokens and more are shared by threads
    library.recformer_use_amx(amx)
    assert use_torchs(torchs) == torchs
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        together = by_kernel(model, packed)
        firsts, means = together[packed.cu_seqlens[:-1]], by_kernel(model, packed, "avg")
        for number in (1, 2, 3):
            torch.set_num_threads(number)
            assert torch.equal(by_kernel(model, packed), together)
            for each in range(packed.batch_size):
                start, end = packed.cu_seqlens[each : each + 2].tolist()
                one = alone(packed, each)
                assert torch.equal(by_kernel(model, one), together[start:end])
                assert torch.equal(by_kernel(model, one, "cls"), firsts[each : each + 1])
                assert torch.equal(by_kernel(model, one, "avg"), means[each : each + 1])
    finally:
        torch.set_num_threads(threads)
        use_torchs()


def test_panels_hold_the_weights() -> None:
    weight = torch.randn(64, 96, generator=torch.Generator().manual_seed(3))
    parts = kernel.panels(weight, kernel.THREE_BFLOAT16)
    assert parts.shape == (
        2,
        3,
        3,
        16,
        32,
        2,
    )  # panel, group of inputs, part, pair, output, of pair
    assert torch.equal(parts.double().sum(2)[1, 2, 5, 7], weight[39, 74:76].double())
    plain = kernel.panels(weight, kernel.FLOAT)
    assert torch.equal(plain[1, :, 7], weight[39])


def test_positions_are_those_given() -> None:
    model, packed = make(), batch([5, 9])
    own = packed.offsets_in_sequence + model.embeddings.first_position
    given = PackedTokens(
        packed.input_ids, packed.token_type_ids, packed.item_position_ids, packed.cu_seqlens, own
    )
    assert torch.equal(by_kernel(model, given), by_kernel(model, packed))
    given.position_ids[3] += 7
    assert not torch.equal(by_kernel(model, given), by_kernel(model, packed))


def _add(weight: nn.Parameter) -> None:
    with torch.no_grad():
        weight += 0.5


def _write_data(weight: nn.Parameter) -> None:
    weight.data.mul_(2)


def _other_memory(weight: nn.Parameter) -> None:
    weight.data = weight.data * 2


@pytest.mark.parametrize("change", [_add, _write_data, _other_memory])
def test_changed_weights_are_seen(change: Any) -> None:
    model, packed = make(), batch(LENGTHS)
    before = by_kernel(model, packed)
    change(model.encoder.layer[1].intermediate.dense.weight)
    after = by_kernel(model, packed)
    expected = exact(model, packed)
    assert (expected - before).abs().max() > 0.1
    torch.testing.assert_close(after.double(), expected, atol=2e-5, rtol=0)


def _replace(model: RecformerModel) -> None:
    dense = model.encoder.layer[1].intermediate.dense
    model.encoder.layer[1].intermediate.dense = nn.Linear(dense.in_features, dense.out_features)


def _other_parameter(model: RecformerModel) -> None:
    dense = model.encoder.layer[1].intermediate.dense
    dense.weight = nn.Parameter(dense.weight * 2)


@pytest.mark.parametrize("change", [_replace, _other_parameter])
def test_parts_that_are_replaced_are_seen(change: Any) -> None:
    model, packed = make(), batch(LENGTHS)
    before = by_kernel(model, packed)
    change(model)
    after = by_kernel(model, packed)
    expected = exact(model, packed)
    assert (expected - before).abs().max() > 0.1
    torch.testing.assert_close(after.double(), expected, atol=2e-5, rtol=0)


def test_layers_that_adapters_wrap_later_are_computed_by_torch() -> None:
    model = make()
    assert _encoded(model) is not None
    layer = model.encoder.layer[0].intermediate
    forward = layer.dense.forward
    layer.dense.forward = lambda hidden: forward(hidden) * 2
    assert _encoded(model) is None
    del layer.dense.forward
    assert _encoded(model) is not None
    layer.dense = nn.Sequential(layer.dense)
    assert _encoded(model) is None


def _encoded(model: RecformerModel, dtype: torch.dtype = torch.float32) -> Tensor | None:
    with torch.no_grad():
        return kernel.encode(model, batch([4, 6]), dtype, None)


def test_torch_computes_what_the_kernel_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    assert _encoded(make()) is not None
    assert _encoded(make(hidden_size=48)) is None
    assert _encoded(make(num_attention_heads=4)) is None  # 16 numbers a head
    assert _encoded(make(hidden_act="relu")) is None
    assert _encoded(make().double(), torch.float64) is None
    assert kernel.encode(make(), batch([4, 6]), torch.float32, None) is None  # for gradients
    hooked = make()
    seen: list[int] = []
    hooked.encoder.layer[0].register_forward_hook(lambda *_: seen.append(1))
    with torch.no_grad():
        hooked.encode(batch([4, 6]))
    assert seen == [1]
    adapted = make()
    layer = adapted.encoder.layer[0].intermediate
    layer.dense = type("Adapted", (nn.Linear,), {})(64, 160)
    assert _encoded(adapted) is None
    monkeypatch.setenv("RECFORMER_KERNEL", "0")
    assert _encoded(make()) is None


@torch.no_grad()
def test_an_unknown_token_is_an_error_as_in_torch() -> None:
    packed = batch([4, 6])
    packed.input_ids[7] = 90
    with pytest.raises(IndexError):
        make().encode(packed)


def test_without_a_compiler_torch_computes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    said: list[str] = []
    monkeypatch.setattr(kernel.log, "debug", lambda text, *_: said.append(text))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for compiler in ("nowhere", "false"):
        monkeypatch.setenv("CXX", compiler)
        assert kernel.library.__wrapped__() is None
        assert "runs in torch, without its C++ kernel" in said.pop()
    monkeypatch.setattr(kernel, "cpu_flags", lambda: frozenset({"avx2", "fma"}))
    assert kernel.library.__wrapped__() is None


def test_the_wheel_carries_the_sources() -> None:
    root = Path(kernel.__file__).parents[2]
    (listed,) = re.findall(
        r"^recformer = \[(.*py\.typed.*)\]", (root / "pyproject.toml").read_text(), re.M
    )
    patterns = re.findall(r'"([^"]+)"', listed)
    carried = {path for pattern in patterns for path in (root / "recformer").glob(pattern)}
    sources = set(kernel.SOURCES.rglob("*"))
    assert kernel.SOURCES / "kernel.cpp" in sources
    assert sources <= carried
    included = set(re.findall(r'#include "(.+)"', "".join(s.read_text() for s in sources)))
    assert included == {s.name for s in sources if s.suffix == ".h"}


def test_the_library_is_compiled_once_and_appears_whole(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    compiler, calls = tmp_path / "c++", tmp_path / "calls"
    compiler.write_text(
        '#!/bin/sh\n[ "$1" = --version ] && { echo fake; exit 0; }\n'
        f'echo "$@" >> {calls}\nwhile [ "$1" != -o ]; do shift; done\necho whole > "$2"\n'
    )
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    flags = frozenset(kernel.NEEDED)
    file = kernel._compiled(flags)
    assert file.read_text() == "whole\n"
    assert kernel._compiled(flags) == file
    assert kernel._compiled(flags | {"avx512_bf16"}) != file
    options = [line.split() for line in calls.read_text().splitlines()]
    assert ["-mavx512bf16" in each for each in options] == [False, True]
    other = shutil.copytree(kernel.SOURCES, tmp_path / "cpp")
    monkeypatch.setattr(kernel, "SOURCES", other)
    assert kernel._compiled(flags) == file
    for source in other.iterdir():  # any of them makes another library
        source.write_text(source.read_text() + "// changed")
        changed = kernel._compiled(flags)
        assert changed != file
        file = changed
    assert {path.suffix for path in file.parent.iterdir()} == {".so"}
