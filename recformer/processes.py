"""Place of this process among those of a run, the one that prints, and signals that end a run.

A run's processes are on one machine, or on several that see the same files. They are started by the
run itself (`--num_processes 2`), by `torchrun`, or by `srun`; on several nodes also by whatever
starts the command once on each of them: a shell, Kubernetes. `join` finds out which, once, before
anything is written.
"""

from __future__ import annotations

import atexit
import logging
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

from recformer.files import UserError

_LOGGER = logging.getLogger("recformer")

# What the first process of a node tells those that it starts: its id, so that nobody else's
# children, which inherit variables too, take themselves for them; and its node, of how many.
PARENT = "RECFORMER_FIRST_PROCESS"
PLACE = "RECFORMER_NODE"

# Seconds that the others of a node have to end when the first one has.
_PATIENCE = 30

# What gloo, NCCL and torch's store say when a process that they talk to is gone.
_GONE = re.compile(
    r"closed by peer|connection reset|broken pipe|connection refused|connection was closed"
    r"|failed to recv|nccl|timed out|timeout",
    re.IGNORECASE,
)

# And where one cannot wait for the others.
_TAKEN = re.compile(r"EADDRINUSE|address already in use", re.IGNORECASE)

Value = TypeVar("Value")


@dataclass(frozen=True)
class Group:
    """The processes of a run.

    Attributes:
        rank, world: which of how many this is.
        external: others started them, so that the run must start none.
        node, nodes: on which of how many machines.
        local_rank: which of those of its machine.
    """

    rank: int = 0
    world: int = 1
    external: bool = False
    node: int = 0
    nodes: int = 1
    local_rank: int = 0


_group = Group()


def join(
    num_processes: int,
    cuda: bool = False,
    num_nodes: int | None = None,
    advice: str = "set --num_processes to {}",
) -> Group:
    """Find this process's place among the processes of a run.

    Where others started them, or they are on several nodes, they know of each other from here on.

    Args:
        num_processes: that the run is told to have on each node.
        cuda: they compute on GPUs.
        num_nodes: that the run is told to have; None: as many as the launcher says (`srun`,
            `torchrun`, Kubeflow), else 1.
        advice: how to ask for `{}` processes on each node.

    Raises:
        UserError: the launcher started another number of processes or nodes, or nothing says which
            of several nodes this is, or how many there are; or they do not find each other.
    """
    global _group
    starter, found = _started_by(num_processes, num_nodes)
    if num_nodes is not None and found.nodes != num_nodes:
        raise UserError(
            f"--num_nodes {num_nodes}: {starter or 'srun'} started the processes on {found.nodes}; "
            f"leave the flag out, or start them on {num_nodes}"
        )
    if found.world != num_processes * found.nodes and (starter or found.world > 1):
        each = f" on each of {found.nodes} nodes" if found.nodes > 1 else ""
        raise UserError(
            f"{starter} started {found.world} processes, and the flags ask for {num_processes}"
            f"{each}: start {num_processes * found.nodes}, or "
            f"{advice.format(found.world // found.nodes)}"
        )
    _group = found
    if not starter and found.world > 1:
        # For those that it starts.
        os.environ |= {PARENT: str(os.getpid()), PLACE: f"{found.node} {found.nodes}"}
    if found.external and _talking() is None:
        _find_first_node(starter, found.nodes)
        others = [] if starter else _start_others(num_processes)
        _meet(found, cuda, others)
    return _group


def environments_of_runs(number: int, num_nodes: int | None) -> list[dict[str, str]]:
    """Variables of runs that this process starts one after another, as each process of a launcher.

    This process then knows whether it is the first of them, and meets the others in these runs
    alone. Each run has its own place to meet: the first process may still be writing when another
    begins the next run, which must not find the one before.

    Args:
        number: of runs.
        num_nodes: as for `join`.

    Raises:
        UserError: as `join`.
    """
    global _group
    env = dict(os.environ)
    starter, _group = _started_by(1, num_nodes)
    if not _group.external:
        return [env] * number
    _find_first_node(starter, _group.nodes)
    # Not where torchrun's own process lets them meet, which knows the addresses of the first run.
    port = int(os.environ["MASTER_PORT"])
    later = [
        env | {"MASTER_PORT": str(port + run), "TORCHELASTIC_USE_AGENT_STORE": "False"}
        for run in range(1, number)
    ]
    return [env, *later]


def _meet(place: Group, cuda: bool, others: Sequence[subprocess.Popen[bytes]]) -> None:
    """Begin to talk to the processes of the run; `others` of this node end where that fails.

    Raises:
        UserError: they do not find each other.
    """
    import torch.distributed

    address = os.environ["MASTER_ADDR"]
    try:
        socket.getaddrinfo(address, None)
    except OSError as error:  # the pod may not have its name yet
        _LOGGER.warning("MASTER_ADDR=%s has no address (%s): waiting for it", address, error)
    if cuda:
        torch.cuda.set_device(place.local_rank)
    try:
        torch.distributed.init_process_group(
            "cpu:gloo,cuda:nccl" if cuda else "gloo", rank=place.rank, world_size=place.world
        )
    except (RuntimeError, ValueError) as error:  # what torch makes of a network, and of a port
        for other in others:
            other.kill()
        raise UserError(_unmet(error)) from error


def _unmet(error: Exception) -> str:
    """What to say where the processes of a run did not find each other."""
    address, port = (os.environ.get(name, "") for name in ("MASTER_ADDR", "MASTER_PORT"))
    said = str(error).partition("\n")[0].strip()
    if _TAKEN.search(said):
        advice = f"port {port} is taken here, set MASTER_PORT to a free one, the same on each node"
    else:
        advice = (
            "set MASTER_ADDR to the name of node 0 as all nodes know it, and MASTER_PORT to a port "
            "of it that they reach"
        )
    return f"{_place_in_words()} did not meet the others at {address}:{port} ({said}): {advice}"


def _started_by(num_processes: int, num_nodes: int | None = None) -> tuple[str, Group]:
    """Starter of the processes, empty where there is none yet, and the place of this one."""
    env = os.environ
    if env.get(PARENT) == str(os.getppid()) and "LOCAL_RANK" in env:
        node, nodes = map(int, env.get(PLACE, "0 1").split())
        return "this run", _place(node, nodes, int(env["LOCAL_RANK"]), num_processes, nodes > 1)
    by_torchrun = "TORCHELASTIC_RUN_ID" in env
    if by_torchrun and (int(env.get("WORLD_SIZE", "1")) > 1 or (num_nodes or 1) > 1):
        rank, world = int(env.get("RANK", "0")), int(env.get("WORLD_SIZE", "1"))
        local = int(env.get("LOCAL_WORLD_SIZE", world))
        return "torchrun", Group(
            rank, world, True, rank // local, world // local, int(env.get("LOCAL_RANK", rank))
        )
    # Variables of a job alone say what it may use; those of a step say what srun started.
    tasks, place = int(env.get("SLURM_STEP_NUM_TASKS", "1")), int(env.get("SLURM_PROCID", "0"))
    if tasks > 1 or place > 0:
        tasks = max(tasks, int(env.get("SLURM_NTASKS", "1")))
        nodes = int(env.get("SLURM_STEP_NUM_NODES", env.get("SLURM_NNODES", "1")))
        node = int(env.get("SLURM_NODEID", "0"))
        if nodes == tasks > 1 and num_processes > 1:  # one a node, which starts the others there
            return "", _place(node, nodes, 0, num_processes, True)
        local = int(env.get("SLURM_LOCALID", "0")) if nodes > 1 else place
        # Such as "3,1", on every task; elsewhere those beyond their share say it.
        each = env.get("SLURM_STEP_TASKS_PER_NODE", "")
        if tasks % nodes or local >= tasks // nodes or "," in each:
            raise UserError(
                f"srun started {tasks} tasks on {nodes} nodes, not the same number on each"
                f"{f' ({each})' if each else ''}: give it --ntasks-per-node"
            )
        # Not SLURM_PROCID: with another distribution of the tasks, nodes would mix.
        return "srun", Group(node * (tasks // nodes) + local, tasks, True, node, nodes, local)
    if num_nodes is None and num_processes > 1 and int(env.get("SLURM_NNODES", "1")) > 1:
        raise UserError(
            f"SLURM gave this job {env['SLURM_NNODES']} nodes, and the command runs on one of "
            f"them: start it with srun, see scripts/slurm, or unset SLURM_NNODES to use this alone"
        )
    nodes = num_nodes or _nodes_of_pods()
    return "", _place(_node(nodes) if nodes > 1 else 0, nodes, 0, num_processes, nodes > 1)


def _place(node: int, nodes: int, local_rank: int, each: int, external: bool) -> Group:
    return Group(node * each + local_rank, nodes * each, external, node, nodes, local_rank)


def _nodes_of_pods() -> int:
    """Number of nodes where no flag says it: Kubeflow's variables do, where it started this.

    Raises:
        UserError: they give no one number, or this is said to be another node than the first.
    """
    env = os.environ
    alone = "give --num_nodes, the same on each, or --num_nodes 1 to use this machine alone"
    if "PET_NNODES" in env:
        least, _, most = env["PET_NNODES"].partition(":")
        if not least.isdecimal() or int(least) < 1 or most not in ("", least):
            raise UserError(f"PET_NNODES={env['PET_NNODES']} is no number of nodes: {alone}")
        return int(least)
    if "MASTER_ADDR" not in env:  # left behind by something else
        return 1
    # Of a PyTorchJob, which counts pods so. LOCAL_RANK: left behind by a process of a run.
    world = env.get("WORLD_SIZE", "")
    if "RANK" in env and "LOCAL_RANK" not in env and world.isdecimal() and int(world) > 1:
        return int(world)
    for name in ("NODE_RANK", "PET_NODE_RANK", "JOB_COMPLETION_INDEX"):
        if env.get(name, "0").strip("0"):
            raise UserError(
                f"{name}={env[name]} and MASTER_ADDR={env['MASTER_ADDR']} say that this is one of "
                f"several nodes, and nothing says of how many: {alone}"
            )
    return 1


def _node(nodes: int) -> int:
    """Which of several nodes this is, where each was given the command once."""
    env = os.environ
    # Of a shell, Kubeflow's, SLURM's, Kubernetes' indexed jobs; and Kubeflow's own, which counts
    # nodes where it starts one process on each.
    names = ["NODE_RANK", "PET_NODE_RANK", "SLURM_NODEID", "JOB_COMPLETION_INDEX"]
    names += ["RANK"] if env.get("WORLD_SIZE") == str(nodes) else []
    name = next((name for name in names if name in env), None)
    if name is None:
        raise UserError(
            f"--num_nodes {nodes}: nothing says which of them this is, set NODE_RANK (0 to "
            f"{nodes - 1}) and MASTER_ADDR (the name of node 0) on each"
        )
    value = env[name]
    number = ""  # that whoever counts says himself
    if name == "SLURM_NODEID":
        number = env.get("SLURM_STEP_NUM_NODES", env.get("SLURM_NNODES", ""))
    elif name == "PET_NODE_RANK":
        number = env.get("PET_NNODES", "")
    if number.isdecimal() and int(number) < nodes:
        raise UserError(
            f"--num_nodes {nodes}: {name}={value} counts {number} of them; start the command on "
            f"{nodes} together, or set NODE_RANK (0 to {nodes - 1}) and MASTER_ADDR (the name of "
            f"node 0) on each"
        )
    if not value.isdecimal() or int(value) >= nodes:
        raise UserError(f"--num_nodes {nodes}: got {name}={value}, expected 0 to {nodes - 1}")
    return int(value)


def _find_first_node(starter: str, nodes: int) -> None:
    """Set where the processes meet, where the starter did not."""
    env = os.environ
    if "PET_MASTER_ADDR" in env:
        env.setdefault("MASTER_ADDR", env["PET_MASTER_ADDR"])
        env.setdefault("MASTER_PORT", env.get("PET_MASTER_PORT", "29500"))
    if "SLURM_JOB_ID" in env and "SLURM_STEP_NUM_TASKS" in env:
        job = int(env["SLURM_JOB_ID"]) + int(env.get("SLURM_STEP_ID", 0))
        env.setdefault("MASTER_PORT", str(15000 + job % 10000))
        names = env.get("SLURM_STEP_NODELIST", env.get("SLURM_JOB_NODELIST", ""))
        if nodes > 1 and names:
            from lightning.fabric.plugins.environments import SLURMEnvironment

            env.setdefault("MASTER_ADDR", SLURMEnvironment.resolve_root_node_address(names))
    if nodes == 1:
        env.setdefault("MASTER_ADDR", "127.0.0.1")
    if "MASTER_ADDR" not in env:
        raise UserError(
            f"{nodes} nodes: nothing says where the first of them is, set MASTER_ADDR to its name "
            f"on each, and MASTER_PORT if 29500 is taken"
        )
    env.setdefault("MASTER_PORT", "29500")
    if not env["MASTER_PORT"].isdecimal():
        raise UserError(f"MASTER_PORT={env['MASTER_PORT']} is no port: expected a number")


def _start_others(num_processes: int) -> list[subprocess.Popen[bytes]]:
    """Start the other processes of this node; they end when this one does."""
    others = [
        subprocess.Popen(
            [sys.executable, *sys.orig_argv[1:]], env=os.environ | {"LOCAL_RANK": str(rank)}
        )
        for rank in range(1, num_processes)
    ]

    def end() -> None:
        deadline = time.monotonic() + _PATIENCE
        for other in others:
            try:
                other.wait(max(deadline - time.monotonic(), 0))
            except subprocess.TimeoutExpired:
                other.kill()

    atexit.register(end)
    return others


def group() -> Group:
    """The processes of the run that was joined last; one without any."""
    return _group


def rank_and_world() -> tuple[int, int]:
    """Rank of this process and number of processes that can talk to each other by now."""
    distributed = _talking()
    return (0, 1) if distributed is None else (distributed.get_rank(), distributed.get_world_size())


def _talking() -> Any:
    """`torch.distributed`, where a process group is up; torch is not imported to find out."""
    distributed = sys.modules.get("torch.distributed")
    if distributed is None or not distributed.is_available() or not distributed.is_initialized():
        return None
    return distributed


def is_first() -> bool:
    """Whether this process is the one that prints and writes."""
    return max(rank_and_world()[0], _group.rank) == 0


def agreed(value: Value) -> Value:
    """The first process's `value`, on every process."""
    distributed = _talking()
    if distributed is None:
        return value
    box = [value]
    distributed.broadcast_object_list(box, src=0)
    return box[0]


def say(text: object) -> None:
    """Tell the user something, once: logged by the first process of a run, at level INFO."""
    if is_first():
        _LOGGER.info("%s", text)


class Stopped(BaseException):
    """A signal told this process to end."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number

    @property
    def status(self) -> int:
        """Exit status, as shells count: 143 for SIGTERM, 130 for SIGINT."""
        return 128 + self.number


_keeps = ""


def keeps(text: str) -> None:
    """Set the advice that is printed when a signal stops this process."""
    global _keeps
    _keeps = text


def stopped_message(stop: Stopped) -> str:
    """One line about a signal."""
    name = signal.Signals(stop.number).name
    return f"stopped by {name}" + (f"; {_keeps}" if _keeps else "")


@contextmanager
def stopped_by_signals() -> Iterator[None]:
    """SIGTERM, SIGINT and SIGUSR1 (SLURM's notice) raise `Stopped` in the main thread."""
    main = os.getpid()

    def stop(number: int, frame: Any) -> None:
        if os.getpid() != main:  # a forked loader worker: nothing to say
            os._exit(128 + number)
        # A group's and the parent's signal may both arrive; a second Ctrl-C ends at once.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        raise Stopped(number)

    before = {}
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        if signal.getsignal(number) is not signal.SIG_IGN:  # as `nohup` and shells ask for
            before[number] = signal.signal(number, stop)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def message_of_lost(error: BaseException) -> str | None:
    """What to say where another process of the run has ended, or the port to meet at is taken.

    Args:
        error: that a process of several met.

    Returns:
        None where the error is of another kind.
    """
    if _group.world == 1 or not isinstance(error, RuntimeError):
        return None
    if _TAKEN.search(str(error)):  # of the port where Lightning lets the processes of a node meet
        return _unmet(error)
    if not _GONE.search(str(error)):
        return None
    said = next((line.strip() for line in str(error).splitlines() if _GONE.search(line)), "")
    return (
        f"{_place_in_words()} lost the others: one of them ended or cannot be reached, and says "
        f"why itself ({said[:160]}); give the command again, on all nodes, to go on from what is "
        f"kept"
    )


def _place_in_words() -> str:
    where = f"process {_group.rank} of {_group.world}"
    return where + (f" (node {_group.node} of {_group.nodes})" if _group.nodes > 1 else "")
