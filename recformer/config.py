"""Configuration of Recformer: Longformer's, plus the shape of an item sentence.

`PAPER` holds the values that the paper and every published script use; they differ from the class
defaults, which are those of the published class and stay as they are so that old code means what it
meant.
"""

from __future__ import annotations

from typing import Any

from transformers import LongformerConfig

from recformer.files import UserError
from recformer.paper import PAPER as PAPER  # where code asks for it

POOLER_TYPES = ("cls", "avg", "avg_published")


class RecformerConfig(LongformerConfig):
    """Longformer's configuration with the fields of the published `RecformerConfig`.

    Args:
        attention_window: tokens that a token sees around itself, half on either side; even. One
            number for every layer, or a list with one number a layer.
        token_type_size: rows of the token-type table: `<s>`, attribute name, attribute value, pad.
        max_token_num: tokens a sequence is cut to, `<s>` included.
        max_item_embeddings: rows of the item-position table: `<s>` and the newest
            `max_item_embeddings - 1` items of a sequence.
        max_attr_num: attributes an item is cut to.
        max_attr_length: tokens an attribute is cut to, its name and value together.
        pooler_type: "cls", the hidden state of `<s>`; "avg", the mean over a sequence's tokens; or
            "avg_published", that mean with `<s>` counted twice, as the published code has it, for
            checkpoints that were trained so.
        temp: temperature that cosine similarities are divided by.
        mlm_weight: weight of the masked-language-model loss of either side in pretraining.
        item_num: rows of the item table of `RecformerForSeqRec`; 0 means that there is none yet.
        finetune_negative_sample_size: negatives per example in finetuning; 0 or less means the
            softmax over all items.
        head: options of the head of `RecformerForCatalogue`; None: another model.
        kwargs: any field of `LongformerConfig`.

    Examples:
        >>> config = RecformerConfig(max_attr_num=3, max_attr_length=32, max_token_num=1024)
        >>> config.max_attr_num, config.attention_window, config.pooler_type
        (3, 64, 'cls')
    """

    model_type = "recformer"

    def __init__(
        self,
        attention_window: list[int] | int = 64,
        token_type_size: int = 4,
        max_token_num: int = 2048,
        max_item_embeddings: int = 32,
        max_attr_num: int = 12,
        max_attr_length: int = 8,
        pooler_type: str = "cls",
        temp: float = 0.05,
        mlm_weight: float = 0.1,
        item_num: int = 0,
        finetune_negative_sample_size: int = 0,
        head: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        # A Longformer's fields may come with its model_type, which this class must not take over.
        kwargs.pop("model_type", None)
        super().__init__(attention_window=attention_window, **kwargs)
        self.token_type_size = token_type_size
        self.max_token_num = max_token_num
        self.max_item_embeddings = max_item_embeddings
        self.max_attr_num = max_attr_num
        self.max_attr_length = max_attr_length
        self.pooler_type = pooler_type
        self.temp = temp
        self.mlm_weight = mlm_weight
        self.item_num = item_num
        self.finetune_negative_sample_size = finetune_negative_sample_size
        self.head = head

    @classmethod
    def get_config_dict(cls, *args: Any, **kwargs: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        """As in transformers, reading a Longformer's `config.json` as ours without a warning."""
        values, rest = super().get_config_dict(*args, **kwargs)
        if values.get("model_type") == LongformerConfig.model_type:
            values = {**values, "model_type": cls.model_type}
        return values, rest

    @property
    def layer_windows(self) -> list[int]:
        """The attention window of every layer, from `attention_window` as it stands now.

        Raises:
            UserError: a window that is not a positive even number, or a list of another length
                than the number of layers.
        """
        windows = self.attention_window
        if isinstance(windows, int):
            windows = [windows] * self.num_hidden_layers
        if len(windows) != self.num_hidden_layers:
            raise UserError(
                f"attention_window has {len(windows)} entries for {self.num_hidden_layers} layers; "
                "give one number, or one per layer"
            )
        for window in windows:
            if window <= 0 or window % 2:
                raise UserError(
                    f"attention_window must be positive and even, got {window}: "
                    "half of it lies on either side of a token"
                )
        return list(windows)

    def check(self) -> None:
        """Refuse values that no model can be built from.

        Called by the models and not by the constructor, because fields are set after it as well
        (`config.attention_window = [64] * 12`).

        Raises:
            UserError: names the field, what it holds and what it may hold.
        """
        _ = self.layer_windows
        if self.pooler_type not in POOLER_TYPES:
            raise UserError(
                f"pooler_type must be 'cls', 'avg' or 'avg_published', got {self.pooler_type!r}"
            )
        if self.hidden_size % self.num_attention_heads:
            raise UserError(
                f"hidden_size {self.hidden_size} is not a multiple of "
                f"num_attention_heads {self.num_attention_heads}"
            )
        for name in ("hidden_dropout_prob", "attention_probs_dropout_prob"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"{name} must be from 0 to below 1, got {getattr(self, name)}")
        if not self.temp > 0:
            raise UserError(f"temp must be above 0, got {self.temp}")
