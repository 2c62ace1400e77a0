"""The command `recformer`: the table of its commands.

`recformer COMMAND --help` describes a command. Each is one file of `recformer/commands`, but for
`recformer/pretrain.py`, `recformer/finetune.py` and those of the baselines.
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
            "turn interactions and items into a processed folder",
        ),
        "process-pretraining": (
            "recformer.commands.process_pretraining",
            "turn sources of any form into the files to pretrain on",
        ),
        "audit": (
            "recformer.commands.audit",
            "list flaws of the data that can spoil an evaluation",
        ),
        "download": ("recformer.commands.download", "fetch a public data set"),
        "sample": (
            "recformer.commands.sample",
            "write a generated sample in the raw form of Amazon's files",
        ),
        "tokenizer": ("recformer.commands.tokenizer", "train a small tokenizer on a catalogue"),
    },
    "pretraining": {
        "pretrain": (
            "recformer.pretrain",
            "pretrain by item-item contrast and masked language modelling",
        ),
        "convert": ("recformer.commands.convert", "turn a training checkpoint into released files"),
        "start-weights": (
            "recformer.commands.start_weights",
            "turn a language model into the start weights of pretraining",
        ),
        "inspect": ("recformer.commands.inspect", "describe a checkpoint"),
    },
    "training and evaluation on a catalogue": {
        "finetune": ("recformer.finetune", "finetune on a processed folder and evaluate"),
        "baseline": ("baselines.__main__", "train and evaluate a baseline"),
        "sweep": ("baselines.sweep", "search settings of a model by validation"),
        "semantic-ids": ("baselines.semantic_ids.__main__", "make codes of items from their texts"),
    },
    "comparing": {
        "compare": ("recformer.commands.compare", "test two or more runs against each other"),
        "leaderboard": ("baselines.leaderboard", "put all runs of a folder into one table"),
        "reproduce": ("baselines.reproduce", "make the numbers of a published table again"),
    },
    "using": {
        "recommend": (
            "recformer.commands.recommend",
            "recommend items for the histories in a file, or for all users",
        ),
        "index": (
            "recformer.commands.index",
            "build an approximate index of a large catalogue, its recall measured",
        ),
        "serve": (
            "recformer.commands.serve",
            "answer requests for recommendations over HTTP, with a page to try them",
        ),
        "encode": ("recformer.commands.encode", "write the vectors of a whole catalogue"),
        "benchmark": (
            "recformer.commands.benchmark",
            "measure speed and memory against named peers",
        ),
        "export": (
            "recformer.commands.export",
            "write item vectors for other search engines, the encoder as ONNX",
        ),
        "env": ("recformer.commands.env", "print versions, device and threads, for a report"),
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
    """Run the installed command `recformer`."""
    exit_with_message(main)


if __name__ == "__main__":
    run()
