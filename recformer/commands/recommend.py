"""Recommendations of a finetuned model for histories in a file.

`recformer recommend --model result/best_model --histories FILE.jsonl --k 10`

A line of the histories is {"user": …, "items": [name, …]}, oldest first, the names as in the data
that the model was finetuned on. A line of the answer is {"user": …, "items": […], "scores": […]},
best first, scores being cosines. Items that the catalogue does not hold are skipped and counted;
a user of whom none is left gets an empty answer.
"""

from __future__ import annotations

import json
import sys
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
NAMED = 5  # users without a known item, in the message about them


def read_histories(path: Path) -> Iterator[tuple[Any, list[str]]]:
    """User and item names of every line; numbers as names of items are taken as text.

    Raises:
        UserError: a line is not as expected; names it.
    """
    with open(path, encoding="utf-8") as handle:
        for number, line in enumerate(handle, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except RecursionError:
                raise UserError(f"{path}:{number} is not JSON: nested too deep") from None
            except ValueError as error:  # also a number of thousands of digits
                raise UserError(f"{path}:{number} is not JSON: {error}") from error
            items = row.get("items") if isinstance(row, dict) else None
            right = isinstance(items, list) and all(isinstance(x, str | int) for x in items)
            if items is None or not right or "user" not in row:
                raise UserError(
                    f'{path}:{number}: expected {{"user": …, "items": [name, …]}}, got '
                    f"{line.strip()[:80]}"
                )
            yield row["user"], [str(item) for item in items]


def write_recommendations(
    recommender: CatalogueRecommender, path: Path, k: int, filter_seen: bool, handle: IO[str]
) -> str:
    """Answer every line of a file of histories; returns what is to be said about it."""
    histories, left_out, unknown, total = read_histories(path), [], 0, 0
    with tqdm(desc="recommending", unit="user", file=sys.stderr, disable=None) as bar:
        while users := list(islice(histories, USERS_AT_ONCE)):
            answers = recommender.recommend([items for _, items in users], k, filter_seen)
            for (user, items), answer in zip(users, answers, strict=True):
                line = {"user": user, "items": answer.items, "scores": answer.scores}
                handle.write(json.dumps(line, ensure_ascii=False) + "\n")
                unknown += answer.num_unknown
                if answer.num_unknown == len(items):
                    left_out.append(user)
            total += len(users)
            bar.update(len(users))
    text = f"{total:,} users; {unknown:,} items of their histories are not in the catalogue"
    if left_out:
        names = ", ".join(map(str, left_out[:NAMED])) + (", …" if len(left_out) > NAMED else "")
        text += f"; {len(left_out):,} users have no other and got an empty answer: {names}"
    return text


def main(argv: Sequence[str] | None = None) -> None:
    """Parse flags, recommend, say what was skipped."""
    parser = command_parser("recommend", __doc__)
    parser.add_argument(
        "--model", required=True, metavar="FOLDER", help="best model of recformer.finetune"
    )
    parser.add_argument("--histories", required=True, type=Path, metavar="FILE")
    parser.add_argument("--k", type=int, default=10, help="items a user (default: %(default)s)")
    parser.add_argument(
        "--filter_seen", action="store_true", help="never recommend items of the history"
    )
    parser.add_argument(
        "--meta_file",
        metavar="FILE",
        help="meta_data.json of the processed folder (default: the one in the model's folder)",
    )
    parser.add_argument(
        "--output", metavar="FILE", help="JSON Lines of recommendations (default: printed)"
    )
    args = parser.parse_args(argv)
    keep_freed_memory()
    if args.k < 1:
        raise UserError(f"--k {args.k}: must be at least 1")
    if not args.histories.is_file():
        raise FileNotFoundError(f"{args.histories} does not exist")
    recommender = CatalogueRecommender.load(args.model, args.meta_file)
    target: AbstractContextManager[IO[str]] = (
        nullcontext(sys.stdout) if args.output is None else atomic_write(args.output)
    )
    with target as handle:
        said = write_recommendations(recommender, args.histories, args.k, args.filter_seen, handle)
    print(said, file=sys.stderr)
