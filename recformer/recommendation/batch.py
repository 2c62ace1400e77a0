"""Recommendations for many users as one Parquet file, gone on with where it was cut off.

Users are answered some at a time, and each such part is kept beside the output, named by all that
its rows depend on: model, catalogue, options, and the histories of its users. A part that is there
already is not computed again, so the file is the same whether or not a run was interrupted.
"""

from __future__ import annotations

import io
import json
import shutil
import sys
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from tqdm.auto import tqdm

from recformer.files import UserError, atomic_write, sha256_of
from recformer.recommendation.answers import Recommended
from recformer.recommendation.histories import History
from recformer.recommendation.recommender import CatalogueRecommender

USERS_AT_ONCE = 1024  # one pass over the items serves them all
NAMED = 5  # users without a known item, in the message about them
FORM = "recformer recommendations 1"

SCHEMA = pa.schema(
    [
        ("user", pa.string()),
        ("items", pa.list_(pa.string())),
        ("scores", pa.list_(pa.float64())),
        ("num_unknown", pa.int32()),
        ("fallback", pa.string()),
    ]
)


@dataclass
class Told:
    """Summary of many answers.

    Attributes:
        users, unknown: how many users, and items of theirs that the catalogue does not hold.
        left_out: users of whom nothing is known.
        stand_in: what they got.
        kept: users whose answers were there already.
    """

    users: int = 0
    unknown: int = 0
    left_out: list[Any] = field(default_factory=list)
    stand_in: str = "no"
    kept: int = 0

    def add(self, user: Any, num_unknown: int, fallback: str | None) -> None:
        """Count an answer."""
        self.users += 1
        self.unknown += num_unknown
        if fallback:
            self.stand_in = fallback
            self.left_out.append(user)

    def __str__(self) -> str:
        text = (
            f"{_count(self.users, 'user')}; skipped {_count(self.unknown, 'item')} that the "
            "catalogue lacks"
        )
        if self.left_out:
            more = ", …" if len(self.left_out) > NAMED else ""
            names = ", ".join(map(str, self.left_out[:NAMED])) + more
            text += (
                f"; {_count(len(self.left_out), 'user')} had no other and got the "
                f"{self.stand_in} items: {names}"
            )
        if self.kept:
            text += f"; the answers of {_count(self.kept, 'user')} were there from an earlier run"
        return text


def answered(
    recommender: CatalogueRecommender,
    histories: Iterable[History],
    k: int,
    filter_seen: bool,
    allowed: Sequence[str] | None = None,
    total: int | None = None,
) -> Iterator[tuple[Any, Recommended]]:
    """Each user with the answer, in order, with a progress bar on a terminal."""
    iterator = iter(histories)
    with _bar(total) as bar:
        while users := list(islice(iterator, USERS_AT_ONCE)):
            answers = recommender.recommend(
                [items for _, items in users], k, filter_seen, allowed=allowed
            )
            yield from zip((user for user, _ in users), answers, strict=True)
            bar.update(len(users))


def write_parquet(
    recommender: CatalogueRecommender,
    histories: Iterable[History],
    output: Path,
    k: int,
    filter_seen: bool,
    allowed: Sequence[str] | None = None,
    total: int | None = None,
) -> Told:
    """Answer all histories into a Parquet file of one row a user, in order.

    Columns: user (text), items (list of texts), scores (list of float64), num_unknown (int32),
    fallback (text, null where the history was known).

    Args:
        recommender: answers.
        histories: users with their items.
        output: the file, which appears whole when all are answered.
        k, filter_seen, allowed: as in `CatalogueRecommender.recommend`.
        total: number of users, for the bar.
    """
    chosen = None if allowed is None else sorted(set(allowed))
    options = json.dumps([k, filter_seen, chosen])
    key = sha256_of(FORM, recommender.content_key(), options)
    prefix = f".{output.name}.parts-"
    folder = output.parent / f"{prefix}{key[:32]}"
    folder.mkdir(parents=True, exist_ok=True)
    for other in output.parent.iterdir():  # of another model, catalogue or other options
        if other.name.startswith(prefix) and other != folder:
            shutil.rmtree(other, ignore_errors=True)
    told, iterator = Told(), iter(histories)
    parts: list[Path] = []
    with _bar(total) as bar:
        while users := list(islice(iterator, USERS_AT_ONCE)):
            content = sha256_of(json.dumps(users, default=str))
            path = folder / f"{len(parts):06d}-{content[:32]}"
            table = _read(path)
            if table is None:
                table = _answer(recommender, users, k, filter_seen, allowed)
                _write(path, table)
            else:
                told.kept += len(users)
            parts.append(path)
            columns = (table.column(name).to_pylist() for name in ("num_unknown", "fallback"))
            for (user, _), unknown, fallback in zip(users, *columns, strict=True):
                told.add(user, unknown, fallback)
            bar.update(len(users))
    with atomic_write(output, "wb") as handle, pq.ParquetWriter(handle, SCHEMA) as writer:
        for path in parts:
            table = _read(path)
            if table is None:
                raise UserError(f"{path} is damaged by now: the same command makes it again")
            writer.write_table(table)
    shutil.rmtree(folder)
    return told


def _answer(
    recommender: CatalogueRecommender,
    users: list[History],
    k: int,
    filter_seen: bool,
    allowed: Sequence[str] | None,
) -> pa.Table:
    answers = recommender.recommend([items for _, items in users], k, filter_seen, allowed=allowed)
    rows = [
        {
            "user": _text(user),
            "items": [_text(name) for name in answer.items],
            "scores": answer.scores,
            "num_unknown": answer.num_unknown,
            "fallback": answer.fallback,
        }
        for (user, _), answer in zip(users, answers, strict=True)
    ]
    return pa.Table.from_pylist(rows, schema=SCHEMA)


def _write(path: Path, table: pa.Table) -> None:
    """A part: Parquet, of whose last bytes no checksum of its own speaks, behind a CRC-32 of it."""
    content = io.BytesIO()
    pq.write_table(table, content)
    with atomic_write(path, "wb") as handle:
        handle.write(zlib.crc32(content.getbuffer()).to_bytes(4, "little"))
        handle.write(content.getbuffer())


def _read(path: Path) -> pa.Table | None:
    """A part of an earlier run; None where it is not there, or damaged."""
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        return None
    if zlib.crc32(raw[4:]).to_bytes(4, "little") != raw[:4]:
        return None
    return pq.read_table(pa.BufferReader(raw[4:]))


def _text(name: Any) -> str:
    """As text that a file can hold: half surrogate pairs become question marks."""
    return str(name).encode("utf-8", "replace").decode("utf-8")


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _bar(total: int | None) -> Any:
    return tqdm(total=total, desc="recommending", unit="user", file=sys.stderr, disable=None)
