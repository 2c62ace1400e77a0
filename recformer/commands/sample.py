"""A generated sample of five categories in the raw form of Amazon's files.

The quickstart runs on it. The same seed gives the same files.
"""

from __future__ import annotations

from collections.abc import Sequence

from recformer.cli import command_parser
from recformer.preparation.sample import write_sample


def main(argv: Sequence[str] | None = None) -> None:
    """Write the sample and say what was written."""
    parser = command_parser("sample", __doc__)
    parser.add_argument("--output_dir", required=True, help="folder for the ten files")
    parser.add_argument("--seed", type=int, default=0, help="seed of the sample")
    args = parser.parse_args(argv)
    for category, count in write_sample(args.output_dir, args.seed).items():
        print(
            f"{category}: {count['reviews']:,} reviews of {count['reviewers']:,} reviewers, "
            f"{count['metadata_rows']:,} metadata rows"
        )
    print(f"written to {args.output_dir}")
