"""Flags shared by the entry points, as `HfArgumentParser` dataclasses.

Published names are kept. A field's `help` is its documentation; defaults stand here once.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

from recformer.config import PAPER, RecformerConfig
from recformer.files import UserError

# A sequence holds <s> and an item, hence 2.
LEAST = {"max_token_num": 2, "max_item_embeddings": 2, "max_attr_num": 1, "max_attr_length": 1}


def flag(default: Any, text: str, **metadata: Any) -> Any:
    """A dataclass field with a help text; a list as default is copied."""
    metadata["help"] = text
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass
class ModelArguments:
    """The shape of an item sequence and of the encoder; unset, a checkpoint folder's own values
    stand, else the paper's."""

    max_token_num: int | None = flag(
        None, f"tokens a sequence is cut to, <s> included (paper: {PAPER['max_token_num']})"
    )
    max_item_embeddings: int | None = flag(
        None, f"newest items read of a sequence, plus 1 (paper: {PAPER['max_item_embeddings']})"
    )
    max_attr_num: int | None = flag(
        None, f"attributes read of an item (paper: {PAPER['max_attr_num']})"
    )
    max_attr_length: int | None = flag(
        None, f"tokens an attribute is cut to, with its name (paper: {PAPER['max_attr_length']})"
    )
    attention_window: int | None = flag(
        None,
        f"tokens seen around a token, half on either side (paper: {PAPER['attention_window']})",
    )
    pooler_type: str | None = flag(
        None,
        f"cls: hidden state of <s>; avg: mean over tokens (paper: {PAPER['pooler_type']}; sentence "
        "encoders such as all-MiniLM-L6-v2 want avg)",
        choices=["cls", "avg"],
    )
    temp: float | None = flag(
        None, f"temperature that cosine similarities are divided by (paper: {PAPER['temp']})"
    )
    config_overrides: str | None = flag(
        None,
        "other fields of the configuration, e.g. hidden_size=128,num_hidden_layers=2 (sizes only "
        "with --from_scratch)",
    )

    def overrides(self) -> dict[str, Any]:
        """The configuration fields that were set by flags.

        Raises:
            UserError: `config_overrides` is not a list of NAME=VALUE, names no field, or has a
                value of another type than the field.
        """
        names = [field.name for field in fields(ModelArguments) if field.name != "config_overrides"]
        chosen = {name: getattr(self, name) for name in names}
        chosen = {name: value for name, value in chosen.items() if value is not None}
        for name, least in LEAST.items():
            if chosen.get(name, least) < least:
                raise UserError(f"--{name} {chosen[name]}: must be at least {least}")
        defaults = RecformerConfig()
        for part in (self.config_overrides or "").split(",") if self.config_overrides else []:
            name, _, text = part.partition("=")
            name = name.strip()
            if not text or not hasattr(defaults, name):
                raise UserError(
                    f"--config_overrides: {part!r} is not NAME=VALUE of a field of RecformerConfig"
                )
            chosen[name] = _like(getattr(defaults, name), name, text.strip())
        return chosen


def _like(example: Any, name: str, text: str) -> Any:
    """`text` as a value of the type of `example`."""
    try:
        if isinstance(example, bool):
            return {"true": True, "false": False}[text.lower()]
        return type(example)(text) if isinstance(example, (int, float)) else text
    except (KeyError, ValueError):
        kind = type(example).__name__
        raise UserError(f"--config_overrides: {name}={text} is not of type {kind}") from None
