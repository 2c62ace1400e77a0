"""Language models as the start of a Recformer (paper section 2.3: "initialised with Longformer").

`from_backbone` turns a Longformer, RoBERTa, BERT or Recformer folder into a `RecformerConfig` and a
state dict with Recformer's keys; `load_backbone` builds the model too; `backbone_config` reads the
configuration alone. What differs between families stands in the tables below. Key names inside this
file are *plain*: without the prefixes of the file or of the model class.

Shapes: H hidden, V vocabulary, P rows of a position table, N items.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor
from transformers import AutoConfig, PreTrainedModel
from transformers.activations import ACT2FN

from recformer.checkpoints.hub import local_folder
from recformer.checkpoints.loading import LoadReport, load_checkpoint
from recformer.checkpoints.names import (
    HEAD_BIASES,
    ITEM_POSITIONS,
    ITEM_TABLE,
    POSITIONS,
    TOKEN_TYPES,
    UNKNOWN_NAME,
    WORDS,
    PathLike,
    StateDict,
    compact,
    describe_state_dict,
    plain_names,
    why_left_over,
)
from recformer.checkpoints.reading import read_state_dict
from recformer.config import PAPER, RecformerConfig
from recformer.files import UserError, check_folder, read_json
from recformer.models import RecformerForPretraining
from recformer.tokenization import RecformerTokenizer

Model = TypeVar("Model", bound=PreTrainedModel)


@dataclass(frozen=True)
class Architecture:
    """Differences of a family of language models from ours.

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
    "bert": Architecture("bert.", 0, _BERT_HEAD),
    "roberta": Architecture("roberta.", None, _OWN_HEAD),
    "xlm-roberta": Architecture("roberta.", None, _OWN_HEAD),
    "camembert": Architecture("roberta.", None, _OWN_HEAD),
    "longformer": Architecture("longformer.", None, _OWN_HEAD),
    "recformer": Architecture("longformer.", None, _OWN_HEAD),
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
    source, folder = str(path_or_hub_id), local_folder(path_or_hub_id, weights)
    check_folder(folder, "config.json")
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


class _Conversion:
    """Moves tensors from a backbone's names to ours, noting what becomes of each."""

    def __init__(self, backbone: _Backbone, tensors: StateDict, prefix: str, seed: int) -> None:
        self.source = backbone.source
        self.tensors = tensors
        self.names = plain_names(tensors, prefix, backbone.source)
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

    def initialise(self, key: str, *shape: int) -> None:
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
                self.report.left_over[key] = reason = why_left_over(name)
                if reason == UNKNOWN_NAME and name.startswith(("encoder.", "embeddings.")):
                    strange.append(name)
        if strange:
            raise UserError(
                f"{self.source} has {compact(strange)}, for which Recformer's encoder has no "
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
        work.initialise(ITEM_POSITIONS, config.max_item_embeddings, config.hidden_size)
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
    """Row of a backbone's position table that each row of ours takes, and how to say it.

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


def _convert_head(
    work: _Conversion, config: RecformerConfig, family: Architecture, tied: bool
) -> None:
    present = {ours: theirs for theirs, ours in family.head.items() if work.has(theirs)}
    hidden, vocabulary = config.hidden_size, config.vocab_size
    for ours, theirs in present.items():
        work.copy(theirs, ours)
    if not present:
        work.initialise("lm_head.dense.weight", hidden, hidden)
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
            work.initialise("lm_head.decoder.weight", vocabulary, hidden)
