"""Sample of the users of a large folder, of whom an audit's figures are."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from recformer.data.processed import INTERACTION_FILE, ProcessedFolder, Sequences
from recformer.data.sequences import offsets_of
from recformer.files import UserError


def sampled(data: ProcessedFolder, most: int) -> ProcessedFolder:
    """A folder with about `most` interactions at most: those of a seeded sample of its users.

    The others' rows are empty; what a folder says of items stays.
    """
    lengths = data.interaction_offsets()
    if lengths[-1] <= most:
        return data
    chosen = np.random.default_rng(0).random(data.num_users) < most / lengths[-1]

    def of(part: Sequences) -> Sequences:
        kept = np.where(chosen, part.lengths, 0)
        return Sequences(offsets_of(kept), part.items[np.repeat(chosen, part.lengths)])

    return replace(data, train=of(data.train), val=of(data.val), test=of(data.test))


def about_sample(whole: ProcessedFolder, data: ProcessedFolder) -> dict[str, Any]:
    """What the figures are of, where that is not everything."""
    if data is whole:
        return {}
    users, every = (
        int((each.train.lengths + each.val.lengths + each.test.lengths > 0).sum())
        for each in (data, whole)
    )
    return {"sample": {"users": users, "of": every, "interactions_of": _num_interactions(whole)}}


def _num_interactions(data: ProcessedFolder) -> int:
    return int(data.interaction_offsets()[-1])


def times_of(data: ProcessedFolder, whole: ProcessedFolder) -> np.ndarray | None:
    """Times of the users of a sample, read a group of rows at a time."""
    import pyarrow.parquet as pq
    from pyarrow import ArrowException

    path = data.path / INTERACTION_FILE
    if not path.is_file():
        return None
    lengths = [np.diff(each.interaction_offsets()) for each in (data, whole)]
    chosen = (lengths[0] > 0) & (lengths[1] > 0)
    found: list[np.ndarray] = []
    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            for batch in file.iter_batches(1 << 20, columns=["user_id", "timestamp"]):
                if batch["timestamp"].null_count:
                    return None
                own = chosen[batch["user_id"].to_numpy()]
                found.append(batch["timestamp"].to_numpy()[own])
    except (ArrowException, OSError) as error:
        raise UserError(f"{path} cannot be read ({error}): process the data again") from error
    times = np.concatenate([np.empty(0, np.int64), *found])
    if len(times) != lengths[0].sum():
        raise UserError(
            f"{path} was written for other sequences than those of the folder: process the data "
            f"again, or delete the file to go on without times"
        )
    return times
