"""Lightning trainers: device, strategy, precision, processes, checkpoints, loggers."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning import Callback
from lightning.fabric.plugins.environments import LightningEnvironment
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch.callbacks import ModelCheckpoint, TQDMProgressBar
from lightning.pytorch.loggers import Logger
from lightning.pytorch.plugins import TorchCheckpointIO
from lightning.pytorch.strategies import Strategy

from recformer.files import UserError, atomic_write
from recformer.processes import group, join, rank_and_world, say
from recformer.training.arguments import DeviceArguments

# Warnings that a user of ours can do nothing about, and need not.
NOISE = (
    r"`isinstance\(treespec, LeafSpec\)` is deprecated",  # Lightning and torch among themselves
    r"`torch\.distributed\..*` is deprecated",  # DeepSpeed and torch
    r"It is recommended to use .*sync_dist=True",  # figures of the evaluator are gathered already
    r"Since DeepSpeed handles gradient clipping internally",  # and `LitWrapper` leaves it to it
    r".*does not have many workers which may be a bottleneck",
    r"The `srun` command is available on your system but is not used",  # the run starts its own
    r"Checkpoint directory .* exists and is not empty",  # a run that goes on
)


@dataclass(frozen=True)
class Compute:
    """Devices and precision of a run.

    Attributes:
        accelerator, devices: Lightning's.
        precision: Lightning's name.
    """

    accelerator: str
    devices: list[int] | int
    precision: str

    @classmethod
    def of(cls, args: DeviceArguments) -> Compute:
        """From flags; finds this process's place among those of the run (`processes.join`).

        Raises:
            UserError: a GPU that this machine lacks, or another number of processes was started.
        """
        accelerator, devices = choose_devices(args.device, args.num_processes)
        num_processes = devices if isinstance(devices, int) else len(devices)
        cuda = accelerator == "cuda"
        advice = "name {} GPUs by --device" if cuda else "set --num_processes to {}"
        join(num_processes, cuda, args.num_nodes, advice)
        precision = half_precision(accelerator) if args.fp16 else "32-true"
        return cls(accelerator, devices, precision)

    @property
    def num_processes(self) -> int:
        """Of the run, on all nodes."""
        return group().nodes * (
            self.devices if isinstance(self.devices, int) else len(self.devices)
        )


class RunEnvironment(LightningEnvironment):
    """Ranks from `recformer.processes`, whatever variables of SLURM or others are set.

    Lightning's own environments guess from variables, and under SLURM install handlers that write
    `hpc_ckpt_*.ckpt`, which every later fit and test would load in place of the model given.
    """

    @property
    def creates_processes_externally(self) -> bool:
        return group().external or group().rank > 0 or rank_and_world()[1] > 1

    @property
    def main_address(self) -> str:
        """That of node 0; on one machine its own, whatever was left behind in `MASTER_ADDR`."""
        return super().main_address if group().external else "127.0.0.1"

    def local_rank(self) -> int:
        return group().local_rank

    def node_rank(self) -> int:
        return group().node


class WholeFileCheckpointIO(TorchCheckpointIO):
    """Checkpoints that replace their predecessor only when they are complete.

    Lightning's own writer goes through the temporary folder, which may be on another disk: the last
    step is then a copy, and a run killed during it has neither the old checkpoint nor the new one.
    """

    def save_checkpoint(self, checkpoint: Any, path: Any, storage_options: Any = None) -> None:
        with atomic_write(path, "wb") as handle:
            try:
                torch.save(checkpoint, handle)
            except RuntimeError as error:  # what torch's zip writer makes of a full disk
                raise OSError(f"could not write {path}: {error}") from error


class Keeper(ModelCheckpoint):
    """Checkpoints of a folder that may be moved, renamed or mounted elsewhere.

    Lightning keeps absolute paths, and forgets the best score where they are others. Without a
    monitored metric each checkpoint replaces the one before, whatever it is worth.
    """

    def __init__(self, folder: Path, name: str, monitor: str | None = None, **options: Any) -> None:
        options = {"mode": "max", "enable_version_counter": False} | options
        super().__init__(folder, name, monitor, auto_insert_metric_name=False, **options)

    @property
    def state_key(self) -> str:
        return super().state_key.replace(type(self).__qualname__, ModelCheckpoint.__qualname__, 1)

    def state_dict(self) -> dict[str, Any]:
        state = super().state_dict()
        for key in ("best_model_path", "kth_best_model_path", "last_model_path"):
            state[key] = Path(state[key]).name
        kept = {Path(path).name: score for path, score in state["best_k_models"].items()}
        return state | {"best_k_models": kept, "dirpath": ""}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        def here(name: str) -> str:  # older checkpoints hold whole paths
            return str(Path(str(self.dirpath)) / Path(name).name) if name else ""

        state = dict(state_dict) | {"dirpath": self.dirpath}
        for key in ("best_model_path", "kth_best_model_path", "last_model_path"):
            state[key] = here(state[key])
        state["best_k_models"] = {here(path): v for path, v in state["best_k_models"].items()}
        super().load_state_dict(state)


def cpu_has_bfloat16() -> bool:
    """Whether this CPU multiplies bfloat16 matrices in hardware (AVX512-BF16 or AMX)."""
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def half_precision(accelerator: str) -> str:
    """Lightning's name of the 16-bit precision that the hardware is good at.

    bfloat16 where there is hardware for it, else float16 on a GPU, else float32 (said aloud).
    """
    if accelerator == "cuda":
        # Older GPUs emulate bfloat16, which is slow.
        in_hardware = torch.cuda.is_bf16_supported(including_emulation=False)
        return "bf16-mixed" if in_hardware else "16-mixed"
    if cpu_has_bfloat16():
        return "bf16-mixed"
    say("this CPU has no bfloat16 arithmetic: computing in float32")
    return "32-true"


def choose_devices(
    device: Sequence[int] | None, num_processes: int = 1
) -> tuple[str, list[int] | int]:
    """Lightning's accelerator and devices from GPU indices.

    Args:
        device: GPU indices; [-1] for the CPU; None for the first GPU if there is one, else the CPU.
        num_processes: on the CPU; more than one means that it is the CPU.

    Raises:
        UserError: a GPU that this machine lacks.
    """
    if num_processes > 1:
        return "cpu", num_processes
    if device is None:
        return ("cuda", [0]) if torch.cuda.is_available() else ("cpu", 1)
    if list(device) == [-1]:
        return "cpu", 1
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not device or min(device) < 0 or max(device) >= count or len(set(device)) < len(device):
        raise UserError(
            f"--device {' '.join(map(str, device))}: this machine has {count} GPUs; "
            "name distinct ones from 0 on, or -1 for the CPU"
        )
    return "cuda", list(device)


def wandb_logger(output_dir: Path, project: str) -> Logger:
    """A Weights & Biases logger that works without network or account (offline run).

    Raises:
        UserError: the package is not installed.
    """
    try:
        import wandb
    except ImportError as error:
        raise UserError("--wandb needs the package: pip install 'recformer[wandb]'") from error
    from lightning.pytorch.loggers import WandbLogger

    options: dict[str, Any] = {}
    if "WANDB_MODE" not in os.environ and not wandb.api.api_key:
        say("no W&B account found: logging offline (`wandb sync` uploads later)")
        # Lightning's own flag, `offline`, says "dryrun", which newer releases of wandb do not know.
        options["mode"] = "offline"
    return WandbLogger(project=project, save_dir=output_dir, **options)


def build_trainer(
    output_dir: Path,
    max_epochs: int,
    accelerator: str,
    devices: list[int] | int,
    precision: str,
    callbacks: Sequence[Callback],
    strategy: str | Strategy = "auto",
    validate_every: int = 1,
    validate_every_batches: int | None = None,
    accumulate: int = 1,
    max_grad_norm: float = 1.0,
    logger: Logger | None = None,
) -> lightning.Trainer:
    """The Lightning trainer of every model here.

    Lightning wraps no sampler: ours share the users among processes, each exactly once. There is no
    sanity check, as every run is evaluated before it is trained.
    """
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)  # advertisements and the like
    for message in NOISE:
        warnings.filterwarnings("ignore", message)
    on_screen = sys.stdout.isatty()
    rank_zero_only.rank = group().rank  # Lightning's is a guess from variables, made at import
    trainer = lightning.Trainer(
        # A folder that is never made: Lightning looks for requeue files of SLURM there.
        default_root_dir=output_dir / "lightning",
        max_epochs=max_epochs,
        accelerator=accelerator,
        devices=devices,
        num_nodes=group().nodes,
        strategy=strategy,
        precision=precision,  # type: ignore[arg-type]
        callbacks=[*callbacks, *([TQDMProgressBar(refresh_rate=10)] if on_screen else [])],
        enable_progress_bar=on_screen,  # a log file wants lines, not bars
        plugins=[WholeFileCheckpointIO(), RunEnvironment()],
        check_val_every_n_epoch=validate_every,
        val_check_interval=validate_every_batches,
        accumulate_grad_batches=accumulate,
        gradient_clip_val=max_grad_norm or None,
        logger=logger if logger is not None else False,
        use_distributed_sampler=False,
        num_sanity_val_steps=0,
        inference_mode=False,  # the item table made in an evaluation is trained against later
        enable_model_summary=False,
        log_every_n_steps=10,
    )
    # Its handler of SIGTERM waits for the end of the batch, then exits with status 0.
    trainer._signal_connector.register_signal_handlers = lambda: None
    return trainer


@contextmanager
def whole_group(trainer: lightning.Trainer) -> Iterator[None]:
    """End the processes that the trainer started, should the block fail."""
    try:
        yield
    except BaseException:
        for child in _children(trainer):
            child.kill()
        raise


_started: list[Any] = []


def _children(trainer: lightning.Trainer) -> list[Any]:
    """Processes that this trainer or one before it started."""
    _started.extend(getattr(trainer.strategy.launcher, "procs", ()))
    return _started
