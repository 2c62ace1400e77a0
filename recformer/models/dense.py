"""The encoder over padded batches, in operations that can be traced and exported.

The packed encoder (`recformer/models/encoder.py`) cuts, gathers and writes by index, which
`torch.export`, ONNX and dynamic quantisation cannot follow. Here the same layers, with the same
weights, run over right-padded inputs with one mask: a token sees the tokens of its window and
`<s>`; `<s>` sees all, through projections of its own. Every product is a call of an `nn.Linear`, so
quantisers find it. The cost grows with the square of the padded length, where the packed encoder's
grows with the tokens; it pays on other runtimes, not here.

Shapes: B sequences, L padded length, H hidden, A heads, D = H / A.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recformer.models.attention import RecformerSelfAttention
from recformer.models.catalogue import VALUE, RecformerForCatalogue
from recformer.models.encoder import RecformerEmbeddings, RecformerLayer, RecformerModel

#: Names of the inputs of `DenseEncoder`, in order.
INPUTS = ("input_ids", "attention_mask", "token_type_ids", "item_position_ids")


class DenseEncoder(nn.Module):
    """`RecformerModel.encode` of right-padded inputs; inference alone, no dropout.

    The weights are the model's own, not copies: `state_dict` has its keys.

    Args:
        model: the encoder.
    """

    def __init__(self, model: RecformerModel) -> None:
        super().__init__()
        self.embeddings = model.embeddings
        self.encoder = model.encoder
        self.pooler_type = model.config.pooler_type
        self.eval()

    @property
    def max_length(self) -> int:
        """Greatest padded length L: the positions that the model has."""
        table = self.embeddings.position_embeddings
        return table.num_embeddings - self.embeddings.first_position

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        token_type_ids: Tensor,
        item_position_ids: Tensor,
    ) -> Tensor:
        """Pooled vectors (B, H).

        Args:
            input_ids, token_type_ids, item_position_ids: (B, L) int64, `<s>` first.
            attention_mask: (B, L) int64, 1 at tokens, then 0 at padding.
        """
        hidden = _embedded(self.embeddings, input_ids, token_type_ids, item_position_ids)
        tokens = attention_mask.bool()  # (B, L)
        places = torch.arange(input_ids.shape[1], device=input_ids.device)
        distances = (places[:, None] - places[None, :]).abs()  # (L, L)
        # A place of padding sees `<s>`, so that no row of a softmax is empty.
        masks = {
            window: ((distances <= window // 2) | (places == 0)) & tokens[:, None, :]  # (B, L, L)
            for window in sorted(set(self.encoder.windows))
        }
        first_only = self.pooler_type == "cls"
        last = len(self.encoder.layer) - 1
        for number, layer in enumerate(self.encoder.layer):
            mask = masks[self.encoder.windows[number]]
            hidden = _layer(layer, hidden, mask, tokens, first_only and number == last)
        if first_only:
            return hidden[:, 0]
        weights = attention_mask.to(hidden.dtype)[:, :, None]  # (B, L, 1)
        lengths = weights.sum(dim=1)  # (B, 1)
        total = (hidden * weights).sum(dim=1)
        if self.pooler_type == "avg_published":  # <s> counts twice, as `encode_tokens` has it
            return (total + hidden[:, 0]) / (lengths + 1)
        return total / lengths


def _embedded(
    embeddings: RecformerEmbeddings,
    input_ids: Tensor,
    token_type_ids: Tensor,
    item_position_ids: Tensor,
) -> Tensor:
    """(B, L, H) hidden states before the first layer."""
    places = torch.arange(input_ids.shape[1], device=input_ids.device)
    hidden = embeddings.word_embeddings(input_ids)
    hidden = hidden + embeddings.position_embeddings(places + embeddings.first_position)
    hidden = hidden + embeddings.token_type_embeddings(token_type_ids)
    hidden = hidden + embeddings.item_position_embeddings(item_position_ids)
    return embeddings.LayerNorm(hidden)


def _layer(
    layer: nn.Module, hidden: Tensor, mask: Tensor, tokens: Tensor, first_only: bool
) -> Tensor:
    """(B, L, H) -> (B, L, H), or (B, 1, H) of `<s>` if `first_only`."""
    assert isinstance(layer, RecformerLayer)
    attention = layer.attention
    context = _from_first(attention.self, hidden, tokens)  # (B, 1, H)
    if first_only:
        hidden = hidden[:, :1]
    else:
        local = _local(attention.self, hidden, mask)
        context = torch.cat([context, local[:, 1:]], dim=1)
    output = attention.output
    hidden = output.LayerNorm(output.dense(context) + hidden)
    inner = layer.intermediate.activation(layer.intermediate.dense(hidden))
    return layer.output.LayerNorm(layer.output.dense(inner) + hidden)


def _local(attention: RecformerSelfAttention, hidden: Tensor, mask: Tensor) -> Tensor:
    """(B, L, H): every token over its window and `<s>`; the row of `<s>` itself counts not."""
    query, key, value = attention.query(hidden), attention.key(hidden), attention.value(hidden)
    return _attend(query, key, value, mask[:, None], attention.num_heads)


def _from_first(attention: RecformerSelfAttention, hidden: Tensor, tokens: Tensor) -> Tensor:
    """(B, 1, H): `<s>` over all tokens (B, L) of its sequence, through its own projections."""
    query = attention.query_global(hidden[:, :1])
    key, value = attention.key_global(hidden), attention.value_global(hidden)
    return _attend(query, key, value, tokens[:, None, None], attention.num_heads)


def _attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, heads: int) -> Tensor:
    """Softmax attention of queries (B, Q, H) over keys (B, L, H), True in `mask` being seen."""

    def split(x: Tensor) -> Tensor:  # (B, A, ., D)
        return x.unflatten(-1, (heads, -1)).transpose(1, 2)

    context = F.scaled_dot_product_attention(split(query), split(key), split(value), attn_mask=mask)
    return context.transpose(1, 2).flatten(2)


class DenseItemEncoder(nn.Module):
    """Text vectors of single items of a `RecformerForCatalogue`, as of items that nobody bought.

    `CatalogueHead.text_vectors` behind the encoder: what the catalogue holds for an item without a
    learned offset. An input is one item; of a longer one than `max_token_num` the token bag is that
    of the tokens given.

    Args:
        model: encoder and head; weights are its own.
    """

    def __init__(self, model: RecformerForCatalogue) -> None:
        super().__init__()
        self.encoder = DenseEncoder(model.longformer)
        self.head = model.head
        self.eval()

    @property
    def max_length(self) -> int:
        """As of `DenseEncoder`."""
        return self.encoder.max_length

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        token_type_ids: Tensor,
        item_position_ids: Tensor,
    ) -> Tensor:
        """Vectors (B, D) of length 1; arguments as of `DenseEncoder.forward`."""
        head = self.head
        inputs = (input_ids, attention_mask, token_type_ids, item_position_ids)
        text = F.normalize(self.encoder(*inputs).float(), dim=-1)
        if head.options.whiten:
            text = F.normalize((text - head.mean) @ head.whitening, dim=-1)
        if not head.options.bag_size:
            return text
        counts = ((token_type_ids == VALUE) & attention_mask.bool()).to(text.dtype)  # (B, L)
        weights = counts * head.idf[input_ids]
        bag = (weights[:, None] @ F.embedding(input_ids, head.bag))[:, 0]  # (B, G)
        bag = F.normalize(bag, dim=-1) * head.bag_scale
        return F.normalize(torch.cat([text, bag], dim=-1), dim=-1)
