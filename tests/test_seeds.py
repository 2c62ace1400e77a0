"""`--seeds`: a run each, what they have in common, and what happens when one fails."""

from __future__ import annotations

import subprocess
import sys

import pytest

from baselines.__main__ import main as baseline
from recformer.data.processed import Sequences, write_processed
from recformer.files import UserError, read_json
from recformer.training import seeds
from recformer.training.seeds import split_flags


def test_flags_are_split():
    line = ["--model", "sasrec", "--seeds", "3", "1", "--output_dir", "out", "--fp16"]
    assert split_flags(line) == ([3, 1], ["--model", "sasrec", "--fp16"])
    for wrong, said in (
        (["--seeds"], "give its numbers"), (["--seeds", "1", "1"], "stands there twice"),
        (["--seeds", "1", "--seed=2"], "exclude each other"), (["--fp16"], "on the command line"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=said):
            split_flags(wrong)


def test_each_seed_is_a_run_of_its_own(tmp_path, monkeypatch, capsys):
    folder = tmp_path / "folder"
    train, val, test = [[0, 1], [0, 2], [1, 0, 2]], [[2], [1], [3]], [[1], [3], [0]]
    write_processed(
        folder,
        train=Sequences.from_lists(train),
        val=Sequences.from_lists(val),
        test=Sequences.from_lists(test),
        user_names=["a", "b", "c"],
        asins=["A", "B", "C", "D"],
        meta={},
        dataset={},
    )
    lines = []

    def in_this_process(line):
        lines.append(line[4:])
        if "--seed" in line and line[line.index("--seed") + 1] == "9":
            return 1
        baseline(line[4:])
        return 0

    monkeypatch.setattr(seeds, "run_command", in_this_process)
    flags = ["--model", "sasrec", "--data_path", str(folder), "--num_train_epochs", "1"]
    flags += ["--hidden_size", "8", "--num_heads", "1", "--device", "-1"]
    output = tmp_path / "out"
    baseline([*flags, "--output_dir", str(output), "--seeds", "1", "2"])
    assert lines == [
        [*flags, "--seed", "1", "--output_dir", str(output / "seed_1")],
        [*flags, "--seed", "2", "--output_dir", str(output / "seed_2")],
    ]
    summary = read_json(output / "seeds.json")
    values = [read_json(output / f"seed_{s}" / "metrics.json")["test"]["MRR"] for s in (1, 2)]
    assert summary["seeds"] == [1, 2]
    assert summary["MRR"]["values"] == values
    assert summary["MRR"]["mean"] == pytest.approx(sum(values) / 2)
    assert f"|MRR|{sum(values) / 2:.4f}|" in capsys.readouterr().out
    # One fails: the others are run, and the command fails.
    lines.clear()
    with pytest.raises(UserError, match="seeds 9 failed"):
        baseline([*flags, "--output_dir", str(output), "--seeds", "9", "2"])
    assert [line[-3] for line in lines] == ["9", "2"]
    assert not (output / "seeds.json").exists()  # what is there is of other runs


def test_a_stopped_run_stops_its_command():
    # SIGTERM reaches the inner command, which may save: here it says so and takes its time.
    inner = (
        "import signal, sys, time\n"
        "def stop(*_): time.sleep(0.2); print('saved', flush=True); sys.exit(143)\n"
        "signal.signal(signal.SIGTERM, stop); print('runs', flush=True); time.sleep(60)"
    )
    outer = (
        "import signal, sys\nfrom recformer.training.seeds import run_command\n"
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))\n"
        f"run_command([sys.executable, '-c', {inner!r}])"
    )
    with subprocess.Popen([sys.executable, "-c", outer], stdout=subprocess.PIPE, text=True) as run:
        assert run.stdout is not None
        assert run.stdout.readline() == "runs\n"
        run.terminate()
        assert run.stdout.read() == "saved\n"
    assert run.returncode == 143
