"""A generated sample: a shop in the raw form of Amazon's files, or a season of sessions as REES46.

The quickstart runs on the shop. The same seed gives the same files.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from recformer.cli import check_seed, command_parser
from recformer.preparation.sample import write_sample
from recformer.preparation.sample_season import FILE, SAMPLES, write_season


def main(argv: Sequence[str] | None = None) -> None:
    """Write the sample and say what was written."""
    parser = command_parser("sample", __doc__)
    parser.add_argument("--output_dir", required=True, help="folder for the files")
    parser.add_argument("--seed", type=int, default=0, help="seed of the sample")
    parser.add_argument(
        "--kind",
        choices=SAMPLES,
        default=SAMPLES[0],
        help="shop: reviews and metadata of five categories, ten files; season: sessions of a "
        "shop, one file in the REES46 form, where category and price say much of what comes next; "
        "shuffled_season: the same sessions where they say nothing (default: %(default)s)",
    )
    args = parser.parse_args(argv)
    check_seed(args.seed)
    if args.kind != SAMPLES[0]:
        found = write_season(args.output_dir, args.seed, shuffled=args.kind == "shuffled_season")
        counts = ", ".join(f"{number:,} {name}" for name, number in found.items())
        print(f"{counts}: written to {Path(args.output_dir) / FILE}")
        return
    for category, count in write_sample(args.output_dir, args.seed).items():
        print(
            f"{category}: {count['reviews']:,} reviews of {count['reviewers']:,} reviewers, "
            f"{count['metadata_rows']:,} metadata rows"
        )
    print(f"written to {args.output_dir}")
