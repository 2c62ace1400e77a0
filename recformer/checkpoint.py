"""`python -m recformer.checkpoint`: another way to type `recformer inspect`."""

from __future__ import annotations

from recformer.checkpoints.loading import load_checkpoint
from recformer.cli import exit_with_message
from recformer.commands.inspect import main

__all__ = ["load_checkpoint"]  # its place before `recformer.checkpoints`

if __name__ == "__main__":
    exit_with_message(main)
