"""Flags that the data scripts share, and what they say at the end."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from recformer.data.amazon import DEFAULT_ATTRIBUTES


def add_text_flags(parser: argparse.ArgumentParser) -> None:
    """--attributes, --no_clean."""
    parser.add_argument(
        "--attributes",
        nargs="+",
        default=list(DEFAULT_ATTRIBUTES),
        metavar="KEY",
        help="metadata keys that make up an item, in this order; lists are joined by one space "
        f"(default: {' '.join(DEFAULT_ATTRIBUTES)})",
    )
    parser.add_argument(
        "--no_clean",
        action="store_true",
        help="keep text as it stands in the file, as published; without it HTML entities and tags, "
        "style and script fragments, control characters and runs of white space are taken out, "
        "and empty values become absent attributes",
    )


def add_category_flags(
    parser: argparse.ArgumentParser, categories: Sequence[str], dev_category: str
) -> None:
    """--seq_root, --categories, --dev_category."""
    parser.add_argument(
        "--seq_root", required=True, metavar="FOLDER", help="folder of <category>_5.json.gz"
    )
    parser.add_argument(
        "--categories",
        nargs="+",
        default=list(categories),
        metavar="NAME",
        help=f"categories to train on (default: {' '.join(categories)})",
    )
    parser.add_argument(
        "--dev_category",
        default=dev_category,
        metavar="NAME",
        help="category to validate on (default: %(default)s)",
    )


def add_user_flags(parser: argparse.ArgumentParser, min_interactions: int, note: str) -> None:
    """--min_interactions, --user_sample_rate, --seed."""
    parser.add_argument(
        "--min_interactions",
        type=_count,
        default=min_interactions,
        metavar="N",
        help=f"leave out {note} (default: %(default)s)",
    )
    parser.add_argument(
        "--user_sample_rate",
        type=_rate,
        default=1.0,
        metavar="RATE",
        help="keep about this share of the users, drawn by --seed and their name (default: all)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the sample (default: %(default)s)")


def add_reading_flags(parser: argparse.ArgumentParser) -> None:
    """--skip_bad_lines."""
    parser.add_argument(
        "--skip_bad_lines",
        action="store_true",
        help="leave out and count lines that are broken or lack what is needed, instead of "
        "stopping at the first; a file that is cut off stops the run all the same",
    )


def check_attributes(parser: argparse.ArgumentParser, attributes: list[str]) -> None:
    """End with a usage error where an attribute is named twice."""
    if len(set(attributes)) < len(attributes):
        parser.error(f"--attributes names a key twice: {' '.join(attributes)}")


def report_bad_lines(summary: Mapping[str, Any]) -> None:
    """Say on stderr how many lines were left out, why, and where the first ones are."""
    if summary["total"]:
        reasons = ", ".join(f"{number} {reason}" for reason, number in summary["reasons"].items())
        print(f"left out {summary['total']} bad lines: {reasons}", file=sys.stderr)
        for place in summary["first"]:
            print(f"  {place}", file=sys.stderr)


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"got {text}, expected 1 or more")
    return value


def _rate(text: str) -> float:
    value = float(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"got {text}, expected a share above 0 and up to 1")
    return value
