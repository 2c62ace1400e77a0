"""`python -m recformer.tokenization`: another way to type `recformer tokenizer`."""

from __future__ import annotations

from recformer.cli import exit_with_message
from recformer.commands.tokenizer import main

if __name__ == "__main__":
    exit_with_message(main)
