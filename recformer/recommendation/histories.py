"""Histories out of files: JSON Lines, logs of any form, a processed folder."""

from __future__ import annotations

import gzip
import json
import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from recformer.data.processed import USER_FILE, ProcessedFolder
from recformer.files import UserError, read_json, without_repeats

if TYPE_CHECKING:
    from recformer.preparation.bad_lines import BadLines
    from recformer.preparation.columns import Columns

BYTE_ORDER_MARK = b"\xef\xbb\xbf"
PARQUET = b"PAR1"
TABLES = (".csv", ".tsv", ".inter", ".txt", ".dat")  # endings of what is no JSON

# A user, and the items, oldest first.
History = tuple[Any, list[Any]]


def read_histories(
    path: Path, columns: Columns | None = None, bad_lines: BadLines | None = None
) -> Iterator[History]:
    """User and items of every history in a file.

    JSON Lines are read as they come, {"user": …, "items": [name, or attributes, …]} each; numbers
    as names of items are taken as text. Parquet, CSV and the like hold interactions, or lists of
    items, as `recformer process` reads them: users come in the order of their first line, their
    items by time where there are times.

    Args:
        path: the file; JSON Lines may be a pipe, of Parquet also a folder of files.
        columns: of interactions, which are not to be recognised by name.
        bad_lines: notes lines that cannot be used; None: the first ends the reading.

    Raises:
        UserError: a line is not as expected, or no UTF-8, and is not to be skipped; names it.
    """
    if _is_table(path):
        yield from _of_interactions(path, columns, bad_lines)
        return
    with open(path, "rb") as file:
        head = file.peek(4)[:4]
        if head.startswith((b"\xff\xfe", b"\xfe\xff")):
            raise UserError(f"{path} is UTF-16, expected UTF-8: iconv -f UTF-16 -t UTF-8 {path}")
        lines = gzip.GzipFile(fileobj=file) if head.startswith(b"\x1f\x8b") else file
        try:
            for number, raw in enumerate(lines, 1):
                line = raw.removeprefix(BYTE_ORDER_MARK) if number == 1 else raw
                if not line.strip():
                    continue
                try:
                    history = _parse(line, f"{path}:{number}")
                except BadHistoryError as error:
                    if bad_lines is None or not bad_lines.skip:
                        raise
                    bad_lines.add(path, number, error.reason)
                    continue
                yield history
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise UserError(f"{path} is a gzip file that is cut off or damaged: {error}") from error


class BadHistoryError(UserError):
    """A line that is no history.

    Attributes:
        reason: why, in a few words.
    """

    def __init__(self, message: str, reason: str) -> None:
        super().__init__(message)
        self.reason = reason


def _parse(line: bytes, where: str) -> History:
    try:
        row = json.loads(line.decode("utf-8"), object_pairs_hook=without_repeats)
    except UnicodeDecodeError as error:
        raise BadHistoryError(
            f"{where} is not UTF-8 (byte 0x{line[error.start]:02x}); of a Latin-1 file: "
            f"iconv -f LATIN1 -t UTF-8 {where.rpartition(':')[0]}",
            "not UTF-8",
        ) from error
    except RecursionError:
        raise BadHistoryError(f"{where} is not JSON: nested too deep", "not JSON") from None
    except ValueError as error:  # also a number of thousands of digits
        raise BadHistoryError(f"{where} is not JSON: {error}", "not JSON") from error
    items = row.get("items") if isinstance(row, dict) else None
    right = isinstance(items, list) and all(
        isinstance(item, str | int | dict) and not isinstance(item, bool) for item in items
    )
    if items is None or not right or "user" not in row:
        shown = line.decode("utf-8").strip()[:80]
        raise BadHistoryError(
            f'{where}: expected {{"user": …, "items": [name, …]}}, got {shown}', "not a history"
        )
    return row["user"], items


def _is_table(path: Path) -> bool:
    """True for no JSON Lines, by first bytes or name of the file; a pipe is not touched."""
    if not path.is_file():
        return path.is_dir()
    if path.name.lower().removesuffix(".gz").endswith(TABLES):
        return True
    with open(path, "rb") as file:
        return file.read(len(PARQUET)) == PARQUET


def _of_interactions(
    path: Path, columns: Columns | None, bad_lines: BadLines | None
) -> Iterator[History]:
    # Polars is loaded by those who need it.
    from recformer.preparation.bad_lines import BadLines
    from recformer.preparation.columns import Columns
    from recformer.preparation.tables import open_interactions

    source = open_interactions(path, columns or Columns())
    # Every item counts: those that no catalogue knows are for the recommender to count.
    read, _ = source.read(None, bad_lines or BadLines())
    order = np.lexsort((read.times, read.users))  # stable: in the order of the file within a time
    users, items = read.users[order], read.items[order].tolist()
    ends = np.searchsorted(users, np.arange(len(read.user_names)), side="right").tolist()
    for user, start, end in zip(read.user_names, [0, *ends], ends, strict=False):
        yield user, [read.item_names[item] for item in items[start:end]]


def histories_of_folder(path: str | os.PathLike) -> list[History]:
    """All that the users of a processed folder did: training, validation and test together."""
    data = ProcessedFolder.load(path)
    users = data.path / USER_FILE
    names = {row: name for name, row in read_json(users).items()} if users.exists() else {}
    histories: list[History] = []
    for user in range(data.num_users):
        parts = [split[user] for split in (data.train, data.val, data.test) if user < len(split)]
        items = [data.asins[item] for part in parts for item in part.tolist()]
        if items:
            histories.append((names.get(user, str(user)), items))
    return histories


def read_names(path: Path) -> list[str]:
    """The lines of a text file, blank ones left out.

    Raises:
        UserError: the file is not UTF-8.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8: {error}") from error
    return [line.strip() for line in lines if line.strip()]
