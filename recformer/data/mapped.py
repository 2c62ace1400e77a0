"""Arrays in files that are mapped into memory, keyed by content and verified by checksums.

The one form of what is made once and read by many: tokenised items, sequences of pretraining, item
vectors. A store is a folder whose name holds a key of everything that it was made from, so a stale
one cannot be read; processes that map the same store share its memory. It is written beside its
place and moved in, the header last, so that it is whole or not there; one that is damaged is made
anew by whoever opens it.

    <name>.bin   an array, little-endian, without header
    header.json  key, type, shape and CRC-32 of each array, and facts; itself with a checksum
"""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from isal import isal_zlib

from recformer.files import (
    UserError,
    naming,
    partial_folder,
    read_checked_json,
    remove_leftovers,
    write_checked_json,
)

HEADER = "header.json"

# Of headers: raise it when the layout above changes.
FORM = "recformer mapped 1"


class DamagedStoreError(Exception):
    """The files of a store are not what its header says."""


@dataclass(frozen=True)
class Mapped:
    """An open store.

    Attributes:
        key: of what it was made from.
        arrays: by name, mapped.
        facts: what else its maker wrote down.
    """

    key: str
    arrays: dict[str, np.ndarray]
    facts: dict[str, Any]


def open_mapped(
    folder: Path, key: str | None = None, verify: bool = True, mode: str = "r"
) -> Mapped:
    """Map the arrays of a store.

    Args:
        folder: of the store.
        key: that it must have; None for any.
        verify: read the arrays through once and compare checksums, sizes else.
        mode: "r" read-only, "c" for writing to this process's copy alone.

    Raises:
        DamagedStoreError: it is not there, not whole, or not what its header says.
    """
    try:
        header = read_checked_json(folder / HEADER)
        form, found, entries = header["form"], header["key"], header["arrays"]
        if form != FORM:
            raise ValueError(f"form {form!r}")
        specs = {
            name: (np.dtype(entry["dtype"]), tuple(entry["shape"]), entry["crc32"])
            for name, entry in entries.items()
        }
    except (FileNotFoundError, UserError, ValueError, KeyError, TypeError) as error:
        raise DamagedStoreError(f"{folder}: no valid {HEADER} ({error})") from error
    if verify:  # once a run; who built this store last may have died before
        remove_leftovers(folder.parent)
    if key is not None and found != key:
        raise DamagedStoreError(f"{folder}: {HEADER} has the key {found}")
    arrays = {}
    for name, (dtype, shape, crc32) in specs.items():
        array = arrays[name] = _map(folder / f"{name}.bin", dtype, shape, mode)
        if verify and isal_zlib.crc32(array.reshape(-1).view(np.uint8)) != crc32:
            raise DamagedStoreError(f"{folder / name}.bin has another checksum")
    return Mapped(found, arrays, header["facts"])


def _map(path: Path, dtype: np.dtype, shape: tuple[int, ...], mode: str) -> np.ndarray:
    expected = math.prod(shape) * dtype.itemsize
    try:
        size = path.stat().st_size
    except FileNotFoundError as error:
        raise DamagedStoreError(f"{path} is missing") from error
    if size != expected:
        raise DamagedStoreError(f"{path} has {size} bytes, expected {expected}")
    if not expected:  # an empty file cannot be mapped
        return np.empty(shape, dtype)
    try:
        mapped = np.memmap(path, dtype, mode=mode, shape=shape)  # type: ignore[call-overload]
    except FileNotFoundError as error:  # removed at this moment
        raise DamagedStoreError(f"{path} is missing") from error
    # A plain array over the mapping: np.memmap itself makes every slice and index slower.
    return np.asarray(mapped)


class Writer:
    """Writes the arrays of one store; `build_mapped` gives it.

    Attributes:
        facts: to be filled with what else the store is to say.
    """

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self.facts: dict[str, Any] = {}
        self.arrays: dict[str, dict[str, Any]] = {}
        self._folder, self._stack = folder, stack
        self._files: dict[str, IO[bytes]] = {}

    def append(self, name: str, rows: np.ndarray, dtype: str) -> None:
        """Add rows (n, …) to the end of an array, as little-endian `dtype`."""
        data = np.ascontiguousarray(rows.astype(dtype, copy=False))
        if name not in self._files:
            path = self._folder / f"{name}.bin"
            self._files[name] = self._stack.enter_context(open(path, "wb"))  # noqa: SIM115
            self.arrays[name] = {"dtype": dtype, "shape": [0, *data.shape[1:]], "crc32": 0}
        raw = data.tobytes()
        self._files[name].write(raw)
        os.utime(self._folder)  # alive
        entry = self.arrays[name]
        entry["shape"][0] += len(data)
        entry["crc32"] = isal_zlib.crc32(raw, entry["crc32"])

    def sync(self) -> None:
        """Flush the arrays to disk."""
        for file in self._files.values():
            file.flush()
            os.fsync(file.fileno())


@contextmanager
def build_mapped(folder: Path, key: str) -> Iterator[Writer]:
    """Write a store; it is in its place when the block ends without error.

    Equal keys give equal bytes, so it does no harm when two processes move theirs in at once, or
    when one of them replaces the files of a damaged store that another has mapped.

    Raises:
        OSError: names `folder`, whatever of the writing failed.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(folder.parent)
    with naming(folder), partial_folder(folder) as beside:
        with ExitStack() as stack:
            writer = Writer(beside, stack)
            yield writer
            writer.sync()
        header = {"form": FORM, "key": key, "arrays": writer.arrays, "facts": writer.facts}
        write_checked_json(beside / HEADER, header)
        folder.mkdir(exist_ok=True)
        for name in (*(f"{name}.bin" for name in writer.arrays), HEADER):
            os.replace(beside / name, folder / name)


def remove_mapped(folder: Path) -> None:
    """Remove a store, its header first: nobody opens half of one. Mappings outlive it."""
    (folder / HEADER).unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)
