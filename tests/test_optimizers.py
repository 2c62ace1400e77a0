"""Optimizers and schedules of training, by hand."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from recformer.training.lit import LitTraining


def configured(model: torch.nn.Module, **options: Any) -> tuple[torch.optim.Optimizer, Any]:
    module = LitTraining(model, learning_rate=0.01, **options)
    module._trainer = SimpleNamespace(precision="32-true")
    (optimizer,), (entry,) = module.configure_optimizers()
    return optimizer, entry["scheduler"]


def test_inverse_square_root_by_hand() -> None:
    optimizer, schedule = configured(torch.nn.Linear(2, 2), schedule="inverse_sqrt", warmup_steps=4)
    rates = []
    for _ in range(17):
        rates.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    assert rates[:5] == [pytest.approx(0.01 * k / 4) for k in range(5)]
    assert (rates[9], rates[16]) == (pytest.approx(0.01 * 2 / 3), pytest.approx(0.005))


def test_adafactor_moves_tensors_in_proportion_to_their_size() -> None:
    model = torch.nn.ModuleDict(
        {name: torch.nn.Linear(4, 4, bias=False) for name in ("large", "small")}
    )
    size = {"large": 1.0, "small": 0.02}
    with torch.no_grad():
        for name, layer in model.items():
            layer.weight.fill_(size[name])
    optimizer, _ = configured(model, schedule="constant", optimizer="adafactor")
    for layer in model.values():
        layer.weight.grad = torch.full((4, 4), 3.0)
    optimizer.step()
    for name, layer in model.items():  # a hundredth of its size, whatever its gradient
        expected = torch.full((4, 4), size[name] * 0.99)
        torch.testing.assert_close(layer.weight.detach(), expected)
