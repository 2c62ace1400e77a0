"""Search of a catalogue by words of its texts: SQLite's full-text index, in memory."""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Iterable, Mapping

# Letters without their accents; what is no letter or digit divides words.
TABLE = "CREATE VIRTUAL TABLE texts USING fts5(text, tokenize = 'unicode61 remove_diacritics 2')"


class TextSearch:
    """Finds items by words or beginnings of words; may be used from any thread.

    Args:
        texts: of each item by name.
    """

    def __init__(self, texts: Mapping[str, str]) -> None:
        self._lock = threading.Lock()
        self._connection = sqlite3.connect(":memory:", check_same_thread=False)
        self._connection.execute(TABLE)
        self._row_of: dict[str, int] = {}
        self._name_of: list[str] = []
        self.put(texts)

    def put(self, texts: Mapping[str, str]) -> None:
        """Take items in, or give them other texts."""
        with self._lock:
            self._remove(texts)
            first = len(self._name_of)
            self._name_of += texts
            self._row_of |= {name: first + place for place, name in enumerate(texts)}
            self._connection.executemany(
                "INSERT INTO texts (rowid, text) VALUES (?, ?)",
                ((first + place, text) for place, text in enumerate(texts.values())),
            )

    def remove(self, names: Iterable[str]) -> None:
        """Take items out; unknown ones do not count."""
        with self._lock:
            self._remove(names)

    def _remove(self, names: Iterable[str]) -> None:
        rows = [(self._row_of.pop(name),) for name in names if name in self._row_of]
        self._connection.executemany("DELETE FROM texts WHERE rowid = ?", rows)

    def find(self, query: str, k: int) -> list[str]:
        """Names of at most k items that hold every word of the query, best match first.

        The last word may be the beginning of one: it may still be typed.
        """
        words = "".join(c if c.isalnum() else " " for c in query).split()
        if not words:
            return []
        quoted = " ".join(f'"{word}"' for word in words) + " *"
        with self._lock:
            rows = self._connection.execute(
                "SELECT rowid FROM texts WHERE texts MATCH ? ORDER BY rank, rowid LIMIT ?",
                (quoted, k),
            ).fetchall()
            return [self._name_of[row] for (row,) in rows]
