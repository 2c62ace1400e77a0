"""Start of a training: a checkpoint, a language model or random weights."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch

from recformer.checkpoints.backbones import backbone_config, from_backbone
from recformer.checkpoints.loading import load_checkpoint
from recformer.checkpoints.names import ITEM_TABLE, StateDict, plain_name
from recformer.checkpoints.reading import read_state_dict
from recformer.config import PAPER, RecformerConfig
from recformer.data.processed import ITEM_FILE
from recformer.files import UserError, read_json
from recformer.models import RecformerForPretraining, RecformerForSeqRec, RecformerModel
from recformer.tokenization import RecformerTokenizer

Model = TypeVar("Model", RecformerForSeqRec, RecformerForPretraining)


def _tokenizer_fields(tokenizer: RecformerTokenizer) -> dict[str, Any]:
    """The fields of a configuration that a tokenizer decides."""
    eos = tokenizer.eos_token_id
    return {
        "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": eos,
        "sep_token_id": eos,
    }


def start_tokenizer(
    pretrain_ckpt: str | None,
    model_name_or_path: str,
    tokenizer_name: str | None,
    from_scratch: bool,
    overrides: dict[str, Any],
) -> RecformerTokenizer:
    """The tokenizer of `load_start_model`, same arguments, without reading any weights."""
    source = model_name_or_path
    if pretrain_ckpt is not None and not Path(pretrain_ckpt).is_file():
        source = pretrain_ckpt
    if from_scratch:
        source = tokenizer_name or source
        config = RecformerConfig(**PAPER | overrides)
    else:
        config = backbone_config(source, **overrides)
    return RecformerTokenizer.from_pretrained(tokenizer_name or source, config)


def keep_no_activations(encoder: RecformerModel) -> None:
    """Compute the activations of every layer again in the backward pass, from the same random
    state, in place of keeping them."""
    encoder.gradient_checkpointing_enable({"use_reentrant": False})


def load_start_model(
    model_class: type[Model],
    pretrain_ckpt: str | None,
    model_name_or_path: str,
    tokenizer_name: str | None,
    from_scratch: bool,
    overrides: dict[str, Any],
    item_names: Sequence[str] | None = None,
) -> tuple[Model, RecformerTokenizer, str]:
    """The model that training starts from, its tokenizer and a report.

    It has no item table, but for one that `item_names` asks for.

    Args:
        model_class: `RecformerForSeqRec` or `RecformerForPretraining`.
        pretrain_ckpt: state-dict file, Recformer folder or language model; None for the language
            model `model_name_or_path`.
        model_name_or_path: gives configuration and tokenizer where `pretrain_ckpt` is a file.
        tokenizer_name: the tokenizer, where it is not with the weights.
        from_scratch: random weights, of the paper's shape with `overrides`; `tokenizer_name` or
            `model_name_or_path` gives the tokenizer.
        overrides: fields of the configuration.
        item_names: of the catalogue, by item id, where a `RecformerForSeqRec` is to keep the item
            table that a finetuned checkpoint carries; it does if the table is of these items: as
            many as its rows, and the same in the same order where the checkpoint is a folder with
            an `smap.json`. Otherwise the report says why not.

    Raises:
        FileNotFoundError, UserError: as `load_checkpoint` and `from_backbone`.
    """
    if from_scratch:
        source = tokenizer_name or model_name_or_path
        tokenizer = RecformerTokenizer.from_pretrained(source, RecformerConfig(**PAPER | overrides))
        config = RecformerConfig(**PAPER | _tokenizer_fields(tokenizer) | overrides)
        config.max_position_embeddings = config.max_token_num + config.pad_token_id + 1
        model = model_class(config)
        count = sum(parameter.numel() for parameter in model.parameters())
        report = f"random weights: {count:,} parameters, tokenizer {source}"
    elif pretrain_ckpt is not None and Path(pretrain_ckpt).is_file():
        source = model_name_or_path
        state = read_state_dict(pretrain_ckpt)
        # published: configuration and tokenizer come from Longformer, whose weights are not needed.
        config = backbone_config(source, **overrides)
        for key, tensor in state.items():  # a table repeated for long inputs is longer
            if key.endswith("embeddings.position_embeddings.weight"):
                config.max_position_embeddings = tensor.shape[0]
        model = model_class(config)
        report = str(load_checkpoint(model, state, item_table=False, source=pretrain_ckpt))
    else:
        source = pretrain_ckpt or model_name_or_path
        lm_head = model_class is RecformerForPretraining
        config, state, converted = from_backbone(source, lm_head=lm_head, **overrides)
        model = model_class(config)
        load_checkpoint(model, state, item_table=False)
        report = str(converted)
    if isinstance(model, RecformerForSeqRec):
        # A finetuned checkpoint's item table belongs to its own catalogue.
        model.item_embedding = None
        if item_names is not None and not from_scratch:
            report += _keep_table(model, state, pretrain_ckpt or source, item_names)
    tokenizer = RecformerTokenizer.from_pretrained(tokenizer_name or source, model.config)
    if len(tokenizer) > model.config.vocab_size:
        raise UserError(
            f"the tokenizer {tokenizer_name or source} has {len(tokenizer)} tokens, the model "
            f"{model.config.vocab_size}: they do not belong together"
        )
    return model, tokenizer, report


def _keep_table(
    model: RecformerForSeqRec, state: StateDict, source: str, item_names: Sequence[str]
) -> str:
    """Give the model the item table of a state dict, where it is of these items; says why not."""
    tables = [key for key in state if plain_name(key) == ITEM_TABLE]
    if not tables:
        return ""
    table, why = state[tables[0]], ""
    names = Path(source) / ITEM_FILE
    if table.shape != (len(item_names), model.config.hidden_size):
        why = f"it is {tuple(table.shape)}, the data have {len(item_names)} items"
    elif names.is_file() and _names_by_id(names) != list(item_names):
        why = f"{names} has other items than the data, or another order"
    if why:
        return f"\n  item vectors of the checkpoint are not used ({why}): encoded anew"
    model.init_item_embedding(table.to(model.dtype))
    return ""


def _names_by_id(path: Path) -> list[str]:
    """Names of `smap.json` in the order of their ids."""
    item_ids = read_json(path)
    return sorted(item_ids, key=item_ids.__getitem__)


def table_hash(table: torch.Tensor) -> str:
    """Short content hash of an item table."""
    return hashlib.sha256(table.detach().cpu().contiguous().numpy().tobytes()).hexdigest()[:16]


def weights_hash(model: torch.nn.Module) -> str:
    """Short content hash of a model's weights, item table left out."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        if not name.startswith("item_embedding"):
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:16]
