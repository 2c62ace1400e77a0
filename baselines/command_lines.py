"""Command lines of trainings, checked before the first of them is run.

Modules are named, not imported: parsing loads what training needs, and nothing imports an entry
point.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any

# The module that parses and runs each command.
COMMANDS = {"baseline": "baselines.__main__", "finetune": "recformer.finetune"}


def checked(command: str, words: Sequence[str]) -> tuple[Any, Callable[..., Any]]:
    """Flags of a command line as their dataclass, and the function that runs them.

    Args:
        command: of `COMMANDS`.
        words: its flags with their values.

    Raises:
        UserError, FileNotFoundError: a flag that the command lacks, or a value that is not allowed.
    """
    module = import_module(COMMANDS[command])
    args = module.parse(words)
    args.check()
    return args, module.run
