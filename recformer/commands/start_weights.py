"""Write the weights that pretraining starts from: a language model in Recformer's form."""

from __future__ import annotations

from collections.abc import Sequence

from recformer.checkpoints.conversion import LONGFORMER, save_start_weights
from recformer.cli import command_parser
from recformer.config import PAPER


def main(argv: Sequence[str] | None = None) -> None:
    """Parse, write, say what became of every tensor."""
    parser = command_parser("start-weights", __doc__)
    parser.add_argument(
        "--model_name_or_path",
        default=LONGFORMER,
        metavar="NAME",
        help="folder or hub id of a Longformer, RoBERTa or BERT (default: %(default)s)",
    )
    parser.add_argument(
        "--output_path",
        default="longformer_ckpt/longformer-base-4096.bin",
        metavar="FILE",
        help="state dict to write; `recformer pretrain` takes it as --longformer_ckpt",
    )
    parser.add_argument(
        "--max_token_num",
        type=int,
        default=PAPER["max_token_num"],
        metavar="N",
        help="tokens of the longest sequence; where the model has fewer positions, they are "
        "repeated (default: %(default)s)",
    )
    parser.add_argument(
        "--max_item_embeddings",
        type=int,
        default=PAPER["max_item_embeddings"],
        metavar="N",
        help="items of the longest sequence, plus 1 (default: %(default)s)",
    )
    parser.add_argument(
        "--seed",
        type=int,
        default=0,
        help="seed of the tensors that the language model lacks",
    )
    args = parser.parse_args(argv)
    sizes = {name: getattr(args, name) for name in ("max_token_num", "max_item_embeddings")}
    for name, value in sizes.items():
        if value < 2:
            parser.error(f"--{name} {value}: must be at least 2, <s> and an item")

    report = save_start_weights(args.model_name_or_path, args.output_path, seed=args.seed, **sizes)
    print(report)
    changed = "".join(f" --{k} {v}" for k, v in sizes.items() if v != PAPER[k])
    print(
        f"written to {args.output_path}; pretrain with --longformer_ckpt {args.output_path} "
        f"--model_name_or_path {args.model_name_or_path}{changed}"
    )
