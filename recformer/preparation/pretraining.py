"""From raw files to the files that training reads: the four jobs of the data scripts.

    prepare_finetuning          reviews + metadata → a processed folder
    prepare_pretraining_sources any sources → meta_data.json, train.json, dev.json
    prepare_pretraining_items   reviews + metadata of many categories → meta_data.json
    prepare_pretraining         reviews + meta_data.json → train.json, dev.json

Every input is looked at before any long work, and nothing is written before everything is known.
Parameters, counts and content hashes go to dataset.json beside the files.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import msgspec

from recformer.data.processed import (
    DATASET_FILE,
    META_FILE,
    TRAIN_FILE,
    write_mapping,
)
from recformer.files import UserError, atomic_write, read_json
from recformer.preparation.amazon import (
    DEFAULT_ATTRIBUTES,
    check_raw_files,
    read_interactions,
    read_metadata,
    read_reviews,
)
from recformer.preparation.bad_lines import BadLines
from recformer.preparation.filters import count_duplicates
from recformer.preparation.log_arrays import Histories
from recformer.preparation.options import (
    DEFAULT_COLUMNS,
    DEFAULT_FILTERS,
    Filters,
    check_in_files,
    read_histories,
    scratch_beside,
    shared_parameters,
    writable_folder,
)
from recformer.preparation.splits import build_histories
from recformer.preparation.tables import Columns, open_sources

PRETRAINING_CATEGORIES = (
    "Automotive",
    "Cell_Phones_and_Accessories",
    "Clothing_Shoes_and_Jewelry",
    "Electronics",
    "Grocery_and_Gourmet_Food",
    "Home_and_Kitchen",
    "Movies_and_TV",
)
DEV_CATEGORY = "CDs_and_Vinyl"
DEV_FILE = "dev.json"


@dataclass(frozen=True)
class PretrainingSource:
    """A named pair of files; the name goes before every id, so that no two sources collide."""

    name: str
    interactions: Path
    items: Path


def prepare_pretraining_sources(
    sources: Sequence[PretrainingSource],
    dev_source: PretrainingSource,
    output_dir: str | os.PathLike,
    *,
    attributes: Sequence[str] | None = None,
    clean: bool = True,
    min_interactions: int = 2,
    user_sample_rate: float = 1.0,
    seed: int = 0,
    skip_bad_lines: bool = False,
    columns: Columns = DEFAULT_COLUMNS,
    filters: Filters = DEFAULT_FILTERS,
    memory: int | None = None,
) -> dict[str, Any]:
    """Write meta_data.json, train.json and dev.json from sources of any form.

    One sequence a user and source, oldest first, of ids `name:id`. Items that nobody met are left
    out. The arguments are those of `prepare_finetuning`, for every source alike.

    Returns:
        What dataset.json holds.

    Raises:
        FileNotFoundError, UserError: an input is missing, damaged or not what it should be, or a
            name stands for two sources; nothing is written then.
    """
    members = [*((source, TRAIN_FILE) for source in sources), (dev_source, DEV_FILE)]
    names = _all_categories([source.name for source in sources], dev_source.name)
    wrong = [name for name in names if not name or ":" in name]
    if wrong:
        raise UserError(f"got the source name {wrong[0]!r}, expected one that has no colon")
    opened = [
        open_sources(source.interactions, source.items, columns, attributes)
        for source, _ in members
    ]
    for interaction_source, _ in opened:
        check_in_files(memory, interaction_source)
    output = writable_folder(output_dir)
    bad_lines = BadLines(skip=skip_bad_lines)
    counts: dict[str, Any] = {}
    digest = hashlib.sha256()
    with ExitStack() as stack:
        # Left in reverse order: dataset.json is the last to take its name.
        about, meta, *handles = (
            stack.enter_context(atomic_write(output / name))
            for name in (DATASET_FILE, META_FILE, TRAIN_FILE, DEV_FILE)
        )
        files = {
            name: _SequenceFile(name, handle, digest)
            for name, handle in zip((TRAIN_FILE, DEV_FILE), handles)
        }

        def items_of_all() -> Iterator[tuple[str, dict[str, str]]]:
            for (source, file_name), (interaction_source, item_source) in zip(members, opened):
                with scratch_beside(output, memory) as scratch:
                    products, metadata_counts = item_source.read(clean=clean, bad_lines=bad_lines)
                    histories, review_counts, filtered = read_histories(
                        interaction_source,
                        item_source,
                        products,
                        bad_lines,
                        filters,
                        min_interactions=min_interactions,
                        user_sample_rate=user_sample_rate,
                        seed=seed,
                        scratch=scratch,
                    )
                    counts[source.name] = {
                        "metadata": metadata_counts,
                        "reviews": review_counts,
                        "filters": filtered,
                        "histories": histories.counts,
                    }
                    names = histories.item_names
                    ids = [f"{source.name}:{name}" for name in names]
                    files[file_name].add(histories, ids)
                yield from ((key, products[name]) for key, name in zip(ids, names))

        write_mapping(meta, items_of_all())
        for file in files.values():
            file.end()
        dataset = {
            "source": {
                source.name: {
                    "reviews": source.interactions.name,
                    "metadata": source.items.name,
                    "file": file_name,
                }
                for source, file_name in members
            },
            "parameters": {
                "attributes": {
                    source.name: item_source.attributes
                    for (source, _), (_, item_source) in zip(members, opened)
                },
                **shared_parameters(
                    clean,
                    min_interactions,
                    user_sample_rate,
                    seed,
                    skip_bad_lines,
                    filters,
                    columns,
                ),
            },
            "counts": {"sources": counts, "bad_lines": bad_lines.summary()},
            "files": {name: file.total for name, file in files.items()},
            "split_hash": digest.hexdigest(),
        }
        json.dump(dataset, about, ensure_ascii=False, indent=2)
    return dataset


class _SequenceFile:
    """A file of sequences while it is written: a JSON list, one sequence of ids a line.

    Args:
        name: of the file, which enters the digest with each of its lines.
        handle: of the file.
        digest: content hash of all files.

    Attributes:
        total: number of sequences and of interactions so far.
    """

    def __init__(self, name: str, handle: IO[str], digest: Any) -> None:
        self.name, self.handle, self.digest = name, handle, digest
        self.total = {"sequences": 0, "interactions": 0}

    def add(self, histories: Histories, ids: Sequence[str]) -> None:
        """Write histories of item numbers by the items' ids."""
        for piece in histories.pieces():
            own = piece.sequences
            for row in range(len(own)):
                line = json.dumps([ids[item] for item in own[row]])
                self.digest.update(f"{self.name} {line}\n".encode())
                self.handle.write((",\n" if self.total["sequences"] else "[\n") + line)
                self.total["sequences"] += 1
            self.total["interactions"] += len(own.items)

    def end(self) -> None:
        """Close the list."""
        self.handle.write("\n]\n")


def prepare_pretraining_items(
    meta_root: str | os.PathLike,
    seq_root: str | os.PathLike,
    output_dir: str | os.PathLike,
    *,
    categories: Sequence[str] = PRETRAINING_CATEGORIES,
    dev_category: str = DEV_CATEGORY,
    attributes: Sequence[str] = DEFAULT_ATTRIBUTES,
    clean: bool = True,
    skip_bad_lines: bool = False,
) -> dict[str, Any]:
    """Write meta_data.json: every product of the categories that has a title and was reviewed.

    Args:
        meta_root: folder of `meta_<category>.json.gz`.
        seq_root: folder of `<category>_5.json.gz`.
        output_dir: folder to write, created where missing.
        categories, dev_category: to train on, and to validate on.
        attributes: metadata keys that make up an item, in this order. Products whose title is null
            or missing are left out where the title is one of them.
        clean: clean the text, see `recformer.preparation.text.clean_text`.
        skip_bad_lines: leave out and count lines that cannot be used.

    Returns:
        What dataset.json holds.

    Raises:
        FileNotFoundError, UserError: an input is missing, damaged or not what it should be; nothing
            is written then.
    """
    names = _all_categories(categories, dev_category)
    metadata = [_meta_path(meta_root, name) for name in names]
    reviews = [_review_path(seq_root, name) for name in names]
    check_raw_files(reviews, metadata)
    output = writable_folder(output_dir)

    bad_lines = BadLines(skip=skip_bad_lines)
    reviewed = {review.asin for path in reviews for review in read_reviews(path, bad_lines)}
    products, counts = read_metadata(
        metadata,
        attributes,
        clean=clean,
        bad_lines=bad_lines,
        only=reviewed,
        required="title" if "title" in attributes else None,
    )
    if not products:
        raise UserError(
            f"no product in {meta_root} has text and a review in {seq_root}: expected metadata and "
            f"reviews of the same categories"
        )
    dataset = {
        "meta_data": {
            "source": {
                "metadata": [path.name for path in metadata],
                "reviews": [path.name for path in reviews],
            },
            "parameters": {
                "attributes": list(attributes),
                "clean": clean,
                "skip_bad_lines": skip_bad_lines,
            },
            "counts": {
                "metadata": counts,
                "products_reviewed": len(reviewed),
                "bad_lines": bad_lines.summary(),
            },
        }
    }
    with ExitStack() as stack:
        # Left in reverse order. Sequences made from older metadata are no longer described.
        about = stack.enter_context(atomic_write(output / DATASET_FILE))
        write_mapping(stack.enter_context(atomic_write(output / META_FILE)), products.items())
        json.dump(dataset, about, ensure_ascii=False, indent=2)
    return dataset


def prepare_pretraining(
    seq_root: str | os.PathLike,
    output_dir: str | os.PathLike,
    *,
    categories: Sequence[str] = PRETRAINING_CATEGORIES,
    dev_category: str = DEV_CATEGORY,
    min_interactions: int = 2,
    user_sample_rate: float = 1.0,
    seed: int = 0,
    skip_bad_lines: bool = False,
) -> dict[str, Any]:
    """Write train.json and dev.json: one sequence of asins per user and category, oldest first.

    Products that meta_data.json in the same folder does not have are left out. Sorting by time is
    stable: at equal times the order of the file stands.

    Args:
        seq_root: folder of `<category>_5.json.gz`.
        output_dir: folder with meta_data.json, to which the two files are added.
        categories, dev_category: to train on, and to validate on.
        min_interactions: shorter sequences are left out. A pretraining pair is a history and a
            target, so one item is of no use.
        user_sample_rate, seed: keep a seeded sample of the users, the same ones in every category.
        skip_bad_lines: leave out and count lines that cannot be used.

    Returns:
        What dataset.json holds.

    Raises:
        FileNotFoundError, UserError: an input is missing, damaged or not what it should be; nothing
            is written then.
    """
    names = _all_categories(categories, dev_category)
    reviews = {name: _review_path(seq_root, name) for name in names}
    check_raw_files(list(reviews.values()))
    output = writable_folder(output_dir)
    known = _known_asins(output / META_FILE)
    older = read_json(output / DATASET_FILE) if (output / DATASET_FILE).is_file() else {}

    bad_lines = BadLines(skip=skip_bad_lines)
    counts: dict[str, dict[str, int]] = {}
    digest = hashlib.sha256()
    totals = {}
    with ExitStack() as stack:
        # Left in reverse order: dataset.json is the last to take its name.
        about = stack.enter_context(atomic_write(output / DATASET_FILE))
        for file_name, members in ((DEV_FILE, [dev_category]), (TRAIN_FILE, list(categories))):
            handle = stack.enter_context(atomic_write(output / file_name))
            file = _SequenceFile(file_name, handle, digest)
            for name in members:
                interactions, review_counts = read_interactions(reviews[name], known, bad_lines)
                histories = build_histories(
                    interactions,
                    min_interactions=min_interactions,
                    user_sample_rate=user_sample_rate,
                    seed=seed,
                )
                counts[name] = {
                    **review_counts,
                    "duplicate_reviews": count_duplicates(interactions),
                    **histories.counts,
                }
                file.add(histories, histories.item_names)
            file.end()
            if not file.total["sequences"]:
                raise UserError(
                    f"no sequence is left for {file_name} from {', '.join(members)}: of the "
                    f"reviews, none or too few are of products in {output / META_FILE} (was it "
                    f"made from these categories?), or the sample of users is empty"
                )
            totals[file_name] = file.total
        dataset = {
            **older,
            "sequences": {
                "source": {"reviews": [path.name for path in reviews.values()]},
                "parameters": {
                    "categories": list(categories),
                    "dev_category": dev_category,
                    "min_interactions": min_interactions,
                    "user_sample_rate": user_sample_rate,
                    "seed": seed,
                    "skip_bad_lines": skip_bad_lines,
                },
                "counts": {"categories": counts, "bad_lines": bad_lines.summary()},
                "files": totals,
                "split_hash": digest.hexdigest(),
            },
        }
        json.dump(dataset, about, ensure_ascii=False, indent=2)
    return dataset


def _meta_path(root: str | os.PathLike, category: str) -> Path:
    return Path(root) / f"meta_{category}.json.gz"


def _review_path(root: str | os.PathLike, category: str) -> Path:
    return Path(root) / f"{category}_5.json.gz"


def _all_categories(categories: Sequence[str], dev_category: str) -> list[str]:
    names = [*categories, dev_category]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise UserError(
            f"{', '.join(twice)} named twice among the categories; the validation category must "
            f"not be trained on"
        )
    return names


class _Ignored(msgspec.Struct, gc=False):
    """A JSON object whose content is stepped over."""


def _known_asins(path: Path) -> dict[str, _Ignored]:
    """The asins of a meta_data.json, without its texts."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: run meta_data_process.py first")
    try:
        return msgspec.json.decode(path.read_bytes(), type=dict[str, _Ignored])
    except msgspec.DecodeError as error:
        raise UserError(f"{path} is not {{asin: {{attribute: text}}}}: {error}") from error
