"""Which process this is: rank, world, who prints."""

from __future__ import annotations

import logging
import os

import torch.distributed

_LOGGER = logging.getLogger("recformer")


def rank_and_world() -> tuple[int, int]:
    """Rank of this process and number of processes."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return 0, 1


def say(text: object) -> None:
    """Tell the user something, once: logged by the first process of a run, at level INFO."""
    if int(os.environ.get("LOCAL_RANK", "0")) == 0:
        _LOGGER.info("%s", text)
