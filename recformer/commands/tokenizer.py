"""A small byte-level BPE tokenizer, trained on the texts of catalogues."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from recformer.cli import command_parser
from recformer.files import UserError, read_json
from recformer.tokenization import item_texts, train_tokenizer
from recformer.tokenization.texts import show


def _catalogue_texts(meta_files: Sequence[str]) -> Iterator[str]:
    """Attribute names and values of all items in `meta_data.json` files."""
    for path in meta_files:
        items = read_json(path)
        if not isinstance(items, dict):
            raise UserError(f"{path} holds {show(items)}, expected {{asin: {{attribute: text}}}}")
        yield from item_texts(items.values())[0]


def main(argv: Sequence[str] | None = None) -> None:
    """Train a tokenizer on catalogues: the command line of this module."""
    parser = command_parser("tokenizer", __doc__)
    parser.add_argument(
        "--meta_file",
        nargs="+",
        required=True,
        help="meta_data.json files: {asin: {attribute: text}}",
    )
    parser.add_argument(
        "--vocab_size", type=int, default=4096, help="most tokens, special ones included"
    )
    parser.add_argument("--output_dir", required=True, help="folder to write the tokenizer to")
    args = parser.parse_args(argv)
    tokenizer = train_tokenizer(_catalogue_texts(args.meta_file), args.vocab_size, args.output_dir)
    size = len(tokenizer)
    fewer = "" if size == args.vocab_size else f" (of {args.vocab_size}: no pair is left)"
    print(f"wrote a byte-level BPE tokenizer of {size} tokens{fewer} to {args.output_dir}")
