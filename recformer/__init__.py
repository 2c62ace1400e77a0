"""Recformer: sequential recommendation from language.

>>> from recformer import RecformerConfig, RecformerForSeqRec, RecformerModel, RecformerTokenizer

Folders written by `save_pretrained` also load through transformers' `AutoConfig` and `AutoModel`.
"""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from recformer.config import PAPER, RecformerConfig
    from recformer.models import RecformerForPretraining, RecformerForSeqRec, RecformerModel
    from recformer.packing import PackedTokens
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

_MODULES = {
    "LitWrapper": "recformer.training.lit",
    "PAPER": "recformer.config",
    "PackedTokens": "recformer.packing",
    "RecformerConfig": "recformer.config",
    "RecformerForPretraining": "recformer.models",
    "RecformerForSeqRec": "recformer.models",
    "RecformerModel": "recformer.models",
    "RecformerTokenizer": "recformer.tokenization",
}


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(import_module(_MODULES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def _is_program() -> bool:
    """Whether this is the command `recformer`, or `python -m recformer…` or `baselines…`."""
    name = Path(sys.argv[0]).name if sys.argv else ""
    if name != "-m":  # which it is while the packages around a module are imported
        return name in ("recformer", "recformer.exe")
    line = iter(sys.orig_argv[1:])
    asked = next((each for each in line if each.startswith("-m")), "-m")
    module = asked[2:] or next(line, "")
    return module.partition(".")[0] in ("recformer", "baselines")


# `import recformer` in a user's program makes `AutoConfig` and `AutoModel` know our folders, which
# takes seconds: torch and transformers. The command `recformer` ("-m": `python -m recformer…`)
# imports them where its work needs them.
if not _is_program():
    import_module("recformer.models")
