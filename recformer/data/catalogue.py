"""Data that a finetuned folder keeps to recommend without its processed folder."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from recformer.data.processed import ITEM_FILE, META_FILE, ProcessedFolder
from recformer.files import read_json, write_json

# {name: interactions in training}, for users of whom nothing is known.
COUNT_FILE = "item_counts.json"


def write_catalogue(
    folder: str | os.PathLike, data: ProcessedFolder, meta_file: str = META_FILE
) -> None:
    """Write item ids, texts and training counts beside a model.

    The texts are those of every product, of products that nobody has bought too: the model can
    recommend them.

    Args:
        folder: of the model.
        data: what it was trained on.
        meta_file: the file of texts within `data.path`.
    """
    folder = Path(folder)
    texts = dict(zip(data.asins, data.items, strict=True))
    counts = np.bincount(data.train.items, minlength=data.num_items).tolist()
    write_json(folder / ITEM_FILE, {name: row for row, name in enumerate(data.asins)})
    write_json(folder / META_FILE, texts | (read_json(data.path / meta_file) | texts))
    write_json(folder / COUNT_FILE, dict(zip(data.asins, counts, strict=True)))
