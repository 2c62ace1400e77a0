"""From a file of interactions and one of items to a processed folder."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from recformer.data.processed import write_processed
from recformer.preparation.bad_lines import BadLines
from recformer.preparation.options import Filters, SplitOptions, _histories, _writable_folder
from recformer.preparation.pretraining import _DEFAULT_COLUMNS, _DEFAULT_FILTERS, _DEFAULT_SPLIT
from recformer.preparation.splits import DROPPED
from recformer.preparation.tables import Columns, open_sources


def prepare_finetuning(
    file_path: str | os.PathLike,
    meta_file_path: str | os.PathLike,
    output_path: str | os.PathLike,
    *,
    attributes: Sequence[str] | None = None,
    clean: bool = True,
    min_interactions: int = 4,
    user_sample_rate: float = 1.0,
    seed: int = 0,
    skip_bad_lines: bool = False,
    columns: Columns = _DEFAULT_COLUMNS,
    filters: Filters = _DEFAULT_FILTERS,
    options: SplitOptions = _DEFAULT_SPLIT,
    protocol: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Write a processed folder from a file of interactions and one of items.

    As published: only users with at least `min_interactions` reviews of known products are kept,
    ids are given by first appearance, sorting by time is stable. All products of the metadata file
    that have text are written, also those that nobody reviewed.

    Args:
        file_path: interactions, in any form that `recformer.preparation.tables` reads.
        meta_file_path: items, likewise.
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
        protocol: the published protocol that this follows, for dataset.json (`Protocol.record`).

    Returns:
        What dataset.json holds.

    Raises:
        FileNotFoundError, UserError: an input is missing, damaged or not what it should be; nothing
            is written then.
    """
    interaction_source, item_source = open_sources(file_path, meta_file_path, columns, attributes)
    output = _writable_folder(output_path)
    bad_lines = BadLines(skip=skip_bad_lines)
    products, metadata_counts = item_source.read(clean=clean, bad_lines=bad_lines)
    histories, review_counts, filtered = _histories(
        interaction_source,
        item_source,
        products,
        bad_lines,
        filters,
        min_interactions=min_interactions,
        user_sample_rate=user_sample_rate,
        seed=seed,
    )
    split = options.apply(histories, seed)
    train, val, test = split.sequences(histories.sequences)
    times = histories.times
    return write_processed(
        output,
        train=train,
        val=val,
        test=test,
        user_names=histories.user_names,
        asins=histories.item_names,
        meta=products,
        times=None if times is None else times[split.parts != DROPPED],
        dataset={
            "source": {"reviews": Path(file_path).name, "metadata": Path(meta_file_path).name},
            **({"protocol": dict(protocol)} if protocol is not None else {}),
            "parameters": {
                "split": options.split,
                "attributes": [
                    name if name == column else f"{name}={column}"
                    for name, column in item_source.attributes.items()
                ],
                "clean": clean,
                "min_interactions": min_interactions,
                "user_sample_rate": user_sample_rate,
                "seed": seed,
                "skip_bad_lines": skip_bad_lines,
                **filters.asked_for(),
                **({"columns": columns.named()} if columns.named() else {}),
            },
            "split": split.about,
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
