"""On which threads the kernel computes: those of torch, or some that it makes at every call.

Why those of torch is said in `cpp/threads.h`. A process that was forked is without them; a service
does better without (`use_torchs`).
"""

from __future__ import annotations

import ctypes
import functools
import os
from dataclasses import dataclass

import torch

#: What starts torch's threads, and what tells each of how many it is which.
OPEN_MP = ("GOMP_parallel", "omp_get_num_threads", "omp_get_thread_num")


@dataclass
class _Process:
    """What this process computes with."""

    kernel: ctypes.CDLL | None = None
    wanted: bool = True
    forked: bool = False

    def tell(self) -> bool:
        """Tell the kernel, if it is loaded; whether torch's threads are there and wanted."""
        functions = _open_mp() if self.wanted and not self.forked else None
        if self.kernel is not None:
            self.kernel.recformer_use_threads(*(functions or [None] * len(OPEN_MP)))
        return functions is not None


_process = _Process()


@functools.cache
def _open_mp() -> tuple[ctypes.c_void_p, ...] | None:
    """Functions of the OpenMP that torch is linked with: libgomp, or another that has them."""
    linked = ctypes.CDLL(torch._C.__file__)  # what it is linked with is looked through, too
    if not all(hasattr(linked, name) for name in OPEN_MP):
        return None
    return tuple(ctypes.cast(getattr(linked, name), ctypes.c_void_p) for name in OPEN_MP)


def loaded(kernel: ctypes.CDLL) -> None:
    """The kernel is there: it is told now, and again when something changes."""
    kernel.recformer_use_threads.argtypes = [ctypes.c_void_p] * len(OPEN_MP)
    _process.kernel = kernel
    _process.tell()


def use_torchs(wanted: bool = True) -> bool:
    """Let the kernel, now or when it is loaded, compute on torch's threads; whether it does.

    Where torch computes on one thread, as in a service, others do better: those of torch sleep
    between requests, come late, and spin for milliseconds afterwards.
    """
    _process.wanted = wanted
    return _process.tell()


def _after_fork() -> None:
    _process.forked = True
    _process.tell()


os.register_at_fork(after_in_child=_after_fork)
