"""`python -m recformer.data.sample`: another way to type `recformer sample`."""

from __future__ import annotations

from recformer.cli import exit_with_message
from recformer.commands.sample import main

if __name__ == "__main__":
    exit_with_message(main)
