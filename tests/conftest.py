"""Settings that every test shares: offline, few threads, and what the markers mean."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

# Before anything imports torch or transformers, here and in the processes that tests start.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_OFFLINE"] = "1"
os.environ["WANDB_MODE"] = "offline"
os.environ["MPLBACKEND"] = "Agg"

import hypothesis
import pytest
import torch

from recformer.cli import show_messages

torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))

# The same examples on every run: a failure seen once is seen again.
hypothesis.settings.register_profile("recformer", deadline=None, derandomize=True)
hypothesis.settings.load_profile("recformer")

REAL_DATA_VARIABLE = "RECFORMER_REAL_DATA"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    real_data = os.environ.get(REAL_DATA_VARIABLE)
    for item in items:
        if item.get_closest_marker("real_data") and not real_data:
            item.add_marker(pytest.mark.skip(reason=f"${REAL_DATA_VARIABLE} is not set"))
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(autouse=True)
def _own_randomness_and_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each test starts from the same seeds; no test sees what another did to the environment."""
    torch.manual_seed(0)
    # A developer's own training variables must not steer the tests.
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    show_messages()  # as every program does


@pytest.fixture(scope="session")
def repository() -> Path:
    """The root of the checkout."""
    return Path(__file__).resolve().parent.parent


@pytest.fixture
def two_nodes(repository: Path) -> Iterator[Callable[..., list[subprocess.Popen[str]]]]:
    """Starts a command as on two nodes: two launchers that meet over gloo on loopback."""
    started: list[subprocess.Popen[str]] = []

    def start(*command: object) -> list[subprocess.Popen[str]]:
        with socket.create_server(("127.0.0.1", 0)) as server:
            port = server.getsockname()[1]
        nodes = [
            subprocess.Popen(
                [*map(str, command), "--num_nodes", "2"],
                cwd=repository,
                env=os.environ
                | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
                | {"NODE_RANK": str(node), "PYTHONPATH": str(repository)},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                start_new_session=True,
            )
            for node in range(2)
        ]
        started.extend(nodes)
        return nodes

    yield start
    for node in started:
        with suppress(ProcessLookupError):
            os.killpg(node.pid, signal.SIGKILL)
        node.wait()


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The real data folder; only for tests marked `real_data`."""
    value = os.environ.get(REAL_DATA_VARIABLE)
    if not value:
        pytest.skip(f"${REAL_DATA_VARIABLE} is not set")
    folder = Path(value)
    if not folder.is_dir():
        pytest.fail(f"${REAL_DATA_VARIABLE} is {value!r}, which is not a folder")
    return folder
