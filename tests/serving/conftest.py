"""A small model, a service of it, its application over real HTTP, and a PostgreSQL server."""

from __future__ import annotations

import json
import os
import pwd
import shutil
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import uvicorn
from starlette.testclient import TestClient

from recformer.models import RecformerForSeqRec
from recformer.serving.app import create_app
from recformer.serving.service import BESIDE, MAIN, Limits, Service
from recformer.serving.store import Store
from tests.tiny import tiny_recformer

WORDS = ("tent", "lamp", "stove", "rope", "boots", "map", "torch", "knife")
NAMES = [f"B{number}" for number in range(len(WORDS))]
TEXTS = {
    name: {"title": word, "brand": "Acme" if row % 2 else "Borex", "category": "Camping"}
    for row, (name, word) in enumerate(zip(NAMES, WORDS, strict=True))
}
COUNTS = {"B3": 7, "B1": 5, "B0": 5}
KEY = "a key of the tests"


def make_model(path: Path, seed: int = 1) -> Path:
    """A folder with a random model, its catalogue and how often its items were bought."""
    path.mkdir(parents=True, exist_ok=True)
    tiny_recformer(path, ["title", "brand", "category", "Acme", "Borex", "Camping", *WORDS])
    model = RecformerForSeqRec.from_pretrained(path)
    generator = torch.Generator().manual_seed(seed)
    model.init_item_embedding(torch.randn(len(WORDS), 16, generator=generator))
    model.save_pretrained(path)
    (path / "smap.json").write_text(json.dumps({name: i for i, name in enumerate(NAMES)}))
    (path / "meta_data.json").write_text(json.dumps(TEXTS))
    (path / "item_counts.json").write_text(json.dumps(COUNTS))
    return path


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Read by all tests, changed by none."""
    return make_model(tmp_path_factory.mktemp("served") / "best_model")


MakeService = Callable[..., Service]


@pytest.fixture
def make_service(model_folder: Path, tmp_path: Path) -> Iterator[MakeService]:
    """Makes services over one database, the same for all of a test."""
    made = []

    def make(folder: Path = model_folder, beside: Path | None = None, **limits: int) -> Service:
        folders = {MAIN: folder} | ({BESIDE: beside} if beside else {})
        service = Service(folders, Store(str(tmp_path / "serve.sqlite3")), Limits(**limits))
        made.append(service)
        return service

    yield make
    for service in made:
        service.close()


@pytest.fixture
def service(make_service: MakeService) -> Service:
    """One with a new database."""
    return make_service()


@pytest.fixture
def client(service: Service) -> TestClient:
    """A client of the application without a key."""
    return client_of(service)


def client_of(service: Service) -> TestClient:
    return TestClient(create_app(service), "http://localhost", raise_server_exceptions=False)


@contextmanager
def listening(app: object) -> Iterator[str]:
    """The application behind a real socket; gives its address."""
    server = uvicorn.Server(uvicorn.Config(app, log_config=None, lifespan="off"))
    with socket.create_server(("127.0.0.1", 0)) as found:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [found]})
        thread.start()
        try:
            yield f"http://127.0.0.1:{found.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()


def _postgres_folder() -> Path | None:
    found = shutil.which("initdb")
    folders = [Path(found).parent] if found else []
    folders += sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
    return next((each for each in folders if (each / "initdb").exists()), None)


@pytest.fixture(scope="session")
def postgres(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of a PostgreSQL server of the tests' own; skips where there is none to start."""
    pytest.importorskip("psycopg")
    binaries = _postgres_folder()
    if binaries is None:
        pytest.skip("PostgreSQL is not installed")
    # It refuses to run as root.
    user = None
    if os.getuid() == 0:
        if "postgres" not in {each.pw_name for each in pwd.getpwall()}:
            pytest.skip("PostgreSQL does not run as root, and there is no user postgres")
        user = "postgres"
    with _short_folder(user) as folder:

        def run(*command: str) -> None:
            done = subprocess.run(
                [str(binaries / command[0]), *command[1:]],
                user=user,
                cwd=folder,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
                timeout=60,
            )
            if done.returncode:
                pytest.fail(f"{command[0]}: {done.stderr}")

        run("initdb", "-D", "data", "-U", "tests", "-A", "trust", "-E", "UTF8", "--no-sync")
        options = f"-k {folder} -c listen_addresses= -c fsync=off"
        run("pg_ctl", "-D", "data", "-o", options, "-l", "log", "-w", "start")
        try:
            yield f"postgresql://tests@/postgres?host={folder}"
        finally:
            run("pg_ctl", "-D", "data", "-m", "immediate", "-w", "stop")


@contextmanager
def _short_folder(user: str | None) -> Iterator[Path]:
    """A folder whose path is short enough for a socket in it."""
    import tempfile

    with tempfile.TemporaryDirectory(prefix="pg", dir="/tmp") as name:
        if user is not None:
            shutil.chown(name, user)
        yield Path(name)
