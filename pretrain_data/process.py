"""Interactions and items of several sources, of any form → the files to pretrain on.

Writes meta_data.json, train.json and dev.json at once. Every id is written `NAME:id`, so that items
of two sources never collide; sources of which only the published ids are wanted go through
meta_data_process.py and interaction_data_process.py.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))  # a plain checkout works, from any folder

from recformer.cli import exit_with_message
from recformer.preparation import flags
from recformer.preparation.pretraining import PretrainingSource, prepare_pretraining_sources


def main() -> None:
    """Parse, process, say what was written."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
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
        "--output_dir", default=str(HERE), metavar="FOLDER", help="default: beside this script"
    )
    flags.add_column_flags(parser)
    flags.add_text_flags(parser, any_source=True)
    flags.add_user_flags(parser, 2, "sequences of fewer known items than this")
    flags.add_filter_flags(parser)
    flags.add_reading_flags(parser)
    args = parser.parse_args()
    flags.check_attributes(parser, args.attributes)

    sources = [
        PretrainingSource(name, Path(interactions), Path(items))
        for name, interactions, items in [*args.source, args.dev_source]
    ]
    dataset = prepare_pretraining_sources(
        sources[:-1],
        sources[-1],
        args.output_dir,
        attributes=args.attributes,
        clean=not args.no_clean,
        min_interactions=args.min_interactions,
        user_sample_rate=args.user_sample_rate,
        seed=args.seed,
        skip_bad_lines=args.skip_bad_lines,
        columns=flags.columns(args),
        filters=flags.filters(args),
    )
    flags.report_bad_lines(dataset["counts"]["bad_lines"])
    for name, total in dataset["files"].items():
        print(
            f"{Path(args.output_dir) / name}: {total['sequences']} sequences, "
            f"{total['interactions']} interactions"
        )


if __name__ == "__main__":
    exit_with_message(main)
