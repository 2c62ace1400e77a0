"""Residual k-means: k-means over item vectors, then over what it left over, and so on.

Also what every quantiser here shares: codes are assigned by distances that come out the same to the
last bit on any machine, so that a saved quantiser always gives the same codes.

Shapes: N items, H width of item vectors, D of latents (here D = H), L levels, K codes of a level.
"""

from __future__ import annotations

import numpy as np
import torch
from sklearn.cluster import KMeans
from torch import Tensor, nn

from baselines.semantic_ids.settings import QuantiserSettings

ROWS_AT_A_TIME = 128  # with 256 codes, distances stay in the processor's cache


def squared_distances(points: np.ndarray, codebook: np.ndarray) -> np.ndarray:
    """Squared Euclidean distances (N, K), summed in float64 over one dimension after the other.

    A matrix product would be quicker, but its order of summation, and so its last bits and who wins
    a tie, depend on the processor.

    Args:
        points: (N, D).
        codebook: (K, D).
    """
    columns = np.ascontiguousarray(codebook.T, dtype=np.float64)  # (D, K)
    distances = np.zeros((len(points), len(codebook)))
    for start in range(0, len(points), ROWS_AT_A_TIME):
        rows = slice(start, start + ROWS_AT_A_TIME)
        values = np.ascontiguousarray(points[rows].T, dtype=np.float64)[:, :, None]  # (D, rows, 1)
        difference = np.empty_like(distances[rows])
        for value, column in zip(values, columns, strict=True):
            np.subtract(value, column, out=difference)
            np.multiply(difference, difference, out=difference)
            distances[rows] += difference
    return distances


def quantise(latents: np.ndarray, codebooks: np.ndarray) -> np.ndarray:
    """Codes int64 (N, L): at each level the nearest to what the levels before left over.

    Of equally near codes the lowest is taken.

    Args:
        latents: (N, D).
        codebooks: (L, K, D).
    """
    residuals = latents.astype(np.float64)
    codes = np.empty((len(latents), len(codebooks)), dtype=np.int64)
    for level, codebook in enumerate(codebooks):
        codes[:, level] = squared_distances(residuals, codebook).argmin(1)
        residuals -= codebook[codes[:, level]]
    return codes


def kmeans(points: np.ndarray, codebook_size: int, seed: int) -> np.ndarray:
    """Centres float32 (K, D) of scikit-learn's k-means.

    Where there are fewer different points than codes, the codes left over repeat the first centre
    and, as the lowest of equally near ones wins, are never assigned.
    """
    points = points.astype(np.float32)
    found = min(codebook_size, len(np.unique(points, axis=0)))
    centres = KMeans(found, n_init=1, random_state=seed).fit(points).cluster_centers_
    return np.concatenate([centres, centres[:1].repeat(codebook_size - found, axis=0)])


def residual_kmeans(latents: np.ndarray, levels: int, codebook_size: int, seed: int) -> np.ndarray:
    """Codebooks float32 (L, K, D): level by level k-means over what the levels before left over."""
    residuals = latents.astype(np.float64)
    codebooks = np.empty((levels, codebook_size, latents.shape[1]), dtype=np.float32)
    for level in range(levels):
        codebooks[level] = kmeans(residuals, codebook_size, seed + level)
        residuals -= codebooks[level][squared_distances(residuals, codebooks[level]).argmin(1)]
    return codebooks


class ResidualKMeans(nn.Module):
    """Item vectors as sums of centres; nothing is learned but these.

    Args:
        vector_size: H.
        levels: L.
        codebook_size: K.

    Attributes:
        codebooks: float32 (L, K, H).
    """

    method = "rkmeans"
    codebooks: Tensor

    def __init__(
        self,
        vector_size: int,
        levels: int = QuantiserSettings.levels,
        codebook_size: int = QuantiserSettings.codebook_size,
    ) -> None:
        super().__init__()
        self.settings = {
            "vector_size": vector_size,
            "levels": levels,
            "codebook_size": codebook_size,
        }
        self.register_buffer("codebooks", torch.zeros(levels, codebook_size, vector_size))

    def fit(self, vectors: np.ndarray, seed: int = 0) -> list[dict[str, float]]:
        """Find the codebooks for item vectors float32 (N, H). Returns no epochs: there are none."""
        levels, codebook_size, _ = self.codebooks.shape
        found = residual_kmeans(vectors, levels, codebook_size, seed)
        self.codebooks.copy_(torch.from_numpy(found))
        return []

    def latents(self, vectors: np.ndarray) -> np.ndarray:
        """The vectors themselves, float32 (N, H), which are quantised here."""
        return np.asarray(vectors, dtype=np.float32)

    def decode(self, latents: Tensor) -> Tensor:
        """Item vectors (N, H) from latents, here the same."""
        return latents
