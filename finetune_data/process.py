"""Interactions and items → a processed folder to finetune and evaluate on.

Reads Amazon's reviews and metadata (2014, 2018, 2023), CSV, TSV, Parquet, JSON Lines, RecBole's
atomic files and the SASRec text format (`user item` a line), gzipped or not.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))  # a plain checkout works, from any folder

from recformer.cli import exit_with_message
from recformer.evaluation.protocol import HELP, Protocol, with_protocol
from recformer.files import UserError
from recformer.preparation import flags
from recformer.preparation.audit.figures import PAGE_FILE, audit_folder
from recformer.preparation.finetuning import prepare_finetuning


def main() -> None:
    """Parse, process, say what was written, audit it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--file_path",
        default=str(HERE / "Industrial_and_Scientific_5.json.gz"),
        metavar="FILE",
        help="interactions (default: Industrial_and_Scientific_5.json.gz beside this script)",
    )
    parser.add_argument(
        "--meta_file_path",
        default=str(HERE / "meta_Industrial_and_Scientific.json.gz"),
        metavar="FILE",
        help="items (default: meta_Industrial_and_Scientific.json.gz beside this script)",
    )
    parser.add_argument(
        "--output_path",
        default=str(HERE / "Scientific"),
        metavar="FOLDER",
        help="processed folder to write (default: Scientific beside this script)",
    )
    parser.add_argument("--protocol", metavar="NAME", help=HELP)
    flags.add_column_flags(parser)
    flags.add_text_flags(parser, any_source=True)
    flags.add_user_flags(parser, 4, "users with fewer reviews of known products than this")
    flags.add_filter_flags(parser)
    flags.add_split_flags(parser)
    flags.add_reading_flags(parser)
    args = parser.parse_args(with_protocol(None, "data"))
    flags.check_attributes(parser, args.attributes)
    options = flags.split_options(parser, args)

    dataset = prepare_finetuning(
        args.file_path,
        args.meta_file_path,
        args.output_path,
        attributes=args.attributes,
        clean=not args.no_clean,
        min_interactions=args.min_interactions,
        user_sample_rate=args.user_sample_rate,
        seed=args.seed,
        skip_bad_lines=args.skip_bad_lines,
        columns=flags.columns(args),
        filters=flags.filters(args),
        options=options,
        protocol=Protocol.load(args.protocol).record("data", vars(args)) if args.protocol else None,
    )
    counts = dataset["counts"]
    flags.report_bad_lines(counts["bad_lines"])
    for name, number in counts.get("filters", {}).items():
        print(f"{name.replace('_', ' ')}: {number}")
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


if __name__ == "__main__":
    exit_with_message(main)
