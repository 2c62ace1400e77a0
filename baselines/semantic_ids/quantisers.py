"""The quantisers on disk, and how well they describe the vectors."""

from __future__ import annotations

import json
import os
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch

from baselines.semantic_ids.rkmeans import ResidualKMeans
from baselines.semantic_ids.rqvae import RQVAE
from recformer.files import CHECKSUM, UserError, atomic_write

QUANTISER_FILE = "quantiser.safetensors"

Quantiser = RQVAE | ResidualKMeans

METHODS: dict[str, type[Quantiser]] = {kind.method: kind for kind in (RQVAE, ResidualKMeans)}


def code_statistics(codes: np.ndarray, codebook_size: int) -> dict[str, Any]:
    """Spread of items over the codes of a quantiser, before collisions are resolved.

    Args:
        codes: int64 (N, L).
        codebook_size: K.

    Returns:
        `usage` (share of codes that some item has) and `entropy` (bits; at most log2 K) a level;
        `colliding_items` (that share all their codes with another) and `largest_collision`.
    """
    usage, entropy = [], []
    for level in codes.T:
        share = np.bincount(level, minlength=codebook_size) / len(level)
        share = share[share > 0]
        usage.append(len(share) / codebook_size)
        entropy.append(float((share * np.log2(1 / share)).sum()))
    _, counts = np.unique(codes, axis=0, return_counts=True)
    return {
        "usage": usage,
        "entropy": entropy,
        "colliding_items": int(counts[counts > 1].sum()),
        "largest_collision": int(counts.max()),
    }


def reconstruction_error(
    quantiser: Quantiser, vectors: np.ndarray, codes: np.ndarray
) -> list[float]:
    """Share of the variance of item vectors (N, H) that is lost with the codes of 1, 2, … levels.

    0 for vectors that are all the same.

    Args:
        codes: int64 (N, L).
    """
    variance = np.square(vectors - vectors.mean(0)).sum()
    latents = torch.zeros(len(vectors), quantiser.codebooks.shape[2])
    lost = []
    for codebook, column in zip(quantiser.codebooks.detach(), torch.from_numpy(codes).T):
        latents += codebook[column]
        with torch.no_grad():
            restored = quantiser.decode(latents).numpy()
        squares = np.square(restored - vectors).sum()
        lost.append(float(squares / variance) if variance > 0 else 0.0)
    return lost


def save_quantiser(path: str | os.PathLike, quantiser: Quantiser, text_encoder: str) -> None:
    """Write weights, with what is needed to make the quantiser again, whole or not at all."""
    tensors = {name: tensor.contiguous() for name, tensor in quantiser.state_dict().items()}
    metadata = {
        "method": quantiser.method,
        "settings": json.dumps(quantiser.settings),
        "text_encoder": text_encoder,
    }
    metadata[CHECKSUM] = _checksum(tensors, metadata)
    with atomic_write(path, "wb") as handle:
        handle.write(safetensors.torch.save(tensors, metadata))


def load_quantiser(path: str | os.PathLike) -> tuple[Quantiser, str]:
    """A saved quantiser, and the text encoder whose vectors it was made for.

    Raises:
        FileNotFoundError: there is no such file.
        UserError: it holds no quantiser.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path} does not exist")
    try:
        with safetensors.safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
        quantiser = METHODS[metadata["method"]](**json.loads(metadata["settings"]))
        tensors = safetensors.torch.load_file(path)
        expected = metadata.pop(CHECKSUM, None)  # None: an earlier version's
        quantiser.load_state_dict(tensors)
    except (safetensors.SafetensorError, KeyError, ValueError, TypeError, RuntimeError) as error:
        raise UserError(f"{path} holds no quantiser of semantic ids: {error!r}") from error
    # A key of the checksum that was itself damaged leaves another key behind.
    unknown = metadata.keys() - {"method", "settings", "text_encoder"}
    if unknown or expected not in (None, _checksum(tensors, metadata)):
        raise UserError(f"{path} is damaged: its checksum is another")
    return quantiser, metadata["text_encoder"]


def _checksum(tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> str:
    """CRC-32 of weights and what is said of them."""
    crc32 = zlib.crc32(json.dumps(metadata, sort_keys=True).encode())
    for name in sorted(tensors):
        crc32 = zlib.crc32(name.encode() + tensors[name].numpy().tobytes(), crc32)
    return str(crc32)
