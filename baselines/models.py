"""From settings to models with their collators, and back from a saved folder.

A model is an `nn.Module` that satisfies `recformer.training.lit.Recommender`. The models that train
are made of a network (`baselines/sasrec.py`, `baselines/huggingface.py`), item vectors
(`baselines/item_table.py`) and an objective (`baselines/recommender.py`).
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn

from baselines.generative.gpt2_codes import Gpt2Codes, Gpt2CodesTrainCollator
from baselines.generative.recommender import CodeRecommender
from baselines.generative.recommender import HistoryCollator as CodeHistoryCollator
from baselines.generative.tiger import Tiger, TigerTrainCollator
from baselines.semantic_ids.ids import SemanticIds
from baselines.sequence.collators import CausalCollator, HistoryCollator, MaskedCollator
from baselines.sequence.huggingface import HuggingFaceNetwork
from baselines.sequence.item_table import KINDS, ItemTable, nearest_items
from baselines.sequence.published import load_published
from baselines.sequence.recommender import Objective, SequenceRecommender
from baselines.sequence.sasrec import SASRec
from baselines.text_vectors import text_vectors
from baselines.untrained.base import Baseline, Untrained
from baselines.untrained.cooccurrence import Cooccurrence
from baselines.untrained.popularity import Popularity
from baselines.untrained.text_neighbours import TextNeighbours
from recformer.data.processed import ProcessedFolder
from recformer.files import UserError, check_folder, read_json, sha256_of

SEQUENCE = {
    "hidden_size": 128,
    "num_layers": 2,
    "num_heads": 2,
    "dropout": 0.2,
    "max_length": 50,
    "loss": "softmax",
    "num_negatives": 256,
    "gbce_t": 0.75,
    "temperature": 1.0,
    "cosine": False,
    "hard_negatives": 0,
    "separate_outputs": False,
    "items": "id",
    "text_encoder": None,
    "projection_layers": 2,
    "semantic_ids": None,
}
GENERATIVE = {
    "semantic_ids": None,
    "hidden_size": 128,
    "num_layers": 4,
    "num_heads": 6,
    "dropout": 0.1,
    "max_length": 20,
    "num_beams": 50,
    "exact_rank": False,
}
TRANSFORMER = SEQUENCE | {"arch": "gpt2", "objective": "causal", "mask_probability": 0.2}

# Settings of each model and their defaults. A setting that a model does not have is refused.
MODELS: dict[str, dict[str, Any]] = {
    "popularity": {},
    "text_neighbours": {
        "decay": 0.6,
        "text_encoder": None,
        "weighting": "tfidf",
        "history_factor": 1.0,
    },
    "cooccurrence": {"decay": 0.6, "history_factor": 1.0},
    "sasrec": SEQUENCE | {"from_published": None},
    "gsasrec": SEQUENCE | {"loss": "gbce", "separate_outputs": True, "from_published": None},
    "bert4rec": TRANSFORMER | {"arch": "bert", "objective": "masked"},
    "transformer": TRANSFORMER,
    "tiger": GENERATIVE,
    "gpt2_codes": GENERATIVE | {"num_heads": 4},
}
UNTRAINED: dict[str, Callable[..., Baseline]] = {
    "popularity": Popularity,
    "text_neighbours": TextNeighbours,
    "cooccurrence": Cooccurrence,
}

GENERATE: dict[str, type[CodeRecommender]] = {"tiger": Tiger, "gpt2_codes": Gpt2Codes}


@dataclass(frozen=True)
class Built:
    """A model and how its batches are made.

    Attributes:
        train_collator: None where nothing is trained.
        semantic_ids_hash: of the items' codes and the sizes of their codebooks; None without codes.
    """

    model: nn.Module
    train_collator: Callable | None
    eval_collator: Callable
    semantic_ids_hash: str | None = None


def settings_of(model: str, given: dict[str, Any]) -> dict[str, Any]:
    """Settings of a model: the given ones, and its defaults for the others.

    Raises:
        UserError: an unknown model, a setting that the model does not have, or values that do not
            go together.
    """
    if model not in MODELS:
        raise UserError(f"--model {model}: expected one of {', '.join(MODELS)}")
    foreign = sorted(set(given) - set(MODELS[model]))
    if foreign:
        raise UserError(f"--{foreign[0]} is no flag of --model {model}")
    settings = MODELS[model] | given
    if model in UNTRAINED:
        return settings
    for name in ("hidden_size", "num_layers", "num_heads", "projection_layers", "num_beams"):
        if settings.get(name, 1) < 1:
            raise UserError(f"--{name} {settings[name]}: must be at least 1")
    if settings["max_length"] < 2:
        raise UserError(f"--max_length {settings['max_length']}: must be at least 2")
    if model != "tiger" and settings["hidden_size"] % settings["num_heads"]:
        raise UserError(
            f"--hidden_size {settings['hidden_size']} does not divide by --num_heads "
            f"{settings['num_heads']}"
        )
    if not 0 <= settings["dropout"] < 1:
        raise UserError(f"--dropout {settings['dropout']}: must be from 0 to below 1")
    if model in GENERATE:
        if settings["semantic_ids"] is None:
            raise UserError(
                f"--model {model} needs --semantic_ids FILE, as python -m baselines.semantic_ids "
                "writes it"
            )
        return settings
    if not 0 < settings.get("mask_probability", 0.2) <= 1:
        raise UserError(f"--mask_probability {settings['mask_probability']}: must be in (0, 1]")
    if settings["items"] not in KINDS:
        raise UserError(f"--items {settings['items']}: expected one of {', '.join(KINDS)}")
    needs_text = settings["items"] in ("frozen", "init", "add") or settings["hard_negatives"] > 0
    if needs_text != (settings["text_encoder"] is not None):
        raise UserError(
            "--text_encoder goes with --items frozen, init or add, or with --hard_negatives; got "
            f"--items {settings['items']} and --text_encoder {settings['text_encoder']}"
        )
    if (settings["items"] == "codes") != (settings["semantic_ids"] is not None):
        raise UserError("--items codes and --semantic_ids FILE go together")
    _objective(settings)
    return settings


def build(model: str, settings: dict[str, Any], folder: ProcessedFolder) -> Built:
    """A model with random weights (torch's global generator), or one without weights.

    Args:
        model: one of `MODELS`.
        settings: as `settings_of` gives them.
        folder: the data.

    Raises:
        UserError, FileNotFoundError: an encoder, codes or a published file that cannot be read or
            do not fit the data.
    """
    if model in UNTRAINED:
        baseline = Untrained(UNTRAINED[model](folder, **settings))
        return Built(baseline, None, HistoryCollator(sys.maxsize))  # all of it
    if model in GENERATE:
        return _build_generative(model, settings, folder)
    vectors = codes = codes_hash = None
    if settings["text_encoder"] is not None:
        vectors = text_vectors(folder, settings["text_encoder"])
    if settings["semantic_ids"] is not None:
        ids = SemanticIds.load(settings["semantic_ids"], folder.asins)
        codes, codes_hash = ids.codes, _hash(ids)
    hidden_size, max_length = settings["hidden_size"], settings["max_length"]
    if model in ("sasrec", "gsasrec"):
        network: nn.Module = SASRec(
            hidden_size, settings["num_layers"], settings["num_heads"], max_length,
            settings["dropout"],
        )  # fmt: skip
    else:
        network = HuggingFaceNetwork(
            settings["arch"], settings["objective"], hidden_size, settings["num_layers"],
            settings["num_heads"], max_length, settings["dropout"],
        )  # fmt: skip

    def table() -> ItemTable:
        return ItemTable(
            folder.num_items, hidden_size, settings["items"], vectors, codes,
            settings["projection_layers"],
        )  # fmt: skip

    similar = None
    if settings["hard_negatives"]:
        if settings["hard_negatives"] >= folder.num_items:
            raise UserError(
                f"--hard_negatives {settings['hard_negatives']}: an item has only "
                f"{folder.num_items - 1} others"
            )
        assert vectors is not None
        similar = torch.from_numpy(nearest_items(vectors, settings["hard_negatives"]))
    recommender = SequenceRecommender(
        network,
        table(),
        _objective(settings),
        hidden_size,
        table() if settings["separate_outputs"] else None,
        similar,
    )
    if settings.get("from_published"):
        load_published(recommender, settings["from_published"], folder.asins)
    if network.bidirectional:
        return Built(
            recommender,
            MaskedCollator(max_length, folder.num_items, settings["mask_probability"]),
            HistoryCollator(max_length, folder.num_items),
            codes_hash,
        )
    return Built(recommender, CausalCollator(max_length), HistoryCollator(max_length), codes_hash)


def _build_generative(model: str, settings: dict[str, Any], folder: ProcessedFolder) -> Built:
    ids = SemanticIds.load(settings["semantic_ids"], folder.asins)
    max_length = settings["max_length"]
    sizes = {n: settings[n] for n in ("hidden_size", "num_layers", "num_heads", "dropout")}
    search = (settings["num_beams"], settings["exact_rank"])
    collator = CodeHistoryCollator(max_length)
    if model == "tiger":
        tiger = Tiger(ids.codes, ids.codebook_size, *search, **sizes)
        return Built(tiger, TigerTrainCollator(max_length), collator, _hash(ids))
    gpt2 = Gpt2Codes(ids.codes, ids.codebook_size, *search, max_items=max_length, **sizes)
    return Built(gpt2, Gpt2CodesTrainCollator(max_length), collator, _hash(ids))


def _hash(ids: SemanticIds) -> str:
    """Of all that a model has of the ids: the file may have been written again since."""
    return sha256_of(ids.hash, str(ids.codebook_size))


def _objective(settings: dict[str, Any]) -> Objective:
    return Objective(
        settings["loss"],
        settings["num_negatives"],
        settings["gbce_t"],
        settings["temperature"],
        settings["cosine"],
        settings["hard_negatives"],
    )


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
    built = build(saved["model"], saved["settings"] | {"from_published": None}, folder)
    if saved.get("semantic_ids_hash") != built.semantic_ids_hash:
        raise UserError(
            f"{path} was trained with other codes than {saved['settings']['semantic_ids']} holds "
            "now: put the file of its training there"
        )
    built.model.load_state_dict(load_file(Path(path) / "model.safetensors"))
    built.model.eval()
    return built
