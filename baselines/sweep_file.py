"""Files of sweeps: a command, its fixed flags, and what is searched; `recformer sweep --help`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from baselines.command_lines import COMMANDS
from recformer.cli import flag_words
from recformer.files import UserError, read_yaml

# Of a file, and of a range in it.
KEYS, ENDS = ("command", "flags", "search"), ("low", "high", "log")


@dataclass(frozen=True)
class Sweep:
    """A file of this form, checked.

    Attributes:
        command: `baseline` or `finetune`.
        flags: the same in every trial.
        search: flag -> `{low, high[, log]}`, or a list of values.
    """

    command: str
    flags: dict[str, Any]
    search: dict[str, Any]

    @classmethod
    def load(cls, path: str) -> Sweep:
        """Read a file.

        Raises:
            FileNotFoundError: no such file.
            UserError: it is not of this form, or has a key that means nothing.
        """
        content = read_yaml(path)
        if isinstance(content, dict):
            _refuse_unknown(path, content, KEYS)
        try:
            this = cls(content["command"], content.get("flags", {}), content["search"])
            flags, search = dict(this.flags), dict(this.search)
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise UserError(f"{path}: expected command, flags and search ({error})") from error
        if this.command not in COMMANDS:
            raise UserError(f"{path}: command {this.command!r}, expected {' or '.join(COMMANDS)}")
        for name in ("output_dir", "seeds", "overwrite_output_dir"):
            if name in flags or name in search:
                raise UserError(f"{path}: {name} is the sweep's own")
        twice = sorted(set(flags) & set(search))
        if twice or not search:
            raise UserError(f"{path}: {twice or 'nothing'} is fixed and searched")
        for name, space in search.items():
            _check_space(path, name, space)
        for name, value in flags.items():
            if not all(_plain(each) for each in (value if isinstance(value, list) else [value])):
                raise UserError(f"{path}: {name} is {value!r}, expected a value, or a list of them")
        return this

    def borders(self) -> list[dict[str, Any]]:
        """Settings that between them have every value of a list, and both ends of every range."""
        ends = {
            name: space if isinstance(space, list) else [space["low"], space["high"]]
            for name, space in self.search.items()
        }
        first = {name: values[0] for name, values in ends.items()}
        others = ({name: value} for name, values in ends.items() for value in values[1:])
        return [first, *(first | other for other in others)]

    def grid(self) -> list[Sequence[Any]] | None:
        """The values of each setting; None where one is a range of fractions."""
        ends = [space for space in self.search.values() if not isinstance(space, list)]
        if not all(type(space[end]) is int for space in ends for end in ("low", "high")):
            return None
        return [
            list(dict.fromkeys(space))
            if isinstance(space, list)
            else range(space["low"], space["high"] + 1)
            for space in self.search.values()
        ]

    def words(self, settings: dict[str, Any], output_dir: Path) -> list[str]:
        """Flags of a trial as a command line has them."""
        return flag_words(self.flags | settings | {"output_dir": str(output_dir)})


def _refuse_unknown(where: str, content: Mapping[Any, Any], known: tuple[str, str, str]) -> None:
    if unknown := ", ".join(str(key) for key in content if key not in known):
        said = "{}, {} and {}".format(*known)
        raise UserError(f"{where}: {unknown} means nothing there, expected {said}")


def _check_space(path: str, name: str, space: Any) -> None:
    if isinstance(space, list) and space and all(_plain(value) for value in space):
        return
    if isinstance(space, dict):
        _refuse_unknown(f"{path}, search of {name}", space, ENDS)
    numbers = isinstance(space, dict) and all(_is_number(space.get(n)) for n in ("low", "high"))
    if not numbers or space["low"] >= space["high"] or type(space.get("log", False)) is not bool:
        raise UserError(
            f"{path}: search of {name} is {space}, expected a list of values, or low below high"
        )
    if space.get("log") and space["low"] <= 0:
        raise UserError(f"{path}: search of {name}: low must be above 0 with log")


def _plain(value: Any) -> bool:
    return isinstance(value, str | int | float | bool)


def _is_number(value: Any) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and math.isfinite(value)
