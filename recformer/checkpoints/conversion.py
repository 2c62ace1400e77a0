"""Into pretraining and out of it: start weights from a language model, released files from a run.

- `save_start_weights` writes what pretraining starts from, in the paper Longformer's weights.
- `convert_pretraining` turns what pretraining wrote, in any of its forms, into the published pair
  of files and a folder for `from_pretrained`.

The files hold every key of the published ones, so the published classes, which are strict, load
them: the buffer `embeddings.position_ids` too, which nobody needs.

All that is to be written is checked before the first file is.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from recformer.checkpoints.backbones import backbone_config, load_backbone
from recformer.checkpoints.card import ENCODING, write_card
from recformer.checkpoints.loading import LoadReport, load_checkpoint
from recformer.checkpoints.names import (
    POSITIONS,
    PREFIXES,
    WORDS,
    PathLike,
    StateDict,
    compact,
    plain_name,
    plain_names,
)
from recformer.checkpoints.reading import Contents, read_checkpoint, read_state_dict
from recformer.files import (
    UserError,
    atomic_folder,
    atomic_write,
    remove_leftovers,
    write_checksums,
)
from recformer.models import RecformerForPretraining
from recformer.tokenization import RecformerTokenizer

LONGFORMER = "allenai/longformer-base-4096"

# Pretraining leaves configuration, tokenizer and start weights in a folder of this name in its
# output folder; a checkpoint, or the shards made from it, lies at most so many levels below.
START_FOLDER = "start"
START_LEVELS = 4

PRETRAIN_FILE = "recformer_pretrain_ckpt.bin"
SEQREC_FILE = "seqrec_pretrain_ckpt.bin"
MODEL_FOLDER = "recformer_pretrain_ckpt"

# The published classes keep this buffer, an int64 arange of shape (1, rows), in their state dict.
POSITION_IDS = "embeddings.position_ids"
# What `zero_to_fp32.py` put before every key when the published model was trained.
EXPORT_PREFIX = "_forward_module.model."

SIXTEEN_BITS = (torch.bfloat16, torch.float16)


def save_start_weights(
    model_name_or_path: PathLike, output_path: PathLike, *, seed: int = 0, **overrides: Any
) -> LoadReport:
    """Write a language model as the weights of a `RecformerForPretraining`, a state dict.

    Args:
        model_name_or_path: as for `recformer.checkpoints.backbones.from_backbone`.
        output_path: the file, replaced if it exists.
        seed: of tensors that the language model has nothing for.
        overrides: fields of the configuration; `max_token_num` and `max_item_embeddings` decide the
            rows of two tables.

    Returns:
        What became of every tensor.

    Raises:
        FileNotFoundError, UserError: as `from_backbone`, or `output_path` is a folder.
    """
    if Path(output_path).is_dir():
        raise UserError(f"{output_path} is a folder, expected the name of a file to write")
    model, report = load_backbone(
        RecformerForPretraining, model_name_or_path, seed=seed, **overrides
    )
    _save_state(_published_state(model), Path(output_path))
    return report


def convert_pretraining(
    checkpoint: PathLike,
    output_dir: PathLike,
    *,
    start_weights: PathLike | None = None,
    model_name_or_path: PathLike | None = None,
    export_file: PathLike | None = None,
    **overrides: Any,
) -> tuple[LoadReport, list[Path]]:
    """Turn a checkpoint of pretraining into released files.

    The word embeddings of a run that froze them are the start weights': where the checkpoint lacks
    them, or has them rounded to the 16 bits of training, they are taken from there.

    Args:
        checkpoint: as for `read_checkpoint`: a DeepSpeed folder, a Lightning file, a state dict, or
            a folder of weights, whole or in shards.
        output_dir: gets `recformer_pretrain_ckpt.bin` (keys of the published `RecformerModel`),
            `seqrec_pretrain_ckpt.bin` (those of its `RecformerForPretraining`, `longformer.…` and
            `lm_head.…`, as published), and the folder `recformer_pretrain_ckpt` with weights,
            configuration and tokenizer; float32.
        start_weights: file or folder; None for the folder `start` that pretraining leaves in its
            output folder, if there is one.
        model_name_or_path: gives configuration and tokenizer; None for the folder of the start
            weights, else Longformer.
        export_file: also written if given: all weights under `_forward_module.model.…`, which the
            published `convert_pretrain_ckpt.py` reads.
        overrides: fields of the configuration.

    Returns:
        What became of every tensor, and what was written.

    Raises:
        FileNotFoundError, UserError: as `read_checkpoint`; the checkpoint is of another model,
            lacks tensors, has some of another shape or with values that are not finite, or has
            frozen word embeddings that are not those of the start weights. Nothing has been
            written then.
    """
    output = Path(output_dir)
    _refuse_to_overwrite(output)
    start = Path(start_weights) if start_weights is not None else find_start(checkpoint)
    if start is not None and not start.exists():
        raise FileNotFoundError(f"the start weights {start} do not exist")
    own_config = start is not None and (start / "config.json").is_file()
    source = model_name_or_path or (start if start is not None and own_config else LONGFORMER)
    config = backbone_config(source, **overrides)
    tokenizer = RecformerTokenizer.from_pretrained(source, config)
    if len(tokenizer) > config.vocab_size:
        raise UserError(
            f"the tokenizer of {source} has {len(tokenizer)} tokens, its model {config.vocab_size}"
        )

    contents = read_checkpoint(checkpoint)
    names = plain_names(contents.tensors, PREFIXES[-1], str(checkpoint))
    state = {plain: contents.tensors[key] for plain, key in names.items()}
    if POSITIONS in state:  # a table repeated for long inputs is longer than the backbone's
        config.max_position_embeddings = len(state[POSITIONS])
        most = len(state[POSITIONS]) - config.pad_token_id - 1
        if config.max_token_num > most:
            raise UserError(
                f"{checkpoint} has positions for {most} tokens, but its configuration is to say "
                f"max_token_num {config.max_token_num}: give the number it was trained with "
                "(--max_token_num)"
            )
    restored = _restore_words(contents, state, start, str(checkpoint))
    broken = [key for key, value in state.items() if not torch.isfinite(value).all()]
    if broken:
        raise UserError(
            f"{checkpoint} has values that are not finite in {compact(broken)}: the run that wrote "
            "it had diverged; take an earlier checkpoint"
        )
    model = RecformerForPretraining(config)
    report = load_checkpoint(model, state, source=str(checkpoint))
    if restored:
        key = next(key for key in report.copied if plain_name(key) == WORDS)
        report.copied.remove(key)
        report.filled[key] = restored
    report.notes.append(f"{contents.kind}{', ' if contents.facts else ''}{contents.run}")
    report.notes.append(f"configuration and tokenizer of {source}")
    facts = {
        "checkpoint": f"{contents.kind}{', ' if contents.facts else ''}{contents.run}",
        "configuration and tokenizer": f"of {Path(source).name}",
        "an item": f"the first {config.max_attr_num} attributes, {config.max_attr_length} tokens "
        f"each; {config.max_item_embeddings - 1} items, {config.max_token_num} tokens a sequence",
        "pooling": config.pooler_type,
    }
    written = _write_released(model, tokenizer, output, facts)
    if export_file is not None:
        exported = {EXPORT_PREFIX + key: value for key, value in _published_state(model).items()}
        _save_state(exported, Path(export_file))
        written.append(Path(export_file))
    return report, written


def find_start(checkpoint: PathLike) -> Path | None:
    """The folder `start` of the run that wrote `checkpoint`, if there is one."""
    for parent in list(Path(checkpoint).resolve().parents)[:START_LEVELS]:
        if (parent / START_FOLDER / "config.json").is_file():
            return parent / START_FOLDER
    return None


def _restore_words(
    contents: Contents, state: StateDict, start: Path | None, source: str
) -> str | None:
    """Put the start weights' word embeddings into `state` where they were frozen; why, or None.

    Frozen parameters have no float32 copy in a DeepSpeed checkpoint: it has them in the 16 bits of
    training, or not at all.
    """
    words = state.get(WORDS)
    if start is None:
        if words is None:
            raise UserError(
                f"{source} lacks the word embeddings, which were frozen in training, and no folder "
                f"{START_FOLDER!r} lies beside it: give the weights that the training started from "
                "(--start_weights)"
            )
        return None
    given = [v for k, v in read_state_dict(start).items() if k.endswith(WORDS)]
    if len(given) != 1:
        raise UserError(f"{start} has no word embeddings, so it is not what training started from")
    original = given[0].float()
    if words is None:
        state[WORDS] = original
        return f"frozen in training and not in the checkpoint: those of {start}"
    if words.shape != original.shape:
        raise UserError(
            f"{WORDS} is {tuple(words.shape)} in {source} and {tuple(original.shape)} in the start "
            f"weights {start}: give those that this training started from (--start_weights)"
        )
    trained = words.float()
    if torch.equal(trained, original):
        return None
    if any(torch.equal(trained, original.to(dtype).float()) for dtype in SIXTEEN_BITS):
        state[WORDS] = original
        return f"frozen in training and rounded to 16 bits in the checkpoint: those of {start}"
    others = {value.dtype for key, value in contents.tensors.items() if not key.endswith(WORDS)}
    if words.dtype in SIXTEEN_BITS and torch.float32 in others:
        raise UserError(
            f"the word embeddings of {source} were frozen in training, but they are not those of "
            f"{start}: give the weights that this training started from (--start_weights)"
        )
    return None


def _refuse_to_overwrite(output_dir: Path) -> None:
    """The model folder is replaced as a whole, so what stands there must be one."""
    if output_dir.exists() and not output_dir.is_dir():
        raise UserError(f"{output_dir} is a file, expected a folder to write to")
    folder = output_dir / MODEL_FOLDER
    if folder.exists() and not (folder / "config.json").is_file():
        raise UserError(f"{folder} exists and is no model folder: move it away, or choose another")


def _write_released(
    model: RecformerForPretraining,
    tokenizer: RecformerTokenizer,
    output_dir: Path,
    facts: Mapping[str, object],
) -> list[Path]:
    folder = output_dir / MODEL_FOLDER
    remove_leftovers(output_dir)
    with atomic_folder(folder) as partial:
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        write_card(
            partial,
            "Recformer, pretrained",
            "Reads items and histories from their texts; the start of finetuning on a catalogue.",
            facts,
            {},
            ENCODING,
        )
        write_checksums(partial)
        # published: the first file is for RecformerModel; the second is read into
        # RecformerForSeqRec, and has the head all the same.
        state = _published_state(model)
        bare = {plain_name(key): v for key, v in state.items() if key.startswith(PREFIXES[-1])}
        _save_state(bare, output_dir / PRETRAIN_FILE)
        _save_state(state, output_dir / SEQREC_FILE)
    return [output_dir / PRETRAIN_FILE, output_dir / SEQREC_FILE, folder]


def _published_state(model: RecformerForPretraining) -> dict[str, Tensor]:
    """The model's tensors and the buffer that the published classes have beside them."""
    state = dict(model.state_dict())
    rows = model.longformer.embeddings.position_embeddings.num_embeddings
    return {PREFIXES[-1] + POSITION_IDS: torch.arange(rows)[None]} | state


def _save_state(state: dict[str, Tensor], path: Path) -> None:
    with atomic_write(path, "wb") as handle:
        torch.save(state, handle)
