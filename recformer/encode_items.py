"""`python -m recformer.encode_items`: another way to type `recformer encode`."""

from __future__ import annotations

from recformer.cli import exit_with_message
from recformer.commands.encode import main

if __name__ == "__main__":
    exit_with_message(main)
