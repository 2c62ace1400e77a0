"""Unique codes of items: the file, telling apart equal content, new items, the command."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from baselines.semantic_ids import SemanticIds
from recformer.files import UserError, read_json, sha256_of


def toy_ids() -> SemanticIds:
    codes = np.array([[1, 0, 0], [0, 3, 0], [1, 0, 1]])
    return SemanticIds(["B", "C", "A"], codes, 2, [2, 4, 2], "rkmeans", "key")


def test_the_file_by_hand(tmp_path: Path) -> None:
    path = tmp_path / "semantic_ids.json"
    toy_ids().save(path)
    in_order = np.array([[1, 0, 1], [1, 0, 0], [0, 3, 0]], dtype="<i8")
    assert read_json(path) == {
        "levels": 2,
        "codebook_size": [2, 4, 2],
        "codes": {"B": [1, 0, 0], "C": [0, 3, 0], "A": [1, 0, 1]},
        "method": "rkmeans",
        "vectors": "key",
        "hash": sha256_of('["A", "B", "C"]', in_order.tobytes()),
    }


def test_codes_come_in_the_order_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "semantic_ids.json"
    toy_ids().save(path)
    ids = SemanticIds.load(path, ["A", "C"])
    assert ids.codes.dtype == np.int64
    assert ids.codes.tolist() == [[1, 0, 1], [0, 3, 0]]
    assert (ids.levels, ids.codebook_size, ids.method) == (2, [2, 4, 2], "rkmeans")
    assert SemanticIds.load(path).hash == toy_ids().hash
    with pytest.raises(UserError, match="no code for 2 of 3 items, 'X' the first"):
        SemanticIds.load(path, ["X", "A", "Y"])


def test_two_items_never_share_an_id() -> None:
    with pytest.raises(ValueError, match=r"'A' and 'C' have the same id \[1, 0\]"):
        SemanticIds(["A", "B", "C"], np.array([[1, 0], [0, 0], [1, 0]]), 2, [2, 1], "m", "v")


def set_code(value: dict[str, Any]) -> None:
    value["codes"]["C"] = [0, 2, 0]


def rename(value: dict[str, Any]) -> None:
    value["codes"]["D"] = value["codes"].pop("C")


def double(value: dict[str, Any]) -> None:
    value["codes"]["C"] = [1, 0, 0]


def ragged(value: dict[str, Any]) -> None:
    value["codes"]["C"] = [1, 0]


def outside(value: dict[str, Any]) -> None:
    value["codes"]["C"] = [2, 0, 0]


def no_number(value: dict[str, Any]) -> None:
    value["codes"]["C"] = [1, 0, True]


def another_level(value: dict[str, Any]) -> None:
    value["levels"] = 1


def no_hash(value: dict[str, Any]) -> None:
    del value["hash"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (set_code, "other codes than its hash"),
        (rename, "other codes than its hash"),
        (double, "'B' and 'C' have the same id"),
        (ragged, "inhomogeneous"),
        (outside, "outside their codebooks"),
        (no_number, r"'C' has \[1, 0, true\]"),
        (another_level, "3 codebook sizes for 1 levels"),
        (no_hash, "null as its 'hash'"),
    ],
)
def test_a_changed_file_is_refused(
    tmp_path: Path, change: Callable[[dict[str, Any]], None], message: str
) -> None:
    path = tmp_path / "semantic_ids.json"
    toy_ids().save(path)
    value = read_json(path)
    change(value)
    path.write_text(json.dumps(value))
    with pytest.raises(UserError, match=message):
        SemanticIds.load(path)
