"""Turn interactions and items of several sources into the files to pretrain on.

Writes meta_data.json, train.json and dev.json at once. Every id is written `NAME:id`, so that items
of two sources never collide. The scripts meta_data_process.py and interaction_data_process.py of a
checkout write the published ids, without a prefix.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

from recformer.cli import command_parser
from recformer.preparation import flags
from recformer.preparation.lines import rereadable
from recformer.preparation.pretraining import (
    DEV_CATEGORY,
    PRETRAINING_CATEGORIES,
    PretrainingSource,
    prepare_pretraining,
    prepare_pretraining_items,
    prepare_pretraining_sources,
)

ITEMS_HELP = """Turn metadata and reviews of many categories into meta_data.json.

It holds the items to pretrain on: products that have a title and occur in a review file. Run this
before interaction_data_process.py.
"""
SEQUENCES_HELP = """Turn reviews of many categories into sequences, train.json and dev.json.

One sequence of asins per user and category, oldest first; at equal times the order of the file
stands. Products that meta_data.json (meta_data_process.py) does not have are left out.
"""


def main(argv: Sequence[str] | None = None, beside: Path | None = None) -> None:
    """Parse, process, say what was written."""
    parser = command_parser("process-pretraining", __doc__)
    metavar = ("NAME", "INTERACTIONS", "ITEMS")
    parser.add_argument(
        "--source",
        nargs=3,
        action="append",
        required=True,
        metavar=metavar,
        help="to train on; may be given several times",
    )
    parser.add_argument(
        "--dev_source", nargs=3, required=True, metavar=metavar, help="to validate on"
    )
    parser.add_argument(
        "--output_dir", default=str(beside or "."), metavar="FOLDER", help="default: %(default)s"
    )
    flags.add_column_flags(parser)
    flags.add_text_flags(parser, any_source=True)
    flags.add_user_flags(parser, 2, "sequences of fewer known items than this")
    flags.add_filter_flags(parser)
    flags.add_reading_flags(parser)
    flags.add_memory_flag(parser)
    args = parser.parse_args(argv)
    flags.check_attributes(parser, args.attributes)

    with ExitStack() as pipes:
        sources = [
            PretrainingSource(name, *(pipes.enter_context(rereadable(path)) for path in paths))
            for name, *paths in [*args.source, args.dev_source]
        ]
        dataset = prepare_pretraining_sources(
            sources[:-1],
            sources[-1],
            args.output_dir,
            **flags.shared_options(args),
        )
    flags.report_bad_lines(dataset["counts"]["bad_lines"])
    _print_files(args.output_dir, dataset["files"])


def items(argv: Sequence[str] | None = None, beside: Path | None = None) -> None:
    """Parse, process, say what was written."""
    parser = command_parser("", ITEMS_HELP, program="meta_data_process.py")
    parser.add_argument(
        "--meta_root",
        required=True,
        metavar="FOLDER",
        help="folder of meta_<category>.json.gz",
    )
    flags.add_category_flags(parser, PRETRAINING_CATEGORIES, DEV_CATEGORY)
    parser.add_argument(
        "--output_dir",
        default=str(beside or "."),
        metavar="FOLDER",
        help="where to write meta_data.json (default: %(default)s)",
    )
    flags.add_text_flags(parser)
    flags.add_reading_flags(parser)
    args = parser.parse_args(argv)
    flags.check_attributes(parser, args.attributes)

    dataset = prepare_pretraining_items(
        args.meta_root,
        args.seq_root,
        args.output_dir,
        categories=args.categories,
        dev_category=args.dev_category,
        attributes=args.attributes,
        clean=not args.no_clean,
        skip_bad_lines=args.skip_bad_lines,
    )
    counts = dataset["meta_data"]["counts"]
    flags.report_bad_lines(counts["bad_lines"])
    print(
        f"{Path(args.output_dir) / 'meta_data.json'}: {counts['metadata']['products']} products of "
        f"{counts['products_reviewed']} reviewed and {counts['metadata']['rows']} metadata rows; "
        f"more in dataset.json"
    )


def sequences(argv: Sequence[str] | None = None, beside: Path | None = None) -> None:
    """Parse, process, say what was written."""
    parser = command_parser("", SEQUENCES_HELP, program="interaction_data_process.py")
    flags.add_category_flags(parser, PRETRAINING_CATEGORIES, DEV_CATEGORY)
    parser.add_argument(
        "--output_dir",
        default=str(beside or "."),
        metavar="FOLDER",
        help="folder that holds meta_data.json, where train.json and dev.json are written "
        "(default: %(default)s)",
    )
    flags.add_user_flags(
        parser,
        2,
        "sequences of fewer known products than this; a pretraining pair is a history and a "
        "target, so sequences of one product, which the published script wrote, are of no use",
    )
    flags.add_reading_flags(parser)
    args = parser.parse_args(argv)

    dataset = prepare_pretraining(
        args.seq_root,
        args.output_dir,
        categories=args.categories,
        dev_category=args.dev_category,
        min_interactions=args.min_interactions,
        user_sample_rate=args.user_sample_rate,
        seed=args.seed,
        skip_bad_lines=args.skip_bad_lines,
    )
    written = dataset["sequences"]
    flags.report_bad_lines(written["counts"]["bad_lines"])
    _print_files(args.output_dir, written["files"])


def _print_files(output_dir: str, totals: Mapping[str, Mapping[str, int]]) -> None:
    for name, total in totals.items():
        print(
            f"{Path(output_dir) / name}: {total['sequences']} sequences, "
            f"{total['interactions']} interactions"
        )
