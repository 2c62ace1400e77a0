"""Recommendations of a finetuned model for histories in a file.

`recformer recommend --model result/best_model --histories FILE.jsonl --k 10`

A line of the histories is {"user": …, "items": [name, …]}, oldest first, the names as in the data
that the model was finetuned on; an item that no catalogue knows stands there by its attributes,
{"title": …, …}. The file may be a pipe, gzipped, or begin with a byte order mark. A line of the
answer is {"user": …, "items": […], "scores": […]}, best first, scores being cosines. Items that the
catalogue does not hold are skipped and counted. A user of whom none is left gets popular items, or
the newest, and the line says so: "fallback": "popular".

The catalogue is every product of meta_data.json, those that nobody has bought too: --meta_file with
new products has them recommended at once, nothing is trained. Only they are encoded.
"""

from __future__ import annotations

import gzip
import json
import sys
import zlib
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import islice
from pathlib import Path
from typing import IO, Any

from tqdm.auto import tqdm

from recformer.cli import command_parser, keep_freed_memory
from recformer.files import UserError, atomic_write
from recformer.recommendation import CatalogueRecommender

USERS_AT_ONCE = 64  # memory only
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
NAMED = 5  # users without a known item, in the message about them


def read_histories(path: Path) -> Iterator[tuple[Any, list[Any]]]:
    """User and items of every line; numbers as names of items are taken as text.

    Raises:
        UserError: a line is not as expected, or no UTF-8; names it.
    """
    with open(path, "rb") as file:
        head = file.peek(4)[:4]
        if head.startswith((b"\xff\xfe", b"\xfe\xff")):
            raise UserError(f"{path} is UTF-16, expected UTF-8: iconv -f UTF-16 -t UTF-8 {path}")
        lines = gzip.GzipFile(fileobj=file) if head.startswith(b"\x1f\x8b") else file
        try:
            for number, raw in enumerate(lines, 1):
                line = raw.removeprefix(BYTE_ORDER_MARK) if number == 1 else raw
                if line.strip():
                    yield _parse(line, f"{path}:{number}")
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise UserError(f"{path} is a gzip file that is cut off or damaged: {error}") from error


def _parse(line: bytes, where: str) -> tuple[Any, list[Any]]:
    try:
        row = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise UserError(
            f"{where} is not UTF-8 (byte 0x{line[error.start]:02x}); of a Latin-1 file: "
            f"iconv -f LATIN1 -t UTF-8 {where.rpartition(':')[0]}"
        ) from error
    except RecursionError:
        raise UserError(f"{where} is not JSON: nested too deep") from None
    except ValueError as error:  # also a number of thousands of digits
        raise UserError(f"{where} is not JSON: {error}") from error
    items = row.get("items") if isinstance(row, dict) else None
    right = isinstance(items, list) and all(
        isinstance(item, str | int | dict) and not isinstance(item, bool) for item in items
    )
    if items is None or not right or "user" not in row:
        shown = line.decode("utf-8").strip()[:80]
        raise UserError(f'{where}: expected {{"user": …, "items": [name, …]}}, got {shown}')
    return row["user"], items


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


def _json_line(row: dict[str, Any], handle: IO[str]) -> str:
    """A line of JSON; letters are escaped where the output cannot hold them."""
    line = json.dumps(row, ensure_ascii=False)
    try:
        line.encode(getattr(handle, "encoding", None) or "utf-8")
    except UnicodeEncodeError:  # half a surrogate pair, or a terminal that is not UTF-8
        line = json.dumps(row)
    return line + "\n"


def write_recommendations(
    recommender: CatalogueRecommender,
    path: Path,
    k: int,
    filter_seen: bool,
    handle: IO[str],
    allowed: Sequence[str] | None = None,
) -> str:
    """Answer every line of a file of histories; returns what is to be said about it."""
    histories, left_out, unknown, total = read_histories(path), [], 0, 0
    stand_in = "no"
    with tqdm(desc="recommending", unit="user", file=sys.stderr, disable=None) as bar:
        while users := list(islice(histories, USERS_AT_ONCE)):
            answers = recommender.recommend(
                [items for _, items in users], k, filter_seen, allowed=allowed
            )
            for (user, _), answer in zip(users, answers, strict=True):
                line = {"user": user, "items": answer.items, "scores": answer.scores}
                if answer.fallback:
                    stand_in = line["fallback"] = answer.fallback
                    left_out.append(user)
                handle.write(_json_line(line, handle))
                unknown += answer.num_unknown
            total += len(users)
            bar.update(len(users))
    text = f"{_count(total, 'user')}; skipped {_count(unknown, 'item')} that the catalogue lacks"
    if left_out:
        names = ", ".join(map(str, left_out[:NAMED])) + (", …" if len(left_out) > NAMED else "")
        text += f"; {_count(len(left_out), 'user')} had no other and got the {stand_in} items: "
        text += names
    return text


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def main(argv: Sequence[str] | None = None) -> None:
    """Parse flags, recommend, say what was skipped."""
    parser = command_parser("recommend", __doc__)
    parser.add_argument(
        "--model", required=True, metavar="FOLDER", help="best_model of a `recformer finetune` run"
    )
    parser.add_argument(
        "--histories", required=True, type=Path, metavar="FILE", help="JSON Lines, see above"
    )
    parser.add_argument("--k", type=int, default=10, help="items for each user")
    parser.add_argument(
        "--filter_seen", action="store_true", help="never recommend items of the history"
    )
    parser.add_argument(
        "--meta_file",
        metavar="FILE",
        help="meta_data.json of the processed folder, new products among it (default: the one in "
        "the model's folder)",
    )
    parser.add_argument(
        "--allow",
        type=Path,
        metavar="FILE",
        help="names of the only items to recommend, such as those in stock, one a line",
    )
    parser.add_argument(
        "--output", metavar="FILE", help="JSON Lines of recommendations (default: printed)"
    )
    args = parser.parse_args(argv)
    keep_freed_memory()
    if args.k < 1:
        raise UserError(f"--k {args.k}: must be at least 1")
    for path in (args.histories, args.allow):
        if path is not None and not path.exists():
            raise FileNotFoundError(f"{path} does not exist")
        if path is not None and path.is_dir():
            raise UserError(f"{path} is a folder, expected a file")
    allowed = None if args.allow is None else read_names(args.allow)
    recommender = CatalogueRecommender.load(args.model, args.meta_file)
    target: AbstractContextManager[IO[str]] = (
        nullcontext(sys.stdout) if args.output is None else atomic_write(args.output)
    )
    with target as handle:
        said = write_recommendations(
            recommender, args.histories, args.k, args.filter_seen, handle, allowed
        )
    print(said, file=sys.stderr)
