"""Recommendation by cosine similarity between a sequence and item vectors (paper section 2.4).

Shapes: B users, L padded length, N items, K candidates, H hidden.
"""

from __future__ import annotations

import os
from typing import Any

from torch import Tensor, nn

from recformer.config import RecformerConfig
from recformer.data.batches import TrainBatch
from recformer.evaluation.recommender import VectorRecommender
from recformer.files import UserError
from recformer.models.encoder import RecformerModel, RecformerPreTrainedModel
from recformer.models.losses import cosine_scores, full_softmax_loss, sampled_softmax_loss
from recformer.packing import PackedTokens

ITEM_TABLE_KEY = "item_embedding.weight"


class RecformerForSeqRec(RecformerPreTrainedModel, VectorRecommender[PackedTokens]):
    """Recformer as a recommender: the encoder and a table of item vectors, `item_embedding`.

    The score of an item is its cosine similarity to the vector of the history (paper, section 2.4).

    There is no table until `init_item_embedding` makes one, or a file with one is loaded.

    Args:
        config: configuration; `item_num`, `temp` and `finetune_negative_sample_size` count here.
        with_item_embedding: make the table of `config.item_num` vectors at once.
    """

    def __init__(self, config: RecformerConfig, with_item_embedding: bool = False) -> None:
        super().__init__(config)
        self.longformer = RecformerModel(config)
        self.item_embedding: nn.Embedding | None = None
        if with_item_embedding and config.item_num > 0:
            self._set_item_embedding(nn.Embedding(config.item_num, config.hidden_size))
        self.post_init()

    @classmethod
    def from_pretrained(cls, path: str | os.PathLike | None, *args: Any, **kwargs: Any) -> Any:
        """As in transformers; a folder whose config has an `item_num` holds item vectors."""
        if path is not None and getattr(cls.config_class.from_pretrained(path), "head", None):
            raise UserError(
                f"{path} was finetuned with --method head: load it as RecformerForCatalogue"
            )
        kwargs.setdefault("with_item_embedding", True)
        loaded = super().from_pretrained(path, *args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded  # with `output_loading_info`
        if model.item_embedding is not None:  # transformers 5 makes every parameter trainable
            model.item_embedding.weight.requires_grad_(False)
        return loaded

    def init_item_embedding(self, embeddings: Tensor | None = None) -> None:
        """Make the item table, of `config.item_num` random vectors that are trained, or of vectors.

        Args:
            embeddings: (N, H) vectors by item id; kept fixed, as published. `config.item_num`
                becomes N.

        Raises:
            UserError: another hidden size than the model's, or neither vectors nor `item_num`.
        """
        reference = self.longformer.embeddings.word_embeddings.weight
        size = self.config.hidden_size
        if embeddings is None:
            if self.config.item_num < 1:
                raise UserError("set config.item_num to the number of items, or give their vectors")
            table = nn.Embedding(self.config.item_num, size, device=reference.device)
            nn.init.normal_(table.weight, std=self.config.initializer_range)
            self.item_embedding = table.to(reference.dtype)
            return
        if embeddings.dim() != 2 or embeddings.shape[1] != size:
            raise UserError(
                f"item vectors have shape {tuple(embeddings.shape)}, expected (items, {size})"
            )
        self._set_item_embedding(nn.Embedding.from_pretrained(embeddings.detach()))

    def _set_item_embedding(self, table: nn.Embedding) -> None:
        table.weight.requires_grad_(False)
        self.item_embedding = table
        self.config.item_num = table.num_embeddings

    def encode(self, packed: PackedTokens) -> Tensor:
        """Vectors (B, H) of the sequences, or items, of a packed batch."""
        return self.longformer.encode(packed)

    def similarity_score(self, pooler_output: Tensor, candidates: Tensor | None = None) -> Tensor:
        """Cosine similarity divided by `config.temp`, in float32.

        Args:
            pooler_output: (B, H) vectors of sequences.
            candidates: (B, K) item ids; None: every item.

        Returns:
            (B, N), or (B, K).
        """
        table = self.item_vectors()
        if candidates is None:
            return cosine_scores(pooler_output, table, self.config.temp)
        vectors = nn.functional.embedding(candidates, table).float()  # (B, K, H)
        users = pooler_output.float()[:, None]
        return nn.functional.cosine_similarity(users, vectors, dim=-1) / self.config.temp

    def loss(self, pooler_output: Tensor, labels: Tensor) -> Tensor:
        """Softmax loss over all items, or over `config.finetune_negative_sample_size` negatives.

        Args:
            pooler_output: (B, H) vectors of sequences.
            labels: (B,) or (B, 1) item ids.
        """
        labels = labels.reshape(-1)
        table, negatives = self.item_vectors(), self.config.finetune_negative_sample_size
        if negatives <= 0:
            return full_softmax_loss(pooler_output, table, labels, self.config.temp)
        return sampled_softmax_loss(pooler_output, table, labels, negatives, self.config.temp)

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
        candidates: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> Tensor:
        """Scores, or the loss where there are labels.

        Args:
            input_ids … output_hidden_states: as `RecformerModel.forward`.
            return_dict: without effect, as published: the result is one tensor.
            candidates: (B, K) item ids to score; None: every item. Not read where there are labels.
            labels: (B,) or (B, 1) item ids of the targets.

        Returns:
            Scores (B, N) or (B, K), or the loss, a scalar; float32.
        """
        packed = self.longformer.pack(
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
        pooled = self.encode(packed)
        if labels is None:
            return self.similarity_score(pooled, candidates)
        return self.loss(pooled, labels)

    def training_loss(self, batch: TrainBatch[PackedTokens]) -> Tensor:
        """Loss of a batch of `RecformerTrainCollator`."""
        return self.loss(self.encode(batch.history), batch.labels)

    def user_vectors(self, history: PackedTokens) -> Tensor:
        """Vectors (B, H) of histories."""
        return self.encode(history)

    def item_vectors(self) -> Tensor:
        """The item table (N, H).

        Raises:
            UserError: there is none yet.
        """
        if self.item_embedding is None:
            raise UserError("there are no item vectors yet: call init_item_embedding first")
        return self.item_embedding.weight

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # A finetuned file brings its item vectors along, however many: the table is made for them.
        vectors = state_dict.get(prefix + ITEM_TABLE_KEY)
        if vectors is not None:
            table = self.item_embedding
            if table is None or table.weight.shape != vectors.shape:
                device = self.longformer.embeddings.word_embeddings.weight.device
                rows, size = vectors.shape
                self._set_item_embedding(
                    nn.Embedding(rows, size, device=device, dtype=vectors.dtype)
                )
        super()._load_from_state_dict(state_dict, prefix, *args)
