"""Weights from files: released checkpoints and our own.

- `read_checkpoint` reads a file or folder, `read_state_dict` its tensors alone.
- `load_checkpoint` puts a Recformer checkpoint into a model, every key accounted for.

`recformer inspect FILE_OR_FOLDER` says what one is (`recformer.checkpoints.inspection`).

Nothing is loaded halfway: names and shapes are checked before the first value of a model changes.
Key names inside this file are *plain*: without the prefixes of the file or of the model class
(`embeddings.…`, `encoder.layer.N.…`, `lm_head.…`, `item_embedding.weight`). Language models as the
start of a Recformer are in `recformer.checkpoints.backbones`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

import torch
from torch import Tensor
from transformers import PreTrainedModel

from recformer.checkpoints.names import (
    BACKBONE_KINDS,
    HEAD_BIASES,
    ITEM_TABLE,
    PREFIXES,
    PathLike,
    StateDict,
    compact,
    describe_state_dict,
    plain_name,
    plain_names,
    why_left_over,
)
from recformer.checkpoints.reading import read_state_dict
from recformer.files import UserError


@dataclass
class LoadReport:
    """Account of every tensor of a file and of the model it was loaded into.

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
            "; start from it as the backbone instead "
            "(recformer.checkpoints.backbones.load_backbone)"
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
