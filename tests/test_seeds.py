"""`--seeds`: a run each, what they have in common, and what happens when one fails."""

from __future__ import annotations

import csv
import os
import subprocess
import sys

import pytest

from baselines.__main__ import main as baseline
from recformer import processes
from recformer.data.processed import Sequences, write_processed
from recformer.files import UserError, read_json
from recformer.processes import Group
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

    def in_this_process(line, environment):
        lines.append(line[4:])
        if "--seed" in line and line[line.index("--seed") + 1] == "9":
            return 1
        baseline(line[4:])
        return 0

    monkeypatch.setattr(seeds, "run_command", in_this_process)
    flags = ["--model", "sasrec", "--data_path", str(folder), "--num_train_epochs", "1"]
    flags += ["--hidden_size", "8", "--num_heads", "1", "--device", "-1", "--test_users", "2"]
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
    mean, deviation = sum(values) / 2, abs(values[0] - values[1]) / 2**0.5
    table = (output / "seeds.md").read_text()
    assert table in capsys.readouterr().out
    assert table.startswith("|2 of 3 test users|mean|deviation|seed 1|seed 2|\n")
    assert f"|MRR|{mean:.4f}|{deviation:.4f}|{values[0]:.4f}|{values[1]:.4f}|\n" in table
    assert summary["judged"] == "2 of 3 test users"
    (line,) = [line for line in (output / "seeds.tex").read_text().splitlines() if "MRR &" in line]
    assert line == f"MRR & {mean:.4f} & {deviation:.4f} & {values[0]:.4f} & {values[1]:.4f} \\\\"
    with (output / "seeds.csv").open() as handle:
        (row,) = [row for row in csv.DictReader(handle) if row["metric"] == "MRR"]
    assert [float(row[n]) for n in ("mean", "seed 1", "seed 2")] == pytest.approx([mean, *values])
    # One fails: the others are run, and the command fails.
    lines.clear()
    with pytest.raises(UserError, match="seeds 9 failed"):
        baseline([*flags, "--output_dir", str(output), "--seeds", "9", "2"])
    assert [line[-3] for line in lines] == ["9", "2"]
    assert not list(output.glob("seeds.*"))  # what is there is of other runs


RUN_OF_SEEDS = """
import sys
from recformer.training import seeds
inner = '''
import os
from recformer.processes import agreed, join, rank_and_world
join(2)
os.write(1, f"run {rank_and_world()} {agreed(os.environ['RANK'])}\\\\n".encode())
'''
def run_command(line, environment):
    return started([sys.executable, "-c", inner], environment)
started, seeds.run_command = seeds.run_command, run_command
folders = seeds.run_seeds("finetune", ["--seeds", "1", "2"], sys.argv[1], None)
if seeds.is_first():
    seeds.write_summary([1, 2], [{"MRR": 0.25}, {"MRR": 0.75}], sys.argv[1], "test")
"""


@pytest.mark.slow
def test_seeds_under_torchrun(tmp_path, repository):
    """Every run finds its own processes, not those of the run before; one process writes."""
    script = tmp_path / "seeds.py"
    script.write_text(RUN_OF_SEEDS)
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        + [str(script), str(tmp_path)],
        env=os.environ | {"PYTHONPATH": str(repository), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    runs = [line for line in lines if line.startswith("run")]
    assert sorted(runs) == ["run (0, 2) 0", "run (0, 2) 0", "run (1, 2) 0", "run (1, 2) 0"]
    assert sum(line.startswith("|MRR|0.5000|") for line in lines) == 1
    assert sum("seeds.json" in line for line in lines) == 1
    assert read_json(tmp_path / "seeds.json")["MRR"]["mean"] == 0.5


def test_the_first_of_several_nodes_looks_at_the_seeds(tmp_path, monkeypatch):
    """Each run has a port of its own: that of the one before may still be held."""
    for name in list(os.environ):
        if name.startswith(("SLURM_", "TORCHELASTIC_", "PET_")):
            monkeypatch.delenv(name)
    monkeypatch.setattr(processes, "_group", Group())
    for name, value in {"MASTER_ADDR": "n0", "MASTER_PORT": "7000"}.items():
        monkeypatch.setenv(name, value)
    ports = []

    def run_command(line, environment):
        ports.append(environment["MASTER_PORT"])
        return 0

    monkeypatch.setattr(seeds, "run_command", run_command)
    (tmp_path / "seeds.json").write_text("{}")
    for node, first in (("1", False), ("0", True)):
        monkeypatch.setenv("NODE_RANK", node)
        folders = seeds.run_seeds("finetune", ["--seeds", "5", "6"], str(tmp_path), 2)
        assert folders == [tmp_path / "seed_5", tmp_path / "seed_6"]
        assert processes.is_first() is first
        assert (tmp_path / "seeds.json").exists() is not first
    assert ports == ["7000", "7001"] * 2
    # torchrun's own process lets the first run meet alone.
    own = {"TORCHELASTIC_RUN_ID": "x", "RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}
    for name, value in (own | {"TORCHELASTIC_USE_AGENT_STORE": "True"}).items():
        monkeypatch.setenv(name, value)
    found = processes.environments_of_runs(2, None)
    names = ("MASTER_PORT", "TORCHELASTIC_USE_AGENT_STORE")
    assert [tuple(map(each.get, names)) for each in found] == [("7000", "True"), ("7001", "False")]
    assert not processes.is_first()


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
