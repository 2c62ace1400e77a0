"""Recformer: sequential recommendation from language.

>>> from recformer import RecformerConfig, RecformerForSeqRec, RecformerModel, RecformerTokenizer

Folders written by `save_pretrained` also load through transformers' `AutoConfig` and `AutoModel`.
"""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig, AutoModel

from recformer.config import PAPER, RecformerConfig
from recformer.models import RecformerForPretraining, RecformerForSeqRec, RecformerModel
from recformer.packing import PackedTokens
from recformer.tokenization import RecformerTokenizer

__all__ = [
    "PAPER",
    "LitWrapper",
    "PackedTokens",
    "RecformerConfig",
    "RecformerForPretraining",
    "RecformerForSeqRec",
    "RecformerModel",
    "RecformerTokenizer",
]

AutoConfig.register(RecformerConfig.model_type, RecformerConfig, exist_ok=True)
AutoModel.register(RecformerConfig, RecformerModel, exist_ok=True)


def __getattr__(name: str) -> Any:
    # The one class that needs Lightning, which `import recformer` must not.
    if name == "LitWrapper":
        from recformer.training.lit import LitWrapper

        return LitWrapper
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
