"""Flaws of a processed folder that can spoil an evaluation, counted.

Prints warnings and notes, and writes audit.json (all figures) and audit.html (plots).
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from recformer.cli import command_parser
from recformer.files import read_json
from recformer.paper import PAPER
from recformer.preparation.audit.figures import AUDIT_FILE, LIMITS, PAGE_FILE, audit_folder

if TYPE_CHECKING:
    from recformer.tokenization import RecformerTokenizer


def _load_tokenizer(source: str, limits: dict[str, int]) -> RecformerTokenizer:
    """A tokenizer with the limits given, else those in its folder, else the paper's."""
    from recformer.config import RecformerConfig  # transformers, which takes seconds
    from recformer.tokenization import RecformerTokenizer

    stored = Path(source) / "config.json"
    config = {name: PAPER[name] for name in LIMITS}
    if stored.is_file():
        values = read_json(stored)
        config |= {name: values[name] for name in LIMITS if name in values}
    return RecformerTokenizer.from_pretrained(source, RecformerConfig(**config | limits))


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"got {text}, expected 1 or more")
    return value


def main(argv: Sequence[str] | None = None) -> None:
    """Parse flags, audit, print and write."""
    parser = command_parser("audit", __doc__)
    parser.add_argument("folder", help="processed folder, as `recformer process` writes it")
    parser.add_argument(
        "--output_dir", help="where to write audit.json and audit.html (default: the folder)"
    )
    parser.add_argument(
        "--tokenizer_name",
        metavar="FOLDER_OR_HUB_ID",
        help="count tokens too, and what the limits below cut",
    )
    for name in LIMITS:
        parser.add_argument(
            f"--{name}",
            type=_positive,
            metavar="N",
            help="as in finetuning (default: the tokenizer folder's own, else the paper's)",
        )
    args = parser.parse_args(argv)
    limits = {name: getattr(args, name) for name in LIMITS if getattr(args, name) is not None}
    tokenizer = None
    if args.tokenizer_name is not None:
        tokenizer = _load_tokenizer(args.tokenizer_name, limits)
    elif limits:
        parser.error(f"--{', --'.join(limits)}: mean nothing without --tokenizer_name")
    found = audit_folder(args.folder, args.output_dir, tokenizer)
    for warning in found["warnings"]:
        print(f"warning: {warning['message']}")
    for note in found["notes"]:
        print(f"note: {note}")
    output = Path(args.output_dir or args.folder)
    print(
        f"{len(found['warnings'])} warnings; figures in {output / AUDIT_FILE}, plots in "
        f"{output / PAGE_FILE}"
    )
