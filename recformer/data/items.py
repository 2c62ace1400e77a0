"""The tokenised catalogue: every item tokenised once, kept in files that are mapped into memory.

A store is keyed by content: tokenizer, configuration of an item's sentence, and the texts of all
items in order. Another catalogue, tokenizer or configuration has another store, so a stale one
cannot be read. Processes that map the same store share its memory.

Layout of `cache_dir/tokenized_items-<key>/` (little-endian, no headers in the arrays):
    input_ids.bin       (T,) uint16 where the vocabulary fits, else int32
    token_type_ids.bin  (T,) uint8: 1 name, 2 value
    offsets.bin         (N + 1,) int64: item i has the tokens offsets[i]:offsets[i + 1]
    header.json         format, key, N, T, dtype of the ids, CRC-32 of each array; written last

Shapes: N items, T tokens of all of them laid end to end.
"""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import tempfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import tokenizers
from tqdm import tqdm

from recformer.files import UserError, read_json, sha256_of, write_json
from recformer.tokenization import RecformerTokenizer, item_texts, ragged_indices

logger = logging.getLogger(__name__)

# Enters the key: raise it when the layout above changes.
FORMAT = "recformer tokenized items 1"

# Items tokenised at a time: bounds the memory of a build, enough to keep all cores busy.
CHUNK_SIZE = 8192

ARRAYS = ("input_ids", "token_type_ids", "offsets")


def cache_dir(data_dir: Path, output_dir: Path, kind: str = "tokenized") -> Path:
    """Cache folder: beside the data, or in `output_dir` if that is read-only."""
    return (data_dir if os.access(data_dir, os.W_OK) else output_dir) / kind


class DamagedStoreError(Exception):
    """The files of a store are not what its header says."""


class TokenizedItems:
    """Token ids of all items, in the order of their item ids.

    Pickles as its path: a worker process maps the same files.

    Args:
        folder: a store that `open_or_build` has written.

    Attributes:
        input_ids: (T,) uint16 or int32, read-only, mapped.
        token_type_ids: (T,) uint8, read-only, mapped; 1 name, 2 value.
        offsets: (N + 1,) int64, read-only, mapped; item i has the tokens
            `offsets[i]:offsets[i + 1]`, none where an item has no text.
        key: SHA-256 (hex) of tokenizer, configuration and item texts.

    Raises:
        DamagedStoreError: a file is missing or has another size than the header says.
    """

    input_ids: npt.NDArray[Any]
    token_type_ids: npt.NDArray[np.uint8]
    offsets: npt.NDArray[np.int64]

    def __init__(self, folder: str | os.PathLike) -> None:
        self.folder = Path(folder).absolute()
        try:
            header = read_json(self.folder / "header.json")
            self.key: str = header["key"]
            self._crc32: dict[str, int] = {name: header["crc32"][name] for name in ARRAYS}
            num_items, num_tokens = int(header["num_items"]), int(header["num_tokens"])
            if header["format"] != FORMAT or header["dtype"] not in ("uint16", "int32"):
                raise ValueError(f"format {header['format']!r}, dtype {header['dtype']!r}")
        except (FileNotFoundError, ValueError, KeyError, TypeError) as error:
            raise DamagedStoreError(f"{self.folder}: no valid header.json ({error})") from error
        self.input_ids = self._map("input_ids", np.dtype(header["dtype"]), num_tokens)
        self.token_type_ids = self._map("token_type_ids", np.dtype(np.uint8), num_tokens)
        self.offsets = self._map("offsets", np.dtype(np.int64), num_items + 1)

    @classmethod
    def open_or_build(
        cls,
        items: Sequence[Mapping[str, Any]],
        tokenizer: RecformerTokenizer,
        cache_dir: str | os.PathLike,
    ) -> TokenizedItems:
        """Open the store of `items`; they are tokenised first where there is none.

        An existing store is checked against the checksums in its header and built anew if it is
        damaged. Several processes may call this at the same time.

        Args:
            items: N dicts, attributes in order; item id = index.
            cache_dir: where stores are kept; made if missing.

        Raises:
            ValueError: no items, or one that `item_texts` refuses.
        """
        if not len(items):
            raise UserError("no items to tokenise: the catalogue is empty")
        key = _content_key(items, tokenizer)
        folder = Path(cache_dir) / f"tokenized_items-{key}"
        if folder.is_dir():
            try:
                store = cls(folder)
                store._verify(key)
                return store
            except DamagedStoreError as error:
                logger.warning("%s: tokenising again", error)
        _build(items, tokenizer, folder, key)
        return cls(folder)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @cached_property
    def lengths(self) -> npt.NDArray[np.int64]:
        """(N,) int64 number of tokens of each item."""
        return np.diff(self.offsets)

    def gather(
        self, item_ids: npt.ArrayLike
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Tokens of some items, end to end in the order given; an item may come twice.

        Args:
            item_ids: (K,) integers in [0, N).

        Returns:
            input_ids (T',) int64, token_type_ids (T',) int64 and lengths (K,) int64 with
            T' = lengths.sum().

        Raises:
            ValueError: not a list of integers, or an id outside of the catalogue.
        """
        ids = np.asarray(item_ids)
        if ids.size == 0:
            ids = ids.astype(np.int64)
        if ids.ndim != 1 or ids.dtype.kind not in "iu":
            raise ValueError(
                f"item_ids is {ids.dtype} {ids.shape}, expected integers of shape (K,)"
            )
        ids = ids.astype(np.int64, copy=False)
        outside = (ids < 0) | (ids >= len(self))
        if outside.any():
            raise ValueError(f"item id {ids[outside][0]} is not in [0, {len(self)})")
        starts = self.offsets[ids]
        lengths = self.offsets[ids + 1] - starts
        index = ragged_indices(starts, lengths)
        return (
            self.input_ids[index].astype(np.int64),
            self.token_type_ids[index].astype(np.int64),
            lengths,
        )

    def __reduce__(self) -> tuple[type[TokenizedItems], tuple[Path]]:
        return type(self), (self.folder,)

    def _map(self, name: str, dtype: np.dtype, count: int) -> np.ndarray:
        path = self.folder / f"{name}.bin"
        expected = count * dtype.itemsize
        try:
            size = path.stat().st_size
        except FileNotFoundError as error:
            raise DamagedStoreError(f"{path} is missing") from error
        if size != expected:
            raise DamagedStoreError(f"{path} has {size} bytes, expected {expected}")
        if not count:  # an empty file cannot be mapped
            return np.empty(0, dtype)
        # A plain array over the mapping: np.memmap itself makes every slice and index slower.
        return np.asarray(np.memmap(path, dtype.newbyteorder("<"), mode="r", shape=(count,)))

    def _verify(self, key: str) -> None:
        """Read the files through once and compare checksums.

        Raises:
            DamagedStoreError: another key or checksum than expected.
        """
        if self.key != key:
            raise DamagedStoreError(f"{self.folder}: header.json has the key {self.key}")
        for name in ARRAYS:
            if zlib.crc32(getattr(self, name)) != self._crc32[name]:
                raise DamagedStoreError(f"{self.folder / name}.bin has another checksum")


class ItemsInMemory(TokenizedItems):
    """Tokenised items that no file holds, such as those of a request.

    Args:
        input_ids, token_type_ids, offsets: as the attributes of `TokenizedItems`.
    """

    def __init__(
        self,
        input_ids: npt.NDArray[Any],
        token_type_ids: npt.NDArray[np.uint8],
        offsets: npt.NDArray[np.int64],
    ) -> None:
        self.input_ids, self.token_type_ids, self.offsets = input_ids, token_type_ids, offsets

    @classmethod
    def of(cls, items: Sequence[Mapping[str, Any]], tokenizer: RecformerTokenizer) -> ItemsInMemory:
        """`items` (N, possibly none) tokenised.

        Raises:
            UserError: an item that `item_texts` refuses.
        """
        input_ids, token_type_ids, offsets = tokenizer.encode_items(items)
        # The numbers of a store of files: an item has the same content hash in both.
        return cls(input_ids.astype(_ids_dtype(tokenizer)), token_type_ids, offsets)

    def subset(self, kept: npt.NDArray[np.bool_]) -> ItemsInMemory:
        """The items where `kept` (N,) is true."""
        tokens = np.repeat(kept, self.lengths)
        offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(self.lengths[kept])])
        return ItemsInMemory(self.input_ids[tokens], self.token_type_ids[tokens], offsets)

    def __reduce__(self) -> Any:
        return type(self), (self.input_ids, self.token_type_ids, self.offsets)


def _ids_dtype(tokenizer: RecformerTokenizer) -> str:
    return "uint16" if tokenizer.vocab_size <= np.iinfo(np.uint16).max + 1 else "int32"


def _chunks(
    items: Sequence[Mapping[str, Any]],
) -> Iterator[tuple[int, Sequence[Mapping[str, Any]]]]:
    for start in range(0, len(items), CHUNK_SIZE):
        yield start, items[start : start + CHUNK_SIZE]


def _content_key(items: Sequence[Mapping[str, Any]], tokenizer: RecformerTokenizer) -> str:
    """SHA-256 (hex) of everything that the store is made from, over the items in a stream.

    Texts, their lengths and the number of attributes of each item go into three digests, so that
    borders count and the size of the chunks does not.
    """
    texts_digest, lengths_digest, counts_digest = (hashlib.sha256() for _ in range(3))
    for start, chunk in _chunks(items):
        texts, counts = item_texts(chunk, tokenizer.config.max_attr_num, first_index=start)
        lengths = np.fromiter(map(len, texts), "<i8", len(texts))
        texts_digest.update("".join(texts).encode("utf-8", "surrogatepass"))
        lengths_digest.update(lengths.tobytes())
        counts_digest.update(np.array(counts, dtype="<i8").tobytes())
    digests = (texts_digest, lengths_digest, counts_digest)
    return sha256_of(
        FORMAT,
        tokenizers.__version__,  # a release may mend how a text is split
        tokenizer.fingerprint,
        str(len(items)),
        *(digest.digest() for digest in digests),
    )


def _build(
    items: Sequence[Mapping[str, Any]], tokenizer: RecformerTokenizer, folder: Path, key: str
) -> None:
    """Write the store beside its place, then move its files in, the header last.

    Equal keys give equal bytes, so it does no harm when two processes move theirs in at once, or
    when one of them replaces the files of a damaged store that another has mapped.
    """
    dtype = _ids_dtype(tokenizer)
    folder.parent.mkdir(parents=True, exist_ok=True)
    beside = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        crc32 = dict.fromkeys(ARRAYS, 0)
        num_tokens = 0
        progress = tqdm(total=len(items), desc="tokenising items", unit=" items", disable=None)
        with (
            progress,
            open(beside / "input_ids.bin", "wb") as ids_file,
            open(beside / "token_type_ids.bin", "wb") as types_file,
            open(beside / "offsets.bin", "wb") as offsets_file,
        ):
            files = dict(zip(ARRAYS, (ids_file, types_file, offsets_file)))

            def write(name: str, values: np.ndarray, dtype: str) -> None:
                data = values.astype(dtype).tobytes()
                crc32[name] = zlib.crc32(data, crc32[name])
                files[name].write(data)

            write("offsets", np.zeros(1), "<i8")
            for _, chunk in _chunks(items):
                input_ids, token_type_ids, offsets = tokenizer.encode_items(chunk)
                write("input_ids", input_ids, f"<{np.dtype(dtype).str[1:]}")
                write("token_type_ids", token_type_ids, "u1")
                write("offsets", offsets[1:] + num_tokens, "<i8")
                num_tokens += len(input_ids)
                progress.update(len(chunk))
            for file in files.values():
                file.flush()
                os.fsync(file.fileno())
        header = {
            "format": FORMAT,
            "key": key,
            "num_items": len(items),
            "num_tokens": num_tokens,
            "dtype": dtype,
            "crc32": crc32,
        }
        write_json(beside / "header.json", header, indent=2)
        folder.mkdir(exist_ok=True)
        for name in (*(f"{name}.bin" for name in ARRAYS), "header.json"):
            os.replace(beside / name, folder / name)
    finally:
        shutil.rmtree(beside)
