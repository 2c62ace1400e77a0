"""Which process is first, whoever started the processes, and what variables may not change."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from recformer import processes
from recformer.files import UserError
from recformer.processes import PARENT, Group, join

JOB = {"SLURM_JOB_ID": "1", "SLURM_NNODES": "1", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    for name in list(os.environ):
        if name.startswith(("SLURM_", "TORCHELASTIC_", PARENT)):
            monkeypatch.delenv(name)
    monkeypatch.setattr(processes, "_group", Group())


def started(monkeypatch, num_processes: int, **variables: str) -> tuple[str, int, int]:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    return processes._started_by(num_processes)


def test_variables_that_were_left_behind_mean_nothing(monkeypatch):
    found = started(monkeypatch, 1, LOCAL_RANK="1", RANK="3", WORLD_SIZE="8", NODE_RANK="1")
    assert found == ("", 0, 1)
    assert join(1) == Group(0, 1, external=False)
    assert processes.is_first()


def test_a_job_of_many_tasks_is_no_step_of_many(monkeypatch):
    # `sbatch --ntasks=4` and no `srun`: one process runs
    assert started(monkeypatch, 1, SLURM_NTASKS="4", **JOB) == ("", 0, 1)
    assert started(monkeypatch, 2, SLURM_NTASKS_PER_NODE="1") == ("", 0, 2)
    assert join(2) == Group(0, 2, external=False)


def test_tasks_of_srun(monkeypatch):
    step = {"SLURM_STEP_NUM_TASKS": "2", "SLURM_NTASKS": "2", "SLURM_PROCID": "1"}
    assert started(monkeypatch, 2, **JOB | step) == ("srun", 1, 2)
    with pytest.raises(UserError, match="srun started 2 processes, and the flags ask for 1"):
        join(1)


def test_processes_of_torchrun(monkeypatch):
    own = {"TORCHELASTIC_RUN_ID": "x", "RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}
    assert started(monkeypatch, 2, **own) == ("torchrun", 1, 2)
    with pytest.raises(UserError, match="torchrun started 2 processes, and the flags ask for 4"):
        join(4)


def test_children_of_the_run_know_their_parent(monkeypatch):
    own = {PARENT: str(os.getppid()), "LOCAL_RANK": "1"}
    assert started(monkeypatch, 2, **own) == ("this run", 1, 2)
    assert join(2) == Group(1, 2, external=False)
    assert not processes.is_first()
    monkeypatch.setenv(PARENT, str(os.getpid()))  # inherited by a child of a child
    assert join(2) == Group(0, 2, external=False)


def test_two_nodes_are_refused(monkeypatch):
    started(monkeypatch, 2, **JOB | {"SLURM_NNODES": "2", "SLURM_NTASKS": "4"})
    with pytest.raises(UserError, match="a run uses one node, SLURM gave this job 2 nodes"):
        join(2)
    assert join(1) == Group()


@pytest.mark.parametrize(
    ("starter", "variables"),
    [
        ("srun", {"SLURM_STEP_NUM_TASKS": "4", "SLURM_STEP_NUM_NODES": "2", "SLURM_PROCID": "3"}),
        ("torchrun", {"TORCHELASTIC_RUN_ID": "x", "RANK": "1", "WORLD_SIZE": "4"}),
    ],
)
def test_processes_on_two_nodes_are_refused(monkeypatch, starter, variables):
    """They would wait for each other at an address that is each node's own."""
    started(monkeypatch, 4, **JOB | variables | {"LOCAL_WORLD_SIZE": "2"})
    with pytest.raises(UserError, match=f"a run uses one node, {starter} gave this job 2 nodes"):
        join(4)


TALK = """
import sys
from recformer.processes import agreed, is_first, join, rank_and_world
join(2)
print(rank_and_world(), is_first(), agreed(sys.argv[1]))
"""


def test_processes_that_others_start_agree():
    steps = {"SLURM_STEP_NUM_TASKS": "2", "SLURM_NTASKS": "2", "SLURM_JOB_ID": str(os.getpid())}
    tasks = [
        subprocess.Popen(
            [sys.executable, "-c", TALK, f"of {rank}"],
            env=os.environ | JOB | steps | {"SLURM_PROCID": str(rank)},
            cwd=Path(__file__).resolve().parent.parent,
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    outputs = [task.communicate(timeout=240)[0] for task in tasks]
    assert outputs == ["(0, 2) True of 0\n", "(1, 2) False of 0\n"]


def test_a_message_about_a_signal(monkeypatch):
    monkeypatch.setattr(processes, "_keeps", "")
    stop = processes.Stopped(15)
    assert (stop.status, processes.stopped_message(stop)) == (143, "stopped by SIGTERM")
