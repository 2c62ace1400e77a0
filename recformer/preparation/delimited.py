"""Rows of CSV, TSV and the like, each with the number of its line.

A file is read by Python's `csv`, strictly: a row that is not whole names its first line, and
reading goes on with the line after it. In files of tabs a quote may be text: a line that is no row
when quotes count, and one when they do not, is the latter.

A file in which nothing needs judging (`regular_pieces`) is read by Polars, which is several times
faster and finds the same.
"""

from __future__ import annotations

import codecs
import csv
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Literal

import numpy as np

from recformer.preparation.lines import byte_blocks, escaped

_MOST_ROWS, _FEWEST_ROWS = 50_000, 64  # a step; few after one that has to be read again
_LONGEST_FIELD = 1 << 20
_PIECE, _HELD = 1 << 25, 1 << 26  # bytes of a piece, and of pieces that are kept while looked at
_LINE_FEED, _CARRIAGE_RETURN, _QUOTE = b'\n\r"'

Note = Callable[[int, str], None]  # line number, reason


@dataclass(frozen=True)
class Layout:
    """Rules by which lines are cut into fields.

    Attributes:
        separator: between two fields; " " is any run of white space.
        quotes: "always" as in CSV; "maybe" as above; "never": what looks like a quote is text.
    """

    separator: str
    quotes: Literal["always", "maybe", "never"] = "always"

    def split(self, line: str) -> list[str]:
        """A line's fields where quotes are text."""
        line = line.rstrip("\r\n")
        return line.split() if self.separator == " " else line.split(self.separator)


def read_rows(
    lines: Iterator[str], layout: Layout, note: Note, width: int | None = None
) -> Iterator[tuple[list[int], list[list[str]]]]:
    """Rows, some ten thousand at once; blank lines are no rows.

    Args:
        lines: of the file, with their ends.
        layout: how they are cut.
        note: told the first line of what is no row, counted from 1, and the reason.
        width: fields of a row; None: those of the first.

    Yields:
        The numbers of the lines on which the rows begin, and the rows.
    """
    reader = _Reader(lines, layout, note, width)
    while True:
        numbers, rows = reader.some()
        if not rows and reader.ended:
            return
        if rows:
            yield numbers, rows


def regular_pieces(
    path: Path, layout: Layout, width: int
) -> Iterator[tuple[bytes, np.ndarray]] | None:
    """Pieces of a UTF-8 file in which nothing needs judging.

    Every row has `width` fields, and quotes, if any, stand around whole fields and are doubled
    inside. There are no zeros, and carriage returns only at ends of lines. The file is read twice,
    unless it is small: the first time to know that all of it is so.

    Args:
        path: the file, gzipped or plain.
        layout: how it is cut, at a single byte.
        width: fields of a row, two or more.

    Yields:
        Some megabytes of whole rows, and the line on which each of them begins, int64, counted
        from 1.

    Returns:
        None: something is to be judged.
    """
    held: list[tuple[bytes, np.ndarray]] | None = []
    size = 0
    try:
        for piece in _pieces(path, layout, width):
            size += len(piece[0])
            if size > _HELD:
                held = None
            elif held is not None:
                held.append(piece)
    except _Irregular:
        return None
    return iter(held) if held is not None else _pieces(path, layout, width)


class _Irregular(Exception):
    """Something in a file needs judging."""


def _pieces(path: Path, layout: Layout, width: int) -> Iterator[tuple[bytes, np.ndarray]]:
    scan = _Scan(layout, width)
    rows: list[bytes] = []
    rest = b""
    first = True
    for block in byte_blocks(path):
        data = rest + (block.removeprefix(codecs.BOM_UTF8) if first else block)
        first = False
        end = data.rfind(b"\n") + 1
        if len(data) - end > _LONGEST_FIELD:
            raise _Irregular
        rows.append(_taken(scan, data[:end]))
        rest = data[end:]
        if scan.at_border() and sum(map(len, rows)) >= _PIECE:
            yield b"".join(rows), scan.starts()
            rows = []
    rows.append(_taken(scan, rest + b"\n" if rest else b""))
    if not scan.at_border():
        raise _Irregular
    if any(rows):
        yield b"".join(rows), scan.starts()


def _taken(scan: _Scan, data: bytes) -> bytes:
    try:
        data.decode()
    except UnicodeDecodeError:
        raise _Irregular from None
    if not scan.takes(data):
        raise _Irregular
    return data


class _Scan:
    """Where rows begin, found by arrays over bytes of whole lines."""

    def __init__(self, layout: Layout, width: int) -> None:
        self._separator = ord(layout.separator)
        self._quotes = layout.quotes
        self._width = width
        self._inside = 0  # of quotes, where the last lines end
        self._left = 0  # separators of the row that goes on there
        self._lines = 0
        self._starts: list[np.ndarray] = [np.ones(1, np.int64)]

    def takes(self, data: bytes) -> bool:
        """Read lines on; False: something in them needs judging."""
        if not data:
            return True
        if b"\0" in data:
            return False
        here = np.frombuffer(data, np.uint8)
        all_ends = ends = np.flatnonzero(here == _LINE_FEED)
        signs = np.flatnonzero(here == self._separator)
        quotes = np.flatnonzero(here == _QUOTE)
        if len(quotes) or self._inside:
            if self._quotes == "never" or not self._stand_around_fields(here, quotes):
                return False
            ends, signs = self._outside(quotes, ends), self._outside(quotes, signs)
            if self._quotes == "maybe" and len(ends) < len(all_ends):
                return False
            self._inside = (self._inside + len(quotes)) & 1
        if b"\r" in data and not np.isin(np.flatnonzero(here == _CARRIAGE_RETURN) + 1, ends).all():
            return False
        before = np.searchsorted(signs, ends)
        if (np.diff(before, prepend=-self._left) != self._width - 1).any():
            return False
        if np.diff(ends, prepend=-1, append=len(here)).max() > _LONGEST_FIELD:
            return False
        self._left = len(signs) - int(before[-1]) if len(ends) else self._left + len(signs)
        self._starts.append(self._lines + np.searchsorted(all_ends, ends) + 2)
        self._lines += len(all_ends)
        return True

    def _stand_around_fields(self, here: np.ndarray, quotes: np.ndarray) -> bool:
        """Whether quotes open behind a separator and close before one, or else are doubled."""
        around = np.pad(here, 1, constant_values=_LINE_FEED)
        opens, closes = quotes[self._inside :: 2], quotes[1 - self._inside :: 2]
        before, behind = around[opens], around[closes + 2]
        fits = (before == self._separator) | (before == _LINE_FEED) | (before == _QUOTE)
        if not fits.all():
            return False
        fits = (behind == self._separator) | (behind == _LINE_FEED) | (behind == _QUOTE)
        return bool((fits | (behind == _CARRIAGE_RETURN)).all())

    def _outside(self, quotes: np.ndarray, places: np.ndarray) -> np.ndarray:
        """Places that are not inside of quotes."""
        return places[(np.searchsorted(quotes, places) + self._inside) & 1 == 0]

    def at_border(self) -> bool:
        """Whether a row ends where the last lines end."""
        return not self._inside and not self._left

    def starts(self) -> np.ndarray:
        """Lines on which the rows since the last call begin."""
        found = np.concatenate(self._starts)
        self._starts = [found[-1:]]  # of the row that comes next
        return found[:-1]


class _Reader:
    """Rows of a file, with the lines at hand of which those of the last step were made."""

    def __init__(self, lines: Iterator[str], layout: Layout, note: Note, width: int | None) -> None:
        self._lines = lines
        self._layout = layout
        self._note = note
        self._width = width
        self._taken: list[str] = []  # since the step began
        self._again: list[str] = []  # to be read once more, the next one last
        self._number = 0  # of the last line before the step
        self._at_once = _MOST_ROWS
        self._line_end = "\n"
        self.ended = False

    def some(self) -> tuple[list[int], list[list[str]]]:
        """The next rows."""
        found: list[list[str]] = []
        self._taken.clear()
        error = None
        if self._layout.quotes == "never" or len(self._layout.separator) > 1:
            found.extend(map(self._layout.split, islice(self._feed(), self._at_once)))
        else:
            csv.field_size_limit(_LONGEST_FIELD)
            reader = csv.reader(self._feed(), delimiter=self._layout.separator, strict=True)
            try:
                found.extend(islice(reader, self._at_once))
            except csv.Error as raised:
                error = str(raised)
        self.ended = not self._taken
        self._at_once = min(2 * self._at_once, _MOST_ROWS)
        if self._taken and self._number == 0:
            self._line_end = "\r" if self._taken[0].endswith("\r") else "\n"
        return self._checked(found, error)

    def _feed(self) -> Iterator[str]:
        while True:
            line = self._again.pop() if self._again else next(self._lines, None)
            if line is None:
                return
            self._taken.append(line)
            yield line

    def _checked(
        self, found: list[list[str]], error: str | None
    ) -> tuple[list[int], list[list[str]]]:
        taken, first = self._taken, self._number + 1
        if self._width is None:
            self._width = next((len(row) for row in found if any(row)), None)
        whole = error is None and len(found) == len(taken) and {*map(len, found)} <= {self._width}
        if whole and not any(map(escaped, taken)):
            self._number += len(taken)
            return list(range(first, first + len(found))), found
        numbers: list[int] = []
        rows: list[list[str]] = []
        place = 0  # in `taken`
        for row in found:
            length = 1 + sum(field.count(self._line_end) for field in row)
            own = taken[place : place + length]
            if len(row) == self._width and not (length > 1 and self._is_text(own)):
                if any(map(escaped, own)):
                    self._note(first + place, "bytes that are not in the file's encoding")
                else:
                    numbers.append(first + place)
                    rows.append(row)
            elif any(field.strip() for field in row):
                self._broken(place, numbers, rows, None)
                if length > 1:
                    self._read_again(place + 1)
                    return numbers, rows
            place += length
        if error is not None:
            self._broken(place, numbers, rows, error)
            self._read_again(place + 1)
            return numbers, rows
        self._number += len(taken)
        return numbers, rows

    def _read_again(self, place: int) -> None:
        """Go on with a line that was taken before."""
        again = self._taken[place:]
        if len(again) > _FEWEST_ROWS:
            self._at_once = _FEWEST_ROWS
        self._again += reversed(again)
        self._number += place

    def _is_text(self, own: list[str]) -> bool:
        """Whether every line of a row of several would be a row by itself, its quotes text."""
        return self._layout.quotes == "maybe" and all(
            len(self._layout.split(line)) == self._width for line in own
        )

    def _broken(
        self, place: int, numbers: list[int], rows: list[list[str]], error: str | None
    ) -> None:
        """A row that is none: its first line may be one by itself, else it is noted."""
        line = self._taken[place]
        number = self._number + 1 + place
        fields = self._layout.split(line)
        if escaped(line):
            self._note(number, "bytes that are not in the file's encoding")
        elif self._layout.quotes == "maybe" and len(fields) == self._width:
            numbers.append(number)
            rows.append(fields)
        elif any(field.strip() for field in fields):
            self._note(number, _reason(error, len(fields), self._width))


def _reason(error: str | None, found: int, width: int | None) -> str:
    if error is None or found != width:
        return f"{found} fields, expected {width} as in the first row"
    if "new-line character" in error:
        return "a carriage return in a field without quotes"
    if "field larger" in error or "unexpected end" in error:
        return "a quote that does not end"
    return 'a quote that ends before its field does (inside quotes, write "")'
