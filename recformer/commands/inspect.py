"""recformer inspect: what a checkpoint is, before it is used."""

from __future__ import annotations

import argparse
from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> None:
    """Say what a checkpoint is."""
    # Imported here because it builds on this module.
    from recformer.checkpoints.inspection import inspect_checkpoint

    parser = argparse.ArgumentParser(
        prog="python -m recformer.checkpoints.loading",
        description="Say what a checkpoint is: kind, shapes, run, configuration, and how its keys "
        "differ from what the models expect.",
    )
    parser.add_argument(
        "path",
        help="a released .bin file, a Lightning .ckpt, a DeepSpeed folder, a folder of shards, or "
        "a model folder, of a Recformer or of a language model",
    )
    print(inspect_checkpoint(parser.parse_args(argv).path))
