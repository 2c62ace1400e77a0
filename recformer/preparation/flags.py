"""Flags that the data commands share, and their report of bad lines."""

from __future__ import annotations

import argparse
import math
import re
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from recformer.preparation.amazon import DEFAULT_ATTRIBUTES
from recformer.preparation.features import OF_TIME, Asked
from recformer.preparation.options import Filters, SessionOptions, SplitOptions
from recformer.preparation.tables import Columns
from recformer.preparation.times import parse_duration


def add_text_flags(parser: argparse.ArgumentParser, any_source: bool = False) -> None:
    """--attributes, --no_clean.

    Args:
        parser: to add to.
        any_source: not Amazon 2018's metadata alone; what the default is then depends on the file.
    """
    parser.add_argument(
        "--attributes",
        nargs="+",
        default=None if any_source else list(DEFAULT_ATTRIBUTES),
        metavar="[NAME=]COLUMN" if any_source else "KEY",
        help="columns that make up an item, in this order, each under its own or another name; "
        "lists are joined by one space (default: title, brand, category of Amazon's files, which "
        "has brand=store category=categories in 2023 and category=categories in 2014; of other "
        "files every column but the item's id)"
        if any_source
        else "metadata keys that make up an item, in this order; lists are joined by one space "
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


def add_user_flags(
    parser: argparse.ArgumentParser, min_interactions: int | None, note: str
) -> None:
    """--min_interactions, --user_sample_rate, --seed."""
    parser.add_argument(
        "--min_interactions",
        type=_count,
        default=min_interactions,
        metavar="N",
        help=f"leave out {note}" + ("" if min_interactions is None else " (default: %(default)s)"),
    )
    parser.add_argument(
        "--user_sample_rate",
        type=_rate,
        default=1.0,
        metavar="RATE",
        help="keep about this share of the users, drawn by --seed and their name (default: all)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the sample (default: %(default)s)")


def add_feature_flags(parser: argparse.ArgumentParser) -> None:
    """--features."""
    parser.add_argument(
        "--features",
        nargs="+",
        type=_feature,
        default=[],
        metavar="NAME[:TYPE][:OF]",
        help="columns of the interactions or the items that models may read beside the item id, "
        "each with a type float, cat (categories) or list (of categories), told by the values "
        "where none is given; ':item' takes the first value that the log tells of each item, "
        "':interaction' leaves it with the interaction (told by the values); and of the times "
        f"{', '.join(OF_TIME)} (default: none)",
    )


def add_reading_flags(parser: argparse.ArgumentParser) -> None:
    """--skip_bad_lines."""
    parser.add_argument(
        "--skip_bad_lines",
        action="store_true",
        help="leave out and count lines that are broken or lack what is needed, instead of "
        "stopping at the first; a file that is cut off stops the run all the same",
    )


def add_memory_flag(parser: argparse.ArgumentParser) -> None:
    """--memory."""
    parser.add_argument(
        "--memory",
        type=_size,
        metavar="SIZE",
        help="interactions may take about so much, such as 4GB: they then lie in files beside the "
        "output while they are worked on, however many they are, and what is written is the same; "
        "users (40 bytes each) and texts of items come on top (default: all are held in memory)",
    )


def add_column_flags(parser: argparse.ArgumentParser) -> None:
    """--user_column, …, --item_key_column, --separator, --encoding."""
    for flag, what in (
        ("user", "users, in the interactions"),
        ("item", "items, in the interactions; a list a row is a whole history"),
        (
            "time",
            "times, in the interactions: numbers or ISO 8601, UTC where there is no zone; without "
            "times their order in the file counts",
        ),
        ("rating", "ratings, in the interactions"),
        ("event", "types of events, in the interactions, see --events"),
        ("item_key", "items, in the file of items"),
    ):
        parser.add_argument(
            f"--{flag}_column",
            metavar="COLUMN",
            help=f"column of {what} (default: recognised by its name)",
        )
    parser.add_argument(
        "--session_column",
        metavar="COLUMN",
        help="column of sessions, each of which is taken as a user (default: there are users)",
    )
    parser.add_argument(
        "--separator",
        type=_separator,
        metavar="TEXT",
        help="what stands between the columns of a text file, in those whose first line has it; "
        "' ' is any white space (default: a comma in CSV, a tab in TSV). Columns of a file without "
        "a header go by their numbers, from 1",
    )
    parser.add_argument(
        "--encoding",
        metavar="NAME",
        help="of the text files that are not UTF-8: latin-1, cp932, … (default: UTF-8, or what a "
        "byte order mark says)",
    )


def columns(args: argparse.Namespace) -> Columns:
    """Values of the flags of `add_column_flags`."""
    return Columns(
        user=None if _is_owner(args) else args.user_column,
        item=args.item_column,
        time=args.time_column,
        rating=args.rating_column,
        event=args.event_column,
        session=args.session_column,
        owner=args.user_column if _is_owner(args) else None,
        item_key=args.item_key_column,
        separator=args.separator,
        encoding=args.encoding,
    )


def _is_owner(args: argparse.Namespace) -> bool:
    """Whether --user_column says whose the sessions are, not what a sequence is."""
    return args.session_column is not None and getattr(args, "previous_sessions", 0) > 0


def add_session_flags(parser: argparse.ArgumentParser) -> None:
    """--session_gap, --previous_sessions."""
    parser.add_argument(
        "--session_gap",
        type=_duration,
        metavar="TIME",
        help="a session ends where its user pauses for longer, such as 30m, and is a sequence of "
        "its own (default: all that a user has is one sequence)",
    )
    parser.add_argument(
        "--previous_sessions",
        type=_count,
        default=0,
        metavar="N",
        help="a session begins with the items of the last N sessions of the same user "
        "(--user_column), which needs times, and --session_column or --session_gap (default: each "
        "session stands alone)",
    )


def session_options(parser: argparse.ArgumentParser, args: argparse.Namespace) -> SessionOptions:
    """Values of the flags of `add_session_flags`."""
    if args.session_gap is not None and args.session_column is not None:
        parser.error("--session_gap finds sessions by time, --session_column by name: give one")
    if args.previous_sessions and args.session_gap is None and args.session_column is None:
        parser.error("--previous_sessions needs sessions: give --session_column or --session_gap")
    gap = None if args.session_gap is None else parse_duration(args.session_gap)
    return SessionOptions(gap, args.previous_sessions, args.session_column is not None)


def add_filter_flags(parser: argparse.ArgumentParser) -> None:
    """--min_rating, --events, --deduplicate, --drop_consecutive_repeats, --k_core, --max_users."""
    parser.add_argument(
        "--min_rating",
        type=_rating,
        metavar="RATING",
        help="leave out interactions rated lower (default: none)",
    )
    parser.add_argument(
        "--events",
        nargs="+",
        default=[],
        metavar="TYPE",
        help="keep interactions of these types alone, such as purchase cart (default: all)",
    )
    parser.add_argument(
        "--deduplicate",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="of interactions with the same user, item and time keep the first",
    )
    parser.add_argument(
        "--drop_consecutive_repeats",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="where a user meets the same item several times running, keep the first",
    )
    parser.add_argument(
        "--k_core",
        type=_count,
        default=0,
        metavar="K",
        help="leave out users and items with fewer interactions, again and again until none is "
        "left; not with --split windows, as it counts what comes later (default: not)",
    )
    parser.add_argument(
        "--max_users",
        type=_count,
        metavar="N",
        help="keep at most this many users, drawn by --seed and their name, after all else "
        "(default: all)",
    )


def filters(args: argparse.Namespace) -> Filters:
    """Values of the flags of `add_filter_flags`."""
    return Filters(
        min_rating=args.min_rating,
        events=tuple(args.events),
        deduplicate=args.deduplicate,
        drop_consecutive_repeats=args.drop_consecutive_repeats,
        k_core=args.k_core,
        max_users=args.max_users,
    )


def add_split_flags(parser: argparse.ArgumentParser) -> None:
    """--split, --test_quantile, …, --val_draw, --window, --targets, --min_window_sequences."""
    parser.add_argument(
        "--split",
        choices=["leave_one_out", "temporal", "windows"],
        default="leave_one_out",
        help="the last item of every user; or what comes after one point in time for all users, "
        "the last item being the target; or window after window, each judged by what was known "
        "before it (default: %(default)s)",
    )
    parser.add_argument(
        "--test_quantile",
        type=_quantile,
        metavar="SHARE",
        help="temporal: share of the interactions before the test cut (default: 0.9)",
    )
    parser.add_argument(
        "--val_quantile",
        type=_quantile,
        metavar="SHARE",
        help="temporal: share of those to train on (default: 0.9)",
    )
    parser.add_argument(
        "--cold_items",
        type=_quantile,
        metavar="SHARE",
        help="hold this share of the items, drawn by --seed, out of training and make them targets "
        "(default: none)",
    )
    parser.add_argument(
        "--val_users",
        type=_count,
        metavar="N",
        help="leave-one-out: only this many users validate, the others train on their item before "
        "the last (default: all validate)",
    )
    parser.add_argument(
        "--val_seed", type=int, metavar="SEED", help="of the draw of --val_users (default: 42)"
    )
    parser.add_argument(
        "--val_draw",
        choices=["names", "places"],
        help="of --val_users: by names, or numpy.random.RandomState(SEED).choice(users, N) of "
        "places, as gSASRec's code does, which draws some twice: its 512 draws of the 6,040 users "
        "of MovieLens-1M are 483 users (default: names)",
    )
    parser.add_argument(
        "--window",
        type=_duration,
        metavar="TIME",
        help="windows: their length, such as 1d, 12h or 1w",
    )
    parser.add_argument(
        "--targets",
        choices=["every", "last"],
        help="windows: every item of a test sequence but its first is a target, or the last alone "
        "(default: every)",
    )
    parser.add_argument(
        "--min_window_sequences",
        type=_count,
        metavar="N",
        help="windows: one with fewer sequences to validate and test on is refused (default: 10)",
    )


def split_options(parser: argparse.ArgumentParser, args: argparse.Namespace) -> SplitOptions:
    """Values of the flags of `add_split_flags`; a flag of the other split is a usage error."""
    of_split = {
        "leave_one_out": ("val_users", "val_seed", "val_draw", "cold_items"),
        "temporal": ("test_quantile", "val_quantile", "cold_items"),
        "windows": ("window", "targets", "min_window_sequences"),
    }
    every = dict.fromkeys(name for names in of_split.values() for name in names)
    unused = [name for name in every if name not in of_split[args.split]]
    wrong = [f"--{name}" for name in unused if getattr(args, name) is not None]
    if args.split == "windows" and args.k_core > 1:
        wrong.append("--k_core, which counts what comes later,")
    if wrong:
        parser.error(f"{', '.join(wrong)} means nothing with --split {args.split}")
    for name in ("val_seed", "val_draw"):
        if getattr(args, name) is not None and args.val_users is None:
            parser.error(f"--{name} means nothing without --val_users")
    if args.split == "windows" and args.window is None:
        parser.error("--split windows needs the length of a window, such as --window 1d")
    given = {name: getattr(args, name) for name in every if getattr(args, name) is not None}
    if "window" in given:
        given["window"] = parse_duration(given["window"])
    return SplitOptions(split=args.split, **given)


def shared_options(args: argparse.Namespace) -> dict[str, Any]:
    """Arguments that `prepare_finetuning` and `prepare_pretraining_sources` share."""
    return {
        "attributes": args.attributes,
        "clean": not args.no_clean,
        "min_interactions": args.min_interactions,
        "user_sample_rate": args.user_sample_rate,
        "seed": args.seed,
        "skip_bad_lines": args.skip_bad_lines,
        "columns": columns(args),
        "filters": filters(args),
        "memory": args.memory,
    }


def check_attributes(parser: argparse.ArgumentParser, attributes: list[str] | None) -> None:
    """End with a usage error where an attribute is named twice."""
    if attributes is None:
        return
    names = [attribute.partition("=")[0] for attribute in attributes]
    if len(set(names)) < len(names):
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


def _size(text: str) -> int:
    """Bytes of `4GB`, `800MB` or `4GiB`."""
    units = {"MB": 10**6, "GB": 10**9, "TB": 10**12, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?([MGT]i?B)", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"got {text}, expected a size such as 4GB or 800MB")
    return int(float(match[1]) * units[match[2]])


def _feature(text: str) -> Asked:
    try:
        return Asked.parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _duration(text: str) -> str:
    """Checked and left as it is, as protocols and dataset.json have it."""
    try:
        parse_duration(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return text


def _separator(text: str) -> str:
    value = text.replace("\\t", "\t")  # as a shell hands it on
    if not value or set(value) & set("\r\n\"'"):
        raise argparse.ArgumentTypeError(f"got {text!r}, expected ',', ';', '|', '\\t', '::', …")
    return value


def _rating(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"got {text}, expected a number")
    return value


def _rate(text: str) -> float:
    value = float(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"got {text}, expected a share above 0 and up to 1")
    return value


def _quantile(text: str) -> float:
    value = float(text)
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"got {text}, expected a share above 0 and below 1")
    return value
