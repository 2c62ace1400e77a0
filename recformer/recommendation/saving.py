"""A changed catalogue on disk, beside its model.

    catalogue.json      which store holds it
    catalogue-<key>/    a mapped store (`recformer.data.mapped`), named by what it holds
        items           names and attributes as JSON, in pieces: of the model's own items that are
                        still offered, then of the others
        ends            (P,) where the pieces end
        gone            (G,) the model's own rows that are not offered any more, ascending
        vectors         (M, H) float32 of the others
        contents        (M,) content hashes of their texts

The store is written first and the file that names it last, so a reader has the catalogue of before
or that of after, and may go on using what it has mapped. Of the model's own items the vectors are
those of the model, which must be the one that the catalogue was saved with.

Shapes: N0 items of the model, N items, M others, H hidden.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from recformer.data.item_vectors import KEY_DTYPE
from recformer.data.mapped import DamagedStoreError, build_mapped, open_mapped, remove_mapped
from recformer.files import UserError, read_checked_json, sha256_of, write_checked_json
from recformer.recommendation.catalogue import Snapshot
from recformer.recommendation.view import Rows
from recformer.tokenization import Item

CATALOGUE_FILE = "catalogue.json"
PREFIX = "catalogue-"
FORM = "recformer catalogue 1"  # enters the key: raise it when what the arrays hold changes
ITEMS_AT_ONCE = 4096
TRIES = 5  # a reader's, while others save


@dataclass(frozen=True)
class SavedCatalogue:
    """A saved catalogue.

    Attributes:
        texts: {name: attributes} of N items, in the order of their rows.
        gone: ascending rows of the model's own that are not offered.
        vectors: (M, H) float32, mapped.
        contents: M content hashes.
    """

    texts: dict[str, Item]
    gone: NDArray[np.int64]
    vectors: Tensor
    contents: list[bytes]


def save_catalogue(folder: Path, snapshot: Snapshot, model_key: str) -> None:
    """Write what is offered; several who write to one folder do it `alone`.

    Args:
        folder: of the model.
        snapshot: of the catalogue.
        model_key: of weights and item table.
    """
    parts = _parts(snapshot, model_key)
    store = folder / f"{PREFIX}{parts.key[:32]}"
    with build_mapped(store, parts.key) as writer:
        writer.append("ends", np.cumsum([len(piece) for piece in parts.pieces]), "<i8")
        writer.append("gone", parts.gone, "<i8")
        writer.append("contents", parts.contents, KEY_DTYPE.str)
        writer.append("items", np.empty(0), "|u1")
        for piece in parts.pieces:
            writer.append("items", np.frombuffer(piece, np.uint8), "|u1")
        table = Rows(snapshot.view.tables, parts.others)
        writer.append("vectors", np.empty((0, *table.shape[1:])), "<f4")
        for start in range(0, len(table), ITEMS_AT_ONCE):
            part = table[start : start + ITEMS_AT_ONCE]
            writer.append("vectors", part.float().cpu().numpy(), "<f4")
        base = len(snapshot.view.tables[0])
        writer.facts = {"model": model_key, "items": len(snapshot.row_of), "base": base}
    write_checked_json(folder / CATALOGUE_FILE, {"store": store.name, "key": parts.key})
    for other in folder.glob(f"{PREFIX}*"):
        if other != store and other.is_dir():
            remove_mapped(other)


def load_catalogue(folder: Path, base: int, model_key: str) -> SavedCatalogue | None:
    """Read what `save_catalogue` wrote; None where nothing was saved.

    Args:
        folder: of the model.
        base: N0.
        model_key: of the model that is there now.

    Raises:
        UserError: damaged, or saved with another model.
    """
    for attempt in range(TRIES):
        try:
            named = read_checked_json(folder / CATALOGUE_FILE)
        except FileNotFoundError:
            return None
        try:
            opened = open_mapped(folder / str(named["store"]), str(named["key"]), mode="c")
            break
        except DamagedStoreError as error:
            # Somebody may have saved another one in between.
            if attempt + 1 == TRIES or _names_same(folder, named):
                raise UserError(
                    f"the saved catalogue is damaged ({error}): remove {folder / CATALOGUE_FILE} "
                    "to go on with the catalogue that the model was finetuned on"
                ) from error
    facts, arrays = opened.facts, opened.arrays
    if facts["model"] != model_key or facts["base"] != base:
        raise UserError(
            f"{folder / CATALOGUE_FILE} was saved with another model than the one in {folder}: "
            "its vectors do not fit, remove it"
        )
    ends = arrays["ends"].tolist()
    texts: dict[str, Item] = {}
    for start, end in zip([0, *ends], ends, strict=False):
        texts.update(json.loads(arrays["items"][start:end].tobytes()))
    contents = arrays["contents"]
    return SavedCatalogue(
        texts, arrays["gone"], torch.from_numpy(arrays["vectors"]), contents.tolist()
    )


@dataclass(frozen=True)
class _Parts:
    """Content of a store, without the vectors of the rows `others`."""

    pieces: list[bytes]
    gone: NDArray[np.int64]
    others: NDArray[np.int64]
    contents: NDArray[np.bytes_]
    key: str


def _parts(snapshot: Snapshot, model_key: str) -> _Parts:
    base, row_of = len(snapshot.view.tables[0]), snapshot.row_of
    rows = np.fromiter(row_of.values(), np.int64, len(row_of))
    order = np.argsort(rows, kind="stable")
    names = list(row_of)
    pieces = _pieces([names[place] for place in order], snapshot.texts)
    rows = rows[order]
    others = rows[rows >= base]
    gone = np.setdiff1d(np.arange(base), rows)
    mine = np.array([snapshot.contents[row - base] for row in others.tolist()], KEY_DTYPE)
    # A vector follows from the model and the content that it belongs to.
    key = sha256_of(FORM, model_key, gone.tobytes(), mine.tobytes(), *pieces)
    return _Parts(pieces, gone, others, mine, key)


def catalogue_key(snapshot: Snapshot, model_key: str) -> str:
    """SHA-256 (hex) of a catalogue; arguments as of `save_catalogue`."""
    return _parts(snapshot, model_key).key


def _pieces(names: list[str], texts: dict[str, Item]) -> list[bytes]:
    iterator = iter(names)
    pieces = []
    while some := list(islice(iterator, ITEMS_AT_ONCE)):
        text = json.dumps([(name, texts[name]) for name in some])  # ASCII: half surrogates too
        pieces.append(text.encode("ascii"))
    return pieces


def _names_same(folder: Path, named: dict[str, Any]) -> bool:
    try:
        return read_checked_json(folder / CATALOGUE_FILE) == named
    except FileNotFoundError:
        return False
