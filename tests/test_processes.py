"""Which process is first, whoever started the processes, and what variables may not change."""

from __future__ import annotations

import logging
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from recformer import processes
from recformer.files import UserError
from recformer.processes import PARENT, PLACE, Group, join

JOB = {"SLURM_JOB_ID": "1", "SLURM_NNODES": "1", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    for name in list(os.environ):
        if name.startswith(("SLURM_", "TORCHELASTIC_", "PET_", "MASTER_", "RECFORMER_")):
            monkeypatch.delenv(name)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "GROUP_RANK", "NODE_RANK"):
        monkeypatch.delenv(name, raising=False)
    before = dict(os.environ)
    monkeypatch.setattr(processes, "_group", Group())
    yield
    os.environ.clear()
    os.environ.update(before)


def started(
    monkeypatch, num_processes: int, num_nodes: int | None = None, **variables: str
) -> tuple[str, Group]:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    return processes._started_by(num_processes, num_nodes)


def test_variables_that_were_left_behind_mean_nothing(monkeypatch):
    found = started(monkeypatch, 1, LOCAL_RANK="1", RANK="3", WORLD_SIZE="8", NODE_RANK="1")
    assert found == ("", Group())
    assert join(1) == Group()
    assert processes.is_first()
    # Of Lightning in the first process of a machine, and of DeepSpeed.
    left = {"MASTER_ADDR": "127.0.0.1", "NODE_RANK": "0", "LOCAL_RANK": "0", "RANK": "0"}
    assert started(monkeypatch, 2, **left) == ("", Group(0, 2))
    monkeypatch.setenv("NODE_RANK", "1")
    assert started(monkeypatch, 2, 1) == ("", Group(0, 2))  # --num_nodes 1: alone


def test_a_job_of_many_tasks_is_no_step_of_many(monkeypatch):
    # `sbatch --ntasks=4` and no `srun`: one process runs
    assert started(monkeypatch, 1, SLURM_NTASKS="4", **JOB) == ("", Group())
    assert started(monkeypatch, 2, SLURM_NTASKS_PER_NODE="1") == ("", Group(0, 2))
    assert join(2) == Group(0, 2)


def test_tasks_of_srun(monkeypatch):
    step = {"SLURM_STEP_NUM_TASKS": "2", "SLURM_NTASKS": "2", "SLURM_PROCID": "1"}
    assert started(monkeypatch, 2, **JOB | step) == ("srun", Group(1, 2, True, 0, 1, 1))
    said = "srun started 2 processes, and the flags ask for 1: start 1, or set --num_processes to 2"
    with pytest.raises(UserError, match=said):
        join(1)
    with pytest.raises(UserError, match=": start 1, or set --device to 2$"):
        join(1, advice="set --device to {}")


def test_processes_of_torchrun(monkeypatch):
    own = {"TORCHELASTIC_RUN_ID": "x", "RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}
    assert started(monkeypatch, 2, **own) == ("torchrun", Group(1, 2, True, 0, 1, 1))
    with pytest.raises(UserError, match="torchrun started 2 processes, and the flags ask for 4"):
        join(4)


def test_children_of_the_run_know_their_parent(monkeypatch):
    own = {PARENT: str(os.getppid()), "LOCAL_RANK": "1"}
    assert started(monkeypatch, 2, **own) == ("this run", Group(1, 2, local_rank=1))
    assert join(2) == Group(1, 2, local_rank=1)
    assert not processes.is_first()
    monkeypatch.setenv(PARENT, str(os.getpid()))  # inherited by a child of a child
    assert join(2) == Group(0, 2)


TWO_NODES = {"SLURM_STEP_NUM_NODES": "2", "SLURM_NODEID": "1", "SLURM_NNODES": "2"}


@pytest.mark.parametrize(
    ("each", "num_nodes", "variables", "found"),
    [
        # torchrun --nnodes 2 --nproc-per-node 2
        (
            2,
            None,
            {
                "TORCHELASTIC_RUN_ID": "x", "RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1",
                "LOCAL_WORLD_SIZE": "2", "GROUP_RANK": "1",
            },
            ("torchrun", Group(3, 4, True, 1, 2, 1)),
        ),
        # srun --nodes 2 --ntasks-per-node 2, tasks dealt out to the nodes in turns
        (
            2,
            2,
            TWO_NODES
            | {"SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "1", "SLURM_LOCALID": "0"},
            ("srun", Group(2, 4, True, 1, 2, 0)),
        ),
        # srun --nodes 2 --ntasks-per-node 1, which start the others of their node
        (
            2,
            None,
            TWO_NODES
            | {"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "1", "SLURM_LOCALID": "0"},
            ("", Group(2, 4, True, 1, 2, 0)),
        ),
        # a shell on each node, Kubernetes' indexed jobs, Kubeflow
        (1, 2, {"NODE_RANK": "1"}, ("", Group(1, 2, True, 1, 2, 0))),
        (3, 2, {"JOB_COMPLETION_INDEX": "1"}, ("", Group(3, 6, True, 1, 2, 0))),
        (1, 3, {"RANK": "2", "WORLD_SIZE": "3"}, ("", Group(2, 3, True, 2, 3, 0))),
        (2, 2, {"PET_NODE_RANK": "0", "RANK": "7"}, ("", Group(0, 4, True, 0, 2, 0))),
        # Kubeflow's PyTorchJob, now and before it spoke to torchrun
        (1, None, {"PET_NNODES": "2", "PET_NODE_RANK": "1"}, ("", Group(1, 2, True, 1, 2, 0))),
        (
            4,
            None,
            {
                "PET_NNODES": "2", "PET_NODE_RANK": "1", "PET_NPROC_PER_NODE": "4",
                "RANK": "1", "WORLD_SIZE": "8", "MASTER_ADDR": "job-master-0",
            },
            ("", Group(4, 8, True, 1, 2, 0)),
        ),
        (
            2,
            None,
            {"RANK": "1", "WORLD_SIZE": "3", "MASTER_ADDR": "job-master-0"},
            ("", Group(2, 6, True, 1, 3, 0)),
        ),
        # one of its pods alone, on purpose
        (1, 1, {"PET_NNODES": "2", "PET_NODE_RANK": "1"}, ("", Group())),
        # a command on each node of a job, without srun; a node of each of two jobs
        (1, 2, {"SLURM_NNODES": "2", "SLURM_NODEID": "1"}, ("", Group(1, 2, True, 1, 2, 0))),
        (
            1,
            2,
            {"SLURM_NNODES": "1", "SLURM_NODEID": "0", "NODE_RANK": "1"},
            ("", Group(1, 2, True, 1, 2, 0)),
        ),
    ],
)  # fmt: skip
def test_several_nodes(monkeypatch, each, num_nodes, variables, found):
    assert started(monkeypatch, each, num_nodes, **variables) == found


@pytest.mark.parametrize("num_nodes", [2, None])
def test_children_on_the_second_node(monkeypatch, num_nodes):
    """Also where srun or Kubeflow alone told their parent of it."""
    own = {PARENT: str(os.getppid()), PLACE: "1 2", "LOCAL_RANK": "1"}
    assert started(monkeypatch, 2, num_nodes, **own) == ("this run", Group(3, 4, True, 1, 2, 1))


@pytest.mark.parametrize(
    ("each", "num_nodes", "variables", "message"),
    [
        (1, 2, {}, "--num_nodes 2: nothing says which of them this is, set NODE_RANK"),
        (1, 2, {"NODE_RANK": "2"}, "got NODE_RANK=2, expected 0 to 1"),
        (1, 2, {"NODE_RANK": "0"}, "2 nodes: nothing says where the first of them is, set MASTER"),
        (2, None, JOB | {"SLURM_NNODES": "2"}, "SLURM gave this job 2 nodes, and the command runs"),
        (
            2,
            3,
            TWO_NODES | {"SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "1"},
            "--num_nodes 3: srun started the processes on 2",
        ),
        (
            4,
            2,
            TWO_NODES | {"SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "1"},
            "srun started 4 processes, and the flags ask for 4 on each of 2 nodes: start 8, or",
        ),
        (
            2,
            3,
            TWO_NODES | {"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "1"},
            "--num_nodes 3: srun started the processes on 2",
        ),
        # srun -n 4 -N 2 as 3 and 1
        *(
            (
                2,
                None,
                TWO_NODES | {"SLURM_STEP_NUM_TASKS": tasks, "SLURM_PROCID": "2"} | step,
                rf"srun started {tasks} tasks on 2 nodes, not .* each{said}: give it --ntasks-per",
            )
            for tasks, step, said in (
                ("4", {"SLURM_NODEID": "0", "SLURM_LOCALID": "2"}, ""),
                (
                    "4",
                    {"SLURM_LOCALID": "0", "SLURM_STEP_TASKS_PER_NODE": "3,1"},
                    r" \(3,1\)",
                ),
                ("3", {"SLURM_LOCALID": "0"}, ""),
            )
        ),
        # the same command on both, and each is told by its launcher to be alone
        (
            1,
            2,
            {"TORCHELASTIC_RUN_ID": "x", "WORLD_SIZE": "1", "RANK": "0", "GROUP_RANK": "0"},
            "--num_nodes 2: torchrun started the processes on 1; leave the flag out, or start",
        ),
        (
            1,
            2,
            JOB | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_STEP_NUM_NODES": "1", "SLURM_NODEID": "0"},
            "--num_nodes 2: SLURM_NODEID=0 counts 1 of them; start the command on 2 together",
        ),
        (
            1,
            3,
            {"PET_NNODES": "2", "PET_NODE_RANK": "1"},
            "--num_nodes 3: PET_NODE_RANK=1 counts 2 of them",
        ),
        (
            1,
            None,
            {"PET_NNODES": "1:4", "PET_NODE_RANK": "1"},
            "PET_NNODES=1:4 is no number of nodes: give --num_nodes, the same on each",
        ),
        (1, None, {"PET_NNODES": "2"}, "--num_nodes 2: nothing says which of them this is"),
        *(
            (
                1,
                None,
                {name: "1", "MASTER_ADDR": "n0"},
                f"{name}=1 and MASTER_ADDR=n0 say that this is one of several nodes, and nothing",
            )
            for name in ("NODE_RANK", "PET_NODE_RANK", "JOB_COMPLETION_INDEX")
        ),
    ],
)
def test_nodes_that_cannot_find_each_other_are_refused(
    monkeypatch, each, num_nodes, variables, message
):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=message):
        join(each, num_nodes=num_nodes)


def test_first_node_is_found(monkeypatch):
    def found(nodes: int, **variables: str) -> tuple[str, str]:
        for name in ("MASTER_ADDR", "MASTER_PORT", "PET_MASTER_ADDR", "SLURM_JOB_ID"):
            monkeypatch.delenv(name, raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        processes._find_first_node("", nodes)
        return os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]

    assert found(1) == ("127.0.0.1", "29500")
    assert found(2, PET_MASTER_ADDR="job-0", PET_MASTER_PORT="7") == ("job-0", "7")
    assert found(2, MASTER_ADDR="a", MASTER_PORT="8") == ("a", "8")
    slurm = {"SLURM_JOB_ID": "7", "SLURM_STEP_NUM_TASKS": "2"}
    assert found(2, SLURM_STEP_NODELIST="gpu[03-04]", **slurm) == ("gpu03", "15007")


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


NODE = """
import sys
from recformer.cli import exit_with_message
from recformer.processes import agreed, group, join, rank_and_world
def main():
    join(2, num_nodes=2)
    line = f"{rank_and_world()} {group().node} {agreed(f'of {group().rank}')}\\n"
    sys.stdout.write(line)  # at once, also unbuffered: processes share the pipe
    sys.stdout.flush()
    if group().rank == 3:
        sys.exit(9)
    import torch
    torch.distributed.barrier()
exit_with_message(main)
"""


def test_two_launchers_are_two_nodes_and_one_that_dies_ends_the_others(tmp_path, two_nodes):
    """Each starts the other process of its node; the last of the four ends at once."""
    script = tmp_path / "node.py"
    script.write_text(NODE)
    nodes = two_nodes(sys.executable, script)
    found = [node.communicate(timeout=240) for node in nodes]
    for node, (said, _) in enumerate(found):
        assert sorted(said.splitlines()) == [
            f"({2 * node + local}, 4) {node} of 0" for local in range(2)
        ]
    assert [node.returncode for node in nodes] == [1, 1]
    errors = "".join(error for _, error in found)
    for rank in range(3):
        assert f"error: process {rank} of 4 (node {rank // 2} of 2) lost the others" in errors
    assert "Traceback" not in errors


MEET = """
import sys
from recformer.cli import exit_with_message
from recformer.processes import join
exit_with_message(lambda: join(1, num_nodes=2))
"""


def test_a_port_that_is_taken_is_named(repository):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = str(server.getsockname()[1])
        variables = {"NODE_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        done = subprocess.run(
            [sys.executable, "-c", MEET],
            env=os.environ | variables,
            cwd=repository,
            capture_output=True,
            text=True,
            timeout=240,
        )
    assert done.returncode == 1
    (line,) = (line for line in done.stderr.splitlines() if line.startswith("error: "))
    said = f"error: process 0 of 2 (node 0 of 2) did not meet the others at 127.0.0.1:{port} ("
    assert line.startswith(said)
    assert line.endswith(f"port {port} is taken here, set MASTER_PORT to a free one, the same on "
                         "each node")  # fmt: skip
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("port", "met", "said"),
    [
        (
            "99999",
            None,
            r"at n0\.invalid:99999 \(port must have value from 0 to 65535 .*MASTER_PORT",
        ),
        (
            "7",
            RuntimeError("The client socket has timed out\nframe #0"),
            r"n0\.invalid:7 \(The .* out",
        ),
    ],
)
def test_processes_that_do_not_meet_say_where(monkeypatch, caplog, port, met, said):
    import torch.distributed

    def init(*_: object, **__: object) -> None:
        raise met

    if met is not None:
        monkeypatch.setattr(torch.distributed, "init_process_group", init)
    monkeypatch.setattr(logging.getLogger("recformer"), "propagate", True)
    variables = {"NODE_RANK": "1", "MASTER_ADDR": "n0.invalid", "MASTER_PORT": port}
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=rf"process 1 of 2 \(node 1 of 2\) did not meet .* {said}"):
        join(1, num_nodes=2)
    assert "MASTER_ADDR=n0.invalid has no address" in caplog.text


def test_the_port_of_one_machine(monkeypatch):
    """Lightning lets its processes meet: not elsewhere, and a port that is taken is named."""
    from recformer.training.trainer import RunEnvironment

    monkeypatch.setattr(processes, "_group", Group(0, 2))
    monkeypatch.setenv("MASTER_ADDR", "n0")
    assert RunEnvironment().main_address == "127.0.0.1"
    monkeypatch.setenv("MASTER_PORT", "7")
    taken = RuntimeError("The server socket has failed to listen, name: EADDRINUSE\nframe #0")
    assert "(The server socket has failed to listen, name: EADDRINUSE): port 7 is taken here" in (
        processes.message_of_lost(taken) or ""
    )
    monkeypatch.setattr(processes, "_group", Group(0, 2, True, 0, 2, 0))
    assert RunEnvironment().main_address == "n0"


def test_a_message_about_a_signal(monkeypatch):
    monkeypatch.setattr(processes, "_keeps", "")
    stop = processes.Stopped(15)
    assert (stop.status, processes.stopped_message(stop)) == (143, "stopped by SIGTERM")
