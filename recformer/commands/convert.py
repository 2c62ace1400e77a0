"""Released files from a pretraining checkpoint: two state dicts and a `from_pretrained` folder.

`recformer convert --checkpoint result/recformer_pretraining/checkpoints/last.ckpt`

Prints what became of every tensor; nothing is written before all has been checked.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from recformer.checkpoints.conversion import LONGFORMER, START_FOLDER, convert_pretraining
from recformer.cli import parse_flags
from recformer.files import UserError
from recformer.training.arguments import ModelArguments, flag


@dataclass
class ConvertArguments(ModelArguments):
    """Flags of a conversion."""

    checkpoint: str | None = flag(
        None,
        "checkpoint to convert (required): a DeepSpeed folder (x.ckpt), a Lightning file, "
        "pytorch_model.bin, or the folder of shards that zero_to_fp32.py writes",
    )
    output_dir: str = flag("pretrain_ckpt", "folder to write to")
    start_weights: str | None = flag(
        None,
        "file or folder with the frozen word embeddings; unset: the folder "
        f"{START_FOLDER!r} that pretraining left beside the checkpoint, if it is there",
    )
    model_name_or_path: str | None = flag(
        None,
        "folder or hub id of configuration and tokenizer; unset: the folder of the start weights, "
        f"else {LONGFORMER}",
    )
    export_file: str | None = flag(
        None,
        "also write all weights under '_forward_module.model.…' to this file, as zero_to_fp32.py "
        "did when the published model was trained: the published convert_pretrain_ckpt.py reads it",
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Parse, convert, say what became of every tensor."""
    args = parse_flags("convert", __doc__, ConvertArguments, argv)
    if args.checkpoint is None:
        raise UserError("--checkpoint is required: the file or folder to convert")
    report, written = convert_pretraining(
        args.checkpoint,
        args.output_dir,
        start_weights=args.start_weights,
        model_name_or_path=args.model_name_or_path,
        export_file=args.export_file,
        **args.overrides(),
    )
    print(report)
    print("written:", *written)
