"""Requests made up from the service's own description: none is answered with 5xx."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis.errors import Unsatisfiable
from schemathesis import GenerationMode

from recformer.serving.app import create_app
from recformer.serving.service import MAIN, Limits, Service
from recformer.serving.store import Store

HOST = {"Host": "localhost"}
# Reloading takes a second and reads one name of two.
LEFT_OUT = "/v1/reload"


def fuzz(folder: Path, work: Path, examples: int, modes: list[GenerationMode]) -> list[int]:
    """Send so many requests of every kind, right and wrong ones; returns their statuses."""
    store = Store(str(work / "serve.sqlite3"))
    service = Service({MAIN: folder}, store, Limits(k=50, rows=50, body=100_000))
    schema = schemathesis.openapi.from_asgi("/openapi.json", create_app(service), headers=HOST)
    statuses: list[int] = []
    asked = 0
    for found in schema.exclude(path=LEFT_OUT).get_all_operations():
        operation = found.ok()
        asked += 1
        for mode in modes:

            @settings(
                max_examples=examples,
                database=None,
                deadline=None,
                derandomize=True,
                suppress_health_check=list(HealthCheck),
            )
            @given(case=operation.as_strategy(generation_mode=mode))
            def ask(case: schemathesis.Case) -> None:
                answer = case.call(headers=HOST)
                statuses.append(answer.status_code)
                assert answer.status_code < 500, answer.text

            with suppress(Unsatisfiable):  # a request without parameters cannot be wrong
                ask()
    service.close()
    assert asked > 40
    return statuses


def test_no_request_is_answered_with_5xx(model_folder: Path, tmp_path: Path) -> None:
    statuses = fuzz(model_folder, tmp_path, 2, [GenerationMode.POSITIVE])
    assert len(statuses) > 60
    assert {200, 404} <= set(statuses)


@pytest.mark.slow
def test_no_wrong_request_is_answered_with_5xx(model_folder: Path, tmp_path: Path) -> None:
    statuses = fuzz(model_folder, tmp_path, 30, list(GenerationMode))
    assert {200, 400, 404} <= set(statuses)
