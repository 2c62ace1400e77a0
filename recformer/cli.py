"""From flags to a command, the same way for every command.

`command_parser` makes the parser, `parse_flags` fills a dataclass of flags, `exit_with_message`
runs the program: a user's error becomes one line on stderr and exit status 1.
"""

from __future__ import annotations

import argparse
import ctypes
import logging
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from difflib import get_close_matches
from typing import Any, TypeVar

from recformer.files import UserError
from recformer.processes import (
    Stopped,
    is_first,
    message_of_lost,
    stopped_by_signals,
    stopped_message,
)

LEVELS = ("debug", "info", "warning", "error")

MOST_SEED = 2**32 - 1  # that NumPy's older generator takes, which Lightning seeds too

# <malloc.h>
M_TRIM_THRESHOLD = -1
M_MMAP_MAX = -4

Flags = TypeVar("Flags")


class _Screen(logging.Handler):
    """Messages as plain lines: on stdout, from warnings on on stderr."""

    def emit(self, record: logging.LogRecord) -> None:
        warned = record.levelno >= logging.WARNING
        text = (
            f"{record.levelname.lower()}: {record.getMessage()}" if warned else record.getMessage()
        )
        print(text, file=sys.stderr if warned else sys.stdout, flush=True)


def show_messages(level: str = "info") -> None:
    """Show what the package logs, from `level` on; programs call it, a library never does."""
    logger = logging.getLogger("recformer")
    if not any(isinstance(handler, _Screen) for handler in logger.handlers):
        logger.addHandler(_Screen())
        logger.propagate = False
    logger.setLevel(level.upper())


class _SetLevel(argparse.Action):
    """Takes effect while flags are parsed, so that no program has to pass it on."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option: Any = None) -> None:
        show_messages(values if isinstance(values, str) else "warning")


def add_message_flags(parser: argparse.ArgumentParser) -> None:
    """`--quiet` and `--log_level`, which every command has."""
    group = parser.add_argument_group("messages")
    silent: dict[str, Any] = {"dest": argparse.SUPPRESS, "default": argparse.SUPPRESS}
    group.add_argument(
        "--quiet", action=_SetLevel, nargs=0, help="results, warnings and errors alone", **silent
    )
    group.add_argument(
        "--log_level", action=_SetLevel, choices=LEVELS, help="least level shown (info)", **silent
    )


class _Help(argparse.RawDescriptionHelpFormatter):
    """Each flag under one spelling and with its default; line breaks of the description are kept.

    transformers' parser takes `--data-path` beside `--data_path`, and `--no_whiten` with the help
    of `--whiten`.
    """

    def _get_default_metavar_for_optional(self, action: argparse.Action) -> str:
        kinds: dict[Any, str] = {int: "N", float: "X"}
        return kinds.get(action.type, action.dest.rpartition("_")[2].upper())

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if not action.option_strings:
            return super()._format_action_invocation(action)
        first = action.option_strings[0]
        other_spelling = first.replace("_", "-")
        names = [first, *(o for o in action.option_strings[1:] if o != other_spelling)]
        if action.nargs == 0 or isinstance(action.const, bool):  # `--fp16` means `--fp16 True`
            return ", ".join(names)
        values = self._format_args(action, self._get_default_metavar_for_optional(action))
        return f"{', '.join(names)} {values}"

    def _get_help_string(self, action: argparse.Action) -> str:
        text, default = action.help or "", action.default
        name = action.option_strings[0] if action.option_strings else ""
        if isinstance(action, argparse._StoreFalseAction) and name.startswith("--no_"):
            return f"switch --{name.removeprefix('--no_')} off"
        if default is True:
            return f"{text} (default: on)"
        none = default is None or default is False or default == argparse.SUPPRESS
        if none or default in ("", []) or "default:" in text:
            return text
        values = default if isinstance(default, list) else [default]
        shown = " ".join(map(str, values)).replace("%", "%%")
        return f"{text} (default: {shown})"


def command_parser(
    command: str, description: str | None, program: str | None = None
) -> argparse.ArgumentParser:
    """The parser of `recformer COMMAND`.

    Args:
        command: its name in the table of `recformer.__main__`.
        description: docstring of the module; line breaks are kept.
        program: name in the usage line, where it is not `recformer COMMAND`.
    """
    parser = argparse.ArgumentParser(
        prog=program or f"recformer {command}", description=description, formatter_class=_Help
    )
    add_message_flags(parser)
    return parser


def flags_parser(command: str, description: str | None, flags: type) -> Any:
    """The parser of a command whose flags are the fields of a dataclass."""
    from transformers import HfArgumentParser
    from transformers.hf_argparser import string_to_bool

    parser = HfArgumentParser(
        flags, prog=f"recformer {command}", description=description, formatter_class=_Help
    )
    for action in parser._actions:
        if action.type is string_to_bool and action.nargs is None:  # a field `bool | None`
            action.nargs, action.const = "?", True
    required = [
        f"{action.option_strings[0]} {action.dest.rpartition('_')[2].upper()}"
        for action in parser._actions
        if action.required
    ]
    parser.usage = " ".join([parser.prog, *required, "[flags]"])
    add_message_flags(parser)
    return parser


def parse_flags(
    command: str, description: str | None, flags: type[Flags], argv: Sequence[str] | None
) -> Flags:
    """Flags of a command as their dataclass.

    Raises:
        UserError: a word that belongs to no flag.
    """
    return fill(flags_parser(command, description, flags), argv)[0]


def fill(parser: Any, argv: Sequence[str] | None) -> tuple[Any, ...]:
    """Flags as the dataclasses of a `flags_parser`, and a namespace of those added to it.

    Raises:
        UserError: a word that belongs to no flag; names the flag that it is most like.
    """
    *parsed, unknown = parser.parse_args_into_dataclasses(argv, return_remaining_strings=True)
    if unknown:
        first = unknown[0].partition("=")[0]
        known = [name for action in parser._actions for name in action.option_strings]
        alike = get_close_matches(first, known, n=1) if first.startswith("-") else []
        advice = f"is it {alike[0]}? " if alike else ""
        raise UserError(f"{first} is no flag of {parser.prog}: {advice}--help lists them")
    return tuple(parsed)


def check_seed(seed: int) -> int:
    """A `--seed`, if every generator of random numbers takes it.

    Raises:
        UserError: it is negative or too large.
    """
    if not 0 <= seed <= MOST_SEED:
        raise UserError(f"--seed {seed}: must be from 0 to {MOST_SEED}")
    return seed


def flag_words(flags: Mapping[str, Any]) -> list[str]:
    """Flags as a command line has them; one that is True stands alone."""
    line: list[str] = []
    for name, value in flags.items():
        values = value if isinstance(value, list) else [] if value is True else [value]
        line += [f"--{name}", *map(str, values)]
    return line


def keep_freed_memory() -> bool:
    """Make malloc keep freed memory for the rest of this process.

    glibc takes every large block from the kernel and gives it back when it is freed. Each batch
    then pays for its memory anew, page by page, which on CPU can take longer than what is computed
    in it. With this setting a freed block serves the next batch; nothing is given back before the
    process ends. The peak of a training step was the same. Programs that train or encode call it
    before their work.

    Returns:
        False where there is no such setting (other libraries than glibc).
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    # No mapping for a single block, and the top of the heap is never given back.
    return mallopt is not None and all([mallopt(M_MMAP_MAX, 0), mallopt(M_TRIM_THRESHOLD, -1)])


def hide_bars_of_libraries() -> None:
    """No progress bars of transformers and the Hugging Face hub where nobody watches."""
    if sys.stderr.isatty():
        return
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # for what is imported later
    if "transformers" in sys.modules:
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()


def exit_with_message(main: Callable[[], Any]) -> None:
    """Run a program.

    A user's error becomes one line on stderr and exit status 1, SIGTERM one line and 143, SIGINT
    (Ctrl-C) one line and 130.
    """
    show_messages()
    hide_bars_of_libraries()
    try:
        with stopped_by_signals():
            main()
    except (UserError, OSError) as error:  # OSError: the system's own words name the file
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(1) from None
    except RuntimeError as error:
        lost = message_of_lost(error)
        if lost is None:
            raise
        print(f"error: {lost}", file=sys.stderr, flush=True)
        os._exit(1)  # threads of a process group that is broken may not let go
    except Stopped as stop:
        if is_first():
            print(stopped_message(stop), file=sys.stderr)
        raise SystemExit(stop.status) from None
