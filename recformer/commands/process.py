"""Turn interactions and items into a processed folder to finetune and evaluate on.

Reads Amazon's reviews and metadata (2014, 2018, 2023), CSV, TSV, Parquet (a file or a folder), JSON
Lines, RecBole's atomic files, `user item` (SASRec) and `user item item …` (S3-Rec) a line,
{user: [item, …]} and {item: {attribute: text}} as one JSON object (UniSRec, LC-Rec), and histories
as lists: a column of lists, or a history beside the next item, of which the whole is rebuilt
(RecBole's token_seq, MiniOneRec). Text may be gzipped.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from recformer.cli import command_parser
from recformer.evaluation.protocol import HELP, Protocol, with_protocol
from recformer.files import UserError
from recformer.preparation import flags
from recformer.preparation.audit.figures import PAGE_FILE, audit_folder
from recformer.preparation.finetuning import prepare_finetuning
from recformer.preparation.lines import rereadable

REVIEWS = "Industrial_and_Scientific_5.json.gz"
METADATA = "meta_Industrial_and_Scientific.json.gz"
FOLDER = "Scientific"
ALL_THERE_IS = " (default: none, the interactions say what there is to say of them)"


def main(argv: Sequence[str] | None = None, beside: Path | None = None) -> None:
    """Parse, process, say what was written, audit it.

    Args:
        argv: flags; None: those of the program.
        beside: folder of the published files, the defaults; None: there are no defaults.
    """
    parser = command_parser("process", __doc__)

    def where(name: str, text: str) -> dict[str, Any]:
        if beside is None:
            optional = name == METADATA
            return {"required": not optional, "help": text + ALL_THERE_IS * optional}
        return {"default": str(beside / name), "help": f"{text} (default: {beside / name})"}

    parser.add_argument(
        "--file_path",
        metavar="FILE",
        **where(REVIEWS, "interactions"),
    )
    parser.add_argument(
        "--meta_file_path",
        metavar="FILE",
        **where(METADATA, "items"),
    )
    parser.add_argument(
        "--output_path",
        metavar="FOLDER",
        **where(FOLDER, "processed folder to write"),
    )
    parser.add_argument("--protocol", metavar="NAME", help=HELP)
    flags.add_column_flags(parser)
    flags.add_text_flags(parser, any_source=True)
    flags.add_session_flags(parser)
    flags.add_user_flags(
        parser,
        None,
        "users, or sessions, with fewer reviews of known products than this (default: 4; of "
        "sessions 2)",
    )
    flags.add_filter_flags(parser)
    flags.add_split_flags(parser)
    flags.add_feature_flags(parser)
    flags.add_reading_flags(parser)
    flags.add_memory_flag(parser)
    parser.add_argument(
        "--engine",
        choices=["local", "spark"],
        default="local",
        help="spark: --file_path is a table of Parquet files where Spark finds it, a folder "
        "or a URL, and is read and sorted there (pip install 'recformer[spark]', and Java)",
    )
    parser.add_argument(
        "--master",
        metavar="URL",
        help="of the Spark cluster (default: as spark-submit says, else all cores of this machine)",
    )
    args = parser.parse_args(with_protocol(argv, "data"))
    flags.check_attributes(parser, args.attributes)
    if args.master is not None and args.engine != "spark":
        parser.error("--master is of Spark: give --engine spark")
    sessions = flags.session_options(parser, args)
    options = flags.split_options(parser, args)
    if args.min_interactions is None:
        args.min_interactions = 2 if sessions.asked else 4

    protocol = Protocol.load(args.protocol).record("data", vars(args)) if args.protocol else None
    with ExitStack() as pipes:
        interactions = args.file_path
        if args.engine == "local":
            interactions = pipes.enter_context(rereadable(args.file_path))
        items = args.meta_file_path and pipes.enter_context(rereadable(args.meta_file_path))
        dataset = prepare_finetuning(
            interactions,
            items,
            args.output_path,
            **flags.shared_options(args),
            options=options,
            sessions=sessions,
            features=args.features,
            protocol=protocol,
            engine=args.engine,
            master=args.master,
        )
    counts = dataset["counts"]
    flags.report_bad_lines(counts["bad_lines"])
    for name, number in counts.get("filters", {}).items():
        print(f"{name.replace('_', ' ')}: {number}")
    if args.meta_file_path is None:
        found = ", ".join(dataset["parameters"]["attributes"])
        said = f"their text is {found} of the interactions" if found else "they have no text"
        print(f"no file of items (--meta_file_path): {said}")
    if sessions.asked:
        lengths = counts["histories"]
        print(
            f"{lengths['users_kept']} sessions kept, {lengths['users_with_too_few_interactions']} "
            f"with fewer than {args.min_interactions} interactions left out "
            f"({lengths['sessions_of_one_event']} of one event)"
        )
    for feature in dataset.get("features", []):
        print(
            f"feature {feature['name']}: {feature['kind']} of each {feature['of']}, "
            f"{feature['distinct']:,} different values, {feature['missing']:,} missing"
        )
    kept = "" if "filters" in counts else " kept"  # a filter may have taken them out
    print(
        f"{args.output_path}: {dataset['num_users']} users, {dataset['num_items']} items, "
        f"{dataset['num_interactions']} interactions; {counts['metadata']['products']} products "
        f"in meta_data.json; {counts['reviews']['reviews_of_unknown_products']} reviews of unknown "
        f"products left out, {counts['reviews']['duplicate_reviews']} duplicate reviews{kept}; "
        f"split {dataset['split_hash'][:12]}, more in dataset.json"
    )
    try:
        warnings = audit_folder(args.output_path)["warnings"]
    except (UserError, OSError) as error:  # the folder is whole, whatever becomes of its audit
        print(f"{args.output_path} was not audited: {error}", file=sys.stderr)
        return
    for warning in warnings:
        print(f"warning: {warning['message']}")
    print(f"audited: {len(warnings)} warnings, see {Path(args.output_path) / PAGE_FILE}")
