"""Names of tensors: prefixes, renames, and keys that no model takes."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping

from torch import Tensor

from recformer.files import UserError

POSITIONS = "embeddings.position_embeddings.weight"

TOKEN_TYPES = "embeddings.token_type_embeddings.weight"

ITEM_POSITIONS = "embeddings.item_position_embeddings.weight"

StateDict = dict[str, Tensor]

PathLike = str | os.PathLike

# Prefixes that wrappers and model classes put before the plain names, taken off repeatedly.
# `_forward_module.model.longformer.…` is what a Lightning/DeepSpeed export holds.
PREFIXES = ("_forward_module.", "_orig_mod.", "module.", "model.", "longformer.")

# Old BERT files call a LayerNorm's weight and bias by their names in the paper.
RENAMES = ((".LayerNorm.gamma", ".LayerNorm.weight"), (".LayerNorm.beta", ".LayerNorm.bias"))

# Keys that a Recformer has no place for by design, and why.
KNOWN_LEFT_OVERS = (
    (r"embeddings\.position_ids", "a buffer, not a weight"),
    (r"embeddings\.token_type_ids", "a buffer, not a weight"),
    (r"pooler\..*", "Recformer pools without weights"),
    (r"cls\.seq_relationship\..*", "Recformer predicts no next sentence"),
    (r"(classifier|qa_outputs|score)\..*", "the head of another task"),
    (r"(lm_head|cls\.predictions)\..*", "the model has no masked-language-model head"),
    (r"item_embedding\..*", "the model has no item table"),
)

# An item table belongs to a catalogue: a checkpoint need not have one.
ITEM_TABLE = "item_embedding.weight"

# What a file looks like, by a name that one of its keys contains; the first that fits.
LOOKS_LIKE = (
    (r"embeddings\.item_position_embeddings\.", "a Recformer"),
    (r"self\.query_global\.", "a Longformer language model"),
    (r"transformer_blocks\.\d+\.multihead_attention\.", "a SASRec or gSASRec model"),
    (r"transformer\.layer\.\d+\.attention\.q_lin\.", "a DistilBERT"),
    (r"relative_attention_bias", "a T5 or MPNet"),
    (r"rel_embeddings\.", "a DeBERTa"),
    (r"albert_layer_groups\.", "an ALBERT"),
    (r"generator_predictions\.|discriminator_predictions\.|embeddings_project\.", "an ELECTRA"),
    (r"\.attn\.c_attn\.", "a GPT-2"),
    (r"self\.distance_embedding\.", "a BERT with relative positions"),
    (r"^(roberta\.)", "a RoBERTa language model"),
    (r"^(bert\.)", "a BERT language model"),
    (r"encoder\.layer\.0\.attention\.self\.query\.", "a BERT or RoBERTa language model"),
)

BACKBONE_KINDS = (
    "a Longformer language model",
    "a RoBERTa language model",
    "a BERT language model",
    "a BERT or RoBERTa language model",
)

WORDS = "embeddings.word_embeddings.weight"

# One vector under two names; a file in which every tensor stands once has either.
HEAD_BIASES = ("lm_head.bias", "lm_head.decoder.bias")

UNKNOWN_NAME = "nothing in the model has this name"


def compact(keys: Iterable[str]) -> str:
    """Key names with layer numbers as `*` and weight beside bias, each once."""
    stems: dict[str, list[str]] = {}
    for key in keys:
        stem, _, kind = re.sub(r"\.layer\.\d+\.", ".layer.*.", key).rpartition(".")
        kinds = stems.setdefault(stem, [])
        if kind not in kinds:
            kinds.append(kind)
    names = []
    for stem, kinds in stems.items():
        last = kinds[0] if len(kinds) == 1 else "{" + ",".join(kinds) + "}"
        names.append(f"{stem}.{last}" if stem else last)
    return ", ".join(names)


def describe_state_dict(state: Mapping[str, Tensor]) -> str:
    """The kind of model that these weights look like, in a few words."""
    for pattern, kind in LOOKS_LIKE:
        if any(re.search(pattern, _strip_wrappers(key)) for key in state):
            return kind
    return f"an unknown model (its first keys are {few(list(state))})"


def few(names: list[str], most: int = 4) -> str:
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + rest


def first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def _strip_wrappers(key: str) -> str:
    """`key` without what wrappers put before it, and with today's names."""
    stripped = True
    while stripped:
        stripped = False
        for prefix in PREFIXES[:-1]:
            if key.startswith(prefix):
                key, stripped = key[len(prefix) :], True
    for old, new in RENAMES:
        if key.endswith(old):
            key = key[: -len(old)] + new
    return key


def plain_name(key: str) -> str:
    """The plain name of a Recformer's or Longformer's key."""
    return _strip_wrappers(key).removeprefix(PREFIXES[-1])


def plain_names(keys: Iterable[str], prefix: str, source: str) -> dict[str, str]:
    """Plain name to the file's own key, for a family whose classes use `prefix`."""
    names: dict[str, str] = {}
    for key in keys:
        plain = _strip_wrappers(key).removeprefix(prefix)
        if plain in names:
            raise UserError(
                f"{source}: {names[plain]} and {key} are the same tensor by name; "
                "it seems to hold several models, give a file with one"
            )
        names[plain] = key
    return names


def why_left_over(plain: str) -> str:
    for pattern, reason in KNOWN_LEFT_OVERS:
        if re.fullmatch(pattern, plain):
            return reason
    return UNKNOWN_NAME
