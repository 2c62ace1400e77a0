"""Weights from files: released checkpoints and our own.

- `read_checkpoint` reads a file or folder, `read_state_dict` its tensors alone.
- `load_checkpoint` puts a Recformer checkpoint into a model, every key accounted for.

`python -m recformer.checkpoint FILE_OR_FOLDER` says what one is (`recformer.inspection`).

Nothing is loaded halfway: names and shapes are checked before the first value of a model changes.
Key names inside this file are *plain*: without the prefixes of the file or of the model class
(`embeddings.…`, `encoder.layer.N.…`, `lm_head.…`, `item_embedding.weight`). Language models as the
start of a Recformer are in `recformer.backbones`.
"""

from __future__ import annotations

import argparse
import io
import os
import pickle
import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel

from recformer.files import UserError, exit_with_message, read_json

StateDict = dict[str, Tensor]
PathLike = str | os.PathLike

# --- tables -----------------------------------------------------------------------------------

# Weight files of a folder, best first; an index names the shards beside it.
WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)

# Training frameworks wrap the state dict in a dict of their own under one of these names.
CONTAINERS = ("state_dict", "model_state_dict", "module", "model")

# What such a dict may say of its run.
FACTS = (
    "epoch",
    "global_step",
    "global_steps",
    "pytorch-lightning_version",
    "ds_version",
    "hyper_parameters",
)

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
                lines.append(f"  {title.replace('_', ' ')}: {compact(keys)} ({reason})")
        return "\n".join(lines + [f"  {note}" for note in self.notes])


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


# --- reading ----------------------------------------------------------------------------------


@dataclass
class Contents:
    """What a file or folder holds.

    Attributes:
        kind: what it is, in words.
        tensors: by the file's own names, on the CPU.
        facts: what it says of the run that wrote it, by the file's own names (epoch, global_step…).
    """

    kind: str
    tensors: StateDict
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def run(self) -> str:
        """The facts in a line."""
        return ", ".join(f"{name} {value}" for name, value in self.facts.items())


def read_state_dict(path: PathLike) -> StateDict:
    """The tensors of a checkpoint; see `read_checkpoint`."""
    return read_checkpoint(path).tensors


def read_checkpoint(path: PathLike) -> Contents:
    """What a checkpoint holds, on the CPU, under the file's own key names.

    Args:
        path: a `.safetensors` file, a file written by `torch.save` (`.bin`, `.pt`, `.ckpt`: a state
            dict, or a training checkpoint that holds one), a folder with such a file, whole or in
            shards, or a folder that DeepSpeed wrote. What a file is, its first bytes tell, not its
            name. The weights of a DeepSpeed folder are joined by DeepSpeed, in float32 but for
            frozen ones, which it keeps in the precision of training, or leaves out.

    Raises:
        FileNotFoundError: no such file, no weights in the folder, or a shard or rank is absent.
        UserError: truncated, corrupt or no checkpoint, or it holds pickled objects that are not
            tensors (these are never unpickled: that could run foreign code).
    """
    path = Path(path)
    if path.is_dir():
        return _read_folder(path)
    if path.name.endswith(".index.json") and path.is_file():
        return _read_shards(path)
    return _read_file(path)


def _read_folder(folder: Path) -> Contents:
    zero = _zero_root(folder)
    if zero is not None:
        return _read_zero(*zero)
    for name in WEIGHT_FILES:
        if (folder / name).is_file():
            contents = read_checkpoint(folder / name)
            if (folder / "config.json").is_file():
                contents.kind = f"a model folder ({contents.kind})"
            return contents
    below = sorted(path.name for path in folder.glob("*.ckpt"))
    if below:
        raise UserError(f"{folder} holds several checkpoints ({few(below)}): name one of them")
    raise FileNotFoundError(f"{folder} holds no weights: none of {', '.join(WEIGHT_FILES)}")


def _read_shards(index: Path) -> Contents:
    content = read_json(index)
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{index} has no weight_map, so it is not the index of a sharded model")
    state: StateDict = {}
    names = sorted(set(weight_map.values()))
    for name in names:
        shard = index.parent / name
        if not shard.is_file():
            raise FileNotFoundError(f"{shard} does not exist, but {index.name} lists it as a shard")
        state.update(_read_file(shard).tensors)
    absent = sorted(set(weight_map) - set(state))
    if absent:
        raise UserError(f"{index} lists {few(absent)}, which its shards do not hold")
    return Contents(f"weights in {len(names)} shards", state)


def _read_file(path: Path) -> Contents:
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
    if head.lstrip()[:9].lower().startswith((b"<!doctype", b"<html")):
        raise UserError(
            f"{path} is a web page in place of the weights (it begins with {head[:12]!r}): open it "
            "in a browser and download the file that it asks you to confirm"
        )
    # safetensors: eight bytes of length, then JSON. torch.save: a zip file, or a bare pickle.
    if head[8:9] == b"{":
        try:
            return Contents("a safetensors file", load_file(path))
        except SafetensorError as error:
            raise UserError(f"{path} is truncated or corrupt: {error}") from error
    if head[:2] not in (b"PK", b"\x80\x02"):
        raise UserError(
            f"{path} is no checkpoint: it begins with {head[:12]!r}, expected a safetensors file "
            "or one written by torch.save"
        )
    # The model states beside them are no more than the weights in the 16 bits of training.
    if path.name.endswith("_states.pt") and any(path.parent.glob("*_optim_states.pt")):
        raise UserError(
            f"{path} is a part of a DeepSpeed checkpoint: give the folder {path.parent}"
        )
    return _contents_of(_torch_load(path), path)


def _torch_load(path: Path, mmap: bool = False) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except pickle.UnpicklingError as error:  # broken pickles and refused objects alike
        refused = re.search(r"GLOBAL (\S+)", str(error))
        if refused is None:
            raise UserError(f"{path} is truncated or corrupt: {first_line(error)}") from error
        raise UserError(
            f"{path} holds pickled objects ({refused[1]}), which are refused because loading them "
            "could run foreign code; where you trust the file, load it with torch yourself and "
            "save its state dict alone"
        ) from error
    except (RuntimeError, OSError, EOFError, LookupError, ValueError) as error:
        raise UserError(f"{path} is truncated or corrupt: {first_line(error)}") from error


def _contents_of(content: Any, path: Path) -> Contents:
    """The state dict within what `torch.load` gave, be it wrapped or not."""
    kind, facts = "a state dict", {}
    if isinstance(content, Mapping):
        for name in CONTAINERS:
            inner = content.get(name)
            if isinstance(inner, Mapping) and any(isinstance(v, Tensor) for v in inner.values()):
                lightning = "pytorch-lightning_version" in content
                kind = "a Lightning checkpoint" if lightning else "a training checkpoint"
                facts = _facts_of(content)
                content = inner
                break
        state = {key: value for key, value in content.items() if isinstance(value, Tensor)}
        if state:
            return Contents(kind, state, facts)
        what = f"a dict with the keys {few([str(key) for key in content])}"
    else:
        what = f"a {type(content).__name__}"
    raise UserError(f"{path} is no checkpoint: it holds {what}, expected tensors by name")


def _facts_of(content: Mapping[str, Any]) -> dict[str, Any]:
    return {name: content[name] for name in FACTS if content.get(name) is not None}


def _zero_root(folder: Path) -> tuple[Path, str] | None:
    """The outer folder and the tag of a DeepSpeed checkpoint, given either; None if it is none."""
    if any(folder.glob("*_optim_states.pt")) or any(folder.glob("mp_rank_*_model_states.pt")):
        folder = folder.resolve()
        return folder.parent, folder.name
    latest = folder / "latest"
    if latest.is_file():
        tag = latest.read_text(encoding="utf-8").strip()
        if not tag or not (folder / tag).is_dir():
            raise FileNotFoundError(f"{folder / tag} does not exist, but {latest} names it")
        return folder, tag
    return None


def _read_zero(root: Path, tag: str) -> Contents:
    """The weights of a DeepSpeed checkpoint, joined from the parts of its ranks.

    DeepSpeed unpickles whatever the files hold, so they are first read in torch's safe way, which
    lets nothing through but the few classes of DeepSpeed's own.
    """
    folder = root / tag
    models = sorted(folder.glob("*_model_states.pt"))
    if not models:
        raise FileNotFoundError(f"{folder / 'mp_rank_00_model_states.pt'} does not exist")
    try:
        from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
        from deepspeed.runtime.zero.config import ZeroStageEnum
        from deepspeed.utils.tensor_fragment import fragment_address
        from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint
    except ImportError as error:
        raise UserError(
            f"{root} is a DeepSpeed checkpoint, which only DeepSpeed can join: "
            "pip install 'recformer[deepspeed]'"
        ) from error
    torch.serialization.add_safe_globals(
        [DynamicLossScaler, LossScaler, ZeroStageEnum, fragment_address]
    )
    content = _torch_load(models[0], mmap=True)
    ranks = content.get("dp_world_size") if isinstance(content, dict) else None
    if not isinstance(ranks, int):
        raise UserError(f"{models[0]} does not say of how many processes it is")
    parts = _parts_of_ranks(folder, ranks)
    for path in [*models[1:], *parts]:
        _torch_load(path, mmap=True)
    with redirect_stdout(io.StringIO()):
        try:
            state = get_fp32_state_dict_from_zero_checkpoint(str(root), tag)
        except (ValueError, LookupError, RuntimeError) as error:
            raise UserError(f"DeepSpeed cannot join {folder}: {first_line(error)}") from error
    kind = f"a DeepSpeed ZeRO checkpoint of {ranks} {'process' if ranks == 1 else 'processes'}"
    return Contents(kind, state, _facts_of(content))


def _parts_of_ranks(folder: Path, ranks: int) -> list[Path]:
    """The files with each process's part of the weights, all there and none too many."""
    found = sorted(path.name for path in folder.glob("*_optim_states.pt"))
    prefix = found[0].partition("zero_pp_rank_")[0] if found else ""
    wanted = [f"{prefix}zero_pp_rank_{rank}_mp_rank_00_optim_states.pt" for rank in range(ranks)]
    absent = [name for name in wanted if name not in found]
    if absent:
        raise FileNotFoundError(
            f"{folder} lacks {few(absent)}: it was written by {ranks} processes, each with a part "
            "of the weights; copy the missing files from where it was trained"
        )
    strange = [name for name in found if name not in wanted]
    if strange:
        raise UserError(
            f"{folder} holds {few(strange)}, but was written by {ranks} processes: remove what "
            "another run left there"
        )
    return [folder / name for name in wanted]


def describe_state_dict(state: Mapping[str, Tensor]) -> str:
    """What kind of model these weights look like, in a few words."""
    for pattern, kind in LOOKS_LIKE:
        if any(re.search(pattern, _strip_wrappers(key)) for key in state):
            return kind
    return f"an unknown model (its first keys are {few(list(state))})"


def few(names: list[str], most: int = 4) -> str:
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + rest


def first_line(error: Exception) -> str:
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


def load_checkpoint(
    model: PreTrainedModel,
    checkpoint: PathLike | Mapping[str, Tensor],
    allow_missing: Iterable[str] = (),
    item_table: bool = True,
    source: str | None = None,
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
        source: what to call the checkpoint in report and errors; its path where it is one.

    Returns:
        Every key of the file and of the model, and what became of it.

    Raises:
        FileNotFoundError, UserError: as `read_state_dict`.
        UserError: the file is of another model, keys are missing, or shapes differ; nothing in the
            model has changed then.
    """
    if isinstance(checkpoint, Mapping):
        state, source = dict(checkpoint), source or "state dict"
    else:
        state, source = read_state_dict(checkpoint), source or str(checkpoint)
    report = LoadReport(source, type(model).__name__)
    names = plain_names(state, PREFIXES[-1], source)
    values = {plain: state[key] for plain, key in names.items()}
    own = {plain_name(key): (key, value) for key, value in model.state_dict().items()}
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
                asked = "not asked for" if not item_table else why_left_over(plain)
                report.left_over[key] = asked
        elif plain not in own:
            report.left_over[key] = why_left_over(plain)
    return report


def _allowed_keys(own: Iterable[str], patterns: Iterable[str]) -> set[str]:
    """The plain keys that `patterns` allow to be missing, each pattern checked to fit one."""
    own = list(own)
    allowed: set[str] = set()
    for pattern in patterns:
        fitting = [plain for plain in own if fnmatchcase(plain, plain_name(pattern))]
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
            "; start from it as the backbone instead (recformer.backbones.load_backbone)"
            if kind in BACKBONE_KINDS
            else ""
        )
        return f"{source} looks like {kind}, expected a Recformer checkpoint{advice}"
    listed = compact(own[plain][0] for plain in missing)
    return f"{source} lacks {len(missing)} of the {len(own)} tensors of the model: {listed}"


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
        parts.append(f"the file also has {compact(deeper)}, for which the model has no layer")
    return (
        f"{source} does not fit {target}: {'; '.join(parts)}. Build the model with the "
        "configuration that the checkpoint was trained with"
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Say what a checkpoint is."""
    # Imported here because it builds on this module.
    from recformer.inspection import inspect_checkpoint

    parser = argparse.ArgumentParser(
        prog="python -m recformer.checkpoint",
        description="Say what a checkpoint is: kind, shapes, run, configuration, and how its keys "
        "differ from what the models expect.",
    )
    parser.add_argument(
        "path",
        help="a released .bin file, a Lightning .ckpt, a DeepSpeed folder, a folder of shards, or "
        "a model folder, of a Recformer or of a language model",
    )
    print(inspect_checkpoint(parser.parse_args(argv).path))


if __name__ == "__main__":
    exit_with_message(main)
