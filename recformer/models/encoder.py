"""The encoder: token embeddings, Longformer layers over packed tokens, pooling (paper section 2.2).

Shapes: B sequences, L padded length, T packed tokens, H hidden.
"""

from __future__ import annotations

import os
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.activations import ACT2FN, GELUActivation
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils import logging as bars

from recformer.config import RecformerConfig
from recformer.files import UserError, naming, refuse_pointer
from recformer.models import fused, kernel
from recformer.models.attention import AttentionLayout, RecformerSelfAttention, build_layout
from recformer.models.dropout import add_dropout, dropout
from recformer.packing import PackedTokens

# oneDNN compiles a 16-bit matmul for each number of rows and caches it, which takes longer than the
# product; rounding the rows up to a multiple keeps the variants few where torch multiplies.
CPU_TOKEN_MULTIPLE = 256
# In inference the feed-forward goes over rows in pieces whose inner states take about this: glibc
# takes blocks above 32 MB from the kernel anew, page by page, each time.
CPU_INNER_BYTES = 16 << 20
# Rows that are summed and normalised at once, in the cache.
CPU_NORM_ROWS = 256
# Buffers that released files carry and nobody needs.
STALE_BUFFERS = ("position_ids",)
# Parts of one model class that another has no place for by design: no need to report them.
PARTS_OF_OTHERS = (r"^lm_head\.", r"^item_embedding\.", r"^head\.")


def _only_infers(module: nn.Module) -> bool:
    """Neither gradients nor dropout, which checkpointing draws once without and once with them."""
    return not (module.training or torch.is_grad_enabled())


def _trains_in_cpp(module: nn.Module, hidden: Tensor, dense: nn.Linear) -> bool:
    """Whether `fused` takes a linear layer that is plain, and what follows its product."""
    return (
        not _only_infers(module) and fused.usable(hidden) and dense.out_features % kernel.PANEL == 0
    )


class RecformerEmbeddings(nn.Module):
    """Sum of word, position, token-type and item-position embeddings, normalised."""

    def __init__(self, config: RecformerConfig) -> None:
        super().__init__()
        hidden, pad = config.hidden_size, config.pad_token_id
        self.word_embeddings = nn.Embedding(config.vocab_size, hidden, padding_idx=pad)
        self.position_embeddings = nn.Embedding(
            config.max_position_embeddings, hidden, padding_idx=pad
        )
        self.token_type_embeddings = nn.Embedding(config.token_type_size, hidden)
        self.item_position_embeddings = nn.Embedding(config.max_item_embeddings, hidden)
        self.LayerNorm = nn.LayerNorm(hidden, eps=config.layer_norm_eps)
        self.dropout_p = config.hidden_dropout_prob
        # Positions count from 1 after the pad token's id, as in the RoBERTa family.
        self.first_position = pad + 1

    def forward(self, packed: PackedTokens) -> Tensor:
        """(T, H) hidden states of the tokens before the first layer."""
        positions = packed.position_ids
        if positions is None:
            positions = packed.offsets_in_sequence + self.first_position
        hidden = self.word_embeddings(packed.input_ids)
        hidden = hidden + self.position_embeddings(positions)
        hidden = hidden + self.token_type_embeddings(packed.token_type_ids)
        hidden = hidden + self.item_position_embeddings(packed.item_position_ids)
        return dropout(self.LayerNorm(hidden), self.dropout_p, self.training)

    def check(self, packed: PackedTokens) -> int:
        """Refuse a batch that no forward pass is defined for, before any of it is computed.

        Returns:
            Tokens of the longest sequence.

        Raises:
            UserError: a sequence without a token, or longer than the table of positions.
        """
        if packed.batch_size == 0:
            raise UserError("the batch has no sequence")
        if packed.borders is None:
            shortest, longest = (int(n) for n in torch.stack(packed.lengths.aminmax()).tolist())
        else:
            lengths = np.diff(packed.borders)
            shortest, longest = int(lengths.min()), int(lengths.max())
        if shortest < 1:
            raise UserError("a sequence without a token: each starts with <s>")
        rows = self.position_embeddings.num_embeddings
        if packed.position_ids is None:
            last = longest - 1 + self.first_position
        else:
            last = int(packed.position_ids.max())
        if last >= rows:
            raise UserError(
                f"a sequence of {longest} tokens needs position {last}, but the model has only "
                f"positions up to {rows - 1}; cut sequences (max_token_num) to "
                f"{rows - self.first_position} tokens, or start from a model with more positions"
            )
        return longest

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        for name in STALE_BUFFERS:
            state_dict.pop(prefix + name, None)
        super()._load_from_state_dict(state_dict, prefix, *args)


class _ResidualOutput(nn.Module):
    """Linear, dropout, residual, LayerNorm: the end of either half of a layer."""

    def __init__(self, config: RecformerConfig, input_size: int) -> None:
        super().__init__()
        self.dense = nn.Linear(input_size, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout_p = config.hidden_dropout_prob

    def forward(self, hidden: Tensor, residual: Tensor) -> Tensor:
        if self.plain() and _trains_in_cpp(self, residual, self.dense):
            hidden = fused.linear(hidden, self.dense.weight)
            dropout_p = self.dropout_p if self.training else 0.0
            return fused.residual_norm(hidden, self.dense.bias, residual, self.LayerNorm, dropout_p)
        hidden = self.dense(hidden)
        if _only_infers(self) and hidden.device.type == "cpu":
            return self._normalise_sum(hidden, residual)
        hidden = add_dropout(residual, hidden, self.dropout_p, self.training)
        # Autocast on a GPU gives the output of LayerNorm in float32.
        return self.LayerNorm(hidden).to(residual.dtype)

    def plain(self) -> bool:
        """Whether its parts do nothing but what their classes say."""
        return fused.plain(self.dense, nn.Linear) and fused.plain(self.LayerNorm, nn.LayerNorm)

    def _normalise_sum(self, hidden: Tensor, residual: Tensor) -> Tensor:
        """LayerNorm of the sum, in the memory of `hidden`; 16-bit numbers are added in float32."""
        if hidden.dtype.itemsize > 2:
            return self.LayerNorm(hidden.add_(residual))
        norm = self.LayerNorm
        weight, bias = norm.weight.float(), norm.bias.float()
        for piece, other in zip(hidden.split(CPU_NORM_ROWS), residual.split(CPU_NORM_ROWS)):
            total = other.float().add_(piece)
            piece.copy_(F.layer_norm(total, norm.normalized_shape, weight, bias, norm.eps))
        return hidden


class RecformerAttention(nn.Module):
    """Self-attention, output projection, residual and LayerNorm."""

    def __init__(self, config: RecformerConfig, window: int) -> None:
        super().__init__()
        self.self = RecformerSelfAttention(config, window)
        self.output = _ResidualOutput(config, config.hidden_size)

    def forward(self, hidden: Tensor, layout: AttentionLayout, first_only: bool) -> Tensor:
        context = self.self(hidden, layout, first_only)
        residual = hidden.index_select(0, layout.first) if first_only else hidden
        return self.output(context, residual)


class RecformerIntermediate(nn.Module):
    """First half of the feed-forward network."""

    def __init__(self, config: RecformerConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.intermediate_size)
        self.activation = ACT2FN[config.hidden_act]

    def forward(self, hidden: Tensor) -> Tensor:
        if self.plain() and _trains_in_cpp(self, hidden, self.dense):
            return fused.bias_gelu(fused.linear(hidden, self.dense.weight), self.dense.bias)
        hidden = self.dense(hidden)
        if isinstance(self.activation, GELUActivation) and _only_infers(self):
            return torch.ops.aten.gelu_(hidden)
        return self.activation(hidden)

    def plain(self) -> bool:
        """With exact GELU, too, which `fused` computes."""
        return fused.plain(self.dense, nn.Linear) and fused.plain(self.activation, GELUActivation)


class RecformerLayer(GradientCheckpointingLayer):
    """One post-LayerNorm transformer layer."""

    def __init__(self, config: RecformerConfig, window: int) -> None:
        super().__init__()
        self.attention = RecformerAttention(config, window)
        self.intermediate = RecformerIntermediate(config)
        self.output = _ResidualOutput(config, config.intermediate_size)

    def forward(self, hidden: Tensor, layout: AttentionLayout, first_only: bool) -> Tensor:
        """(T, H) -> (T, H), or (B, H) of the `<s>` tokens if `first_only`."""
        hidden = self.attention(hidden, layout, first_only)
        if not _only_infers(self) or hidden.device.type != "cpu":
            return self._feed_forward(hidden)
        rows = CPU_INNER_BYTES // (self.intermediate.dense.out_features * hidden.itemsize)
        rows = max(rows // CPU_TOKEN_MULTIPLE, 1) * CPU_TOKEN_MULTIPLE
        if len(hidden) <= rows:
            return self._feed_forward(hidden)
        return torch.cat([self._feed_forward(piece) for piece in hidden.split(rows)])

    def plain(self) -> bool:
        """Whether all that it multiplies rows of tokens with are layers as they were made."""
        parts = (
            (self.attention, RecformerAttention),
            (self.attention.self, RecformerSelfAttention),
            (self.attention.output, _ResidualOutput),
            (self.intermediate, RecformerIntermediate),
            (self.output, _ResidualOutput),
        )
        return (
            all(fused.plain(part, kind) for part, kind in parts)
            and self.attention.output.plain()
            and self.intermediate.plain()
            and self.output.plain()
            and self.intermediate.dense.out_features % kernel.PANEL == 0
        )

    def _feed_forward(self, hidden: Tensor) -> Tensor:
        return self.output(self.intermediate(hidden), hidden)


class RecformerEncoder(nn.Module):
    """The layers."""

    def __init__(self, config: RecformerConfig) -> None:
        super().__init__()
        self.windows = config.layer_windows
        self.layer = nn.ModuleList([RecformerLayer(config, window) for window in self.windows])

    def forward(self, hidden: Tensor, layout: AttentionLayout, first_only: bool) -> Tensor:
        """(T, H) -> (T, H); with `first_only` the last layer is for `<s>` alone: (B, H)."""
        for layer in self.layer[:-1]:
            hidden = layer(hidden, layout, False)
        return self.layer[-1](hidden, layout, first_only)


@contextmanager
def bars_on_terminals() -> Iterator[None]:
    """No progress bars of transformers inside the block where nobody watches them."""
    shown = bars.is_progress_bar_enabled()
    if not sys.stderr.isatty():
        bars.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            bars.enable_progress_bar()


class RecformerPreTrainedModel(PreTrainedModel):
    """Loading, saving and initialisation by transformers' conventions."""

    config_class = RecformerConfig
    base_model_prefix = "longformer"
    supports_gradient_checkpointing = True
    _no_split_modules: ClassVar[list[str]] = ["RecformerSelfAttention"]
    _keys_to_ignore_on_load_unexpected: ClassVar[list[str]] = [
        *STALE_BUFFERS,
        *PARTS_OF_OTHERS,
    ]

    def __init__(self, config: RecformerConfig) -> None:
        config.check()
        super().__init__(config)

    @classmethod
    def from_pretrained(cls, path: str | os.PathLike | None, *args: Any, **kwargs: Any) -> Any:
        """As in transformers, but with a progress bar on a terminal alone.

        Raises:
            UserError: a Git LFS pointer in place of a file, or weights cut off or damaged.
        """
        if path is not None and Path(path).is_dir():
            refuse_pointer(path)
        try:
            with bars_on_terminals():
                return super().from_pretrained(path, *args, **kwargs)
        except SafetensorError as error:
            raise UserError(f"the weights of {path} are truncated or corrupt: {error}") from error

    def save_pretrained(self, save_directory: str | os.PathLike, *args: Any, **kwargs: Any) -> None:
        """As in transformers; the weights are as readable as the configuration.

        Raises:
            OSError: they could not be written, names the folder.
        """
        try:
            with naming(save_directory), bars_on_terminals():
                super().save_pretrained(save_directory, *args, **kwargs)
        except SafetensorError as error:
            raise OSError(
                f"the weights could not be written to {save_directory}: {error}"
            ) from None
        # safetensors gives its files to their owner alone, whatever the umask says.
        mode = stat.S_IMODE((Path(save_directory) / "config.json").stat().st_mode)
        for file in Path(save_directory).glob("*.safetensors"):
            file.chmod(mode)


class RecformerModel(RecformerPreTrainedModel):
    """The encoder of Recformer: vectors of item sequences and of single items (paper, section 2.2).

    A Longformer whose embeddings also tell attribute names from values, and items from each other.
    State-dict keys are those of transformers' Longformer. `forward` takes padded batches as
    published; `encode` takes packed ones.

    Args:
        config: sizes, window and pooling.
    """

    def __init__(self, config: RecformerConfig) -> None:
        super().__init__(config)
        self.embeddings = RecformerEmbeddings(config)
        self.encoder = RecformerEncoder(config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        return self.embeddings.word_embeddings

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.embeddings.word_embeddings = value

    def encode(self, packed: PackedTokens) -> Tensor:
        """Pooled vectors (B, H) of a packed batch, the last layer computed only where it counts.

        Raises:
            UserError: a sequence that is empty or longer than the model has positions for.
        """
        longest = self.embeddings.check(packed)
        vectors = self._by_kernel(packed, self.config.pooler_type)
        if vectors is not None:
            return vectors
        if self.config.pooler_type == "cls":
            return self._by_torch(packed, longest, first_only=True)[0][: packed.batch_size]
        return self._pooled(*self._by_torch(packed, longest, first_only=False), packed)

    def encode_tokens(self, packed: PackedTokens) -> tuple[Tensor, Tensor]:
        """Hidden states of every token and pooled vectors of a packed batch.

        Returns:
            (T, H) and (B, H).

        Raises:
            UserError: as `encode`.
        """
        longest = self.embeddings.check(packed)
        hidden = self._by_kernel(packed, None)
        if hidden is not None:
            layout = build_layout(packed, (), hidden.dtype, longest)
        else:
            hidden, layout = self._by_torch(packed, longest, first_only=False)
        return hidden[: packed.num_tokens], self._pooled(hidden, layout, packed)

    def _pooled(self, hidden: Tensor, layout: AttentionLayout, packed: PackedTokens) -> Tensor:
        """(B, H) of all states."""
        first = hidden.index_select(0, layout.first)
        pooled = first if self.config.pooler_type == "cls" else layout.mean_tokens(hidden)
        if self.config.pooler_type == "avg_published":
            # published: attention mask and global mask are added, so <s> weighs 2 of n + 1.
            pooled = pooled + (first - pooled) / (layout.lengths[:, None] + 1)
        return pooled[: packed.batch_size]

    def _dtype(self) -> torch.dtype:
        """Of the products."""
        device = self._table().device.type
        autocast = torch.is_autocast_enabled(device)
        return torch.get_autocast_dtype(device) if autocast else self._table().dtype

    def _table(self) -> Tensor:
        """A parameter that every adapter leaves in place."""
        return self.embeddings.position_embeddings.weight

    def _by_kernel(self, packed: PackedTokens, pooler: str | None) -> Tensor | None:
        """What `kernel.encode` gives, where it may be asked."""
        if self._table().device.type != "cpu" or not _only_infers(self):
            return None
        return kernel.encode(self, packed, self._dtype(), pooler)

    def _by_torch(
        self, packed: PackedTokens, longest: int, first_only: bool
    ) -> tuple[Tensor, AttentionLayout]:
        """Hidden states, of tokens or of each `<s>`, which may go on with those of filler."""
        dtype = self._dtype()
        if (
            self._table().device.type == "cpu"
            and dtype.itemsize == 2
            and not self._multiplies_in_cpp(dtype)
        ):
            packed = packed.with_filler(CPU_TOKEN_MULTIPLE, longest)
        # Else the residuals would stay in float32 under autocast, cast around every product.
        hidden = self.embeddings(packed).to(dtype)
        in_cpp = fused.attends(hidden, self.config.num_attention_heads)
        windows = () if in_cpp else self.encoder.windows
        layout = build_layout(packed, windows, hidden.dtype, longest)
        return self.encoder(hidden, layout, first_only), layout

    def _multiplies_in_cpp(self, dtype: torch.dtype) -> bool:
        """Whether `fused.linear` makes every product of the rows of all tokens."""
        return (
            not _only_infers(self)
            and fused.attends(self._table().detach(), self.config.num_attention_heads)
            and fused.multiplies(dtype)
            and all(type(layer) is RecformerLayer and layer.plain() for layer in self.encoder.layer)
        )

    def pack(
        self,
        input_ids: Tensor | None,
        attention_mask: Tensor | None = None,
        global_attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        item_position_ids: Tensor | None = None,
        **refused: Any,
    ) -> PackedTokens:
        """The published padded inputs as a packed batch; arguments as in `forward`."""
        for name, value in refused.items():
            if value is not None and value is not False:
                raise UserError(f"{name} is not supported")
        if input_ids is None or item_position_ids is None:
            missing = "input_ids" if input_ids is None else "item_position_ids"
            raise UserError(f"{missing} is required, of shape (batch, length)")
        if attention_mask is None:
            attention_mask = input_ids != self.config.pad_token_id
        if token_type_ids is None:
            token_type_ids = torch.zeros_like(input_ids)
        if global_attention_mask is not None:
            at_first = torch.zeros_like(global_attention_mask)
            at_first[:, 0] = 1
            if not torch.equal(global_attention_mask, at_first):
                raise UserError(
                    "global_attention_mask must be 1 at the first token of every sequence (<s>) "
                    "and 0 elsewhere: other global tokens are not supported"
                )
        return PackedTokens.from_padded(
            input_ids, attention_mask, token_type_ids, item_position_ids, position_ids
        )

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        global_attention_mask: Tensor | None = None,
        head_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        item_position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> BaseModelOutputWithPooling | tuple[Tensor, Tensor]:
        """The published signature: right-padded inputs in, right-padded hidden states out.

        Args:
            input_ids: (B, L) int64.
            attention_mask: (B, L), 1 at tokens; None: every token but `pad_token_id`.
            global_attention_mask: (B, L), 1 at the first token alone; None means the same.
            token_type_ids: (B, L) int64; None: all 0.
            position_ids: (B, L) int64; None: counted from `pad_token_id + 1`.
            item_position_ids: (B, L) int64.
            return_dict: False returns the tuple of the output's fields.
            head_mask, inputs_embeds, output_attentions, output_hidden_states: refused.

        Returns:
            `last_hidden_state` (B, L, H), zeros at padding, and `pooler_output` (B, H).

        Raises:
            ValueError: inputs that are refused, missing, padded on the left, empty or too long.
        """
        packed = self.pack(
            input_ids,
            attention_mask,
            global_attention_mask,
            token_type_ids,
            position_ids,
            item_position_ids,
            head_mask=head_mask,
            inputs_embeds=inputs_embeds,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
        )
        assert input_ids is not None  # `pack` refused it
        hidden, pooled = self.encode_tokens(packed)
        padded = packed.to_padded(hidden, input_ids.shape[1])
        if return_dict is False:
            return padded, pooled
        return BaseModelOutputWithPooling(last_hidden_state=padded, pooler_output=pooled)
