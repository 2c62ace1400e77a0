"""Parts of a layer that trains on a CPU, in C++: what lies between its products (`cpp/training.h`).

On processors of AMD its products, too (`cpp/training_products.h`).

Attention in place of products over blocks, softmax and masks; bias, dropout, residual and LayerNorm
in one pass; bias and GELU in one; each with the gradients of all that goes in. Random bits of
dropout are a function of a seed, row and column, drawn again on the way back, so no mask is kept.
They are other bits than torch's functions draw (`dropout.py`), which compute where the kernel
cannot (`usable`).

Shapes: B sequences, T packed tokens, H hidden, A heads.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from recformer.models import kernel
from recformer.models.dropout import num_dropped
from recformer.products import torch_is_slow

# Heads that a row of the weights of `<s>` has place for.
LANES = 32


def usable(hidden: Tensor) -> bool:
    """Whether the functions below take states like these (T, H)."""
    return (
        type(hidden) is Tensor
        and hidden.device.type == "cpu"
        and hidden.dtype in (torch.float32, torch.bfloat16)
        and hidden.shape[1] % kernel.PANEL == 0
        and kernel.switched_on()
        and not torch.compiler.is_compiling()
        and kernel.library() is not None
    )


def attends(hidden: Tensor, num_heads: int) -> bool:
    """Whether the attention below takes states like these (T, H)."""
    dim = hidden.shape[1] // num_heads
    return usable(hidden) and dim % kernel.PANEL == 0 and num_heads <= LANES


def plain(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether a module does nothing but what its class says, so that its weights say it all."""
    return (
        type(module) is kind
        and all(type(p) in (nn.Parameter, Tensor) for p in module.parameters())
        and "forward" not in module.__dict__
        and not (
            module._forward_hooks
            or module._forward_pre_hooks
            or module._backward_hooks
            or module._backward_pre_hooks
        )
    )


def _call(name: str, like: Tensor, *values: Tensor | float | None) -> None:
    """Call a function of the kernel on numbers of the dtype of `like`.

    Raises:
        MemoryError: there is no room for its own arrays.
    """
    numbers = kernel.BFLOAT16 if like.dtype == torch.bfloat16 else kernel.FLOAT
    plain_values = (each.data_ptr() if isinstance(each, Tensor) else each for each in values)
    function = getattr(kernel.library(), f"recformer_{name}")
    if function(numbers, *plain_values, torch.get_num_threads()):
        raise MemoryError(f"no memory for recformer_{name}")


def _seed(dropout_p: float) -> int:
    """From torch's generator, so that `torch.manual_seed` and saved states reproduce the bits."""
    return int(torch.randint(1 << 62, ())) if num_dropped(dropout_p) else 0


def _numbers(parameter: Tensor) -> Tensor:
    return parameter.detach().float().contiguous()


def _floats(*shape: int) -> Tensor:
    """Room for float32, whatever the default dtype and device are."""
    return torch.empty(shape, dtype=torch.float32, device="cpu")


def _checked(starts: Tensor, num_tokens: int, least: int = 1) -> Tensor:
    """Borders as the kernel reads them, of sequences of at least so many tokens.

    Raises:
        ValueError: they are not those of so many tokens.
    """
    starts = starts.long().contiguous()
    if starts[0] != 0 or starts[-1] != num_tokens or (starts.diff() < least).any():
        raise ValueError(f"sequences begin at {starts.tolist()} of {num_tokens} tokens")
    return starts


# --- products -------------------------------------------------------------------------------------


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`torch.nn.functional.linear`, autocast too, by the kernel where it `multiplies`.

    Args:
        x: (T, K).
        weight: (N, K).
        bias: (N,).

    Returns:
        (T, N); sums and gradients do not depend on the number of threads where they are made here.
        Under autocast the gradient of the weight is not rounded to bfloat16, that of the bias is.
    """
    autocast = torch.is_autocast_enabled("cpu")
    dtype = torch.get_autocast_dtype("cpu") if autocast else x.dtype
    dtypes = (dtype, torch.float32) if autocast else (dtype,)
    if (
        x.ndim == weight.ndim == 2
        and usable(x)
        and multiplies(dtype)
        and len(x)
        and x.shape[1] == weight.shape[1]
        and (dtype == torch.float32 or len(weight) % 2 == 0)
        and type(weight) in (nn.Parameter, Tensor)
        and x.device == weight.device
        and x.dtype in dtypes
        and weight.dtype in dtypes
        and (bias is None or (bias.dtype in dtypes and bias.shape == weight.shape[:1]))
    ):
        return _Linear.apply(x.to(dtype), weight, bias)
    return F.linear(x, weight, bias)


def multiplies(dtype: torch.dtype) -> bool:
    """Whether `linear` makes products of this dtype itself, of whatever number of rows.

    Those of float32 where torch's are slow; on the same processors those of bfloat16, for what
    torch's need besides: filler, see `encoder.py`, and copies of the weights.
    """
    if not torch_is_slow():
        return False
    return dtype == torch.float32 or (
        dtype == torch.bfloat16 and "avx512_bf16" in kernel.cpu_flags()
    )


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        x, weight = x.contiguous(), weight.contiguous()
        y = x.new_empty(len(x), len(weight))
        ctx.sizes = (*x.shape, len(weight))
        ctx.floats = int(weight.dtype == torch.float32)
        small = None if bias is None else _numbers(bias)
        _call("linear", x, *ctx.sizes, x, ctx.floats, weight, small, y)
        ctx.save_for_backward(x, weight)
        ctx.of_bias = None if bias is None else bias.dtype
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        grad = grad.contiguous()
        of_x = of_weight = of_bias = None
        if ctx.needs_input_grad[0]:
            of_x = torch.empty_like(x)
            _call("linear_back", x, *ctx.sizes, grad, ctx.floats, weight, of_x)
        if ctx.needs_input_grad[1]:
            of_weight = _floats(*weight.shape)
            _call("linear_back_weight", x, *ctx.sizes, grad, x, of_weight)
            of_weight = of_weight.to(weight.dtype)
        if ctx.needs_input_grad[2]:
            of_bias = grad.sum(0).to(ctx.of_bias)
        return of_x, of_weight, of_bias


# --- bias, dropout, residual and LayerNorm; bias and GELU -----------------------------------------


def residual_norm(
    x: Tensor, bias: Tensor, residual: Tensor, norm: nn.LayerNorm, dropout_p: float
) -> Tensor:
    """LayerNorm of `residual + dropout(x + bias)`: (T, H) of both; summed in float32."""
    return _ResidualNorm.apply(x, bias, residual, norm.weight, norm.bias, norm.eps, dropout_p)


class _ResidualNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        bias: Tensor,
        residual: Tensor,
        weight: Tensor,
        shift: Tensor,
        eps: float,
        dropout_p: float,
    ) -> Tensor:
        x, residual = x.contiguous(), residual.contiguous()
        rows, hidden = x.shape
        ctx.dropout = _seed(dropout_p), num_dropped(dropout_p)
        sums, y, stats = torch.empty_like(x), torch.empty_like(x), _floats(rows, 2)
        small = (_numbers(bias), residual, _numbers(weight), _numbers(shift))
        _call("norm", x, rows, hidden, x, *small, eps, *ctx.dropout, sums, y, stats)
        ctx.save_for_backward(sums, stats, weight)
        ctx.dtype = weight.dtype
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        sums, stats, weight = ctx.saved_tensors
        rows, hidden = sums.shape
        grad = grad.contiguous()
        residual = torch.empty_like(sums)
        x = torch.empty_like(sums) if ctx.dropout[1] else residual
        sizes = (rows, hidden, grad, sums, stats, _numbers(weight))
        grads = _floats(3, hidden)
        _call("norm_back", sums, *sizes, *ctx.dropout, residual, x, grads)
        of_weight, of_shift, of_bias = (each.to(ctx.dtype) for each in grads)
        return x, of_bias, residual, of_weight, of_shift, None, None


def bias_gelu(x: Tensor, bias: Tensor) -> Tensor:
    """GELU of `x + bias`, (T, N)."""
    return _BiasGelu.apply(x, bias)


class _BiasGelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor) -> Tensor:
        x = x.contiguous()
        y = torch.empty_like(x)
        _call("gelu", x, *x.shape, x, _numbers(bias), y)
        ctx.save_for_backward(x, bias)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, bias = ctx.saved_tensors
        grad_x, grad_bias = torch.empty_like(x), _floats(x.shape[1])
        _call("gelu_back", x, *x.shape, x, _numbers(bias), grad.contiguous(), grad_x, grad_bias)
        return grad_x, grad_bias.to(bias.dtype)


# --- attention ------------------------------------------------------------------------------------


def band_attention(
    qkv: Tensor,
    first_context: Tensor,
    starts: Tensor,
    num_heads: int,
    window: int,
    dropout_p: float,
) -> Tensor:
    """Softmax attention within the window and to `<s>`; of `<s>` itself the context is given.

    Args:
        qkv: (T, 3 * H) queries, keys and values side by side.
        first_context: (B, H) of the first token of each sequence.
        starts: (B + 1,) int64 where sequences begin, and their end.
        dropout_p: probability that an attention weight is dropped.

    Returns:
        (T, H).
    """
    return _Band.apply(qkv, first_context, starts, num_heads, window // 2, dropout_p)


def causal_attention(qkv: Tensor, starts: Tensor, num_heads: int, dropout_p: float) -> Tensor:
    """Softmax attention of each token to itself and to those before it in its sequence.

    Args:
        qkv: (T, 3 * H) queries, keys and values side by side.
        starts: (B + 1,) int64 where sequences begin, and their end; one may be empty.
        dropout_p: probability that an attention weight is dropped.

    Returns:
        (T, H).
    """
    return _Band.apply(qkv, None, starts, num_heads, 0, dropout_p)


class _Band(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        qkv: Tensor,
        first_context: Tensor | None,  # None: causal
        starts: Tensor,
        num_heads: int,
        half: int,
        dropout_p: float,
    ) -> Tensor:
        qkv = qkv.contiguous()
        num_tokens, hidden = qkv.shape[0], qkv.shape[1] // 3
        causal = first_context is None
        starts = _checked(starts, num_tokens, 0 if causal else 1)
        ctx.sizes = len(starts) - 1, starts, hidden, num_heads, half, int(causal)
        ctx.dropout = _seed(dropout_p), num_dropped(dropout_p)
        context, levels = qkv.new_empty((num_tokens, hidden)), _floats(num_tokens, num_heads)
        _call("band", qkv, *ctx.sizes, qkv, *ctx.dropout, context, levels)
        if first_context is not None:
            context.index_copy_(0, starts[:-1], first_context)
        ctx.save_for_backward(qkv, context, levels)
        return context

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        qkv, context, levels = ctx.saved_tensors
        grad, grad_qkv = grad.contiguous(), torch.empty_like(qkv)
        inputs = (qkv, context, levels, grad)
        _call("band_back", qkv, *ctx.sizes, *inputs, *ctx.dropout, grad_qkv)
        of_first = grad.index_select(0, ctx.sizes[1][:-1]) if ctx.needs_input_grad[1] else None
        return grad_qkv, of_first, None, None, None, None


def gather(
    asked: Tensor, states: Tensor, starts: Tensor, dropout_p: float
) -> tuple[Tensor, Tensor]:
    """Sums of each sequence's states under the softmax of their products with vectors of its heads.

    Args:
        asked: (A, B, H) vectors, of the dtype of the states.
        states: (T, H).
        starts: (B + 1,) int64 where sequences begin, and their end.
        dropout_p: probability that a weight is dropped.

    Returns:
        (A, B, H) sums and (A, B) float32 sums of the weights.
    """
    return _Gather.apply(asked, states, starts, dropout_p)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, asked: Tensor, states: Tensor, starts: Tensor, dropout_p: float
    ) -> tuple[Tensor, Tensor]:
        asked, states = asked.contiguous(), states.contiguous()
        starts = _checked(starts, len(states))
        ctx.sizes = asked.shape[1], starts, asked.shape[2], asked.shape[0]
        ctx.dropout = _seed(dropout_p), num_dropped(dropout_p)
        weights = _floats(len(states), LANES)
        summed, mass = torch.empty_like(asked), _floats(*asked.shape[:2])
        out = (weights, summed, mass)
        _call("gather", states, *ctx.sizes, asked, states, *ctx.dropout, *out)
        ctx.save_for_backward(asked, states, weights)
        return summed, mass

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, grad_mass: Tensor) -> tuple[Tensor | None, ...]:
        asked, states, weights = ctx.saved_tensors
        inputs = (asked, states, weights, grad.contiguous(), grad_mass.contiguous())
        of_asked, of_states = torch.empty_like(asked), torch.empty_like(states)
        _call("gather_back", states, *ctx.sizes, *inputs, *ctx.dropout, of_asked, of_states)
        return of_asked, of_states, None, None
