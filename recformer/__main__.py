"""The command `recformer`: the table of what can be typed.

`recformer COMMAND --help` says what a command does; each is one file of `recformer/commands`, but
for the two trainings, `recformer/pretrain.py` and `recformer/finetune.py`, and what the baselines
bring.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module

import recformer
from recformer.cli import exit_with_message

# Grouped as a person works: name -> (module whose `main` takes the flags, what it does).
COMMANDS: dict[str, dict[str, tuple[str, str]]] = {
    "data": {
        "process": (
            "recformer.commands.process",
            "interactions and items become a processed folder",
        ),
        "process-pretraining": (
            "recformer.commands.process_pretraining",
            "sources of any form become the files to pretrain on",
        ),
        "audit": ("recformer.commands.audit", "what in the data can spoil an evaluation"),
        "download": ("recformer.commands.download", "fetch a public data set"),
        "sample": ("recformer.commands.sample", "write the generated sample in the raw form"),
        "tokenizer": ("recformer.commands.tokenizer", "train a small tokenizer on a catalogue"),
    },
    "pretraining": {
        "pretrain": ("recformer.pretrain", "item-item contrast and masked language modelling"),
        "convert": ("recformer.commands.convert", "a training checkpoint becomes released files"),
        "start-weights": (
            "recformer.commands.start_weights",
            "a language model becomes the start of pretraining",
        ),
        "inspect": ("recformer.commands.inspect", "say what a checkpoint is"),
    },
    "training on a catalogue": {
        "finetune": ("recformer.finetune", "two-stage finetuning and evaluation"),
        "baseline": ("baselines.__main__", "train and evaluate a baseline"),
        "semantic-ids": ("baselines.semantic_ids.__main__", "codes of items from their texts"),
    },
    "judging": {
        "compare": ("recformer.commands.compare", "paired tests of two or more runs"),
        "leaderboard": ("baselines.leaderboard", "all runs of a folder in one table"),
        "reproduce": ("baselines.reproduce", "make the numbers of a published table again"),
    },
    "using": {
        "recommend": ("recformer.commands.recommend", "items for the histories in a file"),
        "serve": ("recformer.commands.serve", "recommendations over HTTP, and a page to try them"),
        "encode": ("recformer.commands.encode", "vectors of a whole catalogue"),
        "benchmark": ("recformer.commands.benchmark", "speed and memory against named peers"),
    },
}


def overview() -> str:
    """The table as text."""
    lines = ["usage: recformer COMMAND [flags]", ""]
    for group, commands in COMMANDS.items():
        lines.append(f"{group}:")
        lines += [f"  {name:<20} {text}" for name, (_, text) in commands.items()]
        lines.append("")
    lines.append("`recformer COMMAND --help` lists the flags of a command, --version the version.")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    """Find the command and hand the rest of the line to it.

    Raises:
        SystemExit: status 2 for an unknown command, 0 behind help and version.
    """
    line = list(sys.argv[1:] if argv is None else argv)
    if not line or line[0] in ("-h", "--help"):
        print(overview())
        raise SystemExit(0 if line else 2)
    if line[0] == "--version":
        print(f"recformer {recformer.__version__}")
        return
    known = {name: module for group in COMMANDS.values() for name, (module, _) in group.items()}
    if line[0] not in known:
        print(
            f"error: recformer has no command {line[0]!r}; `recformer --help` lists them",
            file=sys.stderr,
        )
        raise SystemExit(2)
    import_module(known[line[0]]).main(line[1:])


def run() -> None:
    """What the installed command `recformer` calls."""
    exit_with_message(main)


if __name__ == "__main__":
    run()
