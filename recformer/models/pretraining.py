"""Pretraining: contrastive loss between sequences and their next items, plus MLM (paper 2.3).

Side a holds sequences of items, side b the item that follows each of them.

Shapes: B pairs, L padded length, T packed tokens, M masked tokens, V vocabulary, H hidden.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from transformers.utils import ModelOutput

from recformer.config import RecformerConfig
from recformer.files import UserError
from recformer.losses import cosine_scores
from recformer.models.encoder import RecformerModel, RecformerPreTrainedModel
from recformer.packing import PackedTokens

IGNORED = -100  # label of a token that is not predicted


class RecformerLMHead(nn.Module):
    """Scores of every vocabulary entry at a token, as RoBERTa's head."""

    def __init__(self, config: RecformerConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        # published: the decoder has a weight of its own, not the word embeddings.
        self.decoder = nn.Linear(config.hidden_size, config.vocab_size)
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))
        self.decoder.bias = self.bias

    def forward(self, hidden: Tensor) -> Tensor:
        """(M, H) -> (M, V)."""
        return self.decoder(self.layer_norm(F.gelu(self.dense(hidden))))

    def _tie_weights(self) -> None:
        """Called by transformers 4 after loading, which may have put two tensors in their place."""
        self.decoder.bias = self.bias


@dataclass
class RecformerPretrainingOutput(ModelOutput):
    """What `RecformerForPretraining` returns.

    Attributes:
        loss: scalar, contrastive + mlm_weight * (MLM of a + MLM of b).
        logits: (B, B) float32 cosine similarity / temp of every a with every b.
        cl_correct_num: int64, rows whose best b is their own.
        cl_total_num: B.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    cl_correct_num: Tensor | None = None
    cl_total_num: int | None = None


class RecformerForPretraining(RecformerPreTrainedModel):
    """The encoder with the language-model head."""

    # transformers 5 wants to know which key is a copy of which, transformers 4 which are copies.
    _tied_weights_keys = (
        {"lm_head.decoder.bias": "lm_head.bias"}
        if int(transformers.__version__.split(".")[0]) >= 5
        else ["lm_head.decoder.bias"]
    )

    def __init__(self, config: RecformerConfig) -> None:
        super().__init__(config)
        self.longformer = RecformerModel(config)
        self.lm_head = RecformerLMHead(config)
        self.post_init()

    def get_output_embeddings(self) -> None:
        """None, so that transformers ties nothing to the word embeddings."""
        return

    def get_expanded_tied_weights_keys(self, all_submodels: bool = False) -> dict[str, str]:
        """Both names of the bias, whatever `config.tie_word_embeddings` says (transformers 5)."""
        return {"lm_head.decoder.bias": "lm_head.bias"}

    def forward_packed(
        self,
        a: PackedTokens,
        b: PackedTokens,
        mlm_a: tuple[Tensor, Tensor] | None = None,
        mlm_b: tuple[Tensor, Tensor] | None = None,
    ) -> RecformerPretrainingOutput:
        """Losses of a packed batch of pairs; both sides go through the encoder in one pass.

        Args:
            a, b: B sequences each.
            mlm_a, mlm_b: masked ids and true ids (-100 where nothing is predicted) of that side's
                tokens, (T,) int64 each; None: no MLM loss of that side.

        Raises:
            UserError: sides of different sizes, or as `RecformerModel.encode`.
        """
        if a.batch_size != b.batch_size:
            raise UserError(
                f"side a has {a.batch_size} sequences and side b {b.batch_size}: they are pairs"
            )
        vectors_a, vectors_b = self.longformer.encode(PackedTokens.cat([a, b])).chunk(2)
        logits = cosine_scores(vectors_a, vectors_b, self.config.temp)
        labels = torch.arange(a.batch_size, device=logits.device)
        loss = F.cross_entropy(logits, labels)
        masked = [
            (replace(side, input_ids=mlm[0]), mlm[1])
            for side, mlm in ((a, mlm_a), (b, mlm_b))
            if mlm is not None
        ]
        if masked:
            loss = loss + self.config.mlm_weight * self._mlm_loss(masked)
        return RecformerPretrainingOutput(
            loss=loss,
            logits=logits,
            cl_correct_num=(logits.argmax(dim=1) == labels).sum(),
            cl_total_num=a.batch_size,
        )

    def _mlm_loss(self, sides: list[tuple[PackedTokens, Tensor]]) -> Tensor:
        """Sum over the sides of the mean cross-entropy at their masked tokens.

        A side without a masked token adds zero, with zero gradients.
        """
        hidden, _ = self.longformer.encode_tokens(PackedTokens.cat([side for side, _ in sides]))
        labels = torch.cat([label for _, label in sides])
        places = (labels != IGNORED).nonzero()[:, 0]
        scores = self.lm_head(hidden.index_select(0, places)).float()  # (M, V)
        losses = F.cross_entropy(scores, labels.index_select(0, places), reduction="none")
        counts = [int((label != IGNORED).sum()) for _, label in sides]
        means = [part.sum() / max(part.numel(), 1) for part in losses.split(counts)]
        return torch.stack(means).sum()

    def forward(
        self,
        input_ids_a: Tensor | None = None,
        attention_mask_a: Tensor | None = None,
        global_attention_mask_a: Tensor | None = None,
        token_type_ids_a: Tensor | None = None,
        item_position_ids_a: Tensor | None = None,
        mlm_input_ids_a: Tensor | None = None,
        mlm_labels_a: Tensor | None = None,
        input_ids_b: Tensor | None = None,
        attention_mask_b: Tensor | None = None,
        global_attention_mask_b: Tensor | None = None,
        token_type_ids_b: Tensor | None = None,
        item_position_ids_b: Tensor | None = None,
        mlm_input_ids_b: Tensor | None = None,
        mlm_labels_b: Tensor | None = None,
        head_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> RecformerPretrainingOutput | tuple:
        """The published forward pass over right-padded sides a and b.

        Args:
            input_ids_*, attention_mask_*, global_attention_mask_*, token_type_ids_*,
                item_position_ids_*: (B, L), as `RecformerModel.forward`.
            mlm_input_ids_*: (B, L) masked ids; without them that side has no MLM loss.
            mlm_labels_*: (B, L) true ids, -100 where nothing is predicted.
            return_dict: False returns the tuple of the output's fields.
            head_mask, position_ids, output_attentions, output_hidden_states: refused.

        Raises:
            ValueError: as `RecformerModel.forward`, sides of different batch sizes, or masked ids
                without labels or the reverse.
        """
        refused = {
            "head_mask": head_mask,
            "position_ids": position_ids,
            "output_attentions": output_attentions,
            "output_hidden_states": output_hidden_states,
        }
        for name, value in refused.items():
            if value is not None and value is not False:
                raise UserError(f"{name} is not supported")
        a, mlm_a = self._pack_side(
            "a",
            input_ids_a,
            attention_mask_a,
            global_attention_mask_a,
            token_type_ids_a,
            item_position_ids_a,
            mlm_input_ids_a,
            mlm_labels_a,
        )
        b, mlm_b = self._pack_side(
            "b",
            input_ids_b,
            attention_mask_b,
            global_attention_mask_b,
            token_type_ids_b,
            item_position_ids_b,
            mlm_input_ids_b,
            mlm_labels_b,
        )
        output = self.forward_packed(a, b, mlm_a, mlm_b)
        return output.to_tuple() if return_dict is False else output

    def _pack_side(
        self,
        side: str,
        input_ids: Tensor | None,
        attention_mask: Tensor | None,
        global_attention_mask: Tensor | None,
        token_type_ids: Tensor | None,
        item_position_ids: Tensor | None,
        mlm_input_ids: Tensor | None,
        mlm_labels: Tensor | None,
    ) -> tuple[PackedTokens, tuple[Tensor, Tensor] | None]:
        """One side's padded inputs as a packed batch, with its masked and true ids, (T,) each."""
        if input_ids is None or item_position_ids is None:
            missing = "input_ids" if input_ids is None else "item_position_ids"
            raise UserError(f"{missing}_{side} is required, of shape (batch, length)")
        if (mlm_input_ids is None) != (mlm_labels is None):
            raise UserError(f"mlm_input_ids_{side} and mlm_labels_{side} go together, got one")
        if attention_mask is None:
            attention_mask = input_ids != self.config.pad_token_id
        packed = self.longformer.pack(
            input_ids,
            attention_mask,
            global_attention_mask,
            token_type_ids,
            item_position_ids=item_position_ids,
        )
        if mlm_input_ids is None or mlm_labels is None:
            return packed, None
        mask = attention_mask.bool()
        return packed, (mlm_input_ids[mask], mlm_labels[mask])
