"""Command lines of trainings, checked before the first of them is run.

Modules are named, not imported: parsing loads what training needs, and nothing imports an entry
point.
"""

from __future__ import annotations

import io
import json
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stderr
from dataclasses import asdict
from functools import cache
from importlib import import_module
from typing import Any

from baselines.settings import SETTINGS
from recformer.files import UserError

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
    args = parsed(command, words)
    args.check()
    return args, import_module(COMMANDS[command]).run


def parsed(command: str, words: Sequence[str]) -> Any:
    """Flags of a command line as their dataclass, values as they are.

    Raises:
        UserError, FileNotFoundError: a flag that the command lacks, a file that is not there.
    """
    said = io.StringIO()
    try:
        with redirect_stderr(said):
            args = import_module(COMMANDS[command]).parse(words)
    except SystemExit:  # argparse's, after the usage of all flags, which would hide what is wrong
        wrong = said.getvalue().partition(" error: ")[2].strip()
        line = shlex.join(["recformer", command, *words])
        raise UserError(wrong or f"{line} is no training") from None
    sys.stderr.write(said.getvalue())
    return args


def defaults_of(settings: Mapping[str, Any]) -> dict[str, Any]:
    """What stands for flags that the `run.json` of an older version lacks, by name.

    Args:
        settings: what that file holds; it says which command and model or method it is of.

    Returns:
        Values as JSON has them; none of a command, model or method that is not known.
    """
    if "model" in settings:
        return _defaults("baseline", "model", str(settings["model"]))
    if "pretrain_ckpt" in settings:
        return _defaults("finetune", "method", str(settings.get("method", "published")))
    return {}


@cache
def _defaults(command: str, flag: str, value: str) -> dict[str, Any]:
    module = import_module(COMMANDS[command])
    if value not in (SETTINGS if flag == "model" else module.METHODS):
        return {}
    values = asdict(module.parse([f"--{flag}", value]))
    if flag == "model":
        values |= SETTINGS[value]().as_dict()
        values |= {name: x for name, x in module.SINCE.items() if values[name] is not None}
    return json.loads(json.dumps(values))
