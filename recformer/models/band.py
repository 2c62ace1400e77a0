"""Softmax attention of packed tokens within a band, and to the `<s>` of their sequence.

The run of packed tokens is cut into blocks of queries, whatever sequences they belong to. The keys
of a block are the slice of the run around it, plus one more: the `<s>` of the sequence that reaches
into the slice from the left. Any other sequence with a query in the block has its `<s>` within the
slice, being its first token. A mask, built once a batch and shared by the layers, does the rest.

Shapes: B sequences, T packed tokens, H hidden, A heads, D = H / A, W window;
N blocks (n of them at once) of Q queries and K keys; P tokens that the blocks span.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from recformer.models.dropout import BITS, clear, draw_keep, keep_scale

# Keys a block come in multiples of this, which suits matrix units and the vectors of the softmax:
# under the published window of 64, 63 queries see 128 keys.
KEY_MULTIPLE = 64
# Fewer queries a block copy every key more often, more of them score more pairs outside the band.
LEAST_QUERIES = 47
# Bytes of scores held at once on CPU: few enough to stay in the cache.
SCORE_BYTES = 3 << 20


@dataclass(frozen=True)
class Band:
    """Keys that each block of queries sees, for one window size.

    Attributes:
        block: Q, queries a block.
        half: tokens visible on either side.
        queries: (N * Q,) int64 token of each query; any token beyond the end of the run.
        keys: (N, K) int64 token of each key. Key 0 is the extra one, key 1 + j the token
            `block * n - half + j`; any token where that is outside the run.
        mask: (N, Q, K) additive, 0 or -inf.
    """

    block: int
    half: int
    queries: Tensor
    keys: Tensor
    mask: Tensor

    @property
    def num_blocks(self) -> int:
        return self.mask.shape[0]

    @property
    def num_keys(self) -> int:
        return self.mask.shape[2]

    @property
    def padded_size(self) -> int:
        """P, the tokens that all blocks span, those outside the run included."""
        return (self.num_blocks - 1) * self.block + self.num_keys - 1


def build_band(sequence_ids: Tensor, first: Tensor, window: int, dtype: torch.dtype) -> Band:
    """The band of a batch for one window size, without waiting for the device.

    Args:
        sequence_ids: (T,) int64 sequence of each token.
        first: (B,) int64 the token that is `<s>` of each sequence.
        window: positive and even.
        dtype: floating type that scores are computed in.
    """
    device = sequence_ids.device
    half = window // 2
    num_tokens = sequence_ids.numel()
    least_keys = 1 + window + max(LEAST_QUERIES, half)
    num_keys = -(-least_keys // KEY_MULTIPLE) * KEY_MULTIPLE
    block = num_keys - window - 1
    num_blocks = -(-num_tokens // block)

    start = torch.arange(num_blocks, device=device)[:, None] * block  # (N, 1)
    query = start + torch.arange(block, device=device)  # (N, Q)
    key = start - half + torch.arange(num_keys - 1, device=device)  # (N, K - 1)
    last = num_tokens - 1
    real_query = query <= last
    query_token, key_token = query.clamp(max=last), key.clamp(0, last)
    query_sequence = torch.where(real_query, sequence_ids[query_token], -1)
    real_key = (key >= 0) & (key <= last)
    key_sequence = torch.where(real_key, sequence_ids[key_token], -2)
    is_first = real_key & (key == first[key_sequence.clamp(min=0)])

    near = (query[:, :, None] - key[:, None, :]).abs() <= half  # (N, Q, K - 1)
    same = query_sequence[:, :, None] == key_sequence[:, None, :]
    in_slice = same & (near | is_first[:, None, :])

    slice_start = key[:, 0]
    extra_sequence = sequence_ids[slice_start.clamp(min=0)]  # (N,)
    extra = first[extra_sequence]
    unseen = extra < slice_start  # else it stands in the slice already
    sees_extra = (query_sequence == extra_sequence[:, None]) & unseen[:, None]
    # Rows beyond the last token are thrown away, but a row without any key would be NaN.
    sees_extra = sees_extra | ~real_query

    visible = torch.cat([sees_extra[:, :, None], in_slice], dim=2)  # (N, Q, K)
    mask = torch.zeros(visible.shape, dtype=dtype, device=device)
    return Band(
        block=block,
        half=half,
        queries=query_token.flatten(),
        keys=torch.cat([extra[:, None], key_token], dim=1),
        mask=mask.masked_fill_(~visible, float("-inf")),
    )


def band_attention(qkv: Tensor, band: Band, num_heads: int, dropout_p: float = 0.0) -> Tensor:
    """Softmax attention within the band and to `<s>`.

    Args:
        qkv: (T, 3 * H) queries, keys and values side by side, of the mask's dtype.
        dropout_p: probability that an attention weight is dropped.

    Returns:
        (T, H).
    """
    if qkv.device.type == "cpu":
        return _BandAttention.apply(qkv, band, num_heads, dropout_p)
    return fused_band_attention(qkv, band, num_heads, dropout_p)


def fused_band_attention(qkv: Tensor, band: Band, num_heads: int, dropout_p: float = 0.0) -> Tensor:
    """`band_attention` by torch's scaled-dot-product kernels."""
    query, key, value = _Blocks.apply(qkv, band, num_heads)
    context = F.scaled_dot_product_attention(
        query, key, value, attn_mask=band.mask[:, None], dropout_p=dropout_p
    )
    return context.transpose(1, 2).reshape(-1, qkv.shape[1] // 3)[: qkv.shape[0]]


def _query_view(padded: Tensor, band: Band, start: int, end: int, shape: tuple[int, int]) -> Tensor:
    """Blocks `start:end` of the queries in the first H columns of (P, R), a view (n, A, Q, D)."""
    num_heads, dim = shape
    row = padded.shape[1]
    return padded.as_strided(
        (end - start, num_heads, band.block, dim),
        (band.block * row, dim, row, 1),
        (band.half + start * band.block) * row,
    )


def _query_blocks(qkv: Tensor, band: Band, shape: tuple[int, int]) -> Tensor:
    """Blocks of the queries in (T, 3 * H): (N, A, Q, D)."""
    rows = qkv[:, : shape[0] * shape[1]].index_select(0, band.queries)
    return rows.view(band.num_blocks, band.block, *shape).transpose(1, 2)


def _key_blocks(qkv: Tensor, band: Band, shape: tuple[int, int], column: int) -> Tensor:
    """Blocks of the keys, or values, from `column` on of (T, 3 * H): (N, A, K, D)."""
    columns = qkv[:, column : column + shape[0] * shape[1]]
    rows = columns.index_select(0, band.keys.flatten())
    return rows.view(band.num_blocks, band.num_keys, *shape).transpose(1, 2)


def _add_key_blocks(total: Tensor, band: Band, start: int, blocks: Tensor, column: int) -> Tensor:
    """Add gradients (n, A, K, D) of key blocks from `start` on where their tokens stand in (P, R).

    Returns:
        (n, H) of the extra keys, not yet added.
    """
    num_blocks, num_heads, num_keys, dim = blocks.shape
    row, width = total.shape[1], num_heads * dim
    blocks = blocks.transpose(1, 2).reshape(num_blocks, num_keys, width)
    # Slices overlap; pieces of them no longer than the distance between two blocks do not.
    for begin in range(1, num_keys, band.block):
        piece = blocks[:, begin : begin + band.block]
        target = total.as_strided(
            piece.shape,
            (band.block * row, row, 1),
            (start * band.block + begin - 1) * row + column,
        )
        target += piece
    return blocks[:, 0]


def _copy_blocks(
    out: Tensor, rows: Tensor, tokens: Tensor, first: int, block: int, column: int
) -> Tensor:
    """Copy blocks of rows that overlap, or lie end to end, apart.

    Args:
        out: (n, A, R, D), filled and returned.
        rows: (T, C) contiguous.
        tokens: (n, R) int64 row of each place. Those of block i are `first + i * block` and on,
            other than where that would leave the rows there are.
        first, block: row where block 0 begins, and rows from one block to the next.
        column: where the `A * D` columns that are taken begin.
    """
    num_blocks, num_heads, size, dim = out.shape
    num_rows, row = rows.shape[0], rows.stride(0)
    # Blocks inside are copied out of a view, quicker than by index.
    start = min(max(-(first // block), 0), num_blocks)
    end = min(max((num_rows - size - first) // block + 1, start), num_blocks)
    if start < end:
        out[start:end] = rows.as_strided(
            (end - start, num_heads, size, dim),
            (block * row, dim, row, 1),
            rows.storage_offset() + (first + start * block) * row + column,
        )
    for outside in (slice(0, start), slice(end, num_blocks)):
        index = tokens[outside].flatten()
        if index.numel():
            taken = rows[:, column : column + num_heads * dim].index_select(0, index)
            out[outside] = taken.view(-1, size, num_heads, dim).transpose(1, 2)
    return out


class _Blocks(torch.autograd.Function):
    """(T, 3 * H) -> queries (N, A, Q, D), keys and values (N, A, K, D)."""

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, band: Band, num_heads: int) -> tuple[Tensor, Tensor, Tensor]:
        hidden = qkv.shape[1] // 3
        shape = (num_heads, hidden // num_heads)
        ctx.band, ctx.num_tokens = band, qkv.shape[0]
        query = _query_blocks(qkv, band, shape)
        key = _key_blocks(qkv, band, shape, hidden)
        value = _key_blocks(qkv, band, shape, 2 * hidden)
        return query, key, value

    @staticmethod
    def backward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, None, None]:
        band: Band = ctx.band
        _, num_heads, _, dim = query.shape
        hidden = num_heads * dim
        total = query.new_zeros((band.padded_size, 3 * hidden))
        _query_view(total, band, 0, band.num_blocks, (num_heads, dim)).copy_(query)
        extra = query.new_zeros((band.num_blocks, 3 * hidden))
        extra[:, hidden : 2 * hidden] = _add_key_blocks(total, band, 0, key, hidden)
        extra[:, 2 * hidden :] = _add_key_blocks(total, band, 0, value, 2 * hidden)
        total.index_add_(0, band.keys[:, 0] + band.half, extra)
        return total[band.half : band.half + ctx.num_tokens], None, None


class _Room:
    """Room for a few blocks of queries, keys and values, filled again and again."""

    def __init__(self, band: Band, num_heads: int, qkv: Tensor) -> None:
        self.band, self.num_heads = band, num_heads
        self.hidden = qkv.shape[1] // 3
        self.dim = self.hidden // num_heads
        scores = num_heads * band.block * band.num_keys
        self.step = min(max(1, SCORE_BYTES // (scores * qkv.itemsize)), band.num_blocks)
        self.query = self.new(qkv, band.block)
        self.key = self.new(qkv, band.num_keys)
        self.value = self.new(qkv, band.num_keys)

    def new(self, like: Tensor, rows: int, columns: int | None = None) -> Tensor:
        """Room for (n, A, rows, columns), D columns unless told."""
        return like.new_empty((self.step, self.num_heads, rows, columns or self.dim))

    def spans(self) -> Iterator[tuple[int, int]]:
        """First block of each piece and the one after its last."""
        for start in range(0, self.band.num_blocks, self.step):
            yield start, min(start + self.step, self.band.num_blocks)

    def queries(self, out: Tensor, rows: Tensor, start: int, end: int) -> Tensor:
        """Rows of the queries of blocks `start:end`, heads side by side: (n * A, Q, D)."""
        block = self.band.block
        tokens = self.band.queries.view(-1, block)[start:end]
        return _copy_blocks(
            out[: end - start], rows, tokens, start * block, block, column=0
        ).flatten(0, 1)

    def keys(self, out: Tensor, qkv: Tensor, start: int, end: int, column: int) -> Tensor:
        """Keys, or values, of blocks `start:end` from `column` on of (T, 3 * H): (n * A, K, D)."""
        band = self.band
        out, tokens = out[: end - start], band.keys[start:end]
        first = start * band.block - band.half
        _copy_blocks(out[:, :, 1:], qkv, tokens[:, 1:], first, band.block, column)
        extra = qkv[:, column : column + self.hidden].index_select(0, tokens[:, 0])
        out[:, :, 0] = extra.view(-1, self.num_heads, self.dim)
        return out.flatten(0, 1)


class _BandAttention(torch.autograd.Function):
    """`band_attention` on CPU: a few blocks at a time, out of the cache.

    torch's fused kernel knows no dropout there, and is slow backward. Kept for the way back are the
    weights before dropout, with a minus sign where they were dropped.
    """

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, band: Band, num_heads: int, dropout_p: float) -> Tensor:
        qkv = qkv.contiguous()
        num_tokens, hidden = qkv.shape[0], qkv.shape[1] // 3
        num_blocks, block, num_keys = band.mask.shape
        room = _Room(band, num_heads, qkv)
        scale = room.dim**-0.5
        sign = torch.iinfo(BITS[qkv.dtype]).min
        keep_weights = ctx.needs_input_grad[0]
        kept_blocks = num_blocks if keep_weights else room.step
        signed_weights = qkv.new_empty((kept_blocks, num_heads, block, num_keys))
        scores_room = room.new(qkv, block, num_keys)
        out_room = room.new(qkv, block)
        context = qkv.new_empty((num_blocks, block, num_heads, room.dim))
        for start, end in room.spans():
            query = room.queries(room.query, qkv, start, end)
            key = room.keys(room.key, qkv, start, end, hidden)
            scores = scores_room[: end - start]
            scores.copy_(band.mask[start:end, None])
            scores = scores.flatten(0, 1).baddbmm_(query, key.transpose(1, 2), alpha=scale)
            place = start if keep_weights else 0
            weights = signed_weights[place : place + end - start].flatten(0, 1)
            torch.softmax(scores, dim=-1, out=weights)
            if dropout_p > 0:
                keep = draw_keep(weights.shape, dropout_p, weights.dtype)
                kept = clear(weights, keep)
                weights.view(keep.dtype).bitwise_or_(keep.bitwise_not_().bitwise_and_(sign))
                weights = kept
            value = room.keys(room.value, qkv, start, end, 2 * hidden)
            out = out_room[: end - start]
            torch.bmm(weights, value, out=out.flatten(0, 1))
            torch.mul(out.transpose(1, 2), keep_scale(dropout_p), out=context[start:end])
        result = context.view(-1, hidden)[:num_tokens]
        ctx.save_for_backward(qkv, signed_weights, result)
        ctx.band, ctx.num_heads, ctx.dropout_p = band, num_heads, dropout_p
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        qkv, signed_weights, context = ctx.saved_tensors
        band: Band = ctx.band
        num_heads, hidden = ctx.num_heads, context.shape[1]
        room = _Room(band, num_heads, qkv)
        shape = (num_heads, room.dim)
        scale, survivors = room.dim**-0.5, keep_scale(ctx.dropout_p)
        grad = grad.contiguous()
        # The softmax takes away the mean of the gradient under the weights, which is this:
        exact = torch.promote_types(grad.dtype, torch.float32)
        mean = (grad.to(exact) * context).view(-1, *shape).sum(dim=2).to(grad.dtype)
        mean = F.pad(mean, (0, 0, 0, band.num_blocks * band.block - grad.shape[0]))
        mean = mean.view(band.num_blocks, band.block, num_heads).transpose(1, 2)  # (N, A, Q)
        total = qkv.new_zeros((band.padded_size, 3 * hidden))
        extra = qkv.new_zeros((band.num_blocks, 3 * hidden))
        grad_room, out_room = room.new(qkv, band.num_keys), room.new(qkv, band.block)
        scores_room = room.new(qkv, band.block, band.num_keys)

        def product(out: Tensor, left: Tensor, right: Tensor, factor: float = 1.0) -> Tensor:
            """(n * A, ...) times (n * A, ...) into the first n of `out`: (n, A, ...)."""
            result = out[: left.shape[0] // num_heads]
            result.flatten(0, 1).baddbmm_(left, right, beta=0, alpha=factor)
            return result

        for start, end in room.spans():
            query = room.queries(room.query, qkv, start, end)
            key = room.keys(room.key, qkv, start, end, hidden)
            value = room.keys(room.value, qkv, start, end, 2 * hidden)
            grad_out = room.queries(out_room, grad, start, end)
            if end == band.num_blocks:  # no gradient comes from beyond the last token
                out_room[end - start - 1, :, grad.shape[0] - (end - 1) * band.block :] = 0
            weights = kept = signed_weights[start:end].flatten(0, 1)
            if ctx.dropout_p > 0:
                weights, kept = weights.abs(), weights.relu()
            grad_value = product(grad_room, kept.transpose(1, 2), grad_out, survivors)
            extra[start:end, 2 * hidden :] = _add_key_blocks(
                total, band, start, grad_value, 2 * hidden
            )
            grad_scores = product(scores_room, grad_out, value.transpose(1, 2), survivors)
            grad_scores = grad_scores.flatten(0, 1).mul_(kept)
            grad_scores.addcmul_(weights, mean[start:end].reshape(-1, band.block, 1), value=-1)
            grad_key = product(grad_room, grad_scores.transpose(1, 2), query, scale)
            extra[start:end, hidden : 2 * hidden] = _add_key_blocks(
                total, band, start, grad_key, hidden
            )
            grad_query = product(room.query, grad_scores, key)
            torch.mul(grad_query, scale, out=_query_view(total, band, start, end, shape))
        total.index_add_(0, band.keys[:, 0] + band.half, extra)
        return total[band.half : band.half + grad.shape[0]], None, None, None
