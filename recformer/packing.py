"""Packed token batches: the encoder's native form.

A batch is one run of tokens, all sequences laid end to end, with the borders beside it. There is no
padding, hence no attention mask. The padded signature of the published classes packs at the edge
(`PackedTokens.from_padded`) and unpacks what comes out (`to_padded`).

Shapes: B sequences, L padded length, T packed tokens (sum of the lengths), H hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor


@dataclass(frozen=True)
class PackedTokens:
    """A batch of token sequences without padding.

    Every sequence starts with the `<s>` token (`[CLS]` in the BERT family), which alone has global
    attention.

    Attributes:
        input_ids: (T,) int64 token ids.
        token_type_ids: (T,) int64; 0 `<s>`, 1 attribute name, 2 attribute value.
        item_position_ids: (T,) int64; 0 for `<s>`, k for the k-th newest item.
        cu_seqlens: (B + 1,) int64; sequence b is the tokens `cu_seqlens[b]:cu_seqlens[b + 1]`.
        position_ids: (T,) int64 positions as the embedding table counts them, or None for the usual
            ones (running count within the sequence).
        borders: the numbers of `cu_seqlens`, on the host, so that nobody waits for a device to know
            them; None where nobody wrote them down.

    Examples:
        >>> import torch
        >>> packed = PackedTokens(  # <s> and two tokens, then <s> and one
        ...     input_ids=torch.tensor([0, 7, 8, 0, 9]),
        ...     token_type_ids=torch.tensor([0, 1, 2, 0, 2]),
        ...     item_position_ids=torch.tensor([0, 1, 1, 0, 1]),
        ...     cu_seqlens=torch.tensor([0, 3, 5]),
        ... )
        >>> packed.batch_size, packed.num_tokens, packed.lengths.tolist()
        (2, 5, [3, 2])
        >>> packed.sequence_ids.tolist(), packed.offsets_in_sequence.tolist()
        ([0, 0, 0, 1, 1], [0, 1, 2, 0, 1])
    """

    input_ids: Tensor
    token_type_ids: Tensor
    item_position_ids: Tensor
    cu_seqlens: Tensor
    position_ids: Tensor | None = None
    borders: NDArray[np.int64] | None = None

    def __post_init__(self) -> None:
        size = self.input_ids.shape
        for name in ("token_type_ids", "item_position_ids", "position_ids"):
            value = getattr(self, name)
            if value is not None and value.shape != size:
                raise ValueError(f"{name} has shape {tuple(value.shape)}, input_ids {tuple(size)}")
        if self.input_ids.dim() != 1 or self.cu_seqlens.dim() != 1:
            raise ValueError("packed tokens and cu_seqlens are one-dimensional")

    @property
    def batch_size(self) -> int:
        """B."""
        return self.cu_seqlens.numel() - 1

    @property
    def num_tokens(self) -> int:
        """T."""
        return self.input_ids.numel()

    @property
    def lengths(self) -> Tensor:
        """(B,) int64 number of tokens of each sequence."""
        return self.cu_seqlens.diff()

    @property
    def sequence_ids(self) -> Tensor:
        """(T,) int64 index of the sequence that each token belongs to."""
        index = torch.arange(self.batch_size, device=self.cu_seqlens.device)
        return index.repeat_interleave(self.lengths, output_size=self.num_tokens)

    @property
    def offsets_in_sequence(self) -> Tensor:
        """(T,) int64 0-based place of each token in its sequence."""
        starts = self.cu_seqlens[:-1].repeat_interleave(self.lengths, output_size=self.num_tokens)
        return torch.arange(self.num_tokens, device=starts.device) - starts

    @property
    def host_borders(self) -> NDArray[np.int64]:
        """(B + 1,) `borders`, read from the device where they are not known."""
        if self.borders is not None:
            return self.borders
        return np.array(self.cu_seqlens.tolist(), np.int64)

    def _map(self, function: Callable[[Tensor], Tensor]) -> PackedTokens:
        return PackedTokens(
            function(self.input_ids),
            function(self.token_type_ids),
            function(self.item_position_ids),
            function(self.cu_seqlens),
            None if self.position_ids is None else function(self.position_ids),
            self.borders,
        )

    def to(self, device: torch.device | str, non_blocking: bool = False) -> PackedTokens:
        """The same batch on another device."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> PackedTokens:
        """The same batch in pinned memory; called by loaders."""
        return self._map(lambda tensor: tensor.pin_memory())

    @staticmethod
    def cat(batches: Sequence[PackedTokens]) -> PackedTokens:
        """One batch with the sequences of `batches` one after the other."""
        if any(batch.position_ids is not None for batch in batches):
            raise ValueError("batches with explicit position_ids cannot be joined")
        ends, borders = [batches[0].cu_seqlens], [batches[0].borders]
        offset = batches[0].num_tokens
        for batch in batches[1:]:
            ends.append(batch.cu_seqlens[1:] + offset)
            borders.append(None if batch.borders is None else batch.borders[1:] + offset)
            offset += batch.num_tokens
        known = [part for part in borders if part is not None]
        return PackedTokens(
            torch.cat([batch.input_ids for batch in batches]),
            torch.cat([batch.token_type_ids for batch in batches]),
            torch.cat([batch.item_position_ids for batch in batches]),
            torch.cat(ends),
            borders=np.concatenate(known) if len(known) == len(batches) else None,
        )

    def split(self, count: int) -> list[PackedTokens]:
        """Parts of `count` sequences each, the last one of what is left."""
        parts, borders = [], self.host_borders
        for start in range(0, self.batch_size, count):
            mine = borders[start : start + count + 1]
            first, last, positions = int(mine[0]), int(mine[-1]), self.position_ids
            parts.append(
                PackedTokens(
                    self.input_ids[first:last],
                    self.token_type_ids[first:last],
                    self.item_position_ids[first:last],
                    self.cu_seqlens[start : start + count + 1] - first,
                    None if positions is None else positions[first:last],
                    mine - first,
                )
            )
        return parts

    def with_filler(self, multiple: int, longest: int) -> PackedTokens:
        """More sequences at the end, of at most `longest` tokens: T becomes a multiple."""
        size = -self.num_tokens % multiple
        starts = torch.arange(0, size, longest, device=self.cu_seqlens.device)
        ends = (starts + longest).clamp_(max=size) + self.num_tokens
        filled = self._map(lambda tensor: F.pad(tensor, (0, size)))
        return replace(filled, cu_seqlens=torch.cat([self.cu_seqlens, ends]), borders=None)

    @staticmethod
    def from_padded(
        input_ids: Tensor,
        attention_mask: Tensor,
        token_type_ids: Tensor,
        item_position_ids: Tensor,
        position_ids: Tensor | None = None,
    ) -> PackedTokens:
        """Pack right-padded inputs.

        Args:
            input_ids, attention_mask, token_type_ids, item_position_ids, position_ids: (B, L).

        Raises:
            ValueError: a mask with a hole (left padding, gaps) or a sequence without any token.
        """
        mask = attention_mask.bool()
        lengths = mask.sum(dim=1)
        if (lengths == 0).any():
            raise ValueError("attention_mask has a sequence without a single token")
        if (mask[:, 1:] & ~mask[:, :-1]).any():
            raise ValueError("attention_mask must be right-padded: ones first, then zeros")
        cu_seqlens = F.pad(lengths.cumsum(0), (1, 0))
        return PackedTokens(
            input_ids[mask],
            token_type_ids[mask],
            item_position_ids[mask],
            cu_seqlens,
            None if position_ids is None else position_ids[mask],
        )

    def to_padded(self, values: Tensor, length: int | None = None) -> Tensor:
        """Lay per-token `values` (T, ...) out as (B, L, ...), zeros at padded places."""
        longest = int(self.lengths.max())
        length = longest if length is None else length
        padded = values.new_zeros((self.batch_size, length, *values.shape[1:]))
        return padded.index_put((self.sequence_ids, self.offsets_in_sequence), values)
