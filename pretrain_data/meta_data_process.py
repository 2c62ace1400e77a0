"""Raw metadata and reviews of many categories → meta_data.json, the items to pretrain on.

Kept are products that have a title and occur in a review file. Run this before
interaction_data_process.py.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))  # a plain checkout works, from any folder

from recformer.cli import exit_with_message
from recformer.preparation import flags
from recformer.preparation.pretraining import (
    DEV_CATEGORY,
    PRETRAINING_CATEGORIES,
    prepare_pretraining_items,
)


def main() -> None:
    """Parse, process, say what was written."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--meta_root",
        required=True,
        metavar="FOLDER",
        help="folder of meta_<category>.json.gz",
    )
    flags.add_category_flags(parser, PRETRAINING_CATEGORIES, DEV_CATEGORY)
    parser.add_argument(
        "--output_dir",
        default=str(HERE),
        metavar="FOLDER",
        help="where to write meta_data.json (default: beside this script)",
    )
    flags.add_text_flags(parser)
    flags.add_reading_flags(parser)
    args = parser.parse_args()
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


if __name__ == "__main__":
    exit_with_message(main)
