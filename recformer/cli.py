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
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from recformer.files import UserError
from recformer.processes import Stopped, is_first, stopped_by_signals, stopped_message

LEVELS = ("debug", "info", "warning", "error")

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


def command_parser(command: str, description: str | None) -> argparse.ArgumentParser:
    """The parser of `recformer COMMAND`.

    Args:
        command: its name in the table of `recformer.__main__`.
        description: docstring of the module; line breaks are kept.
    """
    parser = argparse.ArgumentParser(
        prog=f"recformer {command}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_message_flags(parser)
    return parser


def flags_parser(command: str, description: str | None, flags: type) -> Any:
    """The parser of a command whose flags are the fields of a dataclass."""
    from transformers import HfArgumentParser

    parser = HfArgumentParser(
        flags,
        prog=f"recformer {command}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_message_flags(parser)
    return parser


def parse_flags(
    command: str, description: str | None, flags: type[Flags], argv: Sequence[str] | None
) -> Flags:
    """Flags of a command as their dataclass."""
    (parsed,) = flags_parser(command, description, flags).parse_args_into_dataclasses(argv)
    return parsed


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
    except Stopped as stop:
        if is_first():
            print(stopped_message(stop), file=sys.stderr)
        raise SystemExit(stop.status) from None
