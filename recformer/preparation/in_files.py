"""Histories out of a log that is larger than memory, by the same rules as in memory."""

from __future__ import annotations

import numpy as np
import polars as pl

from recformer.data.sequences import Sequences, offsets_of
from recformer.data.texts import Texts
from recformer.preparation.drawing import choose_users
from recformer.preparation.log_arrays import Histories
from recformer.preparation.splits import in_order
from recformer.preparation.spool import LogInFiles


def histories_in_files(
    log: LogInFiles,
    kept: np.ndarray | None,
    *,
    min_interactions: int,
    user_sample_rate: float,
    seed: int,
    max_users: int | None,
) -> tuple[Histories, int]:
    """As `splits.build_histories`, block by block.

    Args:
        log: the interactions.
        kept: which of them the filters left, bool (M,); None: all.
        min_interactions, user_sample_rate, seed, max_users: as there.

    Returns:
        The histories, and the number of users with a single interaction.
    """
    counts = np.diff(log.offsets) if kept is None else np.zeros(len(log.user_names), np.int64)
    if kept is not None:
        for piece in log.pieces():
            own = np.bincount(piece.users[kept[piece.where]], minlength=piece.num_users)
            counts[piece.first_user : piece.first_user + piece.num_users] = own
    chosen, left_out = choose_users(
        log.user_names,
        counts,
        min_interactions=min_interactions,
        user_sample_rate=user_sample_rate,
        seed=seed,
        max_users=max_users,
    )
    scratch = log.scratch
    offsets = offsets_of(counts[chosen])
    number = int(offsets[-1])
    items, times = scratch.array(number, "int32"), scratch.array(number, "int64")
    texts = {name: scratch.array(number, "int32") for name in log.texts}
    item_ids = np.full(len(log.item_names), -1, dtype=np.int32)
    met: list[np.ndarray] = []
    num_items = done = 0
    for piece in log.pieces():
        own = chosen[piece.first_user :][piece.users]
        if kept is not None:
            own &= kept[piece.where]
        places = np.flatnonzero(own)
        frame = pl.DataFrame(
            {"user": piece.users[places], "item": piece.items[places], "time": piece.times[places]}
            | {name: codes[piece.where][places] for name, (codes, _) in log.texts.items()}
        )
        order, frame = in_order(frame)
        new = order[item_ids[order] < 0]
        item_ids[new] = np.arange(num_items, num_items + len(new), dtype=np.int32)
        num_items += len(new)
        met.append(new)
        where = slice(done, done + len(frame))
        items[where] = item_ids[frame["item"].to_numpy()]
        times[where] = frame["time"].to_numpy()
        for name, values in texts.items():
            values[where] = frame[name].to_numpy()
        done += len(frame)
    names = [log.item_names[item] for item in np.concatenate([np.empty(0, np.int32), *met])]
    return Histories(
        sequences=Sequences(offsets, items),
        user_names=_chosen(log.user_names, chosen),
        item_names=names,
        counts=left_out,
        times=times if log.has_times else None,
        texts={name: (values, log.texts[name][1]) for name, values in texts.items()},
        scratch=scratch,
    ), int((counts == 1).sum())


def _chosen(names: Texts, chosen: np.ndarray) -> Texts:
    lengths = np.diff(names.offsets)
    data = names.data[np.repeat(chosen, lengths)]
    return Texts(offsets_of(lengths[chosen]), data)
