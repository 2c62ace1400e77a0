"""The encoder in C++ for CPUs with AVX-512 (`cpp/`), compiled where it is first used.

It gives what the encoder in torch gives, but for rounding, in half the time and less: between the
products nothing leaves the cache. With AMX a float32 number is the sum of three of bfloat16 and a
product the sum of six, as exact as float32 and in half the time of AVX-512. It is used where nobody
trains and all of this holds: Linux on x86-64 with AVX-512 (for bfloat16 AVX512_BF16; AMX if there),
a C++ compiler, the encoder's own layers with GELU, no hooks on them, sizes in multiples of 32.
Anywhere else torch computes. Layers that train take parts of it (`fused.py`).

The library is kept in `$XDG_CACHE_HOME/recformer` (`~/.cache/recformer`) by source, compiler and
CPU. `RECFORMER_KERNEL=0` in the environment switches it off.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
import threading
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers.activations import GELUActivation

from recformer.models import threads
from recformer.packing import PackedTokens

# `RecformerModel` and its layers, whose module imports this one.
Encoder = Any
Layer = Any

SOURCES = Path(__file__).with_name("cpp")
#: Flags of /proc/cpuinfo and what the compiler is told; the first five are needed.
ISA = {
    "avx512f": "-mavx512f",
    "avx512bw": "-mavx512bw",
    "avx512vl": "-mavx512vl",
    "avx512dq": "-mavx512dq",
    "fma": "-mfma",
    "avx512_bf16": "-mavx512bf16",
    "amx_tile": "-mamx-tile",
    "amx_bf16": "-mamx-bf16",
}
NEEDED = ("avx512f", "avx512bw", "avx512vl", "avx512dq", "fma")
COMPILE = ("-std=c++20", "-O3", "-shared", "-fPIC", "-pthread", "-w")
COMPILE_SECONDS = 300
PANEL = 32  # outputs a panel of weights
MOST_HEADS = 32
# What products are of, see `cpp/kernel.cpp`; the last is float32 where there is AMX.
FLOAT, BFLOAT16, THREE_BFLOAT16 = 0, 1, 2
# Tokens of a chunk, whose states one thread keeps in its cache.
CHUNK_TOKENS = {FLOAT: 192, BFLOAT16: 384, THREE_BFLOAT16: 384}
# `pooling` of `cpp/model.h`, by `pooler_type`.
POOLERS = {None: 0, "cls": 1, "avg": 2, "avg_published": 3}
# Numbers of each weight that are looked at before every call, see `_Prepared.unchanged`.
SAMPLES = 16
#: Functions for `fused.py` with the types of all arguments but the first, an int.
CODES = {
    "n": ctypes.c_int64,
    "p": ctypes.c_void_p,
    "s": ctypes.c_uint64,  # a seed
    "d": ctypes.c_double,
}
TRAINING = {
    "recformer_norm": "nnpppppdsnpppn",
    "recformer_norm_back": "nnppppsnpppn",
    "recformer_gelu": "nnpppn",
    "recformer_gelu_back": "nnpppppn",
    "recformer_band": "npnnnnpsnppn",
    "recformer_band_back": "npnnnnppppsnpn",
    "recformer_gather": "npnnppsnpppn",
    "recformer_gather_back": "npnnpppppsnppn",
    "recformer_linear": "nnnpnpppn",
    "recformer_linear_back": "nnnpnppn",
    "recformer_linear_back_weight": "nnnpppn",
}
LEAVES = (nn.Linear, nn.Embedding, nn.LayerNorm, GELUActivation)
# Modules of this package whose classes may hold them.
HOLDERS = ("recformer.models.encoder", "recformer.models.attention")

log = logging.getLogger(__name__)


class _Matrix(ctypes.Structure):
    _fields_ = (("weight", ctypes.c_void_p), ("bias", ctypes.c_void_p))


class _Layer(ctypes.Structure):
    _fields_ = (
        *(
            (name, _Matrix)
            for name in ("qkv", "out", "inner", "outer", "first_query", "first_key", "first_value")
        ),
        *(
            (name, ctypes.c_void_p)
            for name in ("attention_norm", "attention_shift", "output_norm", "output_shift")
        ),
        ("half", ctypes.c_int64),
    )


class _Model(ctypes.Structure):
    _fields_ = (
        *(
            (name, ctypes.c_int64)
            for name in (
                "hidden",
                "inner",
                "heads",
                "layers",
                "first_position",
                "tables_are_bf16",
            )
        ),
        ("eps", ctypes.c_double),
        ("layer", ctypes.POINTER(_Layer)),
        ("tables", ctypes.c_void_p * 4),
        ("rows", ctypes.c_int64 * 4),
        ("norm", ctypes.c_void_p),
        ("shift", ctypes.c_void_p),
    )


class _Batch(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int64) for name in ("sequences", "chunk_tokens", "pooling")),
        ("ids", ctypes.c_void_p * 4),
        *((name, ctypes.c_void_p) for name in ("starts", "result")),
    )


# --- the library ----------------------------------------------------------------------------------


def switched_on() -> bool:
    """Not switched off by `RECFORMER_KERNEL=0`."""
    return os.environ.get("RECFORMER_KERNEL", "1") != "0"


@functools.cache
def cpu_flags() -> frozenset[str]:
    """Those of `ISA` that this machine has."""
    cpuinfo = Path("/proc/cpuinfo")
    if platform.machine() != "x86_64" or not cpuinfo.is_file():
        return frozenset()
    for line in cpuinfo.read_text().splitlines():
        name, _, value = line.partition(":")
        if name.strip() == "flags":
            return frozenset(value.split()) & ISA.keys()
    return frozenset()


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled kernel; None, and a line in the log, where there can be none."""
    flags = cpu_flags()
    if not flags.issuperset(NEEDED):
        return None
    try:
        built = ctypes.CDLL(str(_compiled(flags)))
    except (OSError, subprocess.SubprocessError) as error:
        detail = getattr(error, "stderr", None) or str(error)
        log.debug("the encoder runs in torch, without its C++ kernel: %s", detail.strip()[:300])
        return None
    built.recformer_encode.argtypes = (
        ctypes.POINTER(_Model),
        ctypes.POINTER(_Batch),
        ctypes.c_int64,
        ctypes.c_int,
        ctypes.c_int64,
    )
    built.recformer_sample.restype = ctypes.c_uint64
    built.recformer_sample.argtypes = (
        ctypes.c_void_p,
        ctypes.c_void_p,
        ctypes.c_int64,
        ctypes.c_int64,
    )
    for name, codes in TRAINING.items():
        getattr(built, name).argtypes = [ctypes.c_int, *(CODES[code] for code in codes)]
    built.recformer_use_amx(1)
    threads.loaded(built)
    return built


def _compiled(flags: frozenset[str]) -> Path:
    """The library's file, compiled if it is not there.

    Raises:
        OSError: no compiler, or no folder that can be written.
        subprocess.SubprocessError: the compiler fails.
    """
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    if compiler is None:
        raise FileNotFoundError("no C++ compiler (c++, or $CXX)")
    options = [*COMPILE, *(ISA[flag] for flag in ISA if flag in flags)]
    version = subprocess.run(
        [compiler, "--version"], capture_output=True, check=True, timeout=COMPILE_SECONDS
    ).stdout
    digest = hashlib.sha256(version + " ".join(options).encode())
    for source in sorted(SOURCES.iterdir()):
        digest.update(f"\0{source.name}\0".encode() + source.read_bytes())
    key = digest.hexdigest()
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "recformer"
    file = cache / f"kernel-{key[:24]}.so"
    if file.is_file():
        return file
    log.debug("compiling the encoder's kernel into %s, once", file)
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as scratch:
        part = Path(scratch, file.name)
        subprocess.run(
            [compiler, *options, "-o", str(part), str(SOURCES / "kernel.cpp")],
            capture_output=True,
            check=True,
            text=True,
            timeout=COMPILE_SECONDS,
        )
        os.replace(part, file)  # whole, whoever else compiles it now
    return file


# --- weights --------------------------------------------------------------------------------------


def panels(weight: Tensor, numbers: int) -> Tensor:
    """A weight (…, N, K) in the order of `cpp/kernel.cpp`."""
    *batch, outputs, inputs = weight.shape
    if numbers == FLOAT:
        return weight.float().reshape(*batch, outputs // PANEL, PANEL, inputs).mT.contiguous()
    if numbers == BFLOAT16:
        paired = weight.bfloat16().reshape(*batch, outputs // PANEL, PANEL, inputs // 2, 2)
        return paired.transpose(-3, -2).contiguous()
    parts, left = [], weight.float()
    for _ in range(3):
        parts.append(left.bfloat16())
        left = left - parts[-1]
    split = torch.stack(parts, -3).reshape(*batch, 3, outputs // PANEL, PANEL, inputs // 32, 16, 2)
    # (…, part, panel, output, group, pair, 2) -> (…, panel, group, part, pair, output, 2)
    first = len(batch)
    order = (*range(first), *(first + place for place in (1, 3, 0, 4, 2, 5)))
    return split.permute(order).contiguous()


class Weights:
    """Weights of an encoder in the order in which the kernel reads them.

    Args:
        model: an encoder that `fits` approves of.
        numbers: as the products take them.
    """

    def __init__(self, model: Encoder, numbers: int) -> None:
        self.kept: list[Tensor] = []  # what the pointers point to
        self.numbers = numbers
        layers = [self._layer(layer) for layer in model.encoder.layer]
        self.layers = (_Layer * len(layers))(*layers)
        embeddings = model.embeddings
        tables = [
            table.weight.detach()
            for table in (
                embeddings.word_embeddings,
                embeddings.position_embeddings,
                embeddings.token_type_embeddings,
                embeddings.item_position_embeddings,
            )
        ]
        self.kept += tables
        norm = embeddings.LayerNorm
        self.model = _Model(
            hidden=model.config.hidden_size,
            inner=model.config.intermediate_size,
            heads=model.config.num_attention_heads,
            layers=len(layers),
            first_position=embeddings.first_position,
            tables_are_bf16=int(tables[0].dtype == torch.bfloat16),
            eps=norm.eps,
            layer=self.layers,
            tables=(ctypes.c_void_p * 4)(*(table.data_ptr() for table in tables)),
            rows=(ctypes.c_int64 * 4)(*(len(table) for table in tables)),
            norm=self._numbers(norm.weight),
            shift=self._numbers(norm.bias),
        )

    @torch.no_grad()
    def _layer(self, layer: Layer) -> _Layer:
        attention, own = layer.attention, layer.attention.self
        local = (own.query, own.key, own.value)
        hidden = own.query_global.in_features
        # q . (W x) = (q W) . x: of each head, H outputs of D inputs
        first_key = own.key_global.weight.view(own.num_heads, -1, hidden).mT
        return _Layer(
            qkv=self._matrix(
                torch.cat([part.weight for part in local]), torch.cat([part.bias for part in local])
            ),
            out=self._matrix(attention.output.dense.weight, attention.output.dense.bias),
            inner=self._matrix(layer.intermediate.dense.weight, layer.intermediate.dense.bias),
            outer=self._matrix(layer.output.dense.weight, layer.output.dense.bias),
            first_query=self._matrix(own.query_global.weight, own.query_global.bias),
            first_key=self._matrix(first_key, None),
            first_value=self._matrix(own.value_global.weight, own.value_global.bias),
            attention_norm=self._numbers(attention.output.LayerNorm.weight),
            attention_shift=self._numbers(attention.output.LayerNorm.bias),
            output_norm=self._numbers(layer.output.LayerNorm.weight),
            output_shift=self._numbers(layer.output.LayerNorm.bias),
            half=own.window // 2,
        )

    def _matrix(self, weight: Tensor, bias: Tensor | None) -> _Matrix:
        packed = panels(weight, self.numbers)
        self.kept.append(packed)
        return _Matrix(packed.data_ptr(), None if bias is None else self._numbers(bias))

    def _numbers(self, values: Tensor) -> int:
        numbers = values.detach().float().contiguous()
        self.kept.append(numbers)
        return numbers.data_ptr()


def _parts(modules: list[nn.Module]) -> list[Any]:
    """The modules and parameters that these hold now."""
    return [
        part
        for module in modules
        for parts in (module._modules, module._parameters)
        for part in parts.values()
    ]


class _Prepared:
    """An encoder's weights for the kernel, as long as they are what they were."""

    def __init__(self, model: Encoder) -> None:
        # Not the encoder itself: its entry in `_prepared` would then keep it for ever.
        self.modules = list(model.modules())[1:]
        self.parts = _parts([model, *self.modules])
        self.parameters = list(model.parameters())
        self.ids = [*map(id, self.parts)]
        self.pointers = [p.data_ptr() for p in self.parameters]
        sizes = [p.numel() * p.element_size() for p in self.parameters]
        self.arrays = (ctypes.c_void_p * len(sizes))(*self.pointers)
        self.sizes = (ctypes.c_int64 * len(sizes))(*sizes)
        self.state: Any = None
        self.weights: dict[int, Weights] = {}

    def unchanged(self, model: Encoder, kernel: ctypes.CDLL) -> bool:
        """Whether all is as at the last call; a sample finds what is written by way of `.data`."""
        pointers = [p.data_ptr() for p in self.parameters]
        if pointers != self.pointers or [*map(id, _parts([model, *self.modules]))] != self.ids:
            return False
        versions = tuple(0 if p.is_inference() else p._version for p in self.parameters)
        sample = kernel.recformer_sample(self.arrays, self.sizes, len(self.sizes), SAMPLES)
        before, self.state = self.state, (versions, sample)
        return before is None or before == self.state


_prepared: WeakKeyDictionary[nn.Module, _Prepared] = WeakKeyDictionary()
_preparing = threading.Lock()


def fits(model: Encoder) -> bool:
    """Whether the kernel computes what this encoder does."""
    config = model.config
    dim = config.hidden_size // config.num_attention_heads
    parameters = list(model.parameters())
    dtypes = {p.dtype for p in parameters}
    modules = list(model.modules())[1:]
    leaves = [m for m in modules if not m._modules]
    holders = [m for m in modules if m._modules]
    return (
        config.hidden_size % PANEL == 0
        and config.intermediate_size % PANEL == 0
        and dim % PANEL == 0
        and config.num_attention_heads <= MOST_HEADS
        and len(dtypes) == 1
        and dtypes <= {torch.float32, torch.bfloat16}
        and all(p.device.type == "cpu" and p.is_contiguous() for p in parameters)
        and all(type(p) in (nn.Parameter, Tensor) for p in parameters)
        # nothing adapted, parametrised or quantised
        and all(type(m) in LEAVES for m in leaves)
        and all(type(m) is nn.ModuleList or type(m).__module__ in HOLDERS for m in holders)
        and len(leaves) == 5 + 12 * len(model.encoder.layer)
    )


def runs(model: Encoder, dtype: torch.dtype) -> bool:
    """Whether batches of this encoder, not in training, are computed here."""
    return (
        switched_on()
        and (dtype != torch.bfloat16 or "avx512_bf16" in cpu_flags())
        and library() is not None
        and fits(model)
    )


def _hooked(modules: list[nn.Module]) -> bool:
    return any(m._forward_hooks or m._forward_pre_hooks or "forward" in m.__dict__ for m in modules)


def _weights(model: Encoder, numbers: int, kernel: ctypes.CDLL) -> Weights | None:
    with _preparing:  # parts of the first batch ask at the same time
        prepared = _prepared.get(model)
        if prepared is None or not prepared.unchanged(model, kernel):
            _prepared.pop(model, None)
            if not fits(model):
                return None
            prepared = _Prepared(model)
            prepared.unchanged(model, kernel)
            _prepared[model] = prepared
        if _hooked(prepared.modules):
            return None
        if numbers not in prepared.weights:
            prepared.weights[numbers] = Weights(model, numbers)
        return prepared.weights[numbers]


# --- encoding -------------------------------------------------------------------------------------


def encode(
    model: Encoder, packed: PackedTokens, dtype: torch.dtype, pooler: str | None
) -> Tensor | None:
    """Hidden states, or pooled vectors, of a packed batch.

    Args:
        model: the encoder, not in training.
        packed: B sequences, T tokens, checked.
        dtype: of the products.
        pooler: `pooler_type` of the vectors wanted; None for the states of all tokens.

    Returns:
        (T, H), or (B, H) of vectors, of `dtype`; None where torch has to compute.
    """
    if (
        dtype not in (torch.float32, torch.bfloat16)
        or torch.is_grad_enabled()
        or torch.compiler.is_compiling()
        or type(packed.input_ids) is not Tensor
        or not switched_on()
        or (dtype == torch.bfloat16 and "avx512_bf16" not in cpu_flags())
    ):
        return None
    kernel = library()
    if kernel is None:
        return None
    numbers = BFLOAT16 if dtype == torch.bfloat16 else FLOAT
    if numbers == FLOAT and kernel.recformer_uses_amx():
        numbers = THREE_BFLOAT16
    weights = _weights(model, numbers, kernel)
    if weights is None:
        return None
    starts = packed.cu_seqlens.long().contiguous()
    ids = [
        None if each is None else each.long().contiguous()
        for each in (
            packed.input_ids,
            packed.position_ids,
            packed.token_type_ids,
            packed.item_position_ids,
        )
    ]
    rows = packed.num_tokens if pooler is None else packed.batch_size
    result = torch.empty(rows, model.config.hidden_size, dtype=dtype)
    batch = _Batch(
        sequences=packed.batch_size,
        chunk_tokens=CHUNK_TOKENS[numbers],
        pooling=POOLERS[pooler],
        ids=(ctypes.c_void_p * 4)(*(None if each is None else each.data_ptr() for each in ids)),
        starts=starts.data_ptr(),
        result=result.data_ptr(),
    )
    failed = kernel.recformer_encode(
        weights.model,
        batch,
        packed.num_tokens,
        numbers,
        torch.get_num_threads(),
    )
    return None if failed else result  # torch says what is wrong
