"""The tokenised catalogue: every item tokenised once, kept in files that are mapped into memory.

A store is keyed by content: tokenizer, configuration of an item's sentence, and the texts of all
items in order. Another catalogue, tokenizer or configuration has another store, so a stale one
cannot be read. Processes that map the same store share its memory.

Arrays of `cache_dir/tokenized_items-<key>/` (`recformer.data.mapped`):
    input_ids       (T,) uint16 where the vocabulary fits, else int32
    token_type_ids  (T,) uint8: 1 name, 2 value
    offsets         (N + 1,) int64: item i has the tokens offsets[i]:offsets[i + 1]

Shapes: N items, T tokens of all of them laid end to end.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import tokenizers
from tqdm import tqdm

from recformer.data.mapped import DamagedStoreError, build_mapped, open_mapped
from recformer.data.texts import ItemTexts
from recformer.files import (
    UserError,
    alone,
    found_or_made,
    read_checked_json,
    sha256_of,
    write_checked_json,
)
from recformer.tokenization import RecformerTokenizer, item_texts, ragged_indices

logger = logging.getLogger(__name__)

# Enters the key: raise it when what the arrays hold changes.
FORMAT = "recformer tokenized items 1"

# Items tokenised at a time: bounds the memory of a build, enough to keep all cores busy.
CHUNK_SIZE = 8192

ARRAYS = ("input_ids", "token_type_ids", "offsets")


def cache_dir(data_dir: Path, output_dir: Path, kind: str = "tokenized") -> Path:
    """Cache folder: beside the data, or in `output_dir` if that is read-only."""
    return (data_dir if os.access(data_dir, os.W_OK) else output_dir) / kind


class TokenizedItems:
    """Token ids of all items, in the order of their item ids.

    Pickles as its path: a worker process maps the same files.

    Args:
        folder: a store that `open_or_build` has written.
        key: that it must have; None for any.
        verify: read the files through once and compare checksums.

    Attributes:
        input_ids: (T,) uint16 or int32, read-only, mapped.
        token_type_ids: (T,) uint8, read-only, mapped; 1 name, 2 value.
        offsets: (N + 1,) int64, read-only, mapped; item i has the tokens
            `offsets[i]:offsets[i + 1]`, none where an item has no text.
        key: SHA-256 (hex) of tokenizer, configuration and item texts.

    Raises:
        DamagedStoreError: a file is missing or is not what the header says.
    """

    input_ids: npt.NDArray[Any]
    token_type_ids: npt.NDArray[np.uint8]
    offsets: npt.NDArray[np.int64]

    def __init__(
        self, folder: str | os.PathLike, key: str | None = None, verify: bool = False
    ) -> None:
        self.folder = Path(folder).absolute()
        opened = open_mapped(self.folder, key, verify)
        self.key = opened.key
        self.input_ids, self.token_type_ids, self.offsets = (opened.arrays[n] for n in ARRAYS)

    @classmethod
    def open_or_build(
        cls,
        items: Sequence[Mapping[str, Any]],
        tokenizer: RecformerTokenizer,
        cache_dir: str | os.PathLike,
    ) -> TokenizedItems:
        """Open the store of `items`; they are tokenised first where there is none.

        An existing store is checked against the checksums in its header and built anew if it is
        damaged. Of several processes that call this at the same time one tokenises.

        Args:
            items: N dicts, attributes in order; item id = index.
            cache_dir: where stores are kept; made if missing.

        Raises:
            ValueError: no items, or one that `item_texts` refuses.
        """
        if not len(items):
            raise UserError("no items to tokenise: the catalogue is empty")
        Path(cache_dir).mkdir(parents=True, exist_ok=True)
        with alone(cache_dir):  # going through all texts is done by one, too
            key = _known_key(items, tokenizer, Path(cache_dir))
        folder = Path(cache_dir) / f"tokenized_items-{key}"

        def made() -> TokenizedItems:
            _build(items, tokenizer, folder, key)
            return cls(folder)

        return found_or_made(cache_dir, lambda: cls._found(folder, key), made)

    @classmethod
    def _found(cls, folder: Path, key: str) -> TokenizedItems | None:
        """The store in a folder; None: there is none, or it is damaged."""
        if not folder.is_dir():
            return None
        try:
            return cls(folder, key, verify=True)
        except DamagedStoreError as error:
            logger.warning("%s: tokenising again", error)
            return None

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


def _known_key(
    items: Sequence[Mapping[str, Any]], tokenizer: RecformerTokenizer, cache_dir: Path
) -> str:
    """`_content_key`, noted beside the stores where the items are mapped: going through all of
    their texts takes minutes of Python for millions of them."""
    if not isinstance(items, ItemTexts):
        return _content_key(items, tokenizer)
    made_from = sha256_of(
        FORMAT,
        tokenizers.__version__,
        tokenizer.fingerprint,
        str(tokenizer.config.max_attr_num),
        items.digest(),
    )
    note = cache_dir / f"key-{made_from[:32]}.json"
    with suppress(FileNotFoundError, UserError):  # not there, or damaged: it is made again
        return str(read_checked_json(note)["key"])
    key = _content_key(items, tokenizer)
    write_checked_json(note, {"key": key})
    return key


def _build(
    items: Sequence[Mapping[str, Any]], tokenizer: RecformerTokenizer, folder: Path, key: str
) -> None:
    dtype = f"<{np.dtype(_ids_dtype(tokenizer)).str[1:]}"
    progress = tqdm(total=len(items), desc="tokenising items", unit=" items", disable=None)
    with progress, build_mapped(folder, key) as writer:
        num_tokens = 0
        writer.append("offsets", np.zeros(1), "<i8")
        for _, chunk in _chunks(items):
            input_ids, token_type_ids, offsets = tokenizer.encode_items(chunk)
            writer.append("input_ids", input_ids, dtype)
            writer.append("token_type_ids", token_type_ids, "|u1")
            writer.append("offsets", offsets[1:] + num_tokens, "<i8")
            num_tokens += len(input_ids)
            progress.update(len(chunk))
