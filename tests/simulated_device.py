"""A simulated accelerator, for tests without a GPU.

Tensors say that they live on `simgpu:0`, the arithmetic is done on the CPU, and what a GPU refuses
is refused: operands on two devices, `.numpy()` of a tensor of the device. So code takes its branch
for GPUs. It stands on torch's Python backend for a device of one's own; autocast casts as CUDA's
does. Waits of the host for the device are counted (`host_waits`).

It shows nothing of kernels, memory, streams or NCCL: docs/gpu.md.
"""

from __future__ import annotations

import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, ClassVar

import lightning
import torch
from lightning.pytorch.accelerators import Accelerator
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only
from torch.utils.backend_registration import (
    _DummyBackendModule,
    _setup_privateuseone_for_python_backend,
)

NAME = "simgpu"
ROOT = Path(__file__).resolve().parent.parent
aten = torch.ops.aten

# A mask among the places becomes their list, whose length the host waits for.
BY_PLACES = {
    aten.index.Tensor,
    aten.index_put_.default,
    aten.index_put.default,
    aten._index_put_impl_.default,
}
# May take tensors of both devices, as on a GPU.
BOTH_DEVICES = {aten._to_copy.default, aten.copy_.default, *BY_PLACES}
# The host must know what the device computed: values, or the shape of the result.
WAITING = {
    aten._local_scalar_dense.default,
    aten.nonzero.default,
    aten.masked_select.default,
    aten._unique2.default,
    aten.unique_dim.default,
    aten.unique_consecutive.default,
    aten.bincount.default,
    aten.equal.default,
}
# What CUDA's autocast computes in 16 bits, and what in float32; of its lists, what is used here.
LOWER = ("linear", "matmul", "mm", "bmm", "addmm", "baddbmm", "scaled_dot_product_attention")
LOWER += ("_thnn_fused_gru_cell",)
FLOAT32 = ("layer_norm", "cross_entropy_loss", "nll_loss", "cosine_similarity", "exp", "log")
FLOAT32 += (
    "pow.Tensor_Scalar",
    "softmax.int",
    "log_softmax.int",
    "sum",
    "sum.dim_IntList",
    "linalg_vector_norm",
)


class _Backend(_DummyBackendModule):
    """What torch asks a device's module for."""

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.float16, torch.bfloat16]

    def device(self, index: object) -> Any:
        return nullcontext()

    def get_rng_state(self, device: object = None) -> torch.Tensor:
        return torch.get_rng_state()  # random numbers are the CPU's

    def set_rng_state(self, state: torch.Tensor, device: object = None) -> None:
        torch.set_rng_state(state)

    def synchronize(self, device: object = None) -> None:
        _wait("synchronize")


_setup_privateuseone_for_python_backend(NAME, backend_module=_Backend())
DEVICE = torch.device(NAME, 0)
_waits: Counter[str] | None = None


class SimulatedTensor(torch.Tensor):
    """A tensor of the device."""

    _data: torch.Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, data: torch.Tensor) -> SimulatedTensor:
        tensor = torch.Tensor._make_wrapper_subclass(
            cls,
            data.size(),
            strides=data.stride(),
            storage_offset=data.storage_offset(),
            dtype=data.dtype,
            layout=data.layout,
            device=DEVICE,
            requires_grad=False,
        )
        tensor._data = data
        return tensor

    def __init__(self, data: torch.Tensor) -> None: ...

    def tolist(self) -> Any:
        _wait("tolist")
        return self._data.tolist()

    def __reduce_ex__(self, protocol: Any) -> Any:  # a file that is read on the CPU
        return self._data.__reduce_ex__(protocol)

    def __format__(self, spec: str) -> str:
        _wait("format")
        return format(self._data, spec)

    def numpy(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError(f"can't convert {DEVICE} device type tensor to numpy, use Tensor.cpu()")

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


def _gru_cell(
    input_gates: torch.Tensor,
    hidden_gates: torch.Tensor,
    hx: torch.Tensor,
    input_bias: torch.Tensor | None = None,
    hidden_bias: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """A step of a GRU: (B, 3H) of both sides, (B, H) -> (B, H), and (B, 5H) for the gradient."""
    if input_bias is not None and hidden_bias is not None:
        input_gates, hidden_gates = input_gates + input_bias, hidden_gates + hidden_bias
    (ir, iz, new), (hr, hz, hn) = input_gates.chunk(3, dim=1), hidden_gates.chunk(3, dim=1)
    r, z = (ir + hr).sigmoid(), (iz + hz).sigmoid()
    n = (new + r * hn).tanh()
    return n + z * (hx - n), torch.cat([r, z, n, hx, hn], dim=1)


def _gru_cell_backward(
    grad: torch.Tensor, workspace: torch.Tensor, has_bias: bool
) -> tuple[torch.Tensor | None, ...]:
    """Gradients of the arguments of `_gru_cell`."""
    r, z, n, hx, hn = workspace.chunk(5, dim=1)
    dn = grad * (1 - z) * (1 - n * n)
    dr, dz = dn * hn * r * (1 - r), grad * (hx - n) * z * (1 - z)
    inputs, hiddens = torch.cat([dr, dz, dn], dim=1), torch.cat([dr, dz, dn * r], dim=1)
    biases = (inputs.sum(dim=0), hiddens.sum(dim=0)) if has_bias else (None, None)
    return inputs, hiddens, grad * z, *biases


# What devices alone have, and CPUs do not.
KERNELS: dict[Any, Callable[..., Any]] = {
    aten._thnn_fused_gru_cell.default: _gru_cell,
    aten._thnn_fused_gru_cell_backward.default: _gru_cell_backward,
}


class _EveryCall(TorchDispatchMode):
    """Tensors are made on the device too, where none is among the arguments."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    mine = [isinstance(tensor, SimulatedTensor) for tensor in tensors]
    target = kwargs.get("device")
    target = None if target is None else torch.device(target).type
    if not any(mine) and target != NAME:
        return func(*args, **kwargs)
    strangers = [t for t, own in zip(tensors, mine, strict=True) if not own and t.dim() > 0]
    if any(mine) and strangers and func not in BOTH_DEVICES:
        raise RuntimeError(
            f"Expected all tensors to be on the same device, but found at least two devices, "
            f"{DEVICE} and cpu, in {func}"
        )
    leaves = target == "cpu" or (
        func is aten.copy_.default and not isinstance(args[0], SimulatedTensor)
    )
    masks = func in BY_PLACES and any(
        isinstance(index, torch.Tensor) and index.dtype == torch.bool for index in args[1]
    )
    repeats = func is aten.repeat_interleave.Tensor and kwargs.get("output_size") is None
    if any(mine) and (func in WAITING or leaves or masks or repeats):
        _wait(func.name())
    inner = tree_map_only(SimulatedTensor, lambda tensor: tensor._data, kwargs)
    if target == NAME:
        inner = {**inner, "device": torch.device("cpu")}
    if inner.get("pin_memory"):
        inner = {**inner, "pin_memory": False}
    kernel = KERNELS.get(func, func)
    out = kernel(*tree_map_only(SimulatedTensor, lambda tensor: tensor._data, args), **inner)
    if leaves:
        return args[0] if func is aten.copy_.default else out
    out = tree_map_only(torch.Tensor, SimulatedTensor, out)
    return return_and_correct_aliasing(func, args, kwargs, out) if any(mine) else out


def _wait(name: str) -> None:
    if _waits is None:
        return
    ours = tuple(f"{ROOT / folder}/" for folder in ("recformer", "baselines"))  # .venv lies in ROOT
    own = [f for f in traceback.extract_stack() if f.filename.startswith(ours)]
    place = f"{Path(own[-1].filename).relative_to(ROOT)}:{own[-1].name}" if own else "elsewhere"
    _waits[f"{name} in {place}"] += 1


@contextmanager
def host_waits() -> Iterator[Counter[str]]:
    """Counts waits of the host for the device, by operation and place."""
    global _waits
    _waits = Counter()
    try:
        yield _waits
    finally:
        _waits = None


def _cast(operation: Any, dtype: torch.dtype | None) -> Callable[..., Any]:
    """An operation whose arguments autocast casts: to its own dtype, or to float32."""
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastPrivateUse1)

    def cast(value: Any) -> Any:
        known = isinstance(value, torch.Tensor) and value.is_floating_point()
        if not known or value.dtype == torch.float64 or value.device.type != NAME:
            return value
        return value.to(torch.get_autocast_dtype(NAME) if dtype is None else dtype)

    def run(*args: Any, **kwargs: Any) -> Any:
        with torch._C._ExcludeDispatchKeyGuard(keys):
            return operation(*tree_map(cast, args), **tree_map(cast, kwargs))

    return run


def _empty(*args: Any, dtype: Any = None, **kwargs: Any) -> SimulatedTensor:
    """What torch's own code asks a device for, past Python."""
    make = torch.empty if len(args) == 1 else torch.empty_strided
    return SimulatedTensor(make(*args, dtype=dtype))


def _copy_from(source: torch.Tensor, target: torch.Tensor, *_: object) -> torch.Tensor:
    if not isinstance(target, SimulatedTensor):
        _wait("aten::_copy_from")
    mine = [each._data if isinstance(each, SimulatedTensor) else each for each in (source, target)]
    mine[1].copy_(mine[0])
    return target


_memory = torch.library.Library("aten", "IMPL")
_memory.impl("_copy_from", _copy_from, "PrivateUse1")
for _name in ("empty.memory_format", "empty_strided"):
    _memory.impl(_name, _empty, "PrivateUse1")
_others = torch.library.Library("_", "IMPL")
_others.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")
_autocast = torch.library.Library("aten", "IMPL")
for _names, _dtype in ((LOWER, None), (FLOAT32, torch.float32)):
    for _name in _names:
        _base, _, _overload = _name.partition(".")
        _operation = getattr(getattr(aten, _base), _overload or "default")
        _autocast.impl(_name, _cast(_operation, _dtype), "AutocastPrivateUse1")


@contextmanager
def simulated_device() -> Iterator[torch.device]:
    """The device, on which tensors can be made within the block."""
    with _EveryCall():
        yield DEVICE


class SimulatedAccelerator(Accelerator):
    """Lightning's view of the device."""

    def setup_device(self, device: torch.device) -> None:
        assert device == DEVICE

    def get_device_stats(self, device: Any) -> dict[str, Any]:
        return {}

    def teardown(self) -> None: ...

    @staticmethod
    def parse_devices(devices: Any) -> int:
        return 1

    @staticmethod
    def get_parallel_devices(devices: Any) -> list[torch.device]:
        return [DEVICE]

    @staticmethod
    def auto_device_count() -> int:
        return 1

    @staticmethod
    def is_available() -> bool:
        return True

    @staticmethod
    def name() -> str:
        return NAME


class WaitsOfSteps(lightning.Callback):
    """Counts the waits of every training step, optimizer included.

    Attributes:
        steps: of each step, by operation and place; of all trainers since it was emptied.
    """

    steps: ClassVar[list[Counter[str]]] = []

    def on_train_batch_start(self, *args: Any) -> None:
        self._counting = host_waits()
        self.steps.append(self._counting.__enter__())

    def on_train_batch_end(self, *args: Any) -> None:
        self._counting.__exit__(None, None, None)


class SimulatedTrainer(lightning.Trainer):
    """Lightning's trainer, whatever device it is given, on this one; waits are counted.

    Attributes:
        asked: accelerator and devices that the last one was asked for.
    """

    asked: ClassVar[tuple[Any, Any]]

    def __init__(self, **options: Any) -> None:
        accelerator = SimulatedAccelerator()
        SimulatedTrainer.asked = options["accelerator"], options["devices"]
        options |= {"accelerator": "auto", "devices": 1}
        options["strategy"] = SingleDeviceStrategy(DEVICE, accelerator)
        if options.pop("precision") == "bf16-mixed":
            options["plugins"] = [*options["plugins"], MixedPrecision("bf16-mixed", NAME)]
        options["callbacks"] = [WaitsOfSteps(), *options["callbacks"]]
        super().__init__(**options)
