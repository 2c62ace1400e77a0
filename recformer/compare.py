"""`python -m recformer.compare`: another way to type `recformer compare`."""

from __future__ import annotations

from recformer.cli import exit_with_message
from recformer.commands.compare import main

if __name__ == "__main__":
    exit_with_message(main)
