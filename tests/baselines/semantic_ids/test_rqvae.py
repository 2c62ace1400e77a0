"""Quantisers: codes and gradients by hand, k-means that happens once, idle codes, early stop."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

from baselines.semantic_ids.rkmeans import (
    ResidualKMeans,
    kmeans,
    quantise,
    residual_kmeans,
    squared_distances,
)
from baselines.semantic_ids.rqvae import RQVAE

# Two levels of three codes in the plane; of equal code vectors the first is meant.
CODEBOOKS = np.array(
    [[[0, 0], [4, 0], [0, 4]], [[0, 0], [1, 0], [1, 0]]],
    dtype=np.float32,
)


def clusters(seed: int = 0) -> np.ndarray:
    """float32 (240, 6): four far centres, four near ones about each, a little noise."""
    generator = np.random.default_rng(seed)
    far, near = generator.normal(size=(4, 6)) * 10, generator.normal(size=(4, 6)) * 2
    points = (far[:, None] + near[None]).reshape(16, 6).repeat(15, axis=0)
    return (points + generator.normal(size=points.shape) * 0.01).astype(np.float32)


def toy_model(**settings: float) -> RQVAE:
    """Encoder and decoder are the identity on the plane."""
    model = RQVAE(2, levels=2, codebook_size=3, hidden_sizes=(), latent_size=2, **settings)
    with torch.no_grad():
        for layer in (model.encoder[0], model.decoder[0]):
            layer.weight.copy_(torch.eye(2))
            layer.bias.zero_()
        model.codebooks.copy_(torch.from_numpy(CODEBOOKS))
    model.initialised.fill_(True)
    return model


def test_codes_by_hand() -> None:
    latents = np.array([[0, 0], [1, 0], [5, 0.25], [2, 0], [0.4, 9]], dtype=np.float32)
    # (5, .25): code 1 leaves (1, .25). (2, 0) is as far from codes 0 and 1, then from (1, 0).
    assert quantise(latents, CODEBOOKS).tolist() == [[0, 0], [0, 1], [1, 1], [0, 1], [2, 0]]


def test_the_model_assigns_as_the_final_codes() -> None:
    model = toy_model()
    vectors = torch.tensor([[0.1, 0.0], [5.0, 0.25], [0.4, 9.0]])
    codes, code_vectors, residuals = model.chosen(model.encode(vectors))
    assert codes.tolist() == quantise(model.latents(vectors.numpy()), CODEBOOKS).tolist()
    assert code_vectors[1].tolist() == [[4, 0], [1, 0]]
    torch.testing.assert_close(residuals[1], torch.tensor([[5, 0.25], [1, 0.25]]))


def test_distances_do_not_depend_on_their_company() -> None:
    generator = np.random.default_rng(0)
    points, codebook = generator.normal(size=(300, 7)), generator.normal(size=(5, 7))
    whole = squared_distances(points, codebook)
    np.testing.assert_allclose(whole, ((points[:, None] - codebook) ** 2).sum(-1), rtol=1e-12)
    # To the last bit: alone, and as a sum from the first dimension to the last.
    assert squared_distances(points[290:291], codebook[4:]).item() == whole[290, 4]
    by_hand = 0.0
    for point, code in zip(points[290].tolist(), codebook[4].tolist(), strict=True):
        by_hand += (point - code) * (point - code)
    assert by_hand == whole[290, 4]


def test_residual_kmeans_finds_the_hierarchy() -> None:
    points = clusters()
    codebooks = residual_kmeans(points, levels=2, codebook_size=4, seed=0)
    codes = quantise(points, codebooks)
    first, second = codes.reshape(4, 4, 15, 2)[..., 0], codes.reshape(4, 4, 15, 2)[..., 1]
    assert sorted(first[:, 0, 0].tolist()) == [0, 1, 2, 3]
    assert (first == first[:, :1, :1]).all()
    # The near centres are the same about each far one, and so are their codes.
    assert sorted(second[0, :, 0].tolist()) == [0, 1, 2, 3]
    assert (second == second[:1, :, :1]).all()
    model = ResidualKMeans(6, levels=2, codebook_size=4)
    assert model.fit(points, seed=0) == []
    np.testing.assert_array_equal(model.codebooks.numpy(), codebooks)


def test_fewer_points_than_codes() -> None:
    points = np.array([[0, 0], [3, 1], [0, 0]], dtype=np.float32)
    centres = kmeans(points, codebook_size=4, seed=0)
    assert sorted(map(tuple, centres[:2].tolist())) == [(0, 0), (3, 1)]
    assert (centres[2:] == centres[0]).all()
    assert set(quantise(points, centres[None]).ravel().tolist()) == {0, 1}


def test_losses_by_hand() -> None:
    model = toy_model()
    losses, codes = model(torch.tensor([[5.0, 0.25], [0.5, 5.0]]))
    # (5, .25): residuals (5, .25) and (1, .25), code vectors (4, 0) and (1, 0).
    # (.5, 5): residuals (.5, 5) and (.5, 1), code vectors (0, 4) and (0, 0), the first of two.
    assert codes.tolist() == [[1, 1], [2, 0]]
    first, second = (1 + 0.0625) + 0.0625, (0.25 + 1) + (0.25 + 1)
    assert losses.codebook.item() == pytest.approx((first + second) / 2)
    assert losses.commitment.item() == losses.codebook.item()
    assert losses.reconstruction.item() == pytest.approx((0.0625 + 0.25 + 1) / 4)


def test_gradients_by_hand() -> None:
    model = toy_model()
    vectors = torch.tensor([[5.0, 0.25], [0.5, 5.0]])

    def gradients(name: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Of a loss, with regard to codebooks and to the encoder's bias (a shift of latents)."""
        model.zero_grad()
        losses, _ = model(vectors)
        getattr(losses, name).backward()
        zero = torch.zeros_like
        return (
            zero(model.codebooks) if model.codebooks.grad is None else model.codebooks.grad,
            zero(model.encoder[0].bias)
            if model.encoder[0].bias.grad is None
            else model.encoder[0].bias.grad,
        )

    # Codebook: mean over the batch of 2 (code vector - residual), for the codes that are used.
    codebooks, shift = gradients("codebook")
    expected = torch.zeros(2, 3, 2)
    expected[0, 1] = torch.tensor([-1, -0.25])
    expected[1, 1] = torch.tensor([0, -0.25])
    expected[0, 2] = torch.tensor([-0.5, -1])
    expected[1, 0] = torch.tensor([-0.5, -1])
    torch.testing.assert_close(codebooks, expected)
    assert shift.tolist() == [0, 0]
    # Commitment: the opposite, to the latents alone, levels and batch added up.
    codebooks, shift = gradients("commitment")
    assert not codebooks.any()
    torch.testing.assert_close(shift, -expected.sum((0, 1)))
    # Reconstruction: straight through the codes, as if the decoder had seen the latents: the
    # restored minus the vectors is (0, -.25) and (-.5, -1), a mean of four squares.
    codebooks, shift = gradients("reconstruction")
    assert not codebooks.any()
    torch.testing.assert_close(shift, torch.tensor([-0.5, -1.25]) * 2 / 4)


def test_codes_and_restored_vectors_are_of_the_standardised_input() -> None:
    model = toy_model()
    model.mean.copy_(torch.tensor([10.0, -2.0]))
    model.scale.fill_(2.0)
    vectors = np.array([[10 + 2 * 4, -2.0]], dtype=np.float32)
    assert model.latents(vectors).tolist() == [[4, 0]]
    assert model.decode(torch.tensor([[4.0, 0.0]])).tolist() == vectors.tolist()


def test_commitment_acts() -> None:
    held, free = (small_model(commitment=weight) for weight in (4.0, 0.0))
    distances = []
    for model in (held, free):
        model.fit(clusters(), max_epochs=5, batch_size=60)
        losses, _ = model(torch.from_numpy(clusters()))
        distances.append(losses.commitment.item())
    assert distances[0] < 0.5 * distances[1]


def small_model(**settings: float) -> RQVAE:
    torch.manual_seed(0)
    return RQVAE(6, levels=2, codebook_size=8, hidden_sizes=(16,), latent_size=4, **settings)


def test_kmeans_happens_once_even_after_loading() -> None:
    model = small_model()
    assert not model.initialised
    data = torch.from_numpy(clusters())
    model.initialise(data, seed=0)
    assert model.initialised
    expected = residual_kmeans(model.encode(data).detach().numpy(), 2, 8, seed=0)
    np.testing.assert_allclose(model.codebooks.detach().numpy(), expected, rtol=1e-6)
    assert ((data - model.mean) / model.scale).square().mean().item() == pytest.approx(1, rel=1e-4)

    loaded = small_model()
    loaded.load_state_dict(copy.deepcopy(model.state_dict()))
    with torch.no_grad():
        loaded.codebooks += 1
    changed = loaded.codebooks.detach().clone()
    loaded.initialise(torch.from_numpy(clusters(seed=1)), seed=1)
    assert torch.equal(loaded.codebooks, changed)
    assert torch.equal(loaded.mean, model.mean)


def test_training_is_the_same_for_the_same_seed() -> None:
    states = []
    for seed in (0, 0, 1):
        model = small_model()
        model.fit(clusters(), seed=seed, max_epochs=3, batch_size=60)
        states.append(model.state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert not torch.equal(states[0]["codebooks"], states[2]["codebooks"])


def test_training_loses_less_and_uses_all_codes() -> None:
    model = small_model()
    history = model.fit(clusters(), max_epochs=30, batch_size=24, learning_rate=1e-2)
    assert history[-1]["lost"] < 0.2 * history[0]["lost"]
    best = min(history, key=lambda row: row["lost"] + row["idle"])
    lost, used = model.survey(torch.from_numpy(clusters()))
    assert lost == pytest.approx(best["lost"], rel=1e-5)
    assert 1 - used.float().mean().item() == pytest.approx(best["idle"])
    assert best["idle"] == 0


def test_training_stops_when_nothing_gets_better() -> None:
    model = small_model()
    history = model.fit(clusters(), max_epochs=50, batch_size=60, learning_rate=0.0, patience=3)
    assert [row["epoch"] for row in history] == [1, 2, 3, 4]


def test_idle_codes_move_onto_residuals() -> None:
    model = toy_model()
    with torch.no_grad():
        model.codebooks[0, 2] = 100.0
    vectors = torch.tensor([[4.5, 0.0]])
    _, used = model.survey(vectors)
    assert used.tolist() == [[False, True, False], [True, False, False]]
    model.revive(vectors, used, torch.Generator().manual_seed(0))
    # Level 1 had what code 1 left over, (.5, 0), then what the nearest code leaves now: nothing.
    assert model.codebooks[0].tolist() == [[4.5, 0], [4, 0], [4.5, 0]]
    assert model.codebooks[1].tolist() == [[0, 0], [0, 0], [0, 0]]


def test_dead_codes_come_to_life_in_training() -> None:
    model = small_model()
    data = clusters()
    model.initialise(torch.from_numpy(data), seed=0)
    with torch.no_grad():
        model.codebooks[:, 1:] = 1000.0  # nothing is near these
    assert model.survey(torch.from_numpy(data))[1].sum() == 2
    history = model.fit(data, max_epochs=20, batch_size=60)
    assert history[0]["idle"] == 1 - 2 / 16
    assert history[-1]["idle"] < 0.2


def test_latents_do_not_depend_on_their_company() -> None:
    model = small_model()
    vectors = clusters()
    model.fit(vectors, max_epochs=2, batch_size=60)
    whole = model.latents(vectors)
    assert whole.dtype == np.float32
    np.testing.assert_array_equal(whole[17:18], model.latents(vectors[17:18]))
    assert next(model.parameters()).dtype == torch.float32  # the model itself is not changed
