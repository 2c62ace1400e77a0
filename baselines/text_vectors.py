"""The text of every item as a vector, by a text encoder or a Recformer.

The text of an item is its attributes' values, joined by spaces. Vectors are kept in a store of
files (`recformer.data.item_vectors`): a text is encoded once, whoever asks, and the array is
mapped into memory.

Shapes: N items, B texts, L tokens of the longest, H hidden.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModel, AutoTokenizer, PretrainedConfig

from recformer.checkpoints.names import describe_state_dict, few
from recformer.checkpoints.reading import read_state_dict
from recformer.config import RecformerConfig
from recformer.data.item_vectors import Vectors, content_keys, open_or_build
from recformer.data.items import TokenizedItems
from recformer.data.items import cache_dir as default_cache_dir
from recformer.data.processed import ProcessedFolder
from recformer.files import UserError, sha256_of
from recformer.models import RecformerForSeqRec
from recformer.training.item_encoder import (
    catalogue_vectors,
    encoder_key,
    item_keys,
    token_budget_batches,
    vectors_key,
)
from recformer.training.start import load_start_model

MAX_TOKENS = 96  # of an item's text, for a text encoder
TOKENS_PER_BATCH = 8192  # memory and speed only

# Enters the keys of stored vectors: raise it when pooling or preparation of texts change.
VECTORS_FORM = "mean over tokens, unit length 1"


def text_vectors(
    folder: ProcessedFolder, encoder: str | os.PathLike, cache_dir: str | os.PathLike | None = None
) -> Vectors:
    """Vectors of length 1 of all items' texts; 0 for an item without text.

    Args:
        folder: the data.
        encoder: a Recformer (folder, or a state-dict file beside its config.json and tokenizer),
            which reads items as it does in training; or folder or hub id of a text encoder that
            transformers' AutoModel and AutoTokenizer read, of which the mean over the tokens of the
            last layer is taken, texts cut to MAX_TOKENS tokens.
        cache_dir: where vectors are kept; None: `vectors` in the processed folder, or in the user's
            cache where that is read-only.

    Returns:
        (N, H) float32, mapped into memory. Writing to it changes this process's copy alone.

    Raises:
        UserError: no item has any text, or no encoder can be read from there.
        OSError: not enough room on the disk.
    """
    return keyed_text_vectors(folder, encoder, cache_dir)[0]


def keyed_text_vectors(
    folder: ProcessedFolder, encoder: str | os.PathLike, cache_dir: str | os.PathLike | None = None
) -> tuple[Vectors, str]:
    """As `text_vectors`, and the SHA-256 (hex) of encoder and texts, from which the vectors follow.

    Vectors that were made anew elsewhere may differ in their last bits; their key does not.
    """
    texts = item_texts(folder)
    if not any(texts):
        raise UserError(f"no item of {folder.path} has any text to encode")
    if cache_dir is None:
        cache = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "recformer"
        cache_dir = default_cache_dir(folder.path, cache, "vectors")
    if _is_recformer(encoder):
        vectors, key = _by_recformer(folder, encoder, cache_dir)
        vectors[[row for row, text in enumerate(texts) if not text]] = 0  # in memory alone
        return vectors, key
    return _by_text_encoder(texts, encoder, cache_dir)


def item_texts(folder: ProcessedFolder) -> list[str]:
    """The text of every item; empty where it has none."""
    return [" ".join(item.values()).strip() for item in folder.items]


def _by_text_encoder(
    texts: list[str], encoder: str | os.PathLike, cache_dir: str | os.PathLike
) -> tuple[Vectors, str]:
    """Mean over the tokens of a text encoder's last layer, of length 1; 0 for an empty text.

    Arguments, result and errors as `keyed_text_vectors`.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(encoder)
        model, info = AutoModel.from_pretrained(encoder, output_loading_info=True)
    except (OSError, ValueError) as error:
        raise UserError(f"{encoder} gives no text encoder with its tokenizer: {error}") from error
    if not getattr(tokenizer, "is_fast", False):
        raise UserError(f"{encoder} has no fast (Rust) tokenizer: expected a tokenizer.json")
    missing = [key for key in info["missing_keys"] if not key.startswith("pooler.")]
    if missing:
        raise UserError(f"{encoder} lacks weights of a {type(model).__name__}: {few(missing)}")
    model.pooler = None  # not used; random where the weights lack it, which would change the key
    if model.config.is_encoder_decoder:
        model = model.get_encoder()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = model.to(device, torch.float32).eval()
    fingerprint = tokenizer.backend_tokenizer.to_str()

    @torch.no_grad()
    def encode(rows: np.ndarray) -> np.ndarray:
        chosen = [texts[row] for row in rows]
        ids = tokenizer(chosen, truncation=True, max_length=MAX_TOKENS)["input_ids"]
        lengths = np.array([len(tokens) if text else 0 for text, tokens in zip(chosen, ids)])
        vectors = np.zeros((len(rows), model.config.hidden_size), dtype=np.float32)
        filled = np.flatnonzero(lengths)
        for batch in token_budget_batches(lengths[filled], TOKENS_PER_BATCH):
            batch = filled[batch]
            vectors[batch] = _mean_pooled(model, [ids[row] for row in batch], tokenizer)
        return vectors

    keys = content_keys(text.encode("utf-8", "surrogatepass") for text in texts)
    model_key = encoder_key(model, VECTORS_FORM, str(MAX_TOKENS), fingerprint)
    vectors = open_or_build(keys, encode, model_key, model.config.hidden_size, cache_dir)
    return vectors, sha256_of(model_key, keys.tobytes())


def _mean_pooled(model: Any, token_ids: list[list[int]], tokenizer: Any) -> np.ndarray:
    """(B, H) means of length 1. Padded here, on the right: not every tokenizer can pad."""
    lengths = torch.tensor([len(tokens) for tokens in token_ids])
    ids = torch.full((len(lengths), int(lengths.max())), tokenizer.pad_token_id or 0)  # (B, L)
    mask = torch.arange(ids.shape[1]) < lengths[:, None]  # (B, L)
    ids[mask] = torch.tensor([token for tokens in token_ids for token in tokens])
    mask = mask.to(model.device)
    hidden = model(input_ids=ids.to(model.device), attention_mask=mask.long()).last_hidden_state
    pooled = (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)  # (B, H)
    return torch.nn.functional.normalize(pooled, dim=-1).cpu().numpy()


def _is_recformer(encoder: str | os.PathLike) -> bool:
    """Whether a file, a folder or a hub id is a Recformer, by its keys or its configuration.

    Raises:
        UserError: a file of something else, or nothing to be read.
    """
    if Path(encoder).is_file():
        kind = describe_state_dict(read_state_dict(encoder))
        if kind != "a Recformer":
            raise UserError(
                f"{encoder} is {kind}: expected a Recformer, or the folder of a text encoder"
            )
        return True
    try:
        values, _ = PretrainedConfig.get_config_dict(encoder)
    except OSError as error:
        raise UserError(f"{encoder} gives no text encoder: {error}") from error
    return values.get("model_type") == RecformerConfig.model_type


def _by_recformer(
    folder: ProcessedFolder, checkpoint: str | os.PathLike, cache_dir: str | os.PathLike
) -> tuple[Vectors, str]:
    beside = str(Path(checkpoint).parent)  # of a file: configuration and tokenizer
    model, tokenizer, _ = load_start_model(
        RecformerForSeqRec, str(checkpoint), beside, None, False, {}
    )
    items = TokenizedItems.open_or_build(folder.items, tokenizer, cache_dir)
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    vectors = catalogue_vectors(model, items, cache_dir, unit_length=True)
    model_key = vectors_key(model, "32-true", unit_length=True)
    return vectors, sha256_of(model_key, item_keys(items).tobytes())
