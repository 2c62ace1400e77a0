"""`recformer serve` as a process: start, signals, kill -9, messages."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import requests

from recformer.commands.serve import listen, main, read_key
from recformer.files import UserError


class Running:
    """A service in a process of its own."""

    def __init__(self, folder: Path, work: Path, *flags: str) -> None:
        self.log = work / "log"
        command = [sys.executable, "-m", "recformer", "serve", str(folder), "--port", "0", *flags]
        env = os.environ | {"PYTHONPATH": str(Path.cwd())}
        env.pop("RECFORMER_API_KEY", None)
        with open(self.log, "a") as errors:
            self.process = subprocess.Popen(
                command, cwd=work, stdout=subprocess.PIPE, stderr=errors, text=True, env=env
            )
        assert self.process.stdout is not None
        self.said = self.process.stdout.readline()
        found = re.search(r"http://\S+", self.said)
        assert found, self.said + self.log.read_text()
        self.address = found[0]
        self.session = requests.Session()

    def call(self, method: str, path: str, **values: object) -> requests.Response:
        return self.session.request(method, self.address + path, timeout=60, **values)

    def ready(self) -> Running:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            try:
                if self.call("GET", "/ready").status_code == 200:
                    return self
            except requests.ConnectionError:
                time.sleep(0.05)
        raise AssertionError(self.log.read_text())

    def stop(self, number: int) -> int:
        self.process.send_signal(number)
        return self.process.wait(60)


@contextmanager
def running(folder: Path, work: Path, *flags: str) -> Iterator[Running]:
    service = Running(folder, work, *flags)
    try:
        yield service.ready()
    finally:
        service.process.kill()
        service.process.wait()


def test_small_packets_are_sent_at_once() -> None:
    """Headers and body are two of them: without TCP_NODELAY the second waits 40 ms for an ACK."""

    async def said() -> int:
        async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            sent = writer.get_extra_info("socket")
            value = sent.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
            writer.write(b"%d" % bool(value))
            writer.close()

        with listen("127.0.0.1", 0) as listening:
            async with await asyncio.start_server(answer, sock=listening):
                reader, writer = await asyncio.open_connection(*listening.getsockname())
                value = int(await reader.read())
                writer.close()
        return value

    assert asyncio.run(said()) == 1


def test_signals_and_log_lines(model_folder: Path, tmp_path: Path) -> None:
    with running(model_folder, tmp_path, "--no-bf16") as service:
        assert service.said.startswith("8 items; sqlite:///")
        assert service.process.stdout is not None
        assert service.process.stdout.readline() == "texts are read in float32\n"
        answer = service.call("POST", "/v1/recommend", json={"history": ["B1"]})
        assert len(answer.json()["items"]) == 7
        version = service.call("GET", "/v1/facts").json()["models"][0]["version"]
        service.process.send_signal(signal.SIGHUP)
        for _ in range(600):
            if service.call("GET", "/v1/facts").json()["models"][0]["version"] > version:
                break
            time.sleep(0.05)
        else:
            raise AssertionError("SIGHUP loaded nothing")
        assert service.stop(signal.SIGTERM) == 0
    lines = [json.loads(line) for line in service.log.read_text().splitlines() if line[:1] == "{"]
    asked = [line for line in lines if line.get("route") == "/v1/recommend"]
    assert [(line["method"], line["status"]) for line in asked] == [("POST", 200)]
    assert asked[0]["ms"] > 0
    assert lines[-1]["message"] == "stopped"
    assert any(line["message"] == "reloaded" for line in lines)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--host", "0.0.0.0"], "there is no key"),
        (["--max_k", "0"], "--max_k 0: must be at least 1"),
        (["--port", "70000"], "--port 70000"),
        (["--host", "127.0.0.1", "--beside", "nowhere"], "nowhere does not exist"),
        (["--port", "0", "--database", "mysql://x/y"], "no database of SQLite or PostgreSQL"),
    ],
)
def test_flags_that_cannot_be(
    model_folder: Path, flags: list[str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RECFORMER_API_KEY", raising=False)
    with pytest.raises((UserError, FileNotFoundError), match=message):
        main([str(model_folder), *flags])


def test_an_address_that_is_taken_is_said_before_the_model_is_loaded(
    model_folder: Path, tmp_path: Path
) -> None:
    with running(model_folder, tmp_path) as service:
        port = service.address.rpartition(":")[2]
        with pytest.raises(UserError, match=f"127.0.0.1:{port} cannot be listened on"):
            main([str(model_folder), "--port", port])


def test_a_key_that_is_no_text_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "key"
    path.write_bytes(b"\xff" * 40)
    with pytest.raises(UserError, match="the key in .*key has 40 characters, expected at least 16"):
        read_key(path)


def test_the_kernel_keeps_threads_of_its_own(
    model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[bool] = []
    monkeypatch.setattr("recformer.commands.serve.threads.use_torchs", asked.append)
    monkeypatch.setattr("recformer.commands.serve.serve", lambda args, key: None)
    main([str(model_folder)])
    assert asked == [False]
