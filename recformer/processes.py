"""Place of this process among those of a run, the one that prints, and signals that end a run.

A run's processes are on one machine. They are started by the run itself (`--num_processes 2`), by
`torchrun`, or by `srun`; `join` finds out which, once, before anything is written.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

from recformer.files import UserError

_LOGGER = logging.getLogger("recformer")

# What the first process tells those that it starts: its id, so that nobody else's children,
# which inherit variables too, take themselves for them.
PARENT = "RECFORMER_FIRST_PROCESS"

Value = TypeVar("Value")


@dataclass(frozen=True)
class Group:
    """The processes of a run.

    Attributes:
        rank, world: which of how many this is.
        external: others started them, so that the run must start none.
    """

    rank: int = 0
    world: int = 1
    external: bool = False


_group = Group()


def join(num_processes: int, cuda: bool = False) -> Group:
    """Find this process's place among the processes of a run.

    Where others started them, they know of each other from here on.

    Args:
        num_processes: that the run is told to have.
        cuda: they compute on GPUs.

    Raises:
        UserError: `srun` or `torchrun` started another number of processes, or on several nodes.
    """
    global _group
    starter, rank, world = _started_by(num_processes)
    nodes = _nodes(starter, num_processes, world)
    if nodes > 1:
        advice = (
            "start it on one (--nnodes=1)"
            if starter == "torchrun"
            else "ask for --nodes=1, or unset SLURM_NNODES to use this node alone"
        )
        raise UserError(
            f"a run uses one node, {starter or 'SLURM'} gave this job {nodes} nodes: {advice}"
        )
    if world != num_processes and (starter or world > 1):
        raise UserError(
            f"{starter} started {world} processes, and the flags ask for {num_processes}: start "
            f"{num_processes}, or set --num_processes (GPUs: --device) to {world}"
        )
    _group = Group(rank, world, starter not in ("", "this run"))
    if not starter and world > 1:
        os.environ[PARENT] = str(os.getpid())  # for those that it starts
    if _group.external and _talking() is None:
        import torch.distributed

        if starter == "srun":
            job = int(os.environ.get("SLURM_JOB_ID", "0")) + int(os.environ.get("SLURM_STEP_ID", 0))
            os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
            os.environ.setdefault("MASTER_PORT", str(15000 + job % 10000))
        if cuda:
            torch.cuda.set_device(rank)
        torch.distributed.init_process_group(
            "cpu:gloo,cuda:nccl" if cuda else "gloo", rank=rank, world_size=world
        )
    return _group


def _started_by(num_processes: int) -> tuple[str, int, int]:
    """Starter of the processes, empty where there is none yet; rank and world of this one."""
    env = os.environ
    if env.get(PARENT) == str(os.getppid()) and "LOCAL_RANK" in env:
        return "this run", int(env["LOCAL_RANK"]), num_processes
    if "TORCHELASTIC_RUN_ID" in env and int(env.get("WORLD_SIZE", "1")) > 1:
        return "torchrun", int(env["RANK"]), int(env["WORLD_SIZE"])
    # Variables of a job alone say what it may use; those of a step say what srun started.
    tasks, place = int(env.get("SLURM_STEP_NUM_TASKS", "1")), int(env.get("SLURM_PROCID", "0"))
    if tasks > 1 or place > 0:
        return "srun", place, max(tasks, int(env.get("SLURM_NTASKS", "1")))
    return "", 0, num_processes


def _nodes(starter: str, num_processes: int, world: int) -> int:
    """Nodes that the processes of the run are on; 1 where a job has more and the run has one."""
    env = os.environ
    if starter == "torchrun":
        return world // int(env.get("LOCAL_WORLD_SIZE", world))
    if starter == "srun":
        return int(env.get("SLURM_STEP_NUM_NODES", env.get("SLURM_NNODES", "1")))
    return int(env.get("SLURM_NNODES", "1")) if not starter and num_processes > 1 else 1


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
