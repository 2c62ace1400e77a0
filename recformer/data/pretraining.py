"""Data of pretraining: item sequences and tokenised items in files mapped into memory, and pairs.

`meta_data.json`, `train.json` and `dev.json` (pretrain_data/) are read once, by whoever is first;
ranks, loader workers and later runs map what was made of them. It is keyed by content: another
catalogue, tokenizer or file has another key, so nothing stale can be read.

Arrays of `cache_dir/pretraining-<key>/` (`recformer.data.mapped`), for train and dev:
    <split>_offsets     (S + 1,) int64: sequence s is the items offsets[s]:offsets[s + 1]
    <split>_items       (M,) int32 item ids, oldest first
    <split>_token_ends  (M + 1,) int64: tokens of the items before each place, over the split

A pair is a history (side a) and the item that follows it (side b) (paper, section 2.3.2).

Shapes: S sequences, M items of all of them, P pairs, B pairs of a batch, T packed tokens.
"""

from __future__ import annotations

import hashlib
import os
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from recformer.data.items import TokenizedItems
from recformer.data.mapped import DamagedStoreError, build_mapped, open_mapped
from recformer.data.processed import Sequences
from recformer.files import UserError, found_or_made, read_json, sha256_of
from recformer.tokenization import RecformerTokenizer

FORMAT = "recformer pretraining 1"
SPLITS = ("train", "dev")
ARRAYS = {"offsets": "<i8", "items": "<i4", "token_ends": "<i8"}
READ_SIZE = 1 << 22  # bytes of a file hashed at a time


@dataclass(frozen=True)
class PretrainingData:
    """Pretraining data mapped into memory, made by `open_or_build`.

    Attributes:
        store: all items of the catalogue, tokenised.
        sequences: of "train" and "dev", item ids oldest first, each of two items or more.
        token_ends: of "train" and "dev", (M + 1,) tokens of the items before each place.
        attribute_names: that occur in the catalogue.
        counts: sequences and interactions of each split, and sequences of one item left out.
        key: content hash.
    """

    store: TokenizedItems
    sequences: dict[str, Sequences]
    token_ends: dict[str, np.ndarray]
    attribute_names: list[str]
    counts: dict[str, int]
    key: str

    @classmethod
    def open_or_build(
        cls,
        train_file: str | os.PathLike,
        dev_file: str | os.PathLike,
        item_attr_file: str | os.PathLike,
        tokenizer: RecformerTokenizer,
        cache_dir: str | os.PathLike,
    ) -> PretrainingData:
        """Map the data into memory; the mapped files are made first where there are none.

        Of several processes that call this at the same time one makes them.

        Args:
            train_file, dev_file: JSON lists of sequences, a sequence a list of asins oldest first.
            item_attr_file: JSON, asin -> attributes.
            cache_dir: where mapped files are kept; made if missing.

        Raises:
            FileNotFoundError: a file does not exist.
            UserError: a file is not what it should be; asins without metadata; no pair.
        """
        paths = {"train": Path(train_file), "dev": Path(dev_file), "items": Path(item_attr_file)}
        for path in paths.values():
            if not path.is_file():
                raise FileNotFoundError(f"{path} does not exist")
        hashes = [_file_hash(path) for path in paths.values()]
        key = sha256_of(FORMAT, tokenizer.fingerprint, *hashes)
        folder = Path(cache_dir) / f"pretraining-{key}"
        folder.parent.mkdir(parents=True, exist_ok=True)

        def found() -> PretrainingData | None:
            with suppress(DamagedStoreError):
                return cls._open(folder, key)
            return None

        def made() -> PretrainingData:
            _build(paths, tokenizer, folder, key)
            return cls._open(folder, key)

        return found_or_made(folder.parent, found, made)

    @classmethod
    def _open(cls, folder: Path, key: str) -> PretrainingData:
        opened = open_mapped(folder, key)
        arrays, facts = opened.arrays, opened.facts
        return cls(
            store=TokenizedItems(folder.parent / facts["items"], verify=True),
            sequences={s: Sequences(arrays[f"{s}_offsets"], arrays[f"{s}_items"]) for s in SPLITS},
            token_ends={split: arrays[f"{split}_token_ends"] for split in SPLITS},
            attribute_names=facts["attribute_names"],
            counts=facts["counts"],
            key=key,
        )


def _file_hash(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as handle:
        for block in iter(partial(handle.read, READ_SIZE), b""):
            digest.update(block)
    return digest.hexdigest()


def _build(paths: dict[str, Path], tokenizer: RecformerTokenizer, folder: Path, key: str) -> None:
    """Read the JSON files and write the mapped ones."""
    catalogue = read_json(paths["items"])
    if not isinstance(catalogue, dict) or not catalogue:
        raise UserError(
            f"{paths['items']} holds {_kind(catalogue)}, expected asin -> attributes "
            "(meta_data.json of pretrain_data/meta_data_process.py)"
        )
    if not all(isinstance(item, dict) for item in catalogue.values()):
        asin = next(asin for asin, item in catalogue.items() if not isinstance(item, dict))
        raise UserError(
            f"{paths['items']}: {asin!r} has {_kind(catalogue[asin])}, expected its attributes, "
            '{"title": …}; an smap.json has numbers'
        )
    item_ids = {asin: item_id for item_id, asin in enumerate(catalogue)}
    counts: dict[str, int] = {}
    sequences = {}
    for split in SPLITS:
        rows = read_json(paths[split])
        sequences[split], left_out = _item_sequences(rows, item_ids, paths[split], paths["items"])
        counts[f"{split}_sequences"] = len(sequences[split])
        counts[f"{split}_interactions"] = len(sequences[split].items)
        counts[f"{split}_left_out"] = left_out

    items = list(catalogue.values())
    store = TokenizedItems.open_or_build(items, tokenizer, folder.parent)
    names = sorted({name for item in items for name in item})
    with build_mapped(folder, key) as writer:
        for split, rows in sequences.items():
            ends = np.concatenate([[0], np.cumsum(store.lengths[rows.items], dtype=np.int64)])
            arrays = {"offsets": rows.offsets, "items": rows.items, "token_ends": ends}
            for name, array in arrays.items():
                writer.append(f"{split}_{name}", array, ARRAYS[name])
        writer.facts |= {"items": store.folder.name, "attribute_names": names, "counts": counts}


def _item_sequences(
    rows: Any, item_ids: dict[str, int], path: Path, item_path: Path
) -> tuple[Sequences, int]:
    """Item ids of sequences of asins, those of one item left out and counted.

    Raises:
        UserError: not a list of lists of asins, asins without metadata, or no pair.
    """
    if not isinstance(rows, list):
        raise UserError(
            f"{path} holds {_kind(rows)}, expected a list of sequences, a sequence a list of asins "
            "(pretrain_data/interaction_data_process.py); a folder for finetuning is not one"
        )
    unknown: dict[str, int] = {}
    kept: list[list[int]] = []
    left_out = 0
    for number, row in enumerate(tqdm(rows, desc=f"reading {path.name}", disable=None)):
        if not isinstance(row, list) or not all(isinstance(asin, str) for asin in row):
            raise UserError(
                f"{path}: sequence {number} is {str(row)[:60]}, expected a list of asins"
            )
        ids = [item_ids.get(asin, -1) for asin in row]
        if -1 in ids:
            for asin, item_id in zip(row, ids, strict=True):
                if item_id < 0:
                    unknown[asin] = unknown.get(asin, 0) + 1
        elif len(ids) < 2:
            left_out += 1
        else:
            kept.append(ids)
    if unknown:
        raise UserError(
            f"{path}: {len(unknown):,} asins ({sum(unknown.values()):,} interactions) are not in "
            f"{item_path}, the first {next(iter(unknown))!r}; both files must come from the same "
            "run of pretrain_data/"
        )
    if not kept:
        raise UserError(
            f"{path} has no sequence of two items or more, so no pair of history and target"
        )
    return Sequences.from_lists(kept), left_out


def _kind(value: Any) -> str:
    return f"{type(value).__name__} {str(value)[:40]!r}"
