"""Published protocols as small files: how interactions are filtered, split and judged.

A file of `protocols/` has the parts `data` (flags of finetune_data/process.py) and `evaluation`
(flags of every entry point that evaluates), each a mapping of flags to values, and says in comments
where they come from. `--protocol NAME_OR_FILE` puts the flags of its part before those on the
command line, so a flag that is given wins; what was changed is recorded beside the protocol's name.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from recformer.files import UserError, read_yaml, sha256_of, yaml_file

FOLDER = Path(__file__).resolve().parents[1] / "protocols"

Part = Literal["data", "evaluation"]
# What a protocol may set. Paths, columns and the texts of items are the data set's, not its own.
FLAGS: dict[Part, tuple[str, ...]] = {
    "data": (
        "split", "test_quantile", "val_quantile", "cold_items", "val_users", "val_seed",
        "val_draw", "min_interactions", "min_rating", "deduplicate", "drop_consecutive_repeats",
        "k_core", "max_users", "user_sample_rate", "seed", "window", "targets",
        "min_window_sequences", "session_gap", "previous_sessions", "events",
    ),
    "evaluation": (
        "metric_ks", "ties", "filter_seen", "eval_users", "test_users", "sampled_negatives",
    ),
}  # fmt: skip
HELP = (
    "published protocol whose flags are the defaults: the name of a file in protocols/ or the path "
    "of one"
)


@dataclass(frozen=True)
class Protocol:
    """A protocol file.

    Attributes:
        name: of the file, without its ending.
        hash: SHA-256 of what it prescribes; comments and order do not count.
        parts: flags and their values by part.
    """

    name: str
    hash: str
    parts: dict[Part, dict[str, Any]]

    @classmethod
    def load(cls, name_or_file: str) -> Protocol:
        """Read a file, or the file of that name in `protocols/`.

        Raises:
            FileNotFoundError: there is no such file; names those that there are.
            UserError: the file is no YAML of this form, or sets what a protocol may not set.
        """
        path = yaml_file(name_or_file, FOLDER, "protocol", "--protocol")
        content = _mapping(read_yaml(path), str(path), tuple(FLAGS))
        parts: dict[Part, dict[str, Any]] = {}
        for part, flags in FLAGS.items():
            parts[part] = _mapping(content.get(part, {}), f"{path}, {part}", flags)
            for flag, value in parts[part].items():
                values = value if isinstance(value, list) and value else [value]
                if not all(isinstance(x, str | int | float | bool) for x in values):
                    raise UserError(f"{path}, {part}: {flag} is {value!r}, expected a value")
        return cls(path.stem, sha256_of(json.dumps(parts, sort_keys=True)), parts)

    def record(self, part: Part, values: Mapping[str, Any]) -> dict[str, Any]:
        """`name`, `hash` and, under `changed`, what is not as the protocol prescribes.

        Args:
            part: of the protocol.
            values: the flags as they are used.
        """
        prescribed = self.parts[part]
        changed = {flag: values[flag] for flag in prescribed if values[flag] != prescribed[flag]}
        return {"name": self.name, "hash": self.hash, "changed": changed}

    def check_folder(self, path: Path, dataset: Mapping[str, Any] | None) -> None:
        """Refuse a folder that was processed under another protocol.

        Args:
            path: the processed folder, for the message.
            dataset: its dataset.json; folders without one, or processed without a protocol, pass.

        Raises:
            UserError: names both.
        """
        theirs = (dataset or {}).get("protocol")
        if theirs is not None and theirs["hash"] != self.hash:
            raise UserError(
                f"{path} was processed under protocol {theirs['name']} ({theirs['hash'][:12]}), "
                f"not under {self.name} ({self.hash[:12]}): process the data with --protocol "
                f"{self.name}, or evaluate with the one it was processed under"
            )


def with_protocol(argv: Sequence[str] | None, part: Part) -> list[str]:
    """The command line with the flags of its `--protocol`, if it names one, before all others.

    Args:
        argv: None: that of the process.
        part: whose flags.

    Raises:
        FileNotFoundError, UserError: as `Protocol.load`.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    finder = argparse.ArgumentParser(add_help=False)
    finder.add_argument("--protocol")
    name = finder.parse_known_args(argv)[0].protocol
    if name is None:
        return argv
    flags: list[str] = []
    for flag, value in Protocol.load(name).parts[part].items():
        if value is False:  # no flag is on by itself
            continue
        values = value if isinstance(value, list) else [value]
        flags += [f"--{flag}", *(str(x) for x in values if x is not True)]
    return flags + argv


def _mapping(value: Any, where: str, allowed: tuple[str, ...]) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise UserError(f"{where}: expected a mapping of {', '.join(allowed)}, got {value!r}")
    unknown = [str(key) for key in value if key not in allowed]
    if unknown:
        raise UserError(f"{where}: {unknown[0]} is not known, expected {', '.join(allowed)}")
    return value
