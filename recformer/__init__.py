"""Recformer: sequential recommendation from language.

>>> from recformer import RecformerConfig, RecformerForSeqRec, RecformerModel, RecformerTokenizer

Folders written by `save_pretrained` also load through transformers' `AutoConfig` and `AutoModel`.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from transformers import AutoConfig, AutoModel

from recformer.config import PAPER, RecformerConfig
from recformer.models import RecformerForPretraining, RecformerForSeqRec, RecformerModel
from recformer.packing import PackedTokens

if TYPE_CHECKING:
    from recformer.tokenization import RecformerTokenizer
    from recformer.training.lit import LitWrapper

__version__ = "0.2.0"

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


# Loaded when asked for: what needs Lightning, which `import recformer` must not, and a module that
# is also a command, which Python would warn about.
_LAZY = {
    "LitWrapper": "recformer.training.lit",
    "RecformerTokenizer": "recformer.tokenization",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
