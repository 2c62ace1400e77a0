"""Residual-quantised VAE over item vectors (TIGER, arXiv 2305.05065, section 3.1).

An encoder brings an item vector to a latent; L codebooks quantise it one after the other, each what
the ones before left over; a decoder restores the item vector from the sum of the chosen code
vectors.

Shapes: N items, B items of a batch, H width of item vectors, D of latents, L levels, K codes of a
level.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from baselines.semantic_ids.rkmeans import residual_kmeans
from baselines.semantic_ids.settings import QuantiserSettings

SURVEY_BATCH = 8192  # items at a time: memory and speed only


@dataclass(frozen=True)
class Losses:
    """Means over the batch, scalars.

    Attributes:
        reconstruction: share of the vectors' variance that is lost.
        codebook: squared distance of code vectors to what they stand for, levels added up; moves
            code vectors alone.
        commitment: the same value; moves the encoder alone.
    """

    reconstruction: Tensor
    codebook: Tensor
    commitment: Tensor


class RQVAE(nn.Module):
    """Encoder, codebooks and decoder.

    Args:
        vector_size: H.
        levels: L.
        codebook_size: K.
        hidden_sizes: of the encoder's layers; the decoder has them the other way around.
        latent_size: D.
        commitment: weight of the loss that holds latents to their code vectors.

    Attributes:
        codebooks: float32 (L, K, D).
        mean, scale: vectors are shifted and divided by these, so that they have variance 1.
        initialised: whether mean, scale and codebooks were set from data. It is saved with the
            weights: a loaded model keeps its codes.
    """

    method = "rqvae"
    mean: Tensor
    scale: Tensor
    initialised: Tensor

    def __init__(
        self,
        vector_size: int,
        levels: int = QuantiserSettings.levels,
        codebook_size: int = QuantiserSettings.codebook_size,
        hidden_sizes: Sequence[int] = (512, 256),
        latent_size: int = 64,
        commitment: float = QuantiserSettings.commitment,
    ) -> None:
        super().__init__()
        self.settings: dict[str, Any] = {
            "vector_size": vector_size,
            "levels": levels,
            "codebook_size": codebook_size,
            "hidden_sizes": list(hidden_sizes),
            "latent_size": latent_size,
            "commitment": commitment,
        }
        self.commitment = commitment
        sizes = [vector_size, *hidden_sizes, latent_size]
        self.encoder = mlp(sizes)
        self.decoder = mlp(sizes[::-1])
        self.codebooks = nn.Parameter(torch.zeros(levels, codebook_size, latent_size))
        self.register_buffer("mean", torch.zeros(vector_size))
        self.register_buffer("scale", torch.ones(()))
        self.register_buffer("initialised", torch.zeros((), dtype=torch.bool))

    def encode(self, vectors: Tensor) -> Tensor:
        """Latents (B, D) of item vectors (B, H)."""
        return self.encoder((vectors - self.mean) / self.scale)

    def decode(self, latents: Tensor) -> Tensor:
        """Item vectors (B, H) from latents (B, D)."""
        return self.decoder(latents) * self.scale + self.mean

    def latents(self, vectors: np.ndarray) -> np.ndarray:
        """Latents float32 (N, D) to quantise for good.

        Computed in float64 and rounded, so that the order of summation, which differs between
        processors and batch sizes, does not show.
        """
        exact = copy.deepcopy(self).double().eval()
        with torch.no_grad():
            return exact.encode(torch.tensor(vectors, dtype=torch.float64)).float().numpy()

    def chosen(self, latents: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Codes (B, L), their vectors (B, L, D), and what each was to stand for (B, L, D).

        Gradients of the last reach the latents alone: a code vector does not answer for what the
        levels after it make of its residual.
        """
        codes, vectors, residuals = [], [], []
        residual = latents
        for codebook in self.codebooks:
            code = torch.cdist(residual.detach(), codebook.detach()).argmin(1)
            vector = codebook[code]
            codes.append(code)
            vectors.append(vector)
            residuals.append(residual)
            residual = residual - vector.detach()
        return torch.stack(codes, 1), torch.stack(vectors, 1), torch.stack(residuals, 1)

    def forward(self, vectors: Tensor) -> tuple[Losses, Tensor]:
        """Losses, and codes (B, L), of item vectors (B, H)."""
        latents = self.encode(vectors)
        codes, code_vectors, residuals = self.chosen(latents)
        # Straight through: the decoder sees code vectors, its gradient goes to the latents.
        quantised = latents + (code_vectors.sum(1) - latents).detach()
        lost = (self.decode(quantised) - vectors) / self.scale
        losses = Losses(
            reconstruction=lost.square().mean(),
            codebook=(code_vectors - residuals.detach()).square().sum((1, 2)).mean(),
            commitment=(code_vectors.detach() - residuals).square().sum((1, 2)).mean(),
        )
        return losses, codes

    @torch.no_grad()
    def initialise(self, vectors: Tensor, seed: int) -> None:
        """Mean and scale of item vectors (N, H), and code vectors by k-means over their latents.

        Does nothing to a model that was initialised before, in this process or another.
        """
        if self.initialised:
            return
        self.mean.copy_(vectors.mean(0))
        spread = (vectors - self.mean).square().mean().sqrt()
        self.scale.copy_(spread if spread > 0 else torch.ones(()))
        levels, codebook_size, _ = self.codebooks.shape
        latents = self.encode(vectors).numpy()
        found = residual_kmeans(latents, levels, codebook_size, seed)
        self.codebooks.copy_(torch.from_numpy(found))
        self.initialised.fill_(True)

    def fit(
        self,
        vectors: np.ndarray,
        seed: int = 0,
        max_epochs: int = 60,
        batch_size: int = 512,
        learning_rate: float = 1e-3,
        patience: int = 10,
    ) -> list[dict[str, float]]:
        """Train on item vectors; the best epoch's weights are kept.

        After every epoch codes that no item has are moved onto residuals of random items. An epoch
        is the better, the less variance is lost and the fewer codes lie idle (shares, added up);
        training ends after `patience` epochs without a better one.

        Args:
            vectors: float32 (N, H).
            seed: of k-means, batches and revived codes.
            max_epochs, batch_size, learning_rate: Adam's.

        Returns:
            An entry an epoch: `epoch`, `lost` (share of variance), `idle` (share of codes).
        """
        data = torch.tensor(vectors, dtype=torch.float32)
        self.initialise(data, seed)
        generator = torch.Generator().manual_seed(seed)
        optimizer = torch.optim.Adam(self.parameters(), lr=learning_rate)
        history: list[dict[str, float]] = []
        best, waited = float("inf"), 0
        kept = self.state_dict()
        with tqdm(range(1, max_epochs + 1), desc="RQ-VAE", unit="epoch", disable=None) as bar:
            for epoch in bar:
                self.train()
                for rows in torch.randperm(len(data), generator=generator).split(batch_size):
                    losses, _ = self(data[rows])
                    loss = losses.reconstruction * data.shape[1] + losses.codebook
                    optimizer.zero_grad()
                    (loss + self.commitment * losses.commitment).backward()
                    optimizer.step()
                lost, used = self.survey(data)
                idle = 1 - used.float().mean().item()
                history.append({"epoch": epoch, "lost": lost, "idle": idle})
                bar.set_postfix(lost=f"{lost:.4f}", idle=f"{idle:.3f}")
                if lost + idle < best:
                    best, waited = lost + idle, 0
                    kept = copy.deepcopy(self.state_dict())
                else:
                    waited += 1
                if waited == patience:
                    break
                self.revive(data, used, generator)
        self.load_state_dict(kept)
        return history

    @torch.no_grad()
    def survey(self, vectors: Tensor) -> tuple[float, Tensor]:
        """Share of variance lost over all items (N, H), and which codes they have, bool (L, K)."""
        used = torch.zeros(self.codebooks.shape[:2], dtype=torch.bool)
        levels = torch.arange(len(used))
        lost = 0.0
        for batch in vectors.split(SURVEY_BATCH):
            losses, codes = self(batch)
            used[levels, codes] = True
            lost += losses.reconstruction.item() * len(batch) / len(vectors)
        return lost, used

    @torch.no_grad()
    def revive(self, vectors: Tensor, used: Tensor, generator: torch.Generator) -> None:
        """Move idle codes onto what random items leave over for their level.

        Args:
            vectors: (N, H), at least one.
            used: bool (L, K); code vectors that are used stay where they are.
            generator: draws the items.
        """
        for level, idle in enumerate(~used):
            rows = torch.randint(len(vectors), (int(idle.sum()),), generator=generator)
            _, _, residuals = self.chosen(self.encode(vectors[rows]))
            self.codebooks[level, idle] = residuals[:, level]


def mlp(sizes: Sequence[int]) -> nn.Sequential:
    """Linear layers of these sizes with ReLU between them."""
    layers: list[nn.Module] = []
    for width, next_width in itertools.pairwise(sizes):
        layers += [nn.Linear(width, next_width), nn.ReLU()]
    return nn.Sequential(*layers[:-1])
