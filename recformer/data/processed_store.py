"""The copy of a large processed folder in files that are mapped into memory.

JSON is what a folder is made of and what anybody may write; at a million users it takes a minute
and gigabytes to read. So the first reader of a large folder leaves what it read in
`mapped/processed-<key>/` (`recformer.data.mapped`), and all later ones, whatever process they are
in, map the same files. The key is of the content of the JSON files, so a copy of other files is
never read.

Arrays, of each of train, val and test, and of the items:
    train_offsets, train_items                  `Sequences`, a row a user id
    asin_offsets, asin_data                     `Texts`
    attribute_offsets, attribute_names,
    name_offsets, name_data,
    value_offsets, value_data                   `ItemTexts`

A small folder is read as it is. So is one where nothing can be written.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from recformer.data.mapped import (
    DamagedStoreError,
    Mapped,
    Writer,
    build_mapped,
    open_mapped,
    remove_mapped,
)
from recformer.data.sequences import Sequences
from recformer.data.texts import ItemTexts, Texts
from recformer.files import file_sha256, found_or_made, sha256_of

logger = logging.getLogger(__name__)

# Enters the key: raise it when what the arrays hold changes.
FORMAT = "recformer processed folder 1"

# Bytes of JSON from which on a copy is kept; less is read in a second.
LARGE = 32 << 20

STORES = "mapped"

SPLITS = ("train", "val", "test")
BLOCK = 1 << 22  # rows written at a time


@dataclass(frozen=True, eq=False)
class Content:
    """What the five files of a processed folder say.

    Attributes:
        train, val, test: a row a user id.
        asins: the key of every item, in item id order.
        items: attributes of every item, in item id order.
        split_hash: content hash of the split.
    """

    train: Sequences
    val: Sequences
    test: Sequences
    asins: Sequence[str]
    items: Sequence[dict[str, str]]
    split_hash: str


def open_or_build(folder: Path, names: Sequence[str], read: Callable[[], Content]) -> Content:
    """The content of a folder: mapped where it is large, else as `read` gives it.

    Args:
        folder: the processed folder.
        names: of its train, validation, test and item files, and of that of the texts.
        read: reads and checks them.
    """
    if _size(folder, names) < LARGE:
        return read()
    key = content_key(folder, names)
    store = store_path(folder, key)
    try:
        store.parent.mkdir(exist_ok=True)
    except OSError:  # a folder that is read-only, a full disk
        return read()

    def made() -> Content:
        content = read()
        if content_key(folder, names) != key:  # exchanged while it was read
            return content
        try:
            with build_mapped(store, key) as writer:
                write_content(writer, content)
        except OSError as error:
            logger.warning("%s is not kept mapped: %s", folder, error)
            return content
        return _content(open_mapped(store, key, verify=False))

    return found_or_made(store.parent, lambda: _mapped(store, key), made)


def _mapped(store: Path, key: str) -> Content | None:
    """What is there; None: nothing, or it is damaged."""
    if not store.is_dir():
        return None
    try:
        return _content(open_mapped(store, key))
    except DamagedStoreError as error:
        logger.warning("%s: reading the JSON files again", error)
        return None


def content_key(folder: Path, names: Sequence[str]) -> str:
    """Hash of everything that a copy is made from, hex."""
    with ThreadPoolExecutor(len(names)) as threads:  # hashing lets go of the interpreter's lock
        digests = threads.map(file_sha256, (folder / name for name in names))
        return sha256_of(FORMAT, *digests)


def store_path(folder: Path, key: str) -> Path:
    """Where the copy of a key lies."""
    return folder / STORES / f"processed-{key[:32]}"


def keep(folder: Path, names: Sequence[str], content: Content) -> None:
    """Write the copy of a folder that was just written, if it is large."""
    if _size(folder, names) >= LARGE:
        key = content_key(folder, names)
        with build_mapped(store_path(folder, key), key) as writer:
            write_content(writer, content)


def _size(folder: Path, names: Sequence[str]) -> int:
    return sum((folder / name).stat().st_size for name in names)


def remove_stores(folder: Path) -> None:
    """Remove all copies of a folder; mappings outlive them."""
    for store in (folder / STORES).glob("processed-*"):
        remove_mapped(store)


def write_content(writer: Writer, content: Content) -> None:
    """Write the arrays of a copy."""
    for name in SPLITS:
        part: Sequences = getattr(content, name)
        _append(writer, f"{name}_offsets", part.offsets, "<i8")
        _append(writer, f"{name}_items", part.items, "<i4")
    asins = Texts.of(content.asins)
    items = ItemTexts.of(content.items)
    _append(writer, "attribute_offsets", items.offsets, "<i8")
    _append(writer, "attribute_names", items.names, "<u4")
    for name, texts in (("asin", asins), ("name", items.name_texts), ("value", items.values)):
        _append(writer, f"{name}_offsets", texts.offsets, "<i8")
        _append(writer, f"{name}_data", texts.data, "|u1")
    writer.facts["split_hash"] = content.split_hash


def _append(writer: Writer, name: str, array: np.ndarray, dtype: str) -> None:
    for start in range(0, max(len(array), 1), BLOCK):
        writer.append(name, array[start : start + BLOCK], dtype)


def _content(store: Mapped) -> Content:
    arrays = store.arrays

    def texts(name: str) -> Texts:
        return Texts(arrays[f"{name}_offsets"], arrays[f"{name}_data"])

    train, val, test = (
        Sequences(arrays[f"{name}_offsets"], arrays[f"{name}_items"]) for name in SPLITS
    )
    items = ItemTexts(
        arrays["attribute_offsets"], arrays["attribute_names"], texts("name"), texts("value")
    )
    return Content(train, val, test, texts("asin"), items, store.facts["split_hash"])
