"""Item vectors in files that are mapped into memory, keyed by what an item holds.

A store belongs to one `model_key`: weights, tokenizer and settings that a vector depends on. Within
it a vector belongs to the content of an item (its tokens, or its text), not to a place in a
catalogue: items of the same content are encoded once and have the same bits, a build that was cut
off goes on where it was, and of a changed catalogue only new and changed items are encoded. A stale
vector cannot be read, because whatever it depends on is in its key.

In `cache_dir/item_vectors-<key>/` lie tables, a mapped store each (`recformer.data.mapped`):
    vectors  (K, H) float32
    keys     (K,) the 128-bit content hashes of their items
While items are encoded a table holds a block of them, in the end the whole catalogue in order; what
the whole holds is then removed. Nothing but time is lost if a store is deleted.

Shapes: N items, D items of different content, K items of one table, H hidden.
"""

from __future__ import annotations

import errno
import hashlib
import logging
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
from tqdm.auto import tqdm

from recformer.data.mapped import (
    HEADER,
    DamagedStoreError,
    build_mapped,
    open_mapped,
    remove_mapped,
)
from recformer.files import UserError, sha256_of

logger = logging.getLogger(__name__)

# Enters the key: raise it when what the arrays hold changes.
FORMAT = "recformer item vectors 1"

# Items encoded between two writes: what a kill can cost, and the most that memory must hold.
BLOCK_SIZE = 4096

# Fixed width, so that a trailing zero byte, which numpy strips from a single value, still compares.
KEY_DTYPE = np.dtype("S16")

Keys = npt.NDArray[np.bytes_]
Vectors = npt.NDArray[np.float32]
Table = tuple[Keys, Vectors]


def content_keys(contents: Iterable[bytes]) -> Keys:
    """(N,) 128-bit hashes of what the items hold, as `open_or_build` wants them."""
    digests = (hashlib.blake2b(content, digest_size=KEY_DTYPE.itemsize) for content in contents)
    return np.frombuffer(b"".join(digest.digest() for digest in digests), KEY_DTYPE)


def open_or_build(
    keys: Keys,
    encode: Callable[[npt.NDArray[np.int64]], np.ndarray],
    model_key: str,
    hidden_size: int,
    cache_dir: str | os.PathLike,
    *,
    rank: int = 0,
    world: int = 1,
    wait: Callable[[], object] = lambda: None,
    progress: bool = True,
) -> Vectors:
    """Map the vectors of all items; those that are not stored yet are encoded first.

    Processes that know of each other share the work: each calls this with its `rank`. Others may
    build the same store at the same time; they take over what they see finished.

    Args:
        keys: (N,) content hashes, see `content_keys`.
        encode: gives the (K, H) vectors of the items at some rows of `keys`; called with at most
            BLOCK_SIZE rows at a time, never twice with the same content.
        model_key: names everything that a vector depends on beside the content of its item.
        hidden_size: H.
        cache_dir: where stores are kept; made if missing.
        rank, world: which of how many processes this is.
        wait: returns once all of them have called it.
        progress: show a progress bar (on rank 0).

    Returns:
        (N, H) float32, mapped. Writing to it changes this process's copy alone, never the file.

    Raises:
        UserError: no items, or `encode` gives values that are not finite.
        OSError: not enough room on the disk; what is encoded by then is kept.
        ValueError: `encode` gives another shape than (K, H).
    """
    if not len(keys):
        raise UserError("no items to encode: the catalogue is empty")
    folder = _folder(cache_dir, model_key, hidden_size)
    whole = _path(folder, keys)
    table = _open(whole, hidden_size)
    if table is None:
        _encode_missing(keys, encode, folder, hidden_size, rank, world, progress and rank == 0)
    wait()
    # Once around, unless another build replaces blocks by its catalogue at this very moment.
    while rank == 0 and table is None and _open(whole, hidden_size) is None:
        _encode_missing(keys, encode, folder, hidden_size, 0, 1, False)
        distinct, inverse = np.unique(keys, return_inverse=True)
        tables = _tables(folder, hidden_size)
        table_of, row_of = _locate(distinct, tables)
        if (table_of >= 0).all():
            parts = _gather(tables, table_of[inverse], row_of[inverse])
            _write(whole, keys, parts)
            _remove_covered(folder, distinct, whole, hidden_size)
            break
    wait()
    if table is None:
        table = _open(whole, hidden_size)
    if table is None:
        raise FileNotFoundError(f"{whole} is gone: was it deleted by somebody else?")
    return table[1]


def count_missing(
    keys: Keys, model_key: str, hidden_size: int, cache_dir: str | os.PathLike
) -> int:
    """Number of items that `open_or_build` would encode, those of the same content once."""
    folder = _folder(cache_dir, model_key, hidden_size)
    distinct = np.unique(keys)
    return int((_locate(distinct, _tables(folder, hidden_size))[0] < 0).sum())


def _folder(cache_dir: str | os.PathLike, model_key: str, hidden_size: int) -> Path:
    key = sha256_of(FORMAT, model_key, str(hidden_size))
    return Path(cache_dir) / f"item_vectors-{key}"


def _path(folder: Path, keys: Keys) -> Path:
    """The one place for vectors of these items by this store's model."""
    return folder / sha256_of(folder.name, keys.tobytes())[:32]


def _paths(folder: Path) -> list[Path]:
    """The tables of a store."""
    return sorted(path.parent for path in folder.glob(f"*/{HEADER}"))


def _open(path: Path, hidden_size: int) -> Table | None:
    """Keys and mapped vectors of a table; None if it is not there, or damaged (said in the log)."""
    if not path.is_dir():  # or removed at this moment, because a catalogue holds it all
        return None
    try:
        arrays = open_mapped(path, mode="c").arrays
        keys, vectors = arrays["keys"], arrays["vectors"]
    except (DamagedStoreError, KeyError) as error:
        logger.warning("%s is damaged and not read: %s", path, error)
        return None
    if keys.dtype != KEY_DTYPE or path != _path(path.parent, keys):
        logger.warning("%s is not read: it was put there from elsewhere", path)
        return None
    if vectors.dtype != np.float32 or vectors.shape != (len(keys), hidden_size):
        logger.warning("%s is damaged and not read: %s %s", path, vectors.dtype, vectors.shape)
        return None
    return keys, vectors


def _tables(folder: Path, hidden_size: int) -> list[Table]:
    """All tables of a store. Their mappings outlive the files' removal."""
    opened = (_open(path, hidden_size) for path in _paths(folder))
    return [table for table in opened if table is not None]


def _locate(
    distinct: Keys, tables: list[Table]
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Places of D sorted keys: index of the table (-1: in none) and row there, (D,) each."""
    table_of = np.full(len(distinct), -1)
    row_of = np.zeros(len(distinct), np.int64)
    for index, (keys, _) in enumerate(tables):
        places = np.searchsorted(distinct, keys).clip(max=len(distinct) - 1)
        rows = np.flatnonzero(distinct[places] == keys)
        table_of[places[rows]] = index
        row_of[places[rows]] = rows
    return table_of, row_of


def _encode_missing(
    keys: Keys,
    encode: Callable[[npt.NDArray[np.int64]], np.ndarray],
    folder: Path,
    hidden_size: int,
    rank: int,
    world: int,
    progress: bool,
) -> None:
    """Encode this process's share of what the store lacks.

    The borders of blocks and whose they are depend on the catalogue alone, not on what is there
    already: processes agree without talking, and a resumed build gives the same bits.
    """
    distinct, first = np.unique(keys, return_index=True)
    missing = _locate(distinct, _tables(folder, hidden_size))[0] < 0
    order = np.argsort(first)  # as the items stand in the catalogue
    blocks = [order[start : start + BLOCK_SIZE] for start in range(0, len(order), BLOCK_SIZE)]
    blocks = [block[missing[block]] for block in blocks[rank::world]]
    blocks = [block for block in blocks if len(block)]
    if not blocks:
        return
    folder.mkdir(parents=True, exist_ok=True)
    _check_room(folder, (int(missing.sum()) + len(keys)) * hidden_size * 4)
    count = sum(map(len, blocks))
    with tqdm(
        total=count, desc="encode items", unit="item", disable=None if progress else True
    ) as bar:
        for block in blocks:
            path = _path(folder, distinct[block])
            if _open(path, hidden_size) is None:  # else another process was here
                vectors = _encoded(encode, first[block], hidden_size)
                _write(path, distinct[block], [vectors])
            bar.update(len(block))


def _encoded(
    encode: Callable[[npt.NDArray[np.int64]], np.ndarray],
    rows: npt.NDArray[np.int64],
    hidden_size: int,
) -> Vectors:
    vectors = np.asarray(encode(rows), dtype=np.float32)
    if vectors.shape != (len(rows), hidden_size):
        raise ValueError(
            f"the encoder gives {vectors.shape}, expected vectors ({len(rows)}, {hidden_size})"
        )
    if not np.isfinite(vectors).all():
        raise UserError("the model gives item vectors that are not finite; are its weights sound?")
    return vectors


def _gather(
    tables: list[Table], table_of: npt.NDArray[np.int64], row_of: npt.NDArray[np.int64]
) -> Iterator[Vectors]:
    """The vectors of N items, a block of them at a time; table and row of each are (N,)."""
    for start in range(0, len(table_of), BLOCK_SIZE):
        index, rows = table_of[start : start + BLOCK_SIZE], row_of[start : start + BLOCK_SIZE]
        vectors = np.empty((len(rows), tables[0][1].shape[1]), np.float32)
        for table in np.unique(index):
            here = index == table
            vectors[here] = tables[table][1][rows[here]]
        yield vectors


def _write(path: Path, keys: Keys, parts: Iterable[Vectors]) -> None:
    """Write a table. Through a file and not through a mapping, where a full disk is a crash."""
    try:
        with build_mapped(path, path.name) as writer:
            for part in parts:
                writer.append("vectors", part, "<f4")
            writer.append("keys", keys, KEY_DTYPE.str)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise OSError(
                error.errno,
                f"{os.strerror(error.errno)} for {len(keys):,} item vectors in {path.parent}: make "
                "room, and the same command goes on with what is encoded by now",
            ) from error
        raise


def _check_room(folder: Path, needed: int) -> None:
    """Refuse before hours of encoding what the disk cannot hold.

    Raises:
        OSError: less than `needed` bytes are free.
    """
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OSError(
            errno.ENOSPC,
            f"item vectors need {needed / 1e9:.2f} GB in {folder} until they are complete, "
            f"{free / 1e9:.2f} GB are free: make room, or keep them elsewhere",
        )


def _remove_covered(folder: Path, distinct: Keys, whole: Path, hidden_size: int) -> None:
    """Remove the tables whose items all stand in the catalogue just written, blocks and older ones,
    and what an earlier version left."""
    for path in _paths(folder):
        table = None if path == whole else _open(path, hidden_size)
        if table is not None and np.isin(table[0], distinct).all():
            remove_mapped(path)
    for path in folder.glob("*.npy"):
        path.unlink(missing_ok=True)
