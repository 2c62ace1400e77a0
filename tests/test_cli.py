"""Help of commands, their bars, and freed memory that stays with the process."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from recformer import cli
from recformer.__main__ import main
from recformer.files import UserError
from recformer.training.arguments import flag

SCRIPT = """
import resource
import numpy as np
from recformer.cli import keep_freed_memory

def page_faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    np.empty(8 << 20).fill(1)  # 64 MB, in small pages: see the environment
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

left = [page_faults() for _ in range(3)][-1]
set_up = keep_freed_memory()
kept = [page_faults() for _ in range(3)][-1]
print(left if set_up else 0, kept)
"""


@dataclass
class SomeFlags:
    """Flags of every kind."""

    data_path: str = flag("data/Shop", "processed folder")
    max_token_num: int | None = flag(None, "most tokens")
    share: float = flag(0.5, "of 100 %% of them")
    ties: str = flag("expected", "rank of ties", choices=["expected", "optimistic"])
    metric_ks: list[int] = flag([10, 50], "cut-offs")
    fp16: bool = flag(False, "16 bits")
    cosine: bool | None = flag(None, "scores are cosines")
    whiten: bool = flag(True, "decorrelate")


def test_help_names_each_flag_once_and_its_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    parser = cli.flags_parser("try", "What it does.", SomeFlags)
    usage, _, text = parser.format_help().partition("options:\n")
    assert usage == "usage: recformer try [flags]\n\nWhat it does.\n\n"
    lines = text.partition("\nmessages:")[0].splitlines()
    assert [" ".join(line.split()) for line in lines] == [
        "-h, --help show this help message and exit",
        "--data_path PATH processed folder (default: data/Shop)",
        "--max_token_num N most tokens",
        "--share X of 100 % of them (default: 0.5)",
        "--ties {expected,optimistic}",
        "rank of ties (default: expected)",
        "--metric_ks N [N ...]",
        "cut-offs (default: 10 50)",
        "--fp16 16 bits",
        "--cosine scores are cosines",
        "--whiten decorrelate (default: on)",
        "--no_whiten switch --whiten off",
    ]


@pytest.mark.parametrize(
    ("line", "cosine"), [([], None), (["--cosine"], True), (["--cosine", "false"], False)]
)
def test_a_switch_that_may_be_unset_needs_no_value(line: list[str], cosine: bool | None) -> None:
    args = cli.parse_flags("try", None, SomeFlags, [*line, "--no_whiten", "--data-path", "x"])
    assert (args.cosine, args.whiten, args.data_path) == (cosine, False, "x")


@pytest.mark.parametrize(
    ("command", "word", "advice"),
    [
        ("finetune", "--learing_rate", "is it --learning_rate"),
        ("baseline", "--hiden_size", "is it --hidden_size"),
        ("pretrain", "--dev_fle=x", "is it --dev_file"),
        ("encode", "stray", "--help lists them"),
        ("semantic-ids", "--qqq", "--help lists them"),
    ],
)
def test_a_word_that_is_no_flag_is_one_line(command: str, word: str, advice: str) -> None:
    line = ["--model", "x"] if command == "encode" else []
    first = word.partition("=")[0]
    with pytest.raises(UserError, match=f"^{first} is no flag of recformer {command}: {advice}"):
        main([command, *line, word, "5"])


def test_freed_blocks_are_used_again_without_page_faults() -> None:
    printed = subprocess.check_output(
        [sys.executable, "-c", SCRIPT],
        text=True,
        env={**os.environ, "NUMPY_MADVISE_HUGEPAGE": "0"},
    )
    left, kept = map(int, printed.split())
    if left == 0:
        pytest.skip("another C library, or a sandbox that counts no page faults")
    assert 4 * kept < left


def test_another_c_library_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli.ctypes, "CDLL", lambda name: object())
    assert not cli.keep_freed_memory()
    monkeypatch.setattr(sys, "platform", "darwin")
    assert not cli.keep_freed_memory()


@pytest.mark.parametrize("way", ["save(); load()", "exit_with_message(save)"])
def test_no_bar_of_a_library_fills_a_log_file(tmp_path: Path, way: str) -> None:
    """transformers draws one for every folder it reads or writes, terminal or not."""
    code = (
        "from recformer.cli import exit_with_message\n"
        "from tests.tiny import tiny_config\n"
        "from recformer import RecformerModel\n"
        f"save = lambda: RecformerModel(tiny_config()).save_pretrained({str(tmp_path)!r})\n"
        "from recformer import RecformerForPretraining, RecformerForSeqRec\n"
        "def load():\n"
        f"    RecformerForPretraining(tiny_config()).save_pretrained({str(tmp_path)!r})\n"
        f"    RecformerModel.from_pretrained({str(tmp_path)!r})\n"  # a head is left over
        f"    RecformerForSeqRec.from_pretrained({str(tmp_path)!r})\n"
        f"{way}"
    )
    root = Path(__file__).resolve().parents[1]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], cwd=root, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert (tmp_path / "model.safetensors").exists()


def test_flags_as_words():
    flags = {"model": "sasrec", "fp16": True, "metric_ks": [5, 10], "cosine": "true"}
    assert cli.flag_words(flags) == [
        "--model", "sasrec", "--fp16", "--metric_ks", "5", "10", "--cosine", "true"
    ]  # fmt: skip
