"""Recommendations over HTTP: Gorse's REST API, more under /v1, and a page to try them.

`recformer serve result/best_model` answers on http://127.0.0.1:8000; the page is at /, the
description of all requests at /docs. It needs the extra `serve`: pip install "recformer[serve]".

Items, users and feedback that are sent are kept in a database, by default
`recformer_serve.sqlite3` in the working directory, and are there again after a restart. Without a
key the service answers this machine alone; a key comes from a file (--api_key_file) or from the
variable RECFORMER_API_KEY, and clients send it as the header X-API-Key.

SIGTERM and Ctrl-C end it when the requests that are running have their answers; SIGHUP, or a POST
to /v1/reload, loads the folder again without a request being refused.
"""

from __future__ import annotations

import argparse
import importlib.util
import ipaddress
import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from recformer.cli import command_parser, keep_freed_memory
from recformer.files import UserError
from recformer.models import threads
from recformer.processes import say

KEY_VARIABLE = "RECFORMER_API_KEY"
NEEDED = ("fastapi", "fastapi_offline", "uvicorn", "sqlalchemy", "prometheus_client")
SHORTEST_KEY = 16


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The flags."""
    parser = command_parser("serve", __doc__)
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="best_model of a finetuning")
    parser.add_argument(
        "--beside", type=Path, metavar="FOLDER", help="a second model, which the page compares"
    )
    parser.add_argument(
        "--meta_file", type=Path, metavar="FILE", help="catalogue, in place of the folder's own"
    )
    parser.add_argument(
        "--data_path", type=Path, metavar="FOLDER", help="processed folder: test users for the page"
    )
    parser.add_argument(
        "--database",
        default="recformer_serve.sqlite3",
        metavar="FILE_OR_URL",
        help="SQLite file, or postgresql://user@host/name (default: %(default)s)",
    )
    parser.add_argument("--host", default="127.0.0.1", help="address (default: %(default)s)")
    parser.add_argument("--port", type=int, default=8000, help="0: any (default: %(default)s)")
    parser.add_argument("--api_key_file", type=Path, metavar="FILE", help="a file with the key")
    parser.add_argument(
        "--shown_types",
        nargs="*",
        default=["read"],
        metavar="TYPE",
        help="feedback of items that were shown and nothing else: not offered again, not read as "
        "history (default: read)",
    )
    parser.add_argument(
        "--bf16",
        action=argparse.BooleanOptionalAction,
        help="read texts in bfloat16; scores move in the fourth digit (docs/guides/serving.md; "
        "default: on processors made for it)",
    )
    parser.add_argument("--threads", type=int, help="that compute (default: all cores)")
    parser.add_argument("--max_batch", type=int, default=64, help="histories in a batch (64)")
    parser.add_argument("--max_k", type=int, default=1000, help="items an answer (1000)")
    parser.add_argument("--max_rows", type=int, default=10_000, help="rows a request (10000)")
    parser.add_argument("--max_body", type=int, default=16 * 2**20, help="bytes a request (16 MiB)")
    args = parser.parse_args(argv)
    for name in ("max_batch", "max_k", "max_rows", "max_body"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name} {getattr(args, name)}: must be at least 1")
    if args.threads is not None and args.threads < 1:
        raise UserError(f"--threads {args.threads}: must be at least 1")
    if not 0 <= args.port < 2**16:
        raise UserError(f"--port {args.port}: must be from 0 to 65535")
    return args


def read_key(path: Path | None) -> str | None:
    """The key, from its file or the environment; None where there is none.

    Raises:
        UserError: it is too short, or cannot be a header.
    """
    if path is not None:
        # What is not ASCII is refused below.
        key = path.read_text(encoding="utf-8", errors="replace").strip()
    elif KEY_VARIABLE in os.environ:
        key = os.environ[KEY_VARIABLE].strip()
    else:
        return None
    where = path or f"${KEY_VARIABLE}"
    if len(key) < SHORTEST_KEY or not key.isascii() or not key.isprintable():
        raise UserError(
            f"the key in {where} has {len(key)} characters, expected at least {SHORTEST_KEY} of "
            "ASCII: python3 -c 'import secrets; print(secrets.token_urlsafe())' makes one"
        )
    return key


def is_loopback(host: str) -> bool:
    """True for an address that can be reached from this machine alone."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def listen(host: str, port: int) -> socket.socket:
    """A socket that takes connections from now on.

    Raises:
        UserError: the address cannot be had.
    """
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        # Of TCP by name, or asyncio leaves out TCP_NODELAY and every answer waits 40 ms for an ACK.
        found = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind((host, port))
        found.listen(1024)
    except OSError as error:
        raise UserError(
            f"{host}:{port} cannot be listened on: {error.strerror or error}"
        ) from error
    return found


def main(argv: Sequence[str] | None = None) -> None:
    """Load, listen, answer until a signal comes."""
    args = parse(argv)
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(
            f'{", ".join(missing)} cannot be imported: pip install "recformer[serve]", or '
            'pip install -e ".[serve]" in a checkout'
        )
    key = read_key(args.api_key_file)
    if key is None and not is_loopback(args.host):
        raise UserError(
            f"--host {args.host} can be reached from elsewhere and there is no key: give one "
            f"(--api_key_file or ${KEY_VARIABLE}), or stay on 127.0.0.1"
        )
    keep_freed_memory()
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    threads.use_torchs(False)  # which sleep between requests
    serve(args, key)


def serve(args: argparse.Namespace, key: str | None) -> None:
    """Answer requests until a signal comes."""
    import uvicorn

    from recformer.serving.app import create_app
    from recformer.serving.examples import ExampleUsers
    from recformer.serving.logs import write_json_lines
    from recformer.serving.served import computes_in_bfloat16
    from recformer.serving.service import BESIDE, MAIN, Limits, Service
    from recformer.serving.store import Store

    folders: dict[str, Path] = {MAIN: args.folder} | ({BESIDE: args.beside} if args.beside else {})
    for path in (*folders.values(), args.data_path):
        if path is not None and not path.is_dir():
            raise FileNotFoundError(f"{path} does not exist or is no folder")
    users = None if args.data_path is None else ExampleUsers(args.data_path)
    listening = listen(args.host, args.port)  # before the long work: the address may be taken
    store = Store(args.database)
    limits = Limits(body=args.max_body, k=args.max_k, rows=args.max_rows, batch=args.max_batch)
    bf16 = computes_in_bfloat16() if args.bf16 is None else args.bf16
    service = Service(folders, store, limits, args.shown_types, args.meta_file, bf16)
    config = uvicorn.Config(
        create_app(service, key, users),
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=30,
        lifespan="off",
    )
    server = uvicorn.Server(config)
    host, port = listening.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host
    say(
        f"{len(service.main.recommender):,} items; {store.name}; page and API on http://{shown}:{port}"
    )
    say(f"texts are read in {'bfloat16 (--no-bf16: float32)' if bf16 else 'float32'}")
    if key is None:
        say("there is no key: this machine alone is answered, by the names localhost and 127.0.0.1")
    sys.stdout.flush()
    write_json_lines()
    try:
        with _signals(server, service):
            server.run(sockets=[listening])
    finally:
        service.close()
    logging.getLogger("recformer.serving").info("stopped")


@contextmanager
def _signals(server: Any, service: Any) -> Iterator[None]:
    """SIGTERM and SIGINT end the server in order, a second one at once; SIGHUP reloads."""

    def stop(number: int, frame: Any) -> None:
        service.stopping = True
        server.force_exit = server.should_exit
        server.should_exit = True

    def reload(number: int, frame: Any) -> None:
        threading.Thread(target=_reload, args=(service,), daemon=True).start()

    @contextmanager
    def captured() -> Iterator[None]:  # in place of uvicorn's own, which ends with the signal
        before = {
            number: signal.signal(number, handler)
            for number, handler in (
                (signal.SIGTERM, stop),
                (signal.SIGINT, stop),
                (signal.SIGHUP, reload),
            )
        }
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    server.capture_signals = captured
    yield


def _reload(service: Any) -> None:
    logger = logging.getLogger("recformer.serving")
    for name in service.names:
        try:
            served = service.reload(name)
            fields = {"model": name, "items": len(served.recommender), "version": served.version}
            logger.info("reloaded", extra={"fields": fields})
        except Exception as error:  # the model that is there goes on
            logger.error("not reloaded", extra={"fields": {"model": name, "error": str(error)}})
