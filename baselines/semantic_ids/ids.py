"""Semantic ids: every item as a short tuple of codes, unique to it.

`recformer semantic-ids --data_path FOLDER --text_encoder ENCODER --output_dir DIR` fits a
quantiser to the items' vectors and writes

    semantic_ids.json       the ids, see below
    quantiser.safetensors   what made them: gives new items their ids (`--extend DIR`)
    report.json             reconstruction, code usage and entropy a level, collisions, seconds
    hierarchy.md, .tex, .csv, .png  size and typical words of every first-level code

`semantic_ids.json` is the contract between what makes codes and what learns to generate them:

    levels          L, codes that come from the item's content
    codebook_size   [K_1, …, K_L], and K_d where a level was added that tells apart items of the
                    same content
    codes           {asin: [c_1, …, c_L] or [c_1, …, c_L, d]}, each from 0; no two items alike
    method          what made the codes
    vectors         key of the item vectors that they were made from
    hash            SHA-256 of items and codes, in the order of the asins

LC-Rec's and MiniOneRec's NAME.index.json, {item: ["<a_12>", "<b_3>", …]}, is read as well.

Content codes of two items can be the same. `add_level` appends a number that tells such items
apart; `reassign` moves all but one of them to the nearest free code. Both go by the order of the
asins, not by item ids, so that a quantiser gives the same items the same ids in every folder.

Shapes: N items, L levels, L' levels with an added one, K codes of a level, H width of item vectors,
D of latents.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from recformer.files import UserError, read_json, sha256_of, write_json

FILE = "semantic_ids.json"
TEXT_ENCODER = "sentence-transformers/all-MiniLM-L6-v2"

# Keys of `semantic_ids.json` and their types.
TYPES = {
    "levels": int,
    "codebook_size": list,
    "codes": dict,
    "method": str,
    "vectors": str,
    "hash": str,
}


# A level of NAME.index.json.
_TOKEN = re.compile(r"<[a-z]+_(\d{1,9})>", re.ASCII)


@dataclass(frozen=True, eq=False)
class SemanticIds:
    """Unique codes of items.

    Attributes:
        asins: N item keys.
        codes: int64 (N, L'), a row an item, in the order of `asins`.
        levels: L; where L' is L + 1 the last column only tells apart items of the same L codes.
        codebook_size: L' sizes; every code of a column is below its size.
        method: what made the codes.
        vectors: key of the item vectors that they were made from.

    Raises:
        ValueError: codes outside their codebook, of another shape, or of two items at once.
    """

    asins: list[str]
    codes: np.ndarray
    levels: int
    codebook_size: list[int]
    method: str
    vectors: str

    def __post_init__(self) -> None:
        sizes = np.array(self.codebook_size)
        if self.codes.shape != (len(self.asins), len(sizes)):
            raise ValueError(
                f"codes have the shape {self.codes.shape}, expected {len(self.asins)} items x "
                f"{len(sizes)} levels"
            )
        if len(sizes) not in (self.levels, self.levels + 1):
            raise ValueError(
                f"{len(sizes)} codebook sizes for {self.levels} levels, expected as many or 1 more"
            )
        if ((self.codes < 0) | (self.codes >= sizes)).any():
            raise ValueError(f"codes outside their codebooks, whose sizes are {sizes.tolist()}")
        _, first, counts = np.unique(self.codes, axis=0, return_index=True, return_counts=True)
        if (counts > 1).any():
            code = self.codes[first[counts > 1][0]]
            shared = [self.asins[row] for row in np.flatnonzero((self.codes == code).all(1))[:2]]
            raise ValueError(f"{shared[0]!r} and {shared[1]!r} have the same id {code.tolist()}")

    @property
    def hash(self) -> str:
        """SHA-256 of items and codes; the order of the items does not matter."""
        order = sorted(range(len(self.asins)), key=self.asins.__getitem__)
        asins = json.dumps([self.asins[row] for row in order])
        return sha256_of(asins, self.codes[order].astype("<i8").tobytes())

    def save(self, path: str | os.PathLike) -> None:
        """Write the file, whole or not at all."""
        value = {
            "levels": self.levels,
            "codebook_size": self.codebook_size,
            "method": self.method,
            "vectors": self.vectors,
            "hash": self.hash,
            "codes": dict(zip(self.asins, self.codes.tolist(), strict=True)),
        }
        write_json(path, value)

    @classmethod
    def load(cls, path: str | os.PathLike, asins: Sequence[str] | None = None) -> SemanticIds:
        """Read and check a file.

        Args:
            path: `semantic_ids.json`, or a NAME.index.json.
            asins: the items wanted, in item id order, each of which must have a code; None for all
                that the file has. The hash is checked over the whole file either way.

        Raises:
            FileNotFoundError: there is no such file.
            UserError: it is not such a file, was changed by hand, or lacks one of `asins`.
        """
        value = read_json(path)
        listed = (
            isinstance(value, dict) and value and all(isinstance(v, list) for v in value.values())
        )
        value = _of_index(path, value) if listed else _checked(path, value)
        try:
            ids = cls(
                asins=list(value["codes"]),
                codes=np.array(list(value["codes"].values()), dtype=np.int64),
                levels=value["levels"],
                codebook_size=value["codebook_size"],
                method=value["method"],
                vectors=value["vectors"],
            )
        except (ValueError, OverflowError) as error:
            raise UserError(f"{path}: {error}; make the ids again") from error
        if ids.hash != value.get("hash", ids.hash):
            raise UserError(
                f"{path} holds other codes than its hash says ({ids.hash[:12]}, expected "
                f"{value['hash'][:12]}): it was changed after it was written; make the ids again"
            )
        if asins is None:
            return ids
        rows = {asin: row for row, asin in enumerate(ids.asins)}
        missing = [asin for asin in asins if asin not in rows]
        if missing:
            raise UserError(
                f"{path} has no code for {len(missing):,} of {len(asins):,} items, {missing[0]!r} "
                f"the first: extend it with `python -m baselines.semantic_ids --extend`"
            )
        chosen = ids.codes[[rows[asin] for asin in asins]]
        return cls(list(asins), chosen, ids.levels, ids.codebook_size, ids.method, ids.vectors)


def _of_index(path: str | os.PathLike, index: dict[str, list[Any]]) -> dict[str, Any]:
    """The content of a NAME.index.json in the form of the file; it records no hash.

    Raises:
        UserError: an item has something else than its codes, or more or fewer than the others.
    """
    codes: dict[str, list[int]] = {}
    for item, tokens in index.items():
        found = [_TOKEN.fullmatch(token) for token in tokens if isinstance(token, str)]
        codes[item] = [int(match.group(1)) for match in found if match]
        first = len(next(iter(codes.values())))
        if not first or len(codes[item]) != len(tokens) or len(tokens) != first:
            raise UserError(
                f"{path}: {item!r} has {json.dumps(tokens)[:60]}, expected as many codes for every "
                f'item, as in ["<a_12>", "<b_3>"]'
            )
    sizes = [max(column) + 1 for column in zip(*codes.values())]
    return {
        "codes": codes, "levels": len(sizes), "codebook_size": sizes, "method": "index.json",
        "vectors": "",
    }  # fmt: skip


def _checked(path: str | os.PathLike, value: Any) -> dict[str, Any]:
    """`value` if it has the form of the file.

    Raises:
        UserError: otherwise.
    """
    if not isinstance(value, dict):
        raise UserError(f"{path} holds a {type(value).__name__}, expected semantic ids")
    for name, kind in TYPES.items():
        if type(value.get(name)) is not kind:
            shown = json.dumps(value.get(name))[:60]
            raise UserError(f"{path} has {shown} as its {name!r}, expected semantic ids")
    if not all(type(size) is int for size in value["codebook_size"]):
        raise UserError(f"{path}: 'codebook_size' must be a list of whole numbers")
    for asin, row in value["codes"].items():
        if not isinstance(row, list) or set(map(type, row)) != {int}:
            raise UserError(
                f"{path}: {asin!r} has {json.dumps(row)[:60]}, expected a list of codes"
            )
    return value
