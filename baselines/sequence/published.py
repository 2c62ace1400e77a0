"""Published SASRec and gSASRec checkpoints."""

from __future__ import annotations

import os
from collections.abc import Sequence

import numpy as np
import torch

from baselines.sequence.recommender import SequenceRecommender
from recformer.checkpoints.reading import read_state_dict
from recformer.files import UserError


def load_published(
    model: SequenceRecommender, path: str | os.PathLike, asins: Sequence[str]
) -> None:
    """Weights of a published gSASRec checkpoint (its PyTorch port), in place.

    Its rows are those of items 1 to N, with one row before and one (the padding) behind; our items
    are found by their key, which must be that number, as in the data it was trained on.

    Args:
        model: a SASRec of the same sizes.
        path: file of the state dict.
        asins: item keys in item id order.

    Raises:
        FileNotFoundError: no such file.
        UserError: no file of weights, or keys or shapes that are not those of a gSASRec of this
            size.
    """
    state = read_state_dict(path)
    numbers = np.array([int(a) if a.isdecimal() else 0 for a in asins])
    if sorted(numbers) != list(range(1, len(asins) + 1)):
        raise UserError("--from_published: the items' keys must be the numbers 1 to N")
    rows = torch.from_numpy(numbers)
    ours: dict[str, torch.Tensor] = {}
    for key, tensor in state.items():
        if key in ("item_embedding.weight", "output_embedding.weight"):
            if len(tensor) != len(asins) + 2:
                raise UserError(
                    f"{path}: {key} has {len(tensor)} rows, expected {len(asins)} items and 2"
                )
            side = "inputs" if key.startswith("item") else "outputs"
            ours[f"{side}.item_embedding.weight"] = tensor[rows]
        else:
            ours[f"network.{key}"] = tensor
    expected = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    found = {key: tuple(tensor.shape) for key, tensor in ours.items()}
    different = sorted(k for k in expected | found if expected.get(k) != found.get(k))
    if different:
        key = different[0]
        raise UserError(
            f"{path} is no gSASRec of this size: {key} is {found.get(key, 'missing')}, expected "
            f"{expected.get(key, 'nothing')} ({len(different)} such); --hidden_size, --num_layers, "
            "--max_length, --separate_outputs?"
        )
    model.load_state_dict(ours)
