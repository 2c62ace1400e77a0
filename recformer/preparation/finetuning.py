"""From a file of interactions and one of items to a processed folder."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import polars as pl

from recformer.data.processed import READ_FILES, write_processed
from recformer.data.processed_store import Content, keep
from recformer.files import UserError
from recformer.preparation.bad_lines import BadLines
from recformer.preparation.catalogues import text_of_log
from recformer.preparation.features import (
    OF_TIME,
    Asked,
    check_everywhere,
    make_features,
    moments_of,
)
from recformer.preparation.options import (
    DEFAULT_COLUMNS,
    DEFAULT_FILTERS,
    DEFAULT_SPLIT,
    NO_SESSIONS,
    Filters,
    SessionOptions,
    SplitOptions,
    check_in_files,
    read_histories,
    scratch_beside,
    shared_parameters,
    writable_folder,
)
from recformer.preparation.spark import open_lake, session
from recformer.preparation.splits import DROPPED, TEST, TRAIN, VAL
from recformer.preparation.tables import (
    Columns,
    InteractionSource,
    ItemSource,
    open_items,
    open_log,
    open_sources,
)
from recformer.preparation.windows import Windowed, in_order_of_appearance

SPARK_MEMORY = 4 * 10**9  # bytes of the machine that Spark is started from, where none are named


def prepare_finetuning(
    file_path: str | os.PathLike,
    meta_file_path: str | os.PathLike | None,
    output_path: str | os.PathLike,
    *,
    attributes: Sequence[str] | None = None,
    clean: bool = True,
    min_interactions: int = 4,
    user_sample_rate: float = 1.0,
    seed: int = 0,
    skip_bad_lines: bool = False,
    columns: Columns = DEFAULT_COLUMNS,
    filters: Filters = DEFAULT_FILTERS,
    options: SplitOptions = DEFAULT_SPLIT,
    sessions: SessionOptions = NO_SESSIONS,
    features: Sequence[Asked] = (),
    protocol: Mapping[str, Any] | None = None,
    memory: int | None = None,
    engine: Literal["local", "spark"] = "local",
    master: str | None = None,
) -> dict[str, Any]:
    """Write a processed folder from a file of interactions and one of items.

    As published: only users with at least `min_interactions` reviews of known products are kept,
    ids are given by first appearance, sorting by time is stable. All products of the metadata file
    that have text are written, also those that nobody reviewed.

    Args:
        file_path: interactions, in any form that `recformer.preparation.tables` reads.
        meta_file_path: items, likewise; None: the interactions say what there is to say of them.
        output_path: folder to write, created where missing.
        attributes: columns that make up an item, in this order, `column` or `name=column` each;
            None: see `open_sources`.
        clean: clean the text, see `recformer.preparation.text.clean_text`.
        min_interactions: users with fewer are left out.
        user_sample_rate, seed: keep a seeded sample of the users.
        skip_bad_lines: leave out and count lines that cannot be used.
        columns: columns that are not to be recognised by name.
        filters: what else to leave out.
        options: how to split.
        sessions: which sequences are sessions.
        features: what else to keep of interactions and items.
        protocol: the published protocol that this follows, for dataset.json (`Protocol.record`).
        memory: bytes that may be used, about; interactions then lie in files beside the output
            while they are worked on, however many they are. None: they are held in memory. The
            folder is the same, byte for byte.
        engine: "spark": `file_path` is a table of Parquet files on any path that Spark reads, and
            is read and sorted there; the output folder must lie where all of Spark sees it.
        master: URL of a Spark cluster; None: see `spark.session`.

    Returns:
        What dataset.json holds.

    Raises:
        FileNotFoundError, UserError: an input is missing, damaged or not what it should be; nothing
            is written then.
    """
    in_log: dict[str, str] = {}
    item_source, table = None, None
    if engine == "spark":
        memory = memory or SPARK_MEMORY
        if meta_file_path is None:
            raise UserError("--engine spark needs the items: give them with --meta_file_path")
        item_source = open_items(meta_file_path, columns, attributes)
        table, interaction_source = open_lake(session(master), str(file_path), columns)
    elif meta_file_path is None:
        interaction_source, in_log = open_log(file_path, columns, attributes)
    else:
        interaction_source, item_source = open_sources(
            file_path, meta_file_path, columns, attributes
        )
    of_log, of_items = _places(features, interaction_source, item_source)
    by_spark = engine == "spark"
    check_in_files(memory, interaction_source, options, sessions, features, by_spark)
    output = writable_folder(output_path)
    bad_lines = BadLines(skip=skip_bad_lines)
    products: dict[str, dict[str, str]] = {}
    metadata_counts: dict[str, int] = {}
    item_columns: dict[str, dict[str, Any]] = {}
    if item_source is not None:
        products, metadata_counts = item_source.read(clean=clean, bad_lines=bad_lines)
        if of_items:
            # Lines that are broken were judged when the texts were read.
            item_columns = item_source.read_columns(of_items, BadLines(skip=True))
    with scratch_beside(output, memory) as scratch:
        histories, review_counts, filtered = read_histories(
            interaction_source,
            item_source,
            products if item_source is not None else None,
            bad_lines,
            filters,
            min_interactions=min_interactions,
            user_sample_rate=user_sample_rate,
            seed=seed,
            sessions=sessions,
            extra=list(dict.fromkeys([*of_log, *in_log.values()])),
            scratch=scratch,
            table=table,
        )
        if options.split == "windows":
            histories = in_order_of_appearance(histories)
        if item_source is None:
            products = text_of_log(histories, in_log, clean)
            metadata_counts = {"products": len(products)}
        chosen = (item_source.attributes if item_source else in_log).items()
        split = options.apply(histories, seed)
        made = make_features(
            features, histories, item_columns, moments=moments_of(split), skip_bad=skip_bad_lines
        )
        columns_kept: dict[str, Any] = dict(made.interactions)
        parts = {}
        if features:
            parts = {
                "training": split.parts == TRAIN,
                "validation": split.parts == VAL,
                "the test": split.parts == TEST,
            }
        if isinstance(split, Windowed):
            context = histories.context
            columns_kept |= {
                "window": split.windows,
                "role": split.roles,
                "context": np.zeros(len(split.parts), dtype=bool) if context is None else context,
            }
            parts = {f"window {w}": split.windows == w for w in range(int(split.windows.max()) + 1)}
        check_everywhere(made, parts)
        train, val, test = split.sequences(histories)
        times = histories.times
        about = write_processed(
            output,
            train=train,
            val=val,
            test=test,
            user_names=histories.user_names,
            asins=histories.item_names,
            meta=products,
            times=None if times is None else split.kept(histories, times),
            columns={
                name: values.filter(split.parts != DROPPED)
                if isinstance(values, pl.Series)
                else values[split.parts != DROPPED]
                for name, values in columns_kept.items()
            },
            item_columns=made.items,
            dataset={
                "source": {
                    "reviews": Path(file_path).name,
                    **({} if meta_file_path is None else {"metadata": Path(meta_file_path).name}),
                },
                **({"protocol": dict(protocol)} if protocol is not None else {}),
                "parameters": {
                    "split": options.split,
                    "attributes": [
                        name if name == column else f"{name}={column}" for name, column in chosen
                    ],
                    **shared_parameters(
                        clean,
                        min_interactions,
                        user_sample_rate,
                        seed,
                        skip_bad_lines,
                        filters,
                        columns,
                    ),
                    **sessions.asked_for(),
                },
                "split": split.about,
                **({"features": [one.as_dict() for one in made.features]} if features else {}),
                "counts": {
                    "metadata": metadata_counts,
                    "reviews": review_counts,
                    **({"filters": filtered} if filtered else {}),
                    "histories": {
                        **histories.counts,
                        "users_with_val_and_test_item": int(
                            ((val.lengths > 0) & (test.lengths > 0)).sum()
                        ),
                    },
                    "bad_lines": bad_lines.summary(),
                },
            },
        )
        if scratch is not None:
            names = histories.item_names
            items = [products.get(name, {}) for name in names]
            content = Content(train, val, test, names, items, about["split_hash"])
            keep(output, READ_FILES, content)
        return about


def _places(
    features: Sequence[Asked], log: InteractionSource, items: ItemSource | None
) -> tuple[list[str], list[str]]:
    """Columns of the features: those of the interactions, and those of the items.

    Raises:
        UserError: a name stands twice, or there is no such column.
    """
    names = [one.name for one in features]
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise UserError(f"--features names {twice[0]} twice")
    of_log, of_items = [], []
    for name in names:
        if name in log.file.names:
            of_log.append(name)
        elif items is not None and (name in items.file.names or items.file.kind == "json"):
            of_items.append(name)
        elif name not in OF_TIME:
            there = "" if items is None else f"; of {items.path}: {items.file.few_names()}"
            raise UserError(
                f"--features {name}: no such column, and no feature of times "
                f"({', '.join(OF_TIME)}); columns of {log.path}: {log.file.few_names()}{there}"
            )
    return of_log, of_items
