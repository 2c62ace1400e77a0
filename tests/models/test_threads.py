"""The kernel computes on torch's threads where they are to be had."""

from __future__ import annotations

import os
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest

from recformer.models import kernel, threads


@pytest.fixture(scope="module", autouse=True)
def library() -> None:
    if kernel.library() is None:
        pytest.skip("no AVX-512, or no C++ compiler")


@pytest.mark.parametrize("limit", ["1", "2"])
def test_where_openmp_gives_fewer_threads_one_computes(limit: str) -> None:
    """Three asked for, the crew of which would wait for ever for those that do not come."""
    ran = subprocess.run(
        [sys.executable, "-c", FEWER_THREADS],
        env=os.environ | {"OMP_THREAD_LIMIT": limit},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout == "the same\n"


@pytest.mark.parametrize("loaded", ["before", "after"])
def test_a_fork_computes_on_threads_of_its_own(loaded: str) -> None:
    """OpenMP's threads are not in the new process, which would wait for them for ever."""
    ran = subprocess.run(
        [sys.executable, "-c", FORKED, loaded], capture_output=True, text=True, timeout=60
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout == "the same\n"


MODEL = """
import os, signal, sys, torch
from recformer.models import RecformerModel, kernel, threads
from recformer.config import RecformerConfig
from recformer.packing import PackedTokens

torch.manual_seed(0)
model = RecformerModel(RecformerConfig(
    vocab_size=90, hidden_size=64, num_attention_heads=2, intermediate_size=160,
    num_hidden_layers=2, max_position_embeddings=130, max_item_embeddings=5, attention_window=16))
ids = torch.arange(200) % 90
packed = PackedTokens(ids, ids % 4, ids % 5, torch.tensor([0, 90, 200]))
"""


def test_asking_for_threads_compiles_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """A service without the kernel asks, too; loaded later, the kernel knows what was asked for."""
    monkeypatch.setattr(kernel, "library", lambda: pytest.fail("loaded"))
    monkeypatch.setattr(threads, "_process", threads._Process())
    assert not threads.use_torchs(False)
    later = Noted()
    threads.loaded(SimpleNamespace(recformer_use_threads=later))  # type: ignore[arg-type]
    assert threads.use_torchs()
    assert [[each is None for each in call] for call in later.calls] == [[True] * 3, [False] * 3]


class Noted:
    """A function of C that notes what it is called with."""

    def __init__(self) -> None:
        self.argtypes: Any = None
        self.calls: list[tuple[Any, ...]] = []

    def __call__(self, *values: Any) -> None:
        self.calls.append(values)


# Gradients and vectors of one thread and of three.
FEWER_THREADS = (
    MODEL
    + """
def computed():
    with torch.inference_mode():
        vectors = [model.eval().encode(packed)]
    model.train().zero_grad()
    torch.manual_seed(1)
    model.encode(packed).square().sum().backward()
    return [*vectors, *(p.grad.clone() for p in model.parameters())]

def same(some, others):  # gradients but for what torch itself sums in another order
    near = all(torch.allclose(a, b, 1e-4, 1e-5) for a, b in zip(some, others, strict=True))
    return torch.equal(some[0], others[0]) and near

torch.set_num_threads(1)
expected = computed()
torch.set_num_threads(3)
assert threads.use_torchs()
print("the same" if same(computed(), expected) else "not the same")
"""
)
# By the kernel alone: what torch itself would share out hangs after a fork.
FORKED = (
    MODEL
    + """
def vectors(threads):
    torch.set_num_threads(threads)
    with torch.no_grad():
        return kernel.encode(model.eval(), packed, torch.float32, None)

torch.set_num_threads(3)
torch.ones(1 << 22).exp_()  # and so OpenMP's threads are there
if sys.argv[1] == "before":
    assert torch.equal(vectors(3), vectors(1)) and threads.use_torchs()
child = os.fork()
if child == 0:
    signal.alarm(30)  # one that waits for ever is not left behind
    same = torch.equal(vectors(3), vectors(1)) and not threads.use_torchs()
    os._exit(0 if same else 1)
_, status = os.waitpid(child, 0)
print("the same" if status == 0 else f"not the same: {status}")
"""
)
