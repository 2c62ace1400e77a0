"""A log that is larger than memory, laid down in files by user.

    batches of the log      → parts, by a hash of the user's name, all of a user in one of them
    parts                   → users are numbered in the order in which they first appear in the log,
                              or their sessions are
    parts, once more        → blocks of consecutive users, each in the order of the log

Everything is written and read from beginning to end. What stays in memory is some 40 bytes a user,
the names of the items, and as many interactions as were asked for.

Shapes: M interactions, U users (or sessions), N items.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa

from recformer.data.sequences import offsets_of
from recformer.data.texts import Texts
from recformer.preparation.batches import Batches, ReadAgainError
from recformer.preparation.catalogues import as_text
from recformer.preparation.log_arrays import Interactions, LogPiece, Scratch, cut
from recformer.preparation.log_frames import EXTRA
from recformer.preparation.names import Names
from recformer.preparation.sessions import check_times, split_at_gaps
from recformer.preparation.times import Moments, in_unit

PARTS = 64


@dataclass(eq=False)
class LogInFiles:
    """Interactions in blocks of consecutive users, each in the order of the source.

    Attributes:
        users, items, times: int32, int32, int64 (M,), in files.
        offsets: int64 (U+1,), where the interactions of each user would begin, were they sorted.
        blocks: first users of the blocks, and U.
        user_names, item_names: names of the codes.
        has_times: False where the source gives the order alone; `times` are zeros then.
        first_unknown: the first item of the source that is not known, for messages.
        texts: of every further column, places of texts (int32 (M,)) and the texts.
        scratch: where the files lie.
    """

    users: np.ndarray
    items: np.ndarray
    times: np.ndarray
    offsets: np.ndarray
    blocks: list[int]
    user_names: Texts
    item_names: list[str]
    has_times: bool
    first_unknown: str | None
    texts: dict[str, tuple[np.ndarray, pl.Series]]
    scratch: Scratch

    def __len__(self) -> int:
        return len(self.users)

    def pieces(self) -> Iterator[LogPiece]:
        """A block at a time."""
        for first, stop in pairwise(self.blocks):
            where = slice(int(self.offsets[first]), int(self.offsets[stop]))
            users = self.users[where] - np.int32(first)
            yield LogPiece(where, users, self.items[where], self.times[where], first, stop - first)

    def empty(self, dtype: str) -> np.ndarray:
        """An array of zeros, one an interaction."""
        return self.scratch.array(len(self), dtype)


def spooled(
    batches: Batches, scratch: Scratch, gap: int | None
) -> tuple[LogInFiles, dict[str, int]]:
    """A log laid down in files, and counts of its interactions.

    Args:
        batches: of the log.
        scratch: where to.
        gap: seconds of a pause that ends a session, which then takes the place of a user; None:
            users stay.

    Raises:
        UserError: as `Batches` and `split_at_gaps`.
    """
    while True:
        parts = Parts(scratch.folder)
        try:
            with parts:
                for frame in batches:
                    parts.add(frame)
            break
        except ReadAgainError:
            pass
    has_times = batches.source.columns.time is not None
    exponent = batches.fractions.exponent()
    units = None
    if gap is not None:
        check_times(has_times)
        moments = Moments()
        for _, part in parts:
            moments.add(_times(part, exponent))
        units = moments.units_a_second("--session_gap") if len(parts) else 1
    numbers = _number(parts, exponent, gap, units, scratch)
    log = _in_blocks(parts, numbers, exponent, scratch)
    log.has_times, log.first_unknown = has_times, batches.first_unknown
    return log, batches.counts


class Parts:
    """Rows of a log by a hash of the user's name, in the order of the log.

    Args:
        folder: to write to.

    Attributes:
        items: names of the items.
        texts: of every further column, the texts that stand there.
    """

    def __init__(self, folder: Path) -> None:
        self.items = Names()
        self.texts: dict[str, Names] = {}
        self._folder, self._rows = folder, 0
        self._stack = ExitStack()
        self._writers: dict[int, Any] = {}

    def __enter__(self) -> Parts:
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def __len__(self) -> int:
        return self._rows

    def add(self, frame: pl.DataFrame) -> None:
        """Write a batch."""
        columns = {
            "row": np.arange(self._rows, self._rows + len(frame)),
            "name": frame["user"],
            "item": self.items.codes(frame["item"]),
            "whole": frame["whole"],
            "billionths": frame["billionths"],
        }
        for name in [name for name in frame.columns if name.startswith(EXTRA)]:
            texts = as_text(frame[name])
            columns[name] = self.texts.setdefault(name, Names()).codes(texts)
        self._rows += len(frame)
        part = frame["user"].hash(0) % PARTS
        by_part = (
            pl.DataFrame(columns)
            .with_columns(part=part)
            .partition_by("part", maintain_order=True, as_dict=True, include_key=False)
        )
        for (number,), own in by_part.items():
            table = own.to_arrow(compat_level=pl.CompatLevel.oldest())
            if number not in self._writers:
                options = pa.ipc.IpcWriteOptions(compression="lz4")
                path = self._path(number)
                self._writers[number] = self._stack.enter_context(
                    pa.ipc.new_stream(path, table.schema, options=options)
                )
            self._writers[number].write_table(table)

    def _path(self, number: int) -> str:
        return str(self._folder / f"part-{number}.arrow")

    def __iter__(self) -> Iterator[tuple[int, pl.DataFrame]]:
        """Number and rows of every part that has any."""
        for number in sorted(self._writers):
            with pa.ipc.open_stream(self._path(number)) as reader:
                table = reader.read_all()
            frame = pl.from_arrow(table)
            assert isinstance(frame, pl.DataFrame)
            yield number, frame

    def drop(self, number: int) -> None:
        """Remove a part that is not needed any longer."""
        Path(self._path(number)).unlink()


def _times(part: pl.DataFrame, exponent: int) -> np.ndarray:
    whole = part["whole"].to_numpy()
    return in_unit(whole, part["billionths"].to_numpy(), exponent)[0] if exponent else whole


@dataclass(eq=False)
class _Numbers:
    """Codes of users.

    Attributes:
        local: by part, a number of the user of each row within the part, int32.
        codes: by part, the code of each of these, int32.
        counts: interactions of every code, int64 (U,).
        names: of the codes.
    """

    local: dict[int, np.ndarray]
    codes: dict[int, np.ndarray]
    counts: np.ndarray
    names: Texts


def _number(
    parts: Parts, exponent: int, gap: int | None, units: int | None, scratch: Scratch
) -> _Numbers:
    """Give users, or their sessions, their codes: in the order in which they first appear."""
    folder = scratch.folder
    local: dict[int, np.ndarray] = {}
    names: dict[int, Texts] = {}
    firsts: dict[int, np.ndarray] = {}
    counts: dict[int, np.ndarray] = {}
    for number, part in parts:
        own = Names()
        users = own.codes(part["name"])
        own_names = own.names
        if gap is not None:
            log = Interactions(users, users, _times(part, exponent), own_names, [])
            log = split_at_gaps(log, gap, units)
            users, own_names = log.users, list(log.user_names)
        names[number] = _saved_texts(Texts.of(own_names), folder / f"names-{number}")
        local[number] = _saved(users, folder / f"local-{number}")
        # Codes ascend where they first appear.
        first = np.flatnonzero(np.diff(np.maximum.accumulate(users), prepend=-1) > 0)
        firsts[number] = part["row"].to_numpy()[first]
        counts[number] = np.bincount(users, minlength=len(own_names))
    order = np.argsort(np.concatenate([np.empty(0, np.int64), *firsts.values()]))
    codes = np.empty(len(order), dtype=np.int32)
    codes[order] = np.arange(len(order), dtype=np.int32)
    borders = np.cumsum([0, *map(len, firsts.values())])
    by_part = {
        number: codes[begin:end]
        for number, begin, end in zip(firsts, borders[:-1], borders[1:], strict=True)
    }
    total = np.zeros(len(codes), dtype=np.int64)
    for number, own_counts in counts.items():
        total[by_part[number]] = own_counts
    return _Numbers(local, by_part, total, _merged(names, by_part, scratch))


def _saved(array: np.ndarray, path: Path) -> np.ndarray:
    np.save(path, array)
    # An empty array cannot be mapped.
    return np.load(f"{path}.npy", mmap_mode="r") if len(array) else array


def _saved_texts(texts: Texts, path: Path) -> Texts:
    """Texts in files."""
    data = (
        _saved(texts.data, path.with_name(f"{path.name}-data")) if len(texts.data) else texts.data
    )
    return Texts(_saved(texts.offsets, path), data)


def _merged(names: dict[int, Texts], codes: dict[int, np.ndarray], scratch: Scratch) -> Texts:
    """Names in the order of their codes, in a file."""
    lengths = np.zeros(sum(map(len, names.values())), dtype=np.int64)
    for number, own in names.items():
        lengths[codes[number]] = np.diff(own.offsets)
    offsets = offsets_of(lengths)
    data = scratch.array(int(offsets[-1]), "uint8")
    for number, own in names.items():
        moved = np.repeat(offsets[codes[number]] - own.offsets[:-1], np.diff(own.offsets))
        data[moved + np.arange(len(own.data))] = own.data
    return Texts(offsets, data)


def _in_blocks(parts: Parts, numbers: _Numbers, exponent: int, scratch: Scratch) -> LogInFiles:
    """Rows of all parts by user."""
    offsets = offsets_of(numbers.counts)
    blocks = [0, *(stop for _, stop in cut(offsets, scratch.rows))]
    columns: dict[str, np.ndarray] = {
        "row": scratch.array(len(parts), "int64"),
        "user": scratch.array(len(parts), "int32"),
        "item": scratch.array(len(parts), "int32"),
        "time": scratch.array(len(parts), "int64"),
        **{name: scratch.array(len(parts), "int32") for name in parts.texts},
    }
    filled = offsets[blocks[:-1]].copy()
    for number, part in parts:
        users = numbers.codes[number][numbers.local[number]]
        own = {
            "row": part["row"].to_numpy(),
            "user": users,
            "item": part["item"].to_numpy(),
            "time": _times(part, exponent),
            **{name: part[name].to_numpy() for name in parts.texts},
        }
        block = np.searchsorted(blocks, users, side="right") - 1
        order = np.argsort(block, kind="stable")
        borders = np.searchsorted(block[order], np.arange(len(blocks)))
        for name, values in own.items():
            values = values[order]
            for place, (begin, end) in enumerate(pairwise(borders.tolist())):
                start = filled[place]
                columns[name][start : start + end - begin] = values[begin:end]
        filled += np.diff(borders)
        parts.drop(number)
    for first, stop in pairwise(blocks):
        where = slice(int(offsets[first]), int(offsets[stop]))
        order = np.argsort(columns["row"][where], kind="stable")
        for name in columns:
            columns[name][where] = columns[name][where][order]
    return LogInFiles(
        columns["user"],
        columns["item"],
        columns["time"],
        offsets,
        blocks,
        numbers.names,
        parts.items.names,
        True,
        None,
        {
            name[len(EXTRA) :]: (columns[name], pl.Series(texts.names, dtype=pl.String))
            for name, texts in parts.texts.items()
        },
        scratch,
    )
