"""Training on several processes: ZeRO stage 2 of DeepSpeed (on CPU too), or data parallel."""

from __future__ import annotations

import importlib.util
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.strategies import DeepSpeedStrategy, Strategy

from recformer.files import UserError, beside

STRATEGIES = ("deepspeed_stage_2", "ddp", "auto")


class Zero2Strategy(DeepSpeedStrategy):
    """Lightning's DeepSpeed strategy, stage 2, whose checkpoints appear whole or not at all.

    A checkpoint is a folder that all processes write to. It is written beside its place and moved
    there when complete; what stood there is moved aside first, see `newest_whole`.
    """

    def __init__(self) -> None:
        super().__init__(stage=2, logging_batch_size_per_gpu=1)

    def setup(self, trainer: Any) -> None:
        # Inputs would be cast to the model's type, but batches hold integers alone, and Lightning
        # refuses to look for others in a frozen dataclass.
        self.precision_plugin.convert_input = lambda data: data  # type: ignore[method-assign]
        super().setup(trainer)

    def save_checkpoint(
        self, checkpoint: dict, filepath: Any, storage_options: Any | None = None
    ) -> None:
        path = Path(self.broadcast(filepath))
        partial, aside = Path(self.broadcast(beside(path))), _aside(path)
        super().save_checkpoint(checkpoint, partial, storage_options)
        self.barrier()  # every process has written its part
        if self.is_global_zero:
            if path.exists():
                shutil.rmtree(aside, ignore_errors=True)
                os.replace(path, aside)
            os.replace(partial, path)
            shutil.rmtree(aside, ignore_errors=True)
        self.barrier()


class CpuZero2Strategy(Zero2Strategy):
    """The same over gloo. DeepSpeed can do it; Lightning only insists on GPUs in its checks."""

    def __init__(self) -> None:
        super().__init__()
        from deepspeed import ops

        # Collectives through shared memory: a minute of compiling, where there is a compiler.
        ops.__compatible_ops__["deepspeed_shm_comm"] = False

    @property
    def root_device(self) -> torch.device:
        return torch.device("cpu", 0)

    def setup_environment(self) -> None:
        assert self.accelerator is not None
        self.accelerator.setup_device(self.root_device)
        super(DeepSpeedStrategy, self).setup_environment()

    def setup_distributed(self) -> None:
        self.set_world_ranks()
        self._init_deepspeed_distributed()


def _aside(path: Path) -> Path:
    return path.with_name(f".{path.name}.before")


def newest_whole(path: Path) -> Path | None:
    """The checkpoint at `path`, or the one before it where a run was killed between two renames."""
    return next((each for each in (path, _aside(path)) if each.exists()), None)


def build_strategy(name: str, accelerator: str, num_processes: int) -> str | Strategy:
    """Lightning's strategy.

    Must be called before anything imports DeepSpeed, which looks for its device then.

    Args:
        name: one of `STRATEGIES`; `auto` is `ddp` for several processes and none for one.
        accelerator: "cuda" or "cpu".
        num_processes: of the run.

    Raises:
        UserError: DeepSpeed is not installed.
    """
    if name == "auto":
        return "ddp" if num_processes > 1 else "auto"
    if name != "deepspeed_stage_2":
        return name
    if importlib.util.find_spec("deepspeed") is None:
        raise UserError(
            "--strategy deepspeed_stage_2 needs the package: pip install 'recformer[deepspeed]'; "
            "--strategy ddp does without"
        )
    if accelerator == "cuda":
        return Zero2Strategy()
    os.environ["DS_ACCELERATOR"] = "cpu"
    return CpuZero2Strategy()
