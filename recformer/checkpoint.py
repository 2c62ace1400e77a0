"""Weights from files: released checkpoints, our own, and language models as the backbone.

Three steps, each usable by itself:

- `read_state_dict` reads the tensors of a file or a `from_pretrained` folder.
- `load_checkpoint` puts a Recformer checkpoint into a model, every key accounted for.
- `from_backbone` turns a Longformer, RoBERTa, BERT or Recformer folder into a `RecformerConfig` and
  a state dict with Recformer's keys; `load_backbone` builds the model too.

Nothing is loaded halfway: names and shapes are checked before the first value of a model changes.
What differs between families stands in the tables below. Key names inside this file are *plain*:
without the prefixes of the file or of the model class (`embeddings.…`, `encoder.layer.N.…`,
`lm_head.…`, `item_embedding.weight`).

Shapes: H hidden, V vocabulary, P rows of a position table, N items.
"""

from __future__ import annotations

import os
import pickle
import re
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, TypeVar

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, PreTrainedModel
from transformers.activations import ACT2FN

from recformer.config import PAPER, RecformerConfig
from recformer.files import UserError, read_json
from recformer.models import RecformerForPretraining
from recformer.tokenization import RecformerTokenizer

StateDict = dict[str, Tensor]
PathLike = str | os.PathLike
Model = TypeVar("Model", bound=PreTrainedModel)

# --- tables -----------------------------------------------------------------------------------

# Weight files of a folder, best first; an index names the shards beside it.
WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)

# What the hub may have of a BERT's tokenizer, whose configuration does not say which id is [CLS].
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "vocab.txt",
)

# Training frameworks wrap the state dict in a dict of their own under one of these names.
CONTAINERS = ("state_dict", "model_state_dict", "module", "model")

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


@dataclass(frozen=True)
class Family:
    """How a family of language models differs from ours.

    Attributes:
        prefix: what its classes with a head put before the encoder's keys.
        first_position: row of the first token in its position table; None for pad_token_id + 1,
            which is ours.
        head: its masked-language-model head, its key to ours.
    """

    prefix: str
    first_position: int | None
    head: Mapping[str, str]


_OWN_HEAD = {
    f"lm_head.{name}": f"lm_head.{name}"
    for name in (
        "bias",
        "dense.weight",
        "dense.bias",
        "layer_norm.weight",
        "layer_norm.bias",
        "decoder.weight",
        "decoder.bias",
    )
}
_BERT_HEAD = {
    "cls.predictions.bias": "lm_head.bias",
    "cls.predictions.transform.dense.weight": "lm_head.dense.weight",
    "cls.predictions.transform.dense.bias": "lm_head.dense.bias",
    "cls.predictions.transform.LayerNorm.weight": "lm_head.layer_norm.weight",
    "cls.predictions.transform.LayerNorm.bias": "lm_head.layer_norm.bias",
    "cls.predictions.decoder.weight": "lm_head.decoder.weight",
    "cls.predictions.decoder.bias": "lm_head.decoder.bias",
}

# By the model_type of config.json.
FAMILIES = {
    "bert": Family("bert.", 0, _BERT_HEAD),
    "roberta": Family("roberta.", None, _OWN_HEAD),
    "xlm-roberta": Family("roberta.", None, _OWN_HEAD),
    "camembert": Family("roberta.", None, _OWN_HEAD),
    "longformer": Family("longformer.", None, _OWN_HEAD),
    "recformer": Family("longformer.", None, _OWN_HEAD),
}

# Fields of a backbone's config.json that ours takes over; they fix what its weights mean.
CARRIED_FIELDS = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "hidden_act",
    "layer_norm_eps",
    "pad_token_id",
)
# These too, but they may be overridden.
CARRIED_DEFAULTS = ("hidden_dropout_prob", "attention_probs_dropout_prob", "initializer_range")

# The tensors of an encoder layer; those of `<s>` start from the others where they are missing.
LAYER_TENSORS = tuple(
    f"{module}.{kind}"
    for module in (
        "attention.self.query",
        "attention.self.key",
        "attention.self.value",
        "attention.output.dense",
        "attention.output.LayerNorm",
        "intermediate.dense",
        "output.dense",
        "output.LayerNorm",
    )
    for kind in ("weight", "bias")
)
GLOBAL_PROJECTIONS = ("query", "key", "value")

WORDS = "embeddings.word_embeddings.weight"
POSITIONS = "embeddings.position_embeddings.weight"
TOKEN_TYPES = "embeddings.token_type_embeddings.weight"
ITEM_POSITIONS = "embeddings.item_position_embeddings.weight"
# One vector under two names; a file in which every tensor stands once has either.
HEAD_BIASES = ("lm_head.bias", "lm_head.decoder.bias")
UNKNOWN_NAME = "nothing in the model has this name"


# --- the report -------------------------------------------------------------------------------


@dataclass
class LoadReport:
    """What became of every tensor, of the file's and of the model's.

    Attributes:
        source: the file or folder, as given.
        target: what the tensors went into.
        copied: the model's keys whose values are the file's.
        filled: the model's keys made from other tensors of the file, and how.
        new: the model's keys that the file says nothing about, and what they hold.
        left_over: the file's keys that nothing in the model takes, and why.
        notes: facts about the configuration worth a line.
    """

    source: str
    target: str
    copied: list[str] = field(default_factory=list)
    filled: dict[str, str] = field(default_factory=dict)
    new: dict[str, str] = field(default_factory=dict)
    left_over: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [
            f"{self.source} -> {self.target}: {len(self.copied)} tensors copied, "
            f"{len(self.filled)} filled, {len(self.new)} new, {len(self.left_over)} left over"
        ]
        for title in ("filled", "new", "left_over"):
            by_reason: dict[str, list[str]] = {}
            for key, reason in getattr(self, title).items():
                by_reason.setdefault(reason, []).append(key)
            for reason, keys in by_reason.items():
                lines.append(f"  {title.replace('_', ' ')}: {_compact(keys)} ({reason})")
        return "\n".join(lines + [f"  {note}" for note in self.notes])


def _compact(keys: Iterable[str]) -> str:
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


# --- reading ----------------------------------------------------------------------------------


def read_state_dict(path: PathLike) -> StateDict:
    """The tensors of a checkpoint, on the CPU, under the file's own key names.

    Args:
        path: a `.safetensors` file, a file written by `torch.save` (`.bin`, `.pt`, `.ckpt`: a state
            dict, or a training checkpoint that holds one), or a folder with such a file, whole or
            in shards. What a file is, its first bytes tell, not its name.

    Raises:
        FileNotFoundError: no such file, no weights in the folder, or a shard is absent.
        UserError: truncated, corrupt or no checkpoint, or it holds pickled objects that are not
            tensors (these are never unpickled: that could run foreign code).
    """
    path = Path(path)
    if path.is_dir():
        return _read_folder(path)
    if path.name.endswith(".index.json") and path.is_file():
        return _read_shards(path)
    return _read_file(path)


def _read_folder(folder: Path) -> StateDict:
    for name in WEIGHT_FILES:
        if (folder / name).is_file():
            return read_state_dict(folder / name)
    if (folder / "latest").is_file() or any(folder.glob("**/*_optim_states.pt")):
        raise UserError(
            f"{folder} is a DeepSpeed checkpoint, whose weights are cut over its ranks; join them "
            "first with the zero_to_fp32.py that lies in it and give what that writes"
        )
    raise FileNotFoundError(f"{folder} holds no weights: none of {', '.join(WEIGHT_FILES)}")


def _read_shards(index: Path) -> StateDict:
    content = read_json(index)
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{index} has no weight_map, so it is not the index of a sharded model")
    state: StateDict = {}
    for name in sorted(set(weight_map.values())):
        shard = index.parent / name
        if not shard.is_file():
            raise FileNotFoundError(f"{shard} does not exist, but {index.name} lists it as a shard")
        state.update(_read_file(shard))
    absent = sorted(set(weight_map) - set(state))
    if absent:
        raise UserError(f"{index} lists {_few(absent)}, which its shards do not hold")
    return state


def _read_file(path: Path) -> StateDict:
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist")
    with open(path, "rb") as handle:
        head = handle.read(64)
    if not head:
        raise UserError(f"{path} is empty, expected a checkpoint")
    if head.startswith(b"version https://git-lfs"):
        raise UserError(
            f"{path} is a Git LFS pointer of {path.stat().st_size} bytes in place of the weights: "
            "fetch the file itself (git lfs pull)"
        )
    # safetensors: eight bytes of length, then JSON. torch.save: a zip file, or a bare pickle.
    if head[8:9] == b"{":
        try:
            return load_file(path)
        except SafetensorError as error:
            raise UserError(f"{path} is truncated or corrupt: {error}") from error
    if head[:2] not in (b"PK", b"\x80\x02"):
        raise UserError(
            f"{path} is no checkpoint: it begins with {head[:12]!r}, expected a safetensors file "
            "or one written by torch.save"
        )
    return _tensors_of(_torch_load(path), path)


def _torch_load(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:  # broken pickles and refused objects alike
        refused = re.search(r"GLOBAL (\S+)", str(error))
        if refused is None:
            raise UserError(f"{path} is truncated or corrupt: {_first_line(error)}") from error
        raise UserError(
            f"{path} holds pickled objects ({refused[1]}), which are refused because loading them "
            "could run foreign code; where you trust the file, load it with torch yourself and "
            "save its state dict alone"
        ) from error
    except (RuntimeError, OSError, EOFError, LookupError, ValueError) as error:
        raise UserError(f"{path} is truncated or corrupt: {_first_line(error)}") from error


def _tensors_of(content: Any, path: Path) -> StateDict:
    """The state dict within what `torch.load` gave, be it wrapped or not."""
    if isinstance(content, Mapping):
        for name in CONTAINERS:
            inner = content.get(name)
            if isinstance(inner, Mapping) and any(isinstance(v, Tensor) for v in inner.values()):
                content = inner
                break
        state = {key: value for key, value in content.items() if isinstance(value, Tensor)}
        if state:
            return state
        what = f"a dict with the keys {_few([str(key) for key in content])}"
    else:
        what = f"a {type(content).__name__}"
    raise UserError(f"{path} is no checkpoint: it holds {what}, expected tensors by name")


def describe_state_dict(state: Mapping[str, Tensor]) -> str:
    """What kind of model these weights look like, in a few words."""
    for pattern, kind in LOOKS_LIKE:
        if any(re.search(pattern, _strip_wrappers(key)) for key in state):
            return kind
    return f"an unknown model (its first keys are {_few(list(state))})"


def _few(names: list[str], most: int = 4) -> str:
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + rest


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


# --- loading ----------------------------------------------------------------------------------


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


def _plain(key: str) -> str:
    """The plain name of a Recformer's or Longformer's key."""
    return _strip_wrappers(key).removeprefix(PREFIXES[-1])


def _plain_names(keys: Iterable[str], prefix: str, source: str) -> dict[str, str]:
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


def _why_left_over(plain: str) -> str:
    for pattern, reason in KNOWN_LEFT_OVERS:
        if re.fullmatch(pattern, plain):
            return reason
    return UNKNOWN_NAME


def load_checkpoint(
    model: PreTrainedModel,
    checkpoint: PathLike | Mapping[str, Tensor],
    allow_missing: Iterable[str] = (),
    item_table: bool = True,
) -> LoadReport:
    """Put the weights of a Recformer checkpoint into `model`, all or none.

    Released files, exports of Lightning and DeepSpeed and our own folders are recognised by their
    key names, with or without `longformer.`. A `lm_head` that the model has no use for and buffers
    are left over. An item table in the file becomes that of a `RecformerForSeqRec`; without one the
    model's own, if it has any, stays.

    Args:
        model: a `RecformerModel`, `RecformerForPretraining` or `RecformerForSeqRec`, on any device
            and of any dtype; values are converted to its own.
        checkpoint: a path as for `read_state_dict`, or a state dict.
        allow_missing: keys of the model, `*` for any part of a name, that the file need not have
            (`["lm_head.*"]`); each must fit a key of the model. They keep their values.
        item_table: False leaves the item table of the file out.

    Returns:
        Every key of the file and of the model, and what became of it.

    Raises:
        FileNotFoundError, UserError: as `read_state_dict`.
        UserError: the file is of another model, keys are missing, or shapes differ; nothing in the
            model has changed then.
    """
    if isinstance(checkpoint, Mapping):
        state, source = dict(checkpoint), "state dict"
    else:
        state, source = read_state_dict(checkpoint), str(checkpoint)
    report = LoadReport(source, type(model).__name__)
    names = _plain_names(state, PREFIXES[-1], source)
    values = {plain: state[key] for plain, key in names.items()}
    own = {_plain(key): (key, value) for key, value in model.state_dict().items()}
    own_table = own.pop(ITEM_TABLE, None)
    allowed = _allowed_keys(own, allow_missing)

    for one, other in (HEAD_BIASES, HEAD_BIASES[::-1]):
        if one in values and other in own and other not in values:
            values[other] = values[one]
            report.filled[own[other][0]] = f"from {one}, the same vector"

    missing = [plain for plain in own if plain not in values]
    refused = [plain for plain in missing if plain not in allowed]
    if refused:
        raise UserError(_missing_message(source, state, refused, own))
    takes_table = item_table and hasattr(model, "init_item_embedding")
    mismatches = [
        (plain, values[plain].shape, value.shape)
        for plain, (_, value) in own.items()
        if plain in values and values[plain].shape != value.shape
    ]
    if takes_table and ITEM_TABLE in values:
        shape = values[ITEM_TABLE].shape
        expected = (model.config.item_num or shape[0], model.config.hidden_size)
        if tuple(shape) != expected:
            mismatches.append((ITEM_TABLE, shape, torch.Size(expected)))
    # A deeper model's first layers would fit, and mean nothing.
    deeper = [plain for plain in values if plain.startswith("encoder.layer.") and plain not in own]
    if mismatches or deeper:
        raise UserError(_shape_message(source, type(model).__name__, mismatches, deeper))

    with torch.no_grad():
        for plain, (key, value) in own.items():
            if plain in values:
                value.copy_(values[plain])
                if key not in report.filled:
                    report.copied.append(key)
            else:
                report.new[key] = "not in the file: keeps its initial values"
    if takes_table and ITEM_TABLE in values:
        table = values[ITEM_TABLE].to(model.device, model.dtype)
        model.config.item_num = table.shape[0]
        model.init_item_embedding(table)
        report.copied.append(ITEM_TABLE)
    elif own_table is not None:
        report.new[own_table[0]] = "no item table in the file: the model's stays"
    for plain, key in names.items():
        if plain == ITEM_TABLE:
            if not takes_table:
                asked = "not asked for" if not item_table else _why_left_over(plain)
                report.left_over[key] = asked
        elif plain not in own:
            report.left_over[key] = _why_left_over(plain)
    return report


def _allowed_keys(own: Iterable[str], patterns: Iterable[str]) -> set[str]:
    """The plain keys that `patterns` allow to be missing, each pattern checked to fit one."""
    own = list(own)
    allowed: set[str] = set()
    for pattern in patterns:
        fitting = [plain for plain in own if fnmatchcase(plain, _plain(pattern))]
        if not fitting:
            raise ValueError(f"allow_missing: no key of the model fits {pattern!r}")
        allowed.update(fitting)
    return allowed


def _missing_message(
    source: str, state: StateDict, missing: list[str], own: Mapping[str, tuple[str, Tensor]]
) -> str:
    kind = describe_state_dict(state)
    if kind != "a Recformer":
        advice = (
            "; start from it as the backbone instead (recformer.checkpoint.load_backbone)"
            if kind in BACKBONE_KINDS
            else ""
        )
        return f"{source} looks like {kind}, expected a Recformer checkpoint{advice}"
    listed = _compact(own[plain][0] for plain in missing)
    return (
        f"{source} lacks {len(missing)} of the {len(own)} tensors of the model: {listed}. If they "
        "are meant to start anew, allow them by name (allow_missing)"
    )


def _shape_message(
    source: str,
    target: str,
    mismatches: list[tuple[str, torch.Size, torch.Size]],
    deeper: list[str],
) -> str:
    parts = [
        f"{plain} is {tuple(there)} in the file and {tuple(here)} in the model"
        for plain, there, here in mismatches[:8]
    ]
    if len(mismatches) > 8:
        parts.append(f"{len(mismatches) - 8} more tensors differ")
    if deeper:
        parts.append(f"the file also has {_compact(deeper)}, for which the model has no layer")
    return (
        f"{source} does not fit {target}: {'; '.join(parts)}. Build the model with the "
        "configuration that the checkpoint was trained with"
    )


# --- backbones --------------------------------------------------------------------------------


def from_backbone(
    path_or_hub_id: PathLike, *, lm_head: bool = True, seed: int = 0, **config_overrides: Any
) -> tuple[RecformerConfig, StateDict, LoadReport]:
    """A language model as the start of a Recformer.

    Takes what `save_pretrained` of Longformer, RoBERTa (XLM-R, CamemBERT) and BERT classes writes,
    sentence-transformers folders of these, and Recformer folders:

    - Query, key and value of each layer also start the projections of `<s>`; Longformer has its
      own.
    - Token type row 0 fills all four rows (BERT has a second one, for second sentences, which no
      item is).
    - Our positions are the 1-based count plus pad_token_id. RoBERTa's and Longformer's tables are
      made for that; BERT's start at row 0 and are shifted. Where `max_token_num` needs more rows
      than there are, the usable ones are repeated block-wise. No row is cut off.
    - Item positions are new: normal with standard deviation `initializer_range`.
    - The masked-language-model head is the backbone's. A backbone without one gets a new head,
      whose decoder starts from the word embeddings where the backbone ties the two.

    A Recformer folder keeps all its tensors; only its position tables follow the overrides.

    Args:
        path_or_hub_id: a folder, or a name on the hub (offline, its cached files do).
        lm_head: whether the state dict gets the head of `RecformerForPretraining`.
        seed: of the new tensors.
        config_overrides: fields of `RecformerConfig`. The defaults are the paper's
            (`recformer.config.PAPER`; window 64 for a Longformer too), or a Recformer folder's own.

    Returns:
        The configuration, a state dict with plain keys for `load_checkpoint`, and the report.

    Raises:
        FileNotFoundError: no such folder, or no weights in it.
        UserError: another family, relative positions, an unknown activation, tensors missing or
            unknown in the layers, or an override that the weights contradict.
    """
    backbone = _read_backbone(path_or_hub_id, config_overrides)
    state, report = _convert(backbone, read_state_dict(backbone.folder), lm_head, seed)
    return backbone.config, state, report


def load_backbone(
    model_class: type[Model], path_or_hub_id: PathLike, *, seed: int = 0, **config_overrides: Any
) -> tuple[Model, LoadReport]:
    """A model of `model_class` that starts from a language model; see `from_backbone`.

    Returns:
        The model (float32, in evaluation mode as `from_pretrained` gives it), and the report.
    """
    backbone = _read_backbone(path_or_hub_id, config_overrides)
    tensors = read_state_dict(backbone.folder)
    lm_head = issubclass(model_class, RecformerForPretraining)
    # The conversion settles the sizes of the position tables, so it comes before the model.
    state, converted = _convert(backbone, tensors, lm_head, seed)
    model = model_class(backbone.config)
    loaded = load_checkpoint(model, state)
    report = replace(
        converted,
        target=loaded.target,
        new=converted.new | loaded.new,
        left_over=converted.left_over | loaded.left_over,
    )
    return model.eval(), report


def backbone_config(path_or_hub_id: PathLike, **config_overrides: Any) -> RecformerConfig:
    """The configuration that `from_backbone` gives, from `config.json` alone.

    For a released `.bin` file, which has no configuration of its own: name the backbone that it was
    trained from.
    """
    return _read_backbone(path_or_hub_id, config_overrides, weights=False).config


@dataclass
class _Backbone:
    """A language model that was looked at and accepted; its weights are not read yet."""

    source: str
    folder: Path
    model_type: str
    config: RecformerConfig
    tie_word_embeddings: bool
    notes: list[str]


def _read_backbone(
    path_or_hub_id: PathLike, overrides: Mapping[str, Any], weights: bool = True
) -> _Backbone:
    known = RecformerConfig()
    for name in overrides:
        if not hasattr(known, name):
            raise UserError(f"{name!r} is not a field of RecformerConfig")
    source, folder = str(path_or_hub_id), _local_folder(path_or_hub_id, weights)
    values = read_json(folder / "config.json")
    model_type = values.get("model_type") if isinstance(values, dict) else None
    if model_type not in FAMILIES:
        raise UserError(
            f"{source} is of model type {model_type!r}, which cannot be a backbone; these can: "
            f"{', '.join(FAMILIES)}"
        )
    positions = values.get("position_embedding_type", "absolute")
    if positions != "absolute":
        raise UserError(
            f"{source} has position_embedding_type {positions!r}; Recformer adds absolute position "
            "embeddings to its tokens, so choose a backbone that was trained with those"
        )
    notes: list[str] = []
    if model_type == RecformerConfig.model_type:
        theirs = RecformerConfig.from_pretrained(folder)
        _refuse_other_sizes(source, theirs, overrides)
        config = RecformerConfig.from_pretrained(folder)
        for name, value in overrides.items():
            setattr(config, name, value)
    else:
        theirs = AutoConfig.from_pretrained(folder)
        if theirs.hidden_act not in ACT2FN:
            raise UserError(f"{source} has the activation {theirs.hidden_act!r}, unknown here")
        _refuse_other_sizes(source, theirs, overrides)
        fields = {name: getattr(theirs, name) for name in CARRIED_FIELDS + CARRIED_DEFAULTS}
        bos, eos, notes = _border_tokens(folder, theirs, fields)
        fields |= {"bos_token_id": bos, "eos_token_id": eos, "sep_token_id": eos}
        config = RecformerConfig(**(PAPER | fields | dict(overrides)))
    first = FAMILIES[model_type].first_position
    rows = theirs.max_position_embeddings
    config.max_position_embeddings = len(_position_rows(rows, first, config)[0])
    tied = bool(getattr(theirs, "tie_word_embeddings", True))
    return _Backbone(source, folder, model_type, config, tied, notes)


def _refuse_other_sizes(source: str, config: Any, overrides: Mapping[str, Any]) -> None:
    for name in (*CARRIED_FIELDS, "max_position_embeddings", "token_type_size"):
        own = getattr(config, name, None)  # only a Recformer has a token_type_size
        if name in overrides and own is not None and overrides[name] != own:
            raise UserError(
                f"{name}={overrides[name]!r} cannot be set for a backbone: {source} has {own!r} "
                "and its weights were made for that"
            )


def _border_tokens(
    folder: Path, theirs: Any, fields: Mapping[str, Any]
) -> tuple[int | None, int | None, list[str]]:
    """Ids of `<s>` and `</s>`: the configuration's, or of [CLS] and [SEP], which play them."""
    bos, eos = theirs.bos_token_id, theirs.eos_token_id
    if bos is not None and eos is not None:
        return bos, eos, []
    try:
        tokenizer = RecformerTokenizer.from_pretrained(folder, RecformerConfig(**fields))
    except FileNotFoundError:
        return bos, eos, ["no tokenizer beside the weights: the id of <s> stays unset"]
    name = tokenizer.convert_ids_to_tokens([tokenizer.bos_token_id])[0]
    note = f"{name} (id {tokenizer.bos_token_id}) plays <s>"
    return tokenizer.bos_token_id, tokenizer.eos_token_id, [note]


def _local_folder(path_or_hub_id: PathLike, weights: bool) -> Path:
    """The folder with config.json (and weights): the path itself, or the hub's cached files.

    Raises:
        FileNotFoundError: neither a folder here nor to be had from the hub.
        UserError: a file.
    """
    path = Path(path_or_hub_id)
    if path.is_dir():
        modules = path / "modules.json"
        if not (path / "config.json").is_file() and modules.is_file():
            # Older sentence-transformers folders keep the language model in a subfolder.
            path = path / read_json(modules)[0]["path"]
        if not (path / "config.json").is_file():
            raise FileNotFoundError(f"{path} has no config.json, so it is no model folder")
        return path
    if path.exists():
        raise UserError(
            f"{path} is a file; a backbone is a folder with config.json and weights, or a hub id"
        )
    return _from_hub(str(path_or_hub_id), weights)


def _from_hub(name: str, weights: bool) -> Path:
    try:
        folder = Path(hf_hub_download(name, "config.json")).parent
    except (OSError, ValueError) as error:  # no such repository, no network, not a name at all
        raise FileNotFoundError(
            f"{name!r} is no folder here, and the hub did not give it: {_first_line(error)}"
        ) from error
    for file in TOKENIZER_FILES:
        with suppress(EntryNotFoundError):
            hf_hub_download(name, file)
    if not weights:
        return folder
    for file in WEIGHT_FILES:
        try:
            found = Path(hf_hub_download(name, file))
            if file.endswith(".index.json"):
                for shard in sorted(set(read_json(found)["weight_map"].values())):
                    hf_hub_download(name, shard)
        except EntryNotFoundError:
            continue
        return folder
    raise FileNotFoundError(f"{name!r} has a config.json, but none of {', '.join(WEIGHT_FILES)}")


class _Conversion:
    """Moves tensors from a backbone's names to ours, noting what becomes of each."""

    def __init__(self, backbone: _Backbone, tensors: StateDict, prefix: str, seed: int) -> None:
        self.source = backbone.source
        self.tensors = tensors
        self.names = _plain_names(tensors, prefix, backbone.source)
        self.used: set[str] = set()
        self.result: StateDict = {}
        self.report = LoadReport(backbone.source, "Recformer", notes=list(backbone.notes))
        self.generator = torch.Generator().manual_seed(seed)
        self.deviation = backbone.config.initializer_range

    def has(self, name: str) -> bool:
        return name in self.names

    def take(self, name: str) -> Tensor:
        if name not in self.names:
            raise UserError(
                f"{self.source} lacks {name}, so it is no whole language model of the kind that "
                f"its config.json names (it looks like {describe_state_dict(self.tensors)})"
            )
        self.used.add(name)
        return self.tensors[self.names[name]]

    def copy(self, name: str, key: str | None = None) -> None:
        key = key or name
        self.result[key] = self.take(name)
        self.report.copied.append(key)

    def fill(self, key: str, value: Tensor, how: str) -> None:
        self.result[key] = value
        self.report.filled[key] = how

    def draw(self, key: str, *shape: int) -> None:
        self.result[key] = torch.randn(shape, generator=self.generator) * self.deviation
        self.report.new[key] = f"normal, standard deviation {self.deviation:g}"

    def constant(self, key: str, value: float, *shape: int) -> None:
        self.result[key] = torch.full(shape, value)
        self.report.new[key] = f"{value:g} everywhere"

    def finish(self) -> tuple[StateDict, LoadReport]:
        """Account for what was not used.

        Raises:
            UserError: the encoder holds tensors that ours has no place for (another architecture,
                or more layers than config.json says).
        """
        strange = []
        for name, key in self.names.items():
            if name not in self.used:
                self.report.left_over[key] = reason = _why_left_over(name)
                if reason == UNKNOWN_NAME and name.startswith(("encoder.", "embeddings.")):
                    strange.append(name)
        if strange:
            raise UserError(
                f"{self.source} has {_compact(strange)}, for which Recformer's encoder has no "
                "place: it is another architecture or deeper than its config.json says"
            )
        return self.result, self.report


def _convert(
    backbone: _Backbone, tensors: StateDict, lm_head: bool, seed: int
) -> tuple[StateDict, LoadReport]:
    """Our tensors from the backbone's; sets the number of positions in its configuration."""
    config, family = backbone.config, FAMILIES[backbone.model_type]
    is_recformer = backbone.model_type == RecformerConfig.model_type
    work = _Conversion(backbone, tensors, family.prefix, seed)
    work.copy(WORDS)
    for kind in ("weight", "bias"):
        work.copy(f"embeddings.LayerNorm.{kind}")
    _fill_positions(work, config, family.first_position)
    if is_recformer:
        work.copy(TOKEN_TYPES)
        _fill_item_positions(work, config.max_item_embeddings)
        if work.has(ITEM_TABLE):
            _take_item_table(work, config)
    else:
        types = work.take(TOKEN_TYPES)
        how = f"row 0 of {len(types)} in all {config.token_type_size} rows"
        work.fill(TOKEN_TYPES, types[:1].repeat(config.token_type_size, 1), how)
        work.draw(ITEM_POSITIONS, config.max_item_embeddings, config.hidden_size)
    for number in range(config.num_hidden_layers):
        layer = f"encoder.layer.{number}."
        for tensor in LAYER_TENSORS:
            work.copy(layer + tensor)
        for projection in GLOBAL_PROJECTIONS:
            for kind in ("weight", "bias"):
                local = f"{layer}attention.self.{projection}.{kind}"
                of_start = f"{layer}attention.self.{projection}_global.{kind}"
                if work.has(of_start):
                    work.copy(of_start)
                else:
                    how = "from query, key and value of the layer"
                    work.fill(of_start, work.take(local).clone(), how)
    if lm_head:
        _convert_head(work, config, family, backbone.tie_word_embeddings)
    return work.finish()


def _position_rows(
    rows: int, first: int | None, config: RecformerConfig
) -> tuple[list[int], list[str]]:
    """Which row of a backbone's position table each row of ours takes, and how to say it.

    Args:
        rows: of the backbone's table.
        first: its row of the first token, None for pad_token_id + 1 as in ours.
        config: ours; `max_token_num` tokens must find a position.
    """
    ours_first = config.pad_token_id + 1
    start = ours_first if first is None else first
    usable = rows - start
    how = []
    if start == ours_first:
        sources = list(range(rows))
    else:
        # No token looks up a row before the first; they hold the first one's values.
        sources = [start] * ours_first + list(range(start, rows))
        how.append(f"row p holds the backbone's row p - {ours_first - start}")
    lacking = ours_first + config.max_token_num - len(sources)
    if lacking > 0 and usable > 0:
        sources += [start + index % usable for index in range(lacking)]
        how.append(f"{usable} positions repeated to make {config.max_token_num}")
    return sources, how


def _fill_positions(work: _Conversion, config: RecformerConfig, first: int | None) -> None:
    table = work.take(POSITIONS)
    sources, how = _position_rows(len(table), first, config)
    if how:
        work.fill(POSITIONS, table[torch.tensor(sources)], "; ".join(how))
    else:
        work.copy(POSITIONS)
    config.max_position_embeddings = len(sources)


def _fill_item_positions(work: _Conversion, wanted: int) -> None:
    """The item positions of a Recformer, for as many items as the configuration now says."""
    table = work.take(ITEM_POSITIONS)
    if wanted > len(table):
        raise UserError(
            f"max_item_embeddings={wanted}: {work.source} was trained with {len(table)} item "
            "positions; it can use fewer, not more"
        )
    if wanted == len(table):
        work.copy(ITEM_POSITIONS)
    else:  # positions count from the newest item, so the first rows keep their meaning
        work.fill(ITEM_POSITIONS, table[:wanted], f"the first {wanted} of {len(table)} rows")


def _take_item_table(work: _Conversion, config: RecformerConfig) -> None:
    """The item vectors of a finetuned folder, unless they are of another catalogue."""
    rows = len(work.take(ITEM_TABLE))
    if config.item_num in (0, rows):
        work.copy(ITEM_TABLE)
    else:
        key = work.names[ITEM_TABLE]
        work.report.left_over[key] = f"{rows} items, of another catalogue"


def _convert_head(work: _Conversion, config: RecformerConfig, family: Family, tied: bool) -> None:
    present = {ours: theirs for theirs, ours in family.head.items() if work.has(theirs)}
    hidden, vocabulary = config.hidden_size, config.vocab_size
    for ours, theirs in present.items():
        work.copy(theirs, ours)
    if not present:
        work.draw("lm_head.dense.weight", hidden, hidden)
        work.constant("lm_head.dense.bias", 0.0, hidden)
        work.constant("lm_head.layer_norm.weight", 1.0, hidden)
        work.constant("lm_head.layer_norm.bias", 0.0, hidden)
        work.constant("lm_head.bias", 0.0, vocabulary)
        work.constant("lm_head.decoder.bias", 0.0, vocabulary)
    # The two biases are one vector; a file may hold it under one name, the other, or both.
    for one, other in (HEAD_BIASES, HEAD_BIASES[::-1]):
        if one in present and other not in present:
            work.fill(other, work.result[one].clone(), f"from {one}, the same vector")
    if "lm_head.decoder.weight" not in present:
        if tied:
            how = "the word embeddings, to which the backbone ties it"
            work.fill("lm_head.decoder.weight", work.result[WORDS].clone(), how)
        else:
            work.draw("lm_head.decoder.weight", vocabulary, hidden)
