"""A split that moves with time: train up to window t, validate and test on window t + 1.

Windows are as long as each other and begin at whole hours, days (UTC) or weeks (Monday). Every
interaction belongs to the window of its own time, so that a session that runs past midnight is
trained on up to midnight, and what comes after it are targets of the next window.

Shapes: M interactions of all histories, R sequences, W windows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta, timezone

import numpy as np

from recformer.data.processed import Sequences
from recformer.data.windows import NO_TARGET, TEST_TARGET, VAL_TARGET
from recformer.files import UserError
from recformer.preparation.drawing import draws_of
from recformer.preparation.splits import TEST, TRAIN, VAL, Histories, Split
from recformer.preparation.times import units_a_second

_WEEK = 7 * 86_400
_FIRST_MONDAY = 4 * 86_400  # 1970 began on a Thursday
_EPOCH = datetime(1970, 1, 1, tzinfo=timezone.utc)
_MOST_WINDOWS = 10_000


@dataclass(frozen=True, eq=False)
class Windowed(Split):
    """A split by windows.

    `parts` is the split of the last window: all before it trains, its own sequences validate or
    test. With `windows` and `roles` the split of every window follows.

    Attributes:
        windows: int32 (M,), window of every interaction, from 0.
        roles: int8 (M,): `NO_TARGET`, `VAL_TARGET` or `TEST_TARGET` of its window.
    """

    windows: np.ndarray
    roles: np.ndarray


def in_order_of_appearance(histories: Histories) -> Histories:
    """The same with items numbered by the time at which anybody first met them.

    The items known by some moment are then the ids below a number.

    Raises:
        UserError: the source has no times.
    """
    times, items = histories.times, histories.sequences.items
    if times is None:
        raise UserError(
            "--split windows needs times, the interactions have none: name their column with "
            "--time_column"
        )
    first = np.full(len(histories.item_names), np.iinfo(np.int64).max)
    np.minimum.at(first, items, times)
    order = np.lexsort((np.arange(len(first)), first))
    numbers = np.empty(len(first), dtype=np.int32)
    numbers[order] = np.arange(len(first), dtype=np.int32)
    return replace(
        histories,
        sequences=Sequences(histories.sequences.offsets, numbers[items]),
        item_names=[histories.item_names[item] for item in order],
    )


def split_windows(
    histories: Histories, length: int, *, targets: str, min_sequences: int, seed: int
) -> Windowed:
    """Split by windows.

    In every window but the first, a sequence is a validation or a test sequence by a seeded draw of
    half of them. Its targets there are all of its own items but the first of the sequence, or the
    last of them alone. Items of earlier sessions (`histories.context`) are no targets.

    Args:
        histories: R sequences, items in order of appearance (`in_order_of_appearance`).
        length: of a window, seconds.
        targets: "every" or "last".
        min_sequences: a window with fewer sequences to judge is refused, at least two.
        seed: of the draw.

    Raises:
        UserError: there are no times, fewer than two windows, or a window is sparse; it is named.
    """
    times, sequences = histories.times, histories.sequences
    if times is None:
        raise UserError("--split windows needs times, the interactions have none")
    units = units_a_second(times, "--split windows")
    shift = _FIRST_MONDAY if length % _WEEK == 0 else 0
    numbers = (times // units - shift) // length
    first = int(numbers.min())
    count = int(numbers.max()) - first + 1
    if count < 2:
        raise UserError(
            f"--window: all interactions are of one window from {_moment(first * length + shift)}, "
            f"expected two or more: ask for shorter ones"
        )
    if count > _MOST_WINDOWS:
        raise UserError(f"--window: {count:,} windows, expected at most {_MOST_WINDOWS:,}")
    windows = (numbers - first).astype(np.int32)

    rows = sequences.rows
    own = np.ones(len(rows), bool) if histories.context is None else ~histories.context
    own_before = np.cumsum(own) - own
    within = own_before - own_before[sequences.offsets[:-1]][rows]  # own items before, in its row
    judged = own & (within > 0) & (windows > 0)
    if targets == "last":
        same = (rows[1:] == rows[:-1]) & (windows[1:] == windows[:-1])
        judged &= ~np.append(same, False)
    validates = _lower_half(histories.user_names, rows, windows, judged, seed)
    roles = np.full(len(rows), NO_TARGET, dtype=np.int8)
    roles[judged] = np.where(validates[judged], VAL_TARGET, TEST_TARGET)

    starts = [(first + window) * length + shift for window in range(count)]
    found = _found(rows, windows, roles, sequences.items, count, len(histories.item_names))
    _refuse_sparse(found, starts, min_sequences)
    last = windows == count - 1
    parts = np.full(len(rows), TRAIN, dtype=np.int8)
    parts[last] = np.where(validates[last], VAL, TEST)
    about = {
        "name": "windows",
        "window_seconds": length,
        "units_a_second": units,
        "targets": targets,
        "min_window_sequences": min_sequences,
        "seed": seed,
        "windows": [
            {"number": number, "starts": _moment(start), **own_counts}
            for number, (start, own_counts) in enumerate(zip(starts, found, strict=True))
        ],
    }
    return Windowed(parts, about, windows, roles)


def _lower_half(
    names: Sequence[str], rows: np.ndarray, windows: np.ndarray, judged: np.ndarray, seed: int
) -> np.ndarray:
    """Mask of the interactions of the half of their window's judged sequences with the lower draws,
    bool (M,); of an odd number the smaller half."""
    pairs, of_pair = np.unique(np.stack([windows, rows]), axis=1, return_inverse=True)
    draws = draws_of([f"{names[row]} {window}" for window, row in pairs.T.tolist()], seed)
    has_target = np.zeros(len(draws), dtype=bool)
    has_target[of_pair[judged]] = True
    draws[~has_target] = 2.0  # behind all that count
    order = np.lexsort((draws, pairs[0]))
    begins = np.searchsorted(pairs[0], pairs[0])  # of the pair's window: pairs ascend by window
    number = np.bincount(pairs[0], weights=has_target).astype(np.int64)[pairs[0]]
    validates = np.zeros(len(draws), dtype=bool)
    validates[order] = np.arange(len(draws)) - begins < number // 2
    return validates[of_pair.reshape(-1)]


def _found(
    rows: np.ndarray, windows: np.ndarray, roles: np.ndarray, items: np.ndarray, count: int, n: int
) -> list[dict[str, int]]:
    """Of every window: interactions, items known at its end, sequences of two items or more until
    then, sequences and targets of val and test, and targets that nobody met before it."""
    first = np.full(n, count, dtype=np.int64)
    np.minimum.at(first, items, windows)
    known = np.cumsum(np.bincount(first, minlength=count)[:count])
    found = []
    for window in range(count):
        here = windows == window
        own = {"interactions": int(here.sum()), "items_known": int(known[window])}
        for name, role in (("val", VAL_TARGET), ("test", TEST_TARGET)):
            chosen = here & (roles == role)
            own[f"{name}_sequences"] = len(np.unique(rows[chosen]))
            own[f"{name}_targets"] = int(chosen.sum())
        own["train_sequences"] = int((np.bincount(rows[windows <= window]) > 1).sum())
        chosen = here & (roles != NO_TARGET)
        own["targets_new_in_it"] = int((first[items[chosen]] == window).sum())
        found.append(own)
    return found


def _refuse_sparse(found: list[dict[str, int]], starts: list[int], least: int) -> None:
    sparse = []
    for number, (own, start) in enumerate(zip(found, starts, strict=True)):
        val, test = own["val_sequences"], own["test_sequences"]
        if number == 0:
            if own["train_sequences"] == 0:
                sparse.append(f"{number} ({_moment(start)}: no sequence of two items)")
        elif val + test < least or not val or not test:
            sparse.append(f"{number} ({_moment(start)}: {val} + {test} sequences)")
    if sparse:
        more = f" and {len(sparse) - 5} more" if len(sparse) > 5 else ""
        raise UserError(
            f"--window: {len(sparse)} of {len(found)} windows are sparse: {', '.join(sparse[:5])}"
            f"{more}; expected {least} sequences to validate and test on in each: ask for longer "
            f"windows, or for fewer sequences with --min_window_sequences"
        )


def _moment(seconds: int) -> str:
    return (_EPOCH + timedelta(seconds=seconds)).strftime("%Y-%m-%dT%H:%M:%SZ")
