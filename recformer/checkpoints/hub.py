"""Folders of language models, local or from the Hugging Face hub."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError

from recformer.checkpoints.names import PathLike, first_line
from recformer.checkpoints.reading import WEIGHT_FILES
from recformer.files import UserError, read_json

# What the hub may have of a BERT's tokenizer, whose configuration does not say which id is [CLS].
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "vocab.txt",
)


def local_folder(path_or_hub_id: PathLike, weights: bool) -> Path:
    """The folder with config.json (and weights): the path itself, or the hub's cached files.

    Raises:
        FileNotFoundError: neither a folder here nor to be had from the hub.
        UserError: a file.
    """
    path = Path(path_or_hub_id)
    if path.is_dir():
        modules = path / "modules.json"
        if not (path / "config.json").is_file() and modules.is_file():
            # Older sentence-transformers folders keep the language model in a subfolder.
            path = path / read_json(modules)[0]["path"]
        if not (path / "config.json").is_file():
            raise FileNotFoundError(f"{path} has no config.json, so it is no model folder")
        return path
    if path.exists():
        raise UserError(
            f"{path} is a file; a backbone is a folder with config.json and weights, or a hub id"
        )
    name = str(path_or_hub_id)
    if path.is_absolute() or name.count("/") > 1 or name.startswith((".", "~")):
        raise FileNotFoundError(
            f"{name} does not exist, expected a model folder, a file of weights or a hub id"
        )
    return _from_hub(name, weights)


def _from_hub(name: str, weights: bool) -> Path:
    try:
        folder = Path(hf_hub_download(name, "config.json")).parent
    except (OSError, ValueError) as error:  # no such repository, no network, not a name at all
        raise FileNotFoundError(
            f"{name!r} is no folder here, and the hub did not give it: {first_line(error)}"
        ) from error
    for file in TOKENIZER_FILES:
        with suppress(EntryNotFoundError):
            hf_hub_download(name, file)
    if not weights:
        return folder
    for file in WEIGHT_FILES:
        try:
            found = Path(hf_hub_download(name, file))
            if file.endswith(".index.json"):
                for shard in sorted(set(read_json(found)["weight_map"].values())):
                    hf_hub_download(name, shard)
        except EntryNotFoundError:
            continue
        return folder
    raise FileNotFoundError(f"{name!r} has a config.json, but none of {', '.join(WEIGHT_FILES)}")
