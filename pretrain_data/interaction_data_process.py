"""Raw reviews of many categories → train.json and dev.json, the sequences to pretrain on.

One sequence of asins per user and category, oldest first; at equal times the order of the file
stands. Products that meta_data.json (meta_data_process.py) does not have are left out.
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
    prepare_pretraining,
)


def main() -> None:
    """Parse, process, say what was written."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    flags.add_category_flags(parser, PRETRAINING_CATEGORIES, DEV_CATEGORY)
    parser.add_argument(
        "--output_dir",
        default=str(HERE),
        metavar="FOLDER",
        help="folder that holds meta_data.json, where train.json and dev.json are written "
        "(default: beside this script)",
    )
    flags.add_user_flags(
        parser,
        2,
        "sequences of fewer known products than this; a pretraining pair is a history and a "
        "target, so sequences of one product, which the published script wrote, are of no use",
    )
    flags.add_reading_flags(parser)
    args = parser.parse_args()

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
    for name, total in written["files"].items():
        print(
            f"{Path(args.output_dir) / name}: {total['sequences']} sequences, "
            f"{total['interactions']} interactions"
        )


if __name__ == "__main__":
    exit_with_message(main)
