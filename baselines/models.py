"""From settings to models with their collators, and back from a saved folder.

A model is a `recformer.evaluation.recommender.Recommender`. Sequence models are made of a network
(`baselines/sequence/sasrec.py`, `huggingface.py`), item vectors (`item_table.py`) and an objective
(`recommender.py`).
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import nn

from baselines.generative.gpt2_codes import Gpt2Codes, Gpt2CodesTrainCollator
from baselines.generative.recommender import CodeHistoryCollator, CodeRecommender
from baselines.generative.tiger import Tiger, TigerTrainCollator
from baselines.semantic_ids.ids import SemanticIds
from baselines.sequence.collators import (
    CausalCollator,
    ItemHistoryCollator,
    MaskedCollator,
    PermutedCollator,
)
from baselines.sequence.features import FeatureAggregation, InteractionFeatures
from baselines.sequence.gru import GRU4Rec
from baselines.sequence.huggingface import HuggingFaceNetwork
from baselines.sequence.item_table import ItemTable, nearest_items
from baselines.sequence.permuted import PermutedNetwork
from baselines.sequence.published import load_published
from baselines.sequence.recommender import Objective, SequenceNetwork, SequenceRecommender
from baselines.sequence.replaced import ReplacedItemRecommender
from baselines.sequence.sasrec import SASRec
from baselines.settings import (
    AttentionSettings,
    GenerativeSettings,
    Gru4RecSettings,
    SasrecSettings,
    SequenceSettings,
    Settings,
    TigerSettings,
    TransformerSettings,
    settings_of,
)
from baselines.text_vectors import keyed_text_vectors
from baselines.untrained.base import Untrained
from baselines.untrained.cooccurrence import Cooccurrence
from baselines.untrained.popularity import Popularity
from baselines.untrained.session_neighbours import SessionNeighbours
from baselines.untrained.text_neighbours import TextNeighbours
from recformer.data.features import Encoded, Of, encode_features
from recformer.data.processed import ProcessedFolder
from recformer.data.windows import WindowView
from recformer.files import UserError, check_folder, file_crc32, read_json, sha256_of

UNTRAINED: dict[str, Callable[..., Untrained]] = {
    "popularity": Popularity,
    "text_neighbours": TextNeighbours,
    "cooccurrence": Cooccurrence,
    "sknn": SessionNeighbours,
    "vsknn": partial(SessionNeighbours, weighted=True),
}

GENERATE: dict[str, type[CodeRecommender]] = {"tiger": Tiger, "gpt2_codes": Gpt2Codes}


@dataclass(frozen=True)
class Built:
    """A model and how its batches are made.

    Attributes:
        model: a `recformer.evaluation.recommender.Recommender`.
        train_collator: None where nothing is trained.
        semantic_ids_hash: of the items' codes and the sizes of their codebooks; None without codes.
        content_hash: of what else it reads beside item ids: texts or their vectors, features,
            published weights; None where it reads nothing of these.
        every_prefix: `train_collator` wants every beginning of a training sequence.
    """

    model: nn.Module
    train_collator: Callable | None
    eval_collator: Callable
    semantic_ids_hash: str | None = None
    content_hash: str | None = None
    every_prefix: bool = False


def build(model: str, settings: Settings, folder: ProcessedFolder) -> Built:
    """A model with random weights (torch's global generator), or one without weights.

    Args:
        model: one of `baselines.settings.SETTINGS`.
        settings: its settings.
        folder: the data.

    Raises:
        UserError, FileNotFoundError: an encoder, codes or a published file that cannot be read or
            do not fit the data.
    """
    if model in UNTRAINED:
        untrained = UNTRAINED[model](folder, settings)
        content = untrained.content_hash if isinstance(untrained, TextNeighbours) else None
        whole = ItemHistoryCollator(sys.maxsize)  # all of the history
        return Built(untrained, None, whole, content_hash=content)
    if isinstance(settings, GenerativeSettings):
        return _build_generative(settings, folder)
    assert isinstance(settings, SequenceSettings)
    return _build_sequence(settings, folder)


def _build_sequence(settings: SequenceSettings, folder: ProcessedFolder) -> Built:
    vectors = codes = codes_hash = None
    content: list[bytes | str] = []  # that is read beside item ids
    if settings.text_encoder is not None:
        vectors, key = keyed_text_vectors(folder, settings.text_encoder)
        content.append(key)
    if settings.semantic_ids is not None:
        ids = SemanticIds.load(settings.semantic_ids, folder.asins)
        codes, codes_hash = ids.codes, _hash(ids)

    encoded = encode_features(folder) if settings.features is not None else {}
    _check_features(settings, encoded)

    def aggregation(kind: type[FeatureAggregation], of: Of) -> FeatureAggregation | None:
        own = encoded.get(of)
        if not own:
            return None
        assert settings.features is not None
        return kind(
            own, settings.hidden_size, settings.features, settings.soft_one_hot,
            settings.feature_dropout, settings.swap_noise,
        )  # fmt: skip

    def table() -> ItemTable:
        return ItemTable(
            folder.num_items, settings.hidden_size, settings.items, vectors, codes,
            settings.projection_layers,
            folder.num_trained_items if isinstance(folder, WindowView) else None,
            aggregation(FeatureAggregation, "item"),
        )  # fmt: skip

    similar = None
    if settings.hard_negatives:
        if settings.hard_negatives >= folder.num_items:
            raise UserError(
                f"--hard_negatives {settings.hard_negatives}: an item has only "
                f"{folder.num_items - 1} others"
            )
        assert vectors is not None
        similar = torch.from_numpy(nearest_items(vectors, settings.hard_negatives))
    counts = None
    if settings.negative_power or settings.logq:
        counts = torch.from_numpy(np.bincount(folder.train.items, minlength=folder.num_items))
        if (counts > 0).sum() < 2:
            raise UserError(f"{folder.path}: two items must occur in training to sample by counts")
    objective = settings.objective if isinstance(settings, TransformerSettings) else "clm"
    kind: type[SequenceRecommender] = SequenceRecommender
    more: dict[str, Any] = {}
    if isinstance(settings, TransformerSettings) and objective == "rtd":
        kind = ReplacedItemRecommender
        more = {
            "discriminator_weight": settings.discriminator_weight,
            "discriminator": _network(settings) if settings.separate_discriminator else None,
        }
    recommender = kind(
        _network(settings),
        table(),
        Objective.of(settings),
        settings.hidden_size,
        table() if settings.separate_outputs else None,
        similar,
        counts,
        **more,
    )
    recommender.input_features = aggregation(InteractionFeatures, "interaction")
    content += [part for of in encoded.values() for one in of for part in one.content()]
    if isinstance(settings, SasrecSettings) and settings.from_published:
        load_published(recommender, settings.from_published, folder.asins)
        content.append(str(file_crc32(settings.from_published)))
    hashes = codes_hash, sha256_of(*content) if content else None
    length = settings.max_length
    if objective == "clm":
        return Built(recommender, CausalCollator(length), ItemHistoryCollator(length), *hashes)
    assert isinstance(settings, TransformerSettings)
    collator: Callable
    if objective == "plm":
        collator = PermutedCollator(length, settings.mask_probability, settings.max_span)
    else:
        collator = MaskedCollator(length, folder.num_items, settings.mask_probability)
    hidden_last = ItemHistoryCollator(length, folder.num_items)
    return Built(recommender, collator, hidden_last, *hashes)


def _network(settings: SequenceSettings) -> SequenceNetwork:
    if isinstance(settings, Gru4RecSettings):
        return GRU4Rec(settings.hidden_size, settings.num_layers, settings.dropout)
    assert isinstance(settings, AttentionSettings)
    sizes = (
        settings.hidden_size, settings.num_layers, settings.num_heads, settings.max_length,
        settings.dropout,
    )  # fmt: skip
    if not isinstance(settings, TransformerSettings):
        return SASRec(*sizes)
    width = settings.feed_forward_size
    if settings.objective == "plm":
        return PermutedNetwork(settings.arch, *sizes, width)
    return HuggingFaceNetwork(settings.arch, settings.objective, *sizes, width)


def _check_features(settings: SequenceSettings, encoded: dict[Of, list[Encoded]]) -> None:
    """Refuse features that would say what is to be predicted, or that a file has no weights for."""
    if not encoded:
        return
    if isinstance(settings, SasrecSettings) and settings.from_published:
        raise UserError("--from_published: the published weights know no --features")
    telling = [
        one.feature.name
        for one in encoded["interaction"]
        if one.feature.name not in ("hour", "weekday", "since_last")
    ]
    if telling and getattr(settings, "objective", "") == "rtd":
        raise UserError(
            f"--objective rtd: the feature {telling[0]} of interactions stays that of the true "
            f"item and may say which items are replaced; leave it out, take a column as the item's "
            f"(recformer process --features NAME:…:item), or another objective"
        )


def _build_generative(settings: GenerativeSettings, folder: ProcessedFolder) -> Built:
    assert settings.semantic_ids is not None  # `settings_of` refused it
    ids = SemanticIds.load(settings.semantic_ids, folder.asins)
    length = settings.max_length
    if isinstance(settings, TigerSettings):
        users, every = settings.user_tokens, settings.targets == "all"
        if users and isinstance(folder, WindowView):
            raise UserError("--user_tokens: the sequences of windows are no users, leave it out")
        return Built(
            Tiger(ids.codes, ids.codebook_size, settings),
            TigerTrainCollator(length, last=every, user_tokens=users),
            CodeHistoryCollator(length, users),
            _hash(ids),
            every_prefix=every,
        )
    network = Gpt2Codes(ids.codes, ids.codebook_size, settings)
    return Built(network, Gpt2CodesTrainCollator(length), CodeHistoryCollator(length), _hash(ids))


def _hash(ids: SemanticIds) -> str:
    """Of all that a model has of the ids: the file may have been written again since."""
    return sha256_of(ids.hash, str(ids.codebook_size))


def load(path: str | os.PathLike, folder: ProcessedFolder) -> Built:
    """A trained model from the `best_model` folder of a run, to rank on the data it was trained on.

    Raises:
        FileNotFoundError: the folder is not whole.
        UserError: it was trained on other items, or its file of semantic ids holds other codes now.
    """
    check_folder(path, "config.json", "model.safetensors")
    saved = read_json(Path(path) / "config.json")
    if saved["asins"] != folder.asins:
        raise UserError(f"{path} was trained on other items than those of {folder.path}")
    given = {name: value for name, value in saved["settings"].items() if name != "from_published"}
    built = build(saved["model"], settings_of(saved["model"], given), folder)
    if saved.get("semantic_ids_hash") != built.semantic_ids_hash:
        raise UserError(
            f"{path} was trained with other codes than {saved['settings']['semantic_ids']} holds "
            "now: put the file of its training there"
        )
    built.model.load_state_dict(load_file(Path(path) / "model.safetensors"))
    built.model.eval()
    return built
