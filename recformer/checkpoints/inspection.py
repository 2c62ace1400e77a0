"""A checkpoint described in words, for the person who downloaded it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from recformer.checkpoints.backbones import from_backbone
from recformer.checkpoints.conversion import find_start
from recformer.checkpoints.loading import load_checkpoint
from recformer.checkpoints.names import (
    BACKBONE_KINDS,
    ITEM_POSITIONS,
    ITEM_TABLE,
    POSITIONS,
    PREFIXES,
    TOKEN_TYPES,
    WORDS,
    PathLike,
    StateDict,
    compact,
    describe_state_dict,
    few,
    plain_names,
)
from recformer.checkpoints.reading import Contents, read_checkpoint
from recformer.config import RecformerConfig
from recformer.files import UserError, read_json
from recformer.models import RecformerForPretraining, RecformerForSeqRec

# Fields of a configuration that the shapes of the weights do not show.
SHOWN_FIELDS = (
    "num_attention_heads",
    "attention_window",
    "pooler_type",
    "temp",
    "max_token_num",
    "max_attr_num",
    "max_attr_length",
)


def inspect_checkpoint(path: PathLike) -> str:
    """Kind, shapes, run, configuration, and how its keys differ from what the models expect.

    Args:
        path: any file or folder that `read_checkpoint` reads.

    Raises:
        FileNotFoundError, UserError: as `read_checkpoint`.
    """
    contents = read_checkpoint(path)
    model = describe_state_dict(contents.tensors)
    lines = [f"{path}: {contents.kind}, {model}", _amount(contents.tensors)]
    if contents.facts:
        lines.append(f"written at {contents.run}")
    broken = [k for k, v in contents.tensors.items() if not torch.isfinite(v).all()]
    if broken:
        lines.append(f"NOT FINITE: values of {compact(broken)}")
    if model == "a Recformer":
        lines += _describe_recformer(Path(path), contents)
    elif model in BACKBONE_KINDS:
        lines += _describe_backbone(Path(path))
    else:
        lines.append("not one of ours: no Recformer, and no language model that one can start from")
    return "\n  ".join(lines)


def _amount(tensors: Mapping[str, Tensor]) -> str:
    values = sum(tensor.numel() for tensor in tensors.values())
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values()) / 1e6
    dtypes = sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors.values()})
    return f"{len(tensors)} tensors, {values:,} values, {size:,.1f} MB, {' and '.join(dtypes)}"


def _describe_recformer(path: Path, contents: Contents) -> list[str]:
    names = plain_names(contents.tensors, PREFIXES[-1], str(path))
    state = {plain: contents.tensors[key] for plain, key in names.items()}
    if ITEM_POSITIONS not in state:
        return [f"its keys have a prefix that is unknown here: {few(list(contents.tensors))}"]
    shapes = _sizes(state)
    lines = ["shape: " + ", ".join(f"{name} {size}" for name, size in shapes.items())]
    head = "a" if any(name.startswith("lm_head.") for name in state) else "no"
    table = f"vectors of {len(state[ITEM_TABLE]):,} items" if ITEM_TABLE in state else "no items"
    lines.append(f"with {head} masked-language-model head, {table}")
    config, text = _config_of(path)
    lines.append(text)
    config = config or _config_from(shapes)
    for model_class in (RecformerForPretraining, RecformerForSeqRec):
        try:
            with torch.device("meta"):  # the comparison needs names and shapes alone
                model = model_class(config)
            report = load_checkpoint(model, contents.tensors, source="it")
        except UserError as error:
            lines.append(f"does not load into {model_class.__name__}: {error}")
        else:
            first, *rest = str(report).splitlines()
            lines.append(f"loads into {model_class.__name__}: {first.partition(': ')[2]}")
            lines += [f"  {line.strip()}" for line in rest]
    if "Lightning" in contents.kind or "DeepSpeed" in contents.kind:
        lines.append(f"to release it: recformer convert --checkpoint {path}")
    return lines


def _sizes(state: StateDict) -> dict[str, int]:
    """Sizes of a Recformer by the names of the configuration, as far as its tensors tell."""
    tables = {
        "vocab_size": WORDS,
        "max_position_embeddings": POSITIONS,
        "token_type_size": TOKEN_TYPES,
        "max_item_embeddings": ITEM_POSITIONS,
        "intermediate_size": "encoder.layer.0.intermediate.dense.weight",
    }
    sizes = {name: len(state[key]) for name, key in tables.items() if key in state}
    if "lm_head.bias" in state:  # frozen word embeddings may be elsewhere
        sizes.setdefault("vocab_size", len(state["lm_head.bias"]))
    sizes["hidden_size"] = state[ITEM_POSITIONS].shape[1]
    layers = [re.match(r"encoder\.layer\.(\d+)\.", name) for name in state]
    sizes["num_hidden_layers"] = 1 + max((int(m[1]) for m in layers if m), default=-1)
    return sizes


def _config_from(sizes: Mapping[str, int]) -> RecformerConfig:
    """A configuration of these sizes; how many heads share the hidden size leaves no trace."""
    fields: dict[str, Any] = {**sizes, "num_attention_heads": 1}
    return RecformerConfig(**fields)


def _config_of(path: Path) -> tuple[RecformerConfig | None, str]:
    """The configuration that belongs to a checkpoint, and a line about it."""
    folder = path if path.is_dir() else path.parent
    if not (folder / "config.json").is_file():
        folder = find_start(path) or folder
    if not (folder / "config.json").is_file():
        return None, (
            "no config.json: heads, window, pooling and item lengths do not show in the weights; "
            "they are those it was trained with (released files: Longformer's and the paper's)"
        )
    values = read_json(folder / "config.json")
    if not isinstance(values, dict) or values.get("model_type") != RecformerConfig.model_type:
        return None, f"{folder / 'config.json'} is of another model"
    config = RecformerConfig.from_pretrained(folder)
    fields = ", ".join(f"{name} {getattr(config, name)}" for name in SHOWN_FIELDS)
    return config, f"{folder / 'config.json'}: {fields}"


def _describe_backbone(path: Path) -> list[str]:
    if not path.is_dir() or not (path / "config.json").is_file():
        return ["a backbone is a folder with its config.json; this is the weights alone"]
    try:
        _, _, report = from_backbone(path)
    except UserError as error:
        return [f"cannot start a Recformer: {error}"]
    first, *rest = str(report).splitlines()
    return [
        f"as the start of a Recformer: {first.partition(': ')[2]}",
        *(f"  {line.strip()}" for line in rest),
        f"to start from it: recformer start-weights --model_name_or_path {path}",
    ]
