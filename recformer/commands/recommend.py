"""Recommendations of a finetuned model for histories in a file, or for all users of its data.

`recformer recommend --model result/best_model --histories FILE.jsonl --k 10`
`recformer recommend --model result/best_model --all_users finetune_data/MyShop --output a.parquet`

A line of the histories is {"user": …, "items": [name, …]}, oldest first, the names as in the data
that the model was finetuned on; an item that no catalogue knows stands there by its attributes,
{"title": …, …}. The file may be a pipe, gzipped, or begin with a byte order mark. Parquet, CSV, TSV
and RecBole's files hold interactions or lists of items, as `recformer process` reads them.

A line of the answer is {"user": …, "items": […], "scores": […]}, best first, scores being cosines.
Items that the catalogue does not hold are skipped and counted. A user of whom none is left gets
popular items, or the newest, and the line says so: "fallback": "popular". An --output that ends in
.parquet has these as columns and a row a user; the same command again goes on where it was cut off.

The catalogue is every product of meta_data.json, those that nobody has bought too, or what was
saved there. --catalogue brings more of them, in any form that `recformer process` reads, or other
texts for those that are there: they are recommended at once, nothing is trained, and only what
changed is encoded.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import IO, Any

from recformer.cli import command_parser, keep_freed_memory
from recformer.files import UserError, atomic_write
from recformer.preparation import flags
from recformer.preparation.bad_lines import BadLines
from recformer.preparation.tables import open_items
from recformer.recommendation import CatalogueRecommender
from recformer.recommendation.approximate import ApproximateIndex
from recformer.recommendation.batch import Told, answered, write_parquet
from recformer.recommendation.histories import (
    History,
    histories_of_folder,
    read_histories,
    read_names,
)


def _json_line(row: dict[str, Any], handle: IO[str]) -> str:
    """A line of JSON; letters are escaped where the output cannot hold them."""
    line = json.dumps(row, ensure_ascii=False)
    try:
        line.encode(getattr(handle, "encoding", None) or "utf-8")
    except UnicodeEncodeError:  # half a surrogate pair, or a terminal that is not UTF-8
        line = json.dumps(row)
    return line + "\n"


def write_lines(
    recommender: CatalogueRecommender,
    histories: Iterable[History],
    handle: IO[str],
    k: int,
    filter_seen: bool,
    allowed: Sequence[str] | None,
    total: int | None,
) -> Told:
    """A line of JSON for every history; returns what is to be said about them."""
    told = Told()
    for user, answer in answered(recommender, histories, k, filter_seen, allowed, total):
        line = {"user": user, "items": answer.items, "scores": answer.scores}
        if answer.fallback:
            line["fallback"] = answer.fallback
        handle.write(_json_line(line, handle))
        told.add(user, answer.num_unknown, answer.fallback)
    return told


def take_catalogue(recommender: CatalogueRecommender, args: Any) -> str:
    """Add and change the items of --catalogue; returns what is to be said about it."""
    bad_lines = BadLines(skip=args.skip_bad_lines)
    source = open_items(args.catalogue, flags.columns(args), args.attributes)
    items, _ = source.read(clean=not args.no_clean, bad_lines=bad_lines)
    flags.report_bad_lines(bad_lines.summary())
    new = sum(name not in recommender for name in items)
    encoded = recommender.put_items(items, keep=True)
    return (
        f"{args.catalogue}: {new:,} items added, {len(items) - new:,} were there; "
        f"{encoded:,} texts encoded"
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Parse flags, recommend, say what was skipped."""
    parser = command_parser("recommend", __doc__)
    parser.add_argument(
        "--model", required=True, metavar="FOLDER", help="best_model of a `recformer finetune` run"
    )
    whose = parser.add_mutually_exclusive_group(required=True)
    whose.add_argument(
        "--histories", type=Path, metavar="FILE", help="JSON Lines or a table, see above"
    )
    whose.add_argument(
        "--all_users",
        type=Path,
        metavar="FOLDER",
        help="all users of a processed folder, with all they did, the test items too",
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
        "--catalogue",
        type=Path,
        metavar="FILE",
        help="items to add, or with other texts, as CSV, TSV, Parquet, JSON Lines, …",
    )
    parser.add_argument(
        "--allow",
        type=Path,
        metavar="FILE",
        help="names of the only items to recommend, such as those in stock, one a line",
    )
    parser.add_argument(
        "--approximate",
        action="store_true",
        help="search through the index that recformer index built (default: exactly)",
    )
    parser.add_argument(
        "--output",
        type=Path,
        metavar="FILE",
        help="JSON Lines of recommendations, or Parquet if it ends in .parquet (default: printed)",
    )
    flags.add_column_flags(parser)
    flags.add_text_flags(parser, any_source=True)
    flags.add_reading_flags(parser)
    args = parser.parse_args(argv)
    flags.check_attributes(parser, args.attributes)
    keep_freed_memory()
    if args.k < 1:
        raise UserError(f"--k {args.k}: must be at least 1")
    for path in (args.histories, args.allow, args.catalogue):
        if path is not None and not path.exists():
            raise FileNotFoundError(f"{path} does not exist")
    if args.allow is not None and args.allow.is_dir():
        raise UserError(f"{args.allow} is a folder, expected a file")
    allowed = None if args.allow is None else read_names(args.allow)
    histories: Iterable[History]
    total, bad_lines = None, BadLines()
    if args.all_users is not None:
        histories = histories_of_folder(args.all_users)
        total = len(histories)
    else:
        bad_lines = BadLines(skip=args.skip_bad_lines)
        histories = read_histories(args.histories, flags.columns(args), bad_lines)
    recommender = CatalogueRecommender.load(args.model, args.meta_file)
    if args.approximate:
        recommender.use_index(ApproximateIndex.load(Path(args.model), recommender.catalogue.view))
    if args.catalogue is not None:
        print(take_catalogue(recommender, args), file=sys.stderr)
    options = (args.k, args.filter_seen, allowed, total)
    if args.output is not None and args.output.suffix == ".parquet":
        told = write_parquet(recommender, histories, args.output, *options)
    else:
        target: AbstractContextManager[IO[str]] = (
            nullcontext(sys.stdout) if args.output is None else atomic_write(args.output)
        )
        with target as handle:
            told = write_lines(recommender, histories, handle, *options)
    flags.report_bad_lines(bad_lines.summary())
    print(told, file=sys.stderr)
