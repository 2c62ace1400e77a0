"""`python -m recformer.recommend`: another way to type `recformer recommend`."""

from __future__ import annotations

from recformer.cli import exit_with_message
from recformer.commands.recommend import main

if __name__ == "__main__":
    exit_with_message(main)
