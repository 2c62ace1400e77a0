"""Attention of Recformer over packed tokens (paper section 2.2.2; Longformer).

A token attends to the `window / 2` tokens before and after it in its own sequence and to `<s>`,
which it sees once, through the ordinary key and value (`band.py`). `<s>` attends to every token of
its sequence through projections of its own.

The score of `<s>` against a token x is q . (W x + b). W is multiplied into q instead of x, b is the
same for all tokens and drops out of the softmax, and the value projection is applied after the
weighted sum, so that no token but `<s>` pays for the global projections. Sums over a sequence go
over chunks of tokens that do not cross sequences.

Shapes: B sequences, T packed tokens, H hidden, A heads, D = H / A, W window;
C chunks of S tokens.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recformer.config import RecformerConfig
from recformer.models import fused
from recformer.models.band import Band, band_attention, build_band
from recformer.models.dropout import dropout
from recformer.packing import PackedTokens

# Tokens a chunk of the sums over whole sequences. Every sequence ends with a chunk partly filled.
# Where sequences are about equally long, as single items are, each is a chunk of its own.
CHUNK = 32


@dataclass(frozen=True)
class AttentionLayout:
    """Indices of a batch that every layer uses; see `build_layout`.

    Attributes:
        starts: (B + 1,) int64 where sequences begin, and the end of the last one.
        chunk_sequence: (C,) int64 sequence of each chunk.
        chunk_tokens: (C, S) int64 token of each place of a chunk; if C is B, all of sequence c.
        chunk_valid: (C, S) bool, False at places beyond the end of the sequence.
        token_places: (T,) int64 place of each token among the C * S.
        lengths: (B,) int64 tokens a sequence.
        bands: by window size; of others the kernel attends (`fused.py`).
    """

    starts: Tensor
    chunk_sequence: Tensor
    chunk_tokens: Tensor
    chunk_valid: Tensor
    token_places: Tensor
    lengths: Tensor
    bands: dict[int, Band]

    @property
    def first(self) -> Tensor:
        """(B,) int64 the token that is `<s>` of each sequence."""
        return self.starts[:-1]

    @property
    def batch_size(self) -> int:
        return self.starts.numel() - 1

    def gather_chunks(self, values: Tensor) -> Tensor:
        """Per-token `values` (T, H) as (C, S, H); places that are not valid hold any token."""
        return _GatherChunks.apply(values, self.chunk_tokens, self.token_places)

    def sum_chunks(self, values: Tensor) -> Tensor:
        """Add up (C, ...) over the chunks of each sequence: (B, ...).

        In float32 at least; `values` themselves where every sequence is one chunk.
        """
        if len(values) == self.batch_size:
            return values
        values = _exact(values)
        total = values.new_zeros((self.batch_size, *values.shape[1:]))
        return total.index_add(0, self.chunk_sequence, values)

    def max_chunks(self, values: Tensor) -> Tensor:
        """Greatest of (C, R) over the chunks of each sequence: (B, R)."""
        if len(values) == self.batch_size:
            return values
        greatest = values.new_full((self.batch_size, values.shape[1]), float("-inf"))
        index = self.chunk_sequence[:, None].expand_as(values)
        return greatest.scatter_reduce_(0, index, values, "amax")

    def mean_tokens(self, hidden: Tensor) -> Tensor:
        """Mean over the tokens of each sequence, `<s>` among them: (T, H) -> (B, H)."""
        weights = self.chunk_valid / self.lengths[self.chunk_sequence, None]  # (C, S)
        chunks = self.gather_chunks(hidden)  # (C, S, H)
        means = torch.matmul(weights.to(hidden.dtype)[:, None], chunks)[:, 0]  # (C, H)
        return self.sum_chunks(means).to(hidden.dtype)


def build_layout(
    packed: PackedTokens, windows: Iterable[int], dtype: torch.dtype, longest: int | None = None
) -> AttentionLayout:
    """Indices and masks of a batch, without waiting for the device.

    Args:
        packed: the batch.
        windows: window sizes of the layers that attend in torch, positive and even.
        dtype: floating type that scores are computed in.
        longest: tokens of the longest sequence, if that is known.
    """
    cu_seqlens = packed.cu_seqlens
    device = cu_seqlens.device
    sequence_ids = packed.sequence_ids
    first, lengths = cu_seqlens[:-1], packed.lengths

    # How many chunks there are depends on the lengths; this bound is known without reading them.
    tokens_a_chunk, size = CHUNK, packed.num_tokens // CHUNK + packed.batch_size
    if longest is not None and longest * packed.batch_size <= tokens_a_chunk * size:
        tokens_a_chunk, size = longest, packed.batch_size
    chunk_ends = ((lengths + tokens_a_chunk - 1) // tokens_a_chunk).cumsum(0)
    chunk = torch.arange(size, device=device)
    sequence = torch.searchsorted(chunk_ends, chunk, right=True).clamp_(max=packed.batch_size - 1)
    chunk_starts = F.pad(chunk_ends[:-1], (1, 0))
    place = (chunk - chunk_starts[sequence])[:, None] * tokens_a_chunk
    place = place + torch.arange(tokens_a_chunk, device=device)
    valid = place < lengths[sequence, None]
    tokens = torch.where(valid, first[sequence, None] + place, 0)
    places = chunk_starts[sequence_ids] * tokens_a_chunk + packed.offsets_in_sequence

    return AttentionLayout(
        starts=cu_seqlens,
        chunk_sequence=sequence,
        chunk_tokens=tokens,
        chunk_valid=valid,
        token_places=places,
        lengths=lengths,
        bands={
            window: build_band(sequence_ids, first, window, dtype)
            for window in sorted(set(windows))
        },
    )


def _exact(x: Tensor) -> Tensor:
    """`x` in float32 at least: what is added up over a whole sequence."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class _GatherChunks(torch.autograd.Function):
    """Rows by index; each row that counts is taken once, so the way back is a gather as well."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, chunk_tokens: Tensor, token_places: Tensor) -> Tensor:
        ctx.save_for_backward(token_places)
        return values.index_select(0, chunk_tokens.flatten()).view(*chunk_tokens.shape, -1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (token_places,) = ctx.saved_tensors
        return grad.reshape(-1, grad.shape[-1]).index_select(0, token_places), None, None


class _ZeroGradient(torch.autograd.Function):
    """Give parameters that cannot change the output the gradient they have: zero.

    Without it they would have none, which the optimizer takes for "leave alone" (no weight decay)
    and distributed training for an error.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, *parameters: Tensor) -> Tensor:
        ctx.save_for_backward(*parameters)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return grad, *(torch.zeros_like(parameter) for parameter in ctx.saved_tensors)


class RecformerSelfAttention(nn.Module):
    """Self-attention of one layer. Parameter names are those of transformers' Longformer."""

    def __init__(self, config: RecformerConfig, window: int) -> None:
        super().__init__()
        hidden = config.hidden_size
        self.num_heads = config.num_attention_heads
        self.window = window
        self.dropout_p = config.attention_probs_dropout_prob
        self.query = nn.Linear(hidden, hidden)
        self.key = nn.Linear(hidden, hidden)
        self.value = nn.Linear(hidden, hidden)
        self.query_global = nn.Linear(hidden, hidden)
        self.key_global = nn.Linear(hidden, hidden)
        self.value_global = nn.Linear(hidden, hidden)

    def forward(self, hidden: Tensor, layout: AttentionLayout, first_only: bool = False) -> Tensor:
        """Attend.

        Args:
            hidden: (T, H).
            layout: indices and masks of the batch.
            first_only: compute `<s>` alone.

        Returns:
            (T, H), or (B, H) if `first_only`.
        """
        context = self._attend_from_first(hidden, layout)
        if first_only:
            idle = (self.query, self.key, self.value)
            return _ZeroGradient.apply(context, *(p for layer in idle for p in layer.parameters()))
        local = (self.query, self.key, self.value)
        qkv = fused.linear(
            hidden,
            torch.cat([layer.weight for layer in local]),
            torch.cat([layer.bias for layer in local]),
        )
        dropout_p = self.dropout_p if self.training else 0.0
        if self.window not in layout.bands:
            starts, heads = layout.starts, self.num_heads
            return fused.band_attention(qkv, context, starts, heads, self.window, dropout_p)
        context_local = band_attention(qkv, layout.bands[self.window], self.num_heads, dropout_p)
        if torch.is_grad_enabled():
            return context_local.index_copy(0, layout.first, context)
        return context_local.index_copy_(0, layout.first, context)

    def _attend_from_first(self, hidden: Tensor, layout: AttentionLayout) -> Tensor:
        """Output of `<s>` of every sequence, from all of its tokens: (T, H) -> (B, H)."""
        heads, width = self.num_heads, hidden.shape[1]
        dim = width // heads
        query = self.query_global(hidden.index_select(0, layout.first)) * dim**-0.5  # (B, H)
        # q . (W x + b) = (q W) . x + a constant of the sequence
        key_weight = self.key_global.weight.view(heads, dim, width)
        query = torch.matmul(query.view(-1, heads, dim).transpose(0, 1), key_weight)  # (A, B, H)
        if self.window in layout.bands:
            summed, mass = self._gather(query, hidden, layout)
        else:
            dropout_p = self.dropout_p if self.training else 0.0
            summed, mass = fused.gather(query, hidden, layout.starts, dropout_p)
        value_weight = self.value_global.weight.view(heads, dim, width)
        context = torch.matmul(summed, value_weight.transpose(1, 2))  # (A, B, D)
        # The weights add up to 1 unless some were dropped.
        bias = self.value_global.bias.view(heads, 1, dim) * mass[:, :, None]
        context = (context + bias).transpose(0, 1).reshape(-1, width).to(hidden.dtype)
        return _ZeroGradient.apply(context, self.key_global.bias)

    def _gather(
        self, query: Tensor, hidden: Tensor, layout: AttentionLayout
    ) -> tuple[Tensor, Tensor]:
        """Sums of states (T, H) under the weights of each head, and sums of these.

        Args:
            query: (A, B, H) whose products with the states are the scores.

        Returns:
            (A, B, H) and (A, B).
        """
        query = query.transpose(0, 1).index_select(0, layout.chunk_sequence)  # (C, A, H)
        chunks = layout.gather_chunks(hidden)  # (C, S, H)
        scores = _exact(torch.matmul(query, chunks.transpose(1, 2)))  # (C, A, S)
        scores = scores.masked_fill(~layout.chunk_valid[:, None], float("-inf"))
        with torch.no_grad():  # for the range of exp alone: the softmax does not depend on it
            top = layout.max_chunks(scores.amax(dim=2))
            top = top.index_select(0, layout.chunk_sequence)[:, :, None]
        weights = (scores - top).exp()
        total = layout.sum_chunks(weights.sum(dim=2)).index_select(0, layout.chunk_sequence)
        weights = dropout(weights / total[:, :, None], self.dropout_p, self.training)  # (C, A, S)

        summed = torch.matmul(weights.to(chunks.dtype), chunks)  # (C, A, H)
        summed = layout.sum_chunks(summed).to(hidden.dtype)  # (B, A, H)
        mass = layout.sum_chunks(weights.sum(dim=2))  # (B, A)
        return summed.transpose(0, 1), mass.transpose(0, 1)
