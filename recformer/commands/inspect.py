"""Description of a checkpoint: kind, shapes, run and configuration.

Also: differences between its keys and those of the models.
"""

from __future__ import annotations

from collections.abc import Sequence

from recformer.checkpoints.inspection import inspect_checkpoint
from recformer.cli import command_parser


def main(argv: Sequence[str] | None = None) -> None:
    """Say what a checkpoint is."""
    parser = command_parser("inspect", __doc__)
    parser.add_argument(
        "path",
        help="a released .bin file, a Lightning .ckpt, a DeepSpeed folder, a folder of shards, or "
        "a model folder, of a Recformer or of a language model",
    )
    print(inspect_checkpoint(parser.parse_args(argv).path))
