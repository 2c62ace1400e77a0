"""The folder of a finetuned model: what of it a recommender needs."""

from __future__ import annotations

import os
from pathlib import Path

from recformer.config import RecformerConfig
from recformer.data.processed import ITEM_FILE, META_FILE
from recformer.files import UserError, read_json, sha256_of
from recformer.models import RecformerForCatalogue, RecformerForSeqRec
from recformer.tokenization import Item
from recformer.training.item_encoder import encoder_key
from recformer.training.start import table_hash

Model = RecformerForSeqRec | RecformerForCatalogue


def names_of(folder: Path) -> list[str]:
    """Names of the items of the item table, in its order; none where there is no smap.json."""
    item_ids = read_json(folder / ITEM_FILE) if (folder / ITEM_FILE).exists() else {}
    return sorted(item_ids, key=item_ids.__getitem__)


def texts_of(
    folder: Path, meta_file: str | os.PathLike | None, names: list[str]
) -> dict[str, Item]:
    """Texts of the items by name, from the file that is named or the folder's own."""
    meta = Path(meta_file) if meta_file is not None else folder / META_FILE
    if not meta.exists():
        raise FileNotFoundError(
            f"{meta} does not exist: the texts of the items are needed to read histories, name "
            f"the {META_FILE} of the processed folder"
        )
    texts = read_json(meta)
    if not isinstance(texts, dict) or not all(isinstance(x, dict) for x in texts.values()):
        raise UserError(f"{meta} is not as expected: {{name: {{attribute: text}}}}")
    if names and not any(name in texts for name in names):
        raise UserError(f"{meta} has texts for none of the {len(names)} items of {folder}")
    return texts


def model_of(folder: Path, num_items: int) -> Model:
    """The model of either method.

    Raises:
        UserError: its item table has another number of items.
    """
    config = RecformerConfig.from_pretrained(folder)
    headed = getattr(config, "head", None) is not None
    model: Model = (RecformerForCatalogue if headed else RecformerForSeqRec).from_pretrained(folder)
    table = model.item_embedding
    if (0 if table is None else table.num_embeddings) != num_items:
        found = "no item vectors" if table is None else f"{table.num_embeddings} item vectors"
        raise UserError(
            f"{folder} holds {found} and {num_items} items in {ITEM_FILE}, expected the "
            "folder of the best model of python -m recformer.finetune"
        )
    return model


def model_key(model: Model) -> str:
    """Key of a model with its item table, by content."""
    table = model.item_embedding
    return sha256_of(encoder_key(model), "" if table is None else table_hash(table.weight))


def stamp_of(folder: Path) -> tuple[Path, int, int] | None:
    """The file of the weights and its version."""
    path = (folder / "model.safetensors").absolute()
    if not path.is_file():
        return None
    found = path.stat()
    return path, found.st_size, found.st_mtime_ns
