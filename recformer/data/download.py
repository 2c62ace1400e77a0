"""`python -m recformer.data.download`: another way to type `recformer download`."""

from __future__ import annotations

from recformer.cli import exit_with_message
from recformer.commands.download import main

if __name__ == "__main__":
    exit_with_message(main)
