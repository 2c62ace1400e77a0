"""TIGER: an encoder reads the codes of the history, a decoder writes those of the next item.

"Recommender Systems with Generative Retrieval", Rajput et al., 2023 (arXiv 2305.05065). Encoder
and decoder are transformers' T5; sizes are the paper's by default (section 4).

Deviations, for the sake of one pipe for all models, unless settings ask for the published way: no
token of the user stands before the history, so that users may be new (`user_tokens`); and an epoch
draws one target from each training sequence, as for the other models here (`targets`).

Shapes: B users, S tokens of the longest history, W beams, V tokens, L codes of an item, D hidden.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from numpy.typing import ArrayLike
from torch import Tensor
from torch.nn import functional as F
from transformers import T5Config, T5ForConditionalGeneration

from baselines.generative.recommender import (
    FIRST_USER,
    NO_ITEM,
    START,
    CodeRecommender,
    Read,
    by_length,
    code_loss,
    join_heads,
    pad_items,
    split_heads,
    with_users,
    without_padding,
)
from baselines.settings import TigerSettings
from recformer.data.batches import TrainBatch
from recformer.data.collators import TrainExample, target_position
from recformer.models.dropout import with_fast_dropout


class TigerTrainCollator:
    """Training batches: the history before a random position, and the item at it as the label.

    Args:
        max_items: newest items of a history.
        last: the position is the last one, not a random one.
        user_tokens: see `with_users`.
    """

    def __init__(self, max_items: int, last: bool = False, user_tokens: int = 0) -> None:
        self.max_items = max_items
        self.last = last
        self.user_tokens = user_tokens

    def __call__(self, examples: Sequence[TrainExample]) -> TrainBatch[Tensor]:
        if self.last:
            positions = [len(e.items) - 1 for e in examples]
        else:
            positions = [target_position(len(e.items), e.seed) for e in examples]
        histories = [e.items[:p] for e, p in zip(examples, positions, strict=True)]
        labels = [int(e.items[p]) for e, p in zip(examples, positions, strict=True)]
        users = [e.user_id for e in examples]
        history = with_users(pad_items(histories, self.max_items), users, self.user_tokens)
        return TrainBatch(torch.tensor(labels), history)


@dataclass(frozen=True)
class TigerRead(Read):
    """State of TIGER's decoder; `keys` and `values` are those of the codes written.

    Attributes:
        history_keys, history_values: of each layer, (B, heads, S, head size).
        history_mask: bool (B, 1, 1, S), True at tokens of items.
        levels: int64 (P,), place of each position in its sequence: 0 START, 1 the first code, …
    """

    history_keys: list[Tensor]
    history_values: list[Tensor]
    history_mask: Tensor
    levels: Tensor


class Tiger(CodeRecommender):
    """T5 over code tokens, and users' tokens behind them, if any.

    Args:
        codes, codebook_size: as in `CodeRecommender`.
        settings: sizes of encoder and decoder alike, dropout, and how items are generated.
    """

    def __init__(
        self,
        codes: ArrayLike,
        codebook_size: Sequence[int],
        settings: TigerSettings | None = None,
    ) -> None:
        settings = settings or TigerSettings()
        super().__init__(codes, codebook_size, settings.num_beams, settings.exact_rank)
        self.user_tokens = settings.user_tokens
        self.t5 = T5ForConditionalGeneration(
            T5Config(
                vocab_size=self.num_tokens + settings.user_tokens,
                d_model=settings.hidden_size,
                d_kv=settings.head_size,
                d_ff=settings.feed_forward_size,
                num_layers=settings.num_layers,
                num_heads=settings.num_heads,
                dropout_rate=settings.dropout,
                pad_token_id=START,
                decoder_start_token_id=START,
                eos_token_id=None,
            )
        )
        with_fast_dropout(self.t5)

    def encoder_inputs(self, history: Tensor) -> dict[str, Tensor]:
        """Tokens of histories (B, n), and 0 where they are none: two (B, S)."""
        users = history[:, : bool(self.user_tokens)]  # (B, 1), or none
        items = history[:, users.shape[1] :]
        tokens = self.num_tokens + FIRST_USER - users
        real = (items != NO_ITEM).repeat_interleave(self.trie.num_levels, dim=1)
        return {
            "input_ids": torch.cat([tokens, self.history_tokens(items)], dim=1),
            "attention_mask": F.pad(real.long(), (users.shape[1], 0), value=1),
        }

    def training_loss(self, batch: TrainBatch[Tensor]) -> dict[str, Tensor]:
        """Mean cross-entropy of the target's codes, each after the ones before; see `losses_of`."""
        losses = []
        for rows in by_length(batch.history):
            tokens = self.item_tokens[batch.labels[rows]]  # (G, L)
            inputs = self.encoder_inputs(without_padding(batch.history[rows]))
            written = F.pad(tokens[:, :-1], (1, 0), value=START)
            logits = self.t5(**inputs, decoder_input_ids=written, use_cache=False).logits
            losses.append(code_loss(logits.flatten(0, 1), tokens.flatten()))
        return self.losses_of(torch.cat(losses).view(-1, self.trie.num_levels))

    def start(self, history: Tensor) -> tuple[Tensor, TigerRead]:
        """Encode each user once; logits of the first code, (B, 1, V)."""
        inputs = self.encoder_inputs(history)
        encoded = self.t5.encoder(**inputs).last_hidden_state  # (B, S, D)
        heads, num_users = self.t5.config.num_heads, len(encoded)
        cross = [block.layer[1].EncDecAttention for block in self.t5.decoder.block]
        empty = encoded.new_zeros(num_users, heads, 0, self.t5.config.d_kv)
        nothing = TigerRead(
            keys=[empty] * len(cross),
            values=[empty] * len(cross),
            visible=torch.ones(num_users, 1, 0, dtype=torch.bool, device=encoded.device),
            history_keys=[split_heads(attention.k(encoded), heads) for attention in cross],
            history_values=[split_heads(attention.v(encoded), heads) for attention in cross],
            history_mask=inputs["attention_mask"].bool()[:, None, None],
            levels=torch.empty(0, dtype=torch.int64, device=encoded.device),
        )
        first = torch.full((num_users, 1), START, device=encoded.device)
        return self.step(nothing, torch.zeros_like(first), first)

    def step(self, read: Read, parents: Tensor, tokens: Tensor) -> tuple[Tensor, TigerRead]:
        """One position of transformers' T5 decoder for every beam."""
        assert isinstance(read, TigerRead)
        decoder, heads = self.t5.decoder, self.t5.config.num_heads
        level = int(read.levels[-1]) + 1 if len(read.levels) else 0
        levels = torch.cat([read.levels, read.levels.new_full((tokens.shape[1],), level)])  # (P,)
        visible = read.grown(parents)  # (B, W, P)
        # T5's bias depends on distances in the sequence, here between levels of the tree.
        bias = decoder.block[0].layer[0].SelfAttention.compute_bias(level + 1, level + 1)
        bias = bias[:, :, -1:, levels].masked_fill(
            ~visible[:, None], -torch.inf
        )  # (B, heads, W, P)
        hidden = decoder.embed_tokens(tokens)  # (B, W, D)
        keys, values = [], []
        for index, block in enumerate(decoder.block):
            attention = block.layer[0].SelfAttention
            states = block.layer[0].layer_norm(hidden)
            keys.append(torch.cat([read.keys[index], split_heads(attention.k(states), heads)], 2))
            values.append(
                torch.cat([read.values[index], split_heads(attention.v(states), heads)], 2)
            )
            queries = split_heads(attention.q(states), heads)  # published: scores are not scaled
            context = F.scaled_dot_product_attention(queries, keys[-1], values[-1], bias, scale=1.0)
            hidden = hidden + attention.o(join_heads(context))

            attention = block.layer[1].EncDecAttention
            queries = split_heads(attention.q(block.layer[1].layer_norm(hidden)), heads)
            context = F.scaled_dot_product_attention(
                queries,
                read.history_keys[index],
                read.history_values[index],
                read.history_mask,
                scale=1.0,
            )
            hidden = hidden + attention.o(join_heads(context))
            hidden = block.layer[2](hidden)
        # published: the output layer is the token table, and its input is scaled
        hidden = decoder.final_layer_norm(hidden) * self.t5.config.d_model**-0.5
        grown = replace(read, keys=keys, values=values, visible=visible, levels=levels)
        return self.t5.lm_head(hidden), grown
