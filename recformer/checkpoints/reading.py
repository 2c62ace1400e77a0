"""Reading checkpoints of every form: one file, shards, folders, Lightning, DeepSpeed ZeRO."""

from __future__ import annotations

import io
import os
import pickle
import re
from collections.abc import Mapping
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from recformer.checkpoints.names import PathLike, StateDict, few, first_line
from recformer.files import UserError, check_folder, check_torch_file, read_json, refuse_pointer

# Weight files of a folder, best first; an index names the shards beside it.
WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)

# Training frameworks wrap the state dict in a dict of their own under one of these names.
CONTAINERS = ("state_dict", "model_state_dict", "module", "model")

# Facts about its run that such a dict may hold.
FACTS = (
    "epoch",
    "global_step",
    "global_steps",
    "pytorch-lightning_version",
    "ds_version",
    "hyper_parameters",
)


@dataclass
class Contents:
    """Contents of a checkpoint, a file or a folder.

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
        """The facts as one line."""
        return ", ".join(f"{name} {value}" for name, value in self.facts.items())


def read_state_dict(path: PathLike) -> StateDict:
    """Read the tensors of a checkpoint; see `read_checkpoint`."""
    return read_checkpoint(path).tensors


def read_checkpoint(path: PathLike) -> Contents:
    """Read a checkpoint onto the CPU, under the file's own key names.

    Args:
        path: a `.safetensors` file, a file written by `torch.save` (`.bin`, `.pt`, `.ckpt`: a state
            dict, or a training checkpoint that holds one), a folder with such a file, whole or in
            shards, or a folder that DeepSpeed wrote. The first bytes of a file, not its name,
            tell its form. The weights of a DeepSpeed folder are joined by DeepSpeed, in float32 but
            for frozen ones, which it keeps in the precision of training, or leaves out.

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
    refuse_pointer(path)
    if head.lstrip()[:9].lower().startswith((b"<!doctype", b"<html")):
        raise UserError(
            f"{path} is a web page in place of the weights (it begins with {head[:12]!r}): open it "
            "in a browser and download the file that it asks you to confirm"
        )
    # safetensors: eight bytes of length, then JSON. torch.save: a zip file, or a bare pickle.
    if head[8:9] == b"{":
        check_folder(path.parent, path.name)
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
    content = _torch_load(path)
    if head[:2] == b"PK":
        check_torch_file(path)
    return _contents_of(content, path)


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
        tag = latest.read_text(encoding="utf-8", errors="replace").strip()
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
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # or DeepSpeed warns that it found no GPU
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
