"""GPT-2 over semantic ids: the codes of a user's items as one sequence, the next item written on.

The model of the semantic-ID study: transformers' GPT-2, trained to predict every code of a sequence
from the codes before it, items one after the other.

Shapes: B users, n items, S tokens of the longest history, W beams, V tokens, P positions read,
L codes of an item, D hidden.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from numpy.typing import ArrayLike
from torch import Tensor
from torch.nn import functional as F
from transformers import GPT2Config, GPT2LMHeadModel

from baselines.generative.recommender import (
    NO_ITEM,
    START,
    CodeRecommender,
    Read,
    by_length,
    code_loss,
    join_heads,
    pad_items,
    split_heads,
    without_padding,
)
from baselines.settings import GenerativeSettings, Gpt2CodesSettings
from recformer.data.batches import LabelledBatch
from recformer.data.collators import TrainExample
from recformer.models.dropout import with_fast_dropout
from recformer.models.losses import mean_over_processes


class Gpt2CodesTrainCollator:
    """Training batches whose labels are the newest `max_items` + 1 items of each sequence, (B, n).

    Every item is to be predicted from those before it, so the last has a history of `max_items`, as
    in evaluation. NO_ITEM stands at the end of shorter sequences.
    """

    def __init__(self, max_items: int) -> None:
        self.max_items = max_items

    def __call__(self, examples: Sequence[TrainExample]) -> LabelledBatch:
        return LabelledBatch(pad_items([e.items for e in examples], self.max_items + 1))


@dataclass(frozen=True)
class Gpt2Read(Read):
    """State of GPT-2 after some tokens.

    Attributes:
        lengths: int64 (B, 1), position of the token to be read next.
    """

    lengths: Tensor


class Gpt2Codes(CodeRecommender):
    """GPT-2 over code tokens.

    Args:
        codes, codebook_size: as in `CodeRecommender`.
        settings: sizes of GPT-2, whose feed-forward layers are four times as wide as `hidden_size`,
            dropout, items of the longest history (`max_length`), and how items are generated.
    """

    def __init__(
        self,
        codes: ArrayLike,
        codebook_size: Sequence[int],
        settings: GenerativeSettings | None = None,
    ) -> None:
        settings = settings or Gpt2CodesSettings()
        super().__init__(codes, codebook_size, settings.num_beams, settings.exact_rank)
        self.gpt2 = GPT2LMHeadModel(
            GPT2Config(
                vocab_size=self.num_tokens,
                n_positions=1 + (settings.max_length + 1) * self.trie.num_levels,
                n_embd=settings.hidden_size,
                n_layer=settings.num_layers,
                n_head=settings.num_heads,
                resid_pdrop=settings.dropout,
                embd_pdrop=settings.dropout,
                attn_pdrop=settings.dropout,
                bos_token_id=START,
                eos_token_id=None,
            )
        )
        with_fast_dropout(self.gpt2)

    def input_ids(self, items: Tensor) -> Tensor:
        """START and the codes of padded items, int64 (B, n) -> (B, 1 + n * L)."""
        return F.pad(self.history_tokens(items), (1, 0), value=START)

    def training_loss(self, batch: LabelledBatch) -> dict[str, Tensor]:
        """Mean cross-entropy of all codes of all items, each after everything before it.

        With several processes `loss` is of the codes of all their batches; see `losses_of`.
        """
        losses = []
        for rows in by_length(batch.labels):
            tokens = self.input_ids(without_padding(batch.labels[rows]))  # (G, P)
            # Padding is at the end, where no code of an item can look: it needs no mask.
            hidden = self.gpt2.transformer(input_ids=tokens[:, :-1], use_cache=False)[0]
            real = tokens[:, 1:] != START
            losses.append(code_loss(self.gpt2.lm_head(hidden[real]), tokens[:, 1:][real]))
        codes = torch.cat(losses).view(-1, self.trie.num_levels)  # of every item
        found = self.losses_of(codes)
        return found | {"loss": mean_over_processes(found["loss"], codes.numel())}

    def start(self, history: Tensor) -> tuple[Tensor, Gpt2Read]:
        """Read each history once; logits of the first code, (B, 1, V)."""
        tokens = self.input_ids(history)  # (B, P)
        place = torch.arange(tokens.shape[1], device=tokens.device)  # (P,)
        causal = (place <= place[:, None]).expand(len(tokens), -1, -1)  # (B, P, P)
        hidden, keys, values = self._read(tokens, place, causal, None)
        items = (history != NO_ITEM).sum(1, keepdim=True)  # (B, 1)
        lengths = 1 + items * self.trie.num_levels
        newest = (lengths - 1)[..., None].expand(-1, -1, hidden.shape[2])
        logits = self.gpt2.lm_head(hidden.gather(1, newest))  # (B, 1, V)
        return logits, Gpt2Read(keys, values, (place < lengths)[:, None], lengths)

    def step(self, read: Read, parents: Tensor, tokens: Tensor) -> tuple[Tensor, Gpt2Read]:
        """One position of transformers' GPT-2 for every beam."""
        assert isinstance(read, Gpt2Read)
        visible = read.grown(parents)
        hidden, keys, values = self._read(tokens, read.lengths, visible, read)
        return self.gpt2.lm_head(hidden), Gpt2Read(keys, values, visible, read.lengths + 1)

    def _read(
        self, tokens: Tensor, positions: Tensor, visible: Tensor, before: Gpt2Read | None
    ) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """Hidden states (B, W, D) of tokens (B, W), and all keys and values with theirs."""
        heads, body = self.gpt2.config.n_head, self.gpt2.transformer
        hidden = body.wte(tokens) + body.wpe(positions)
        keys, values = [], []
        for index, block in enumerate(body.h):
            states = block.attn.c_attn(block.ln_1(hidden)).chunk(3, dim=2)
            query, key, value = (split_heads(part, heads) for part in states)
            if before is not None:
                key = torch.cat([before.keys[index], key], dim=2)
                value = torch.cat([before.values[index], value], dim=2)
            keys.append(key)
            values.append(value)
            context = F.scaled_dot_product_attention(query, key, value, visible[:, None])
            hidden = hidden + block.attn.c_proj(join_heads(context))
            hidden = hidden + block.mlp(block.ln_2(hidden))
        return body.ln_f(hidden), keys, values
