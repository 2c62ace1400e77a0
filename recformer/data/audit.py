"""`python -m recformer.data.audit`: another way to type `recformer audit`."""

from __future__ import annotations

from recformer.cli import exit_with_message
from recformer.commands.audit import main

if __name__ == "__main__":
    exit_with_message(main)
