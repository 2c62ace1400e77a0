"""Lightning trainers: device, strategy, precision, loggers."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning import Callback
from lightning.pytorch.callbacks import TQDMProgressBar
from lightning.pytorch.loggers import Logger
from lightning.pytorch.plugins import TorchCheckpointIO
from lightning.pytorch.strategies import Strategy

from recformer.files import UserError, atomic_write
from recformer.processes import say

# Warnings that a user of ours can do nothing about, and need not.
NOISE = (
    r"`isinstance\(treespec, LeafSpec\)` is deprecated",  # Lightning and torch among themselves
    r"`torch\.distributed\..*` is deprecated",  # DeepSpeed and torch
    r"It is recommended to use .*sync_dist=True",  # figures of the evaluator are gathered already
    r"Since DeepSpeed handles gradient clipping internally",  # and `LitWrapper` leaves it to it
    r".*does not have many workers which may be a bottleneck",
)


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
    """A trainer as every model of the repository uses it.

    The samplers know about processes themselves, so that nobody is evaluated twice; one sanity
    check step is not run, because evaluation comes before training anyway.
    """
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)  # advertisements and the like
    for message in NOISE:
        warnings.filterwarnings("ignore", message)
    on_screen = sys.stdout.isatty()
    return lightning.Trainer(
        default_root_dir=output_dir,
        max_epochs=max_epochs,
        accelerator=accelerator,
        devices=devices,
        strategy=strategy,
        precision=precision,  # type: ignore[arg-type]
        callbacks=[*callbacks, *([TQDMProgressBar(refresh_rate=10)] if on_screen else [])],
        enable_progress_bar=on_screen,  # a log file wants lines, not bars
        plugins=[WholeFileCheckpointIO()],
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
