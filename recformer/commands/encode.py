"""Vectors of all items of a processed folder, for use anywhere.

`recformer encode --model FOLDER --data_path FOLDER --output_dir DIR`

Writes to the output folder

    item_vectors.npy  (N, H) float32, row = item id; `numpy.load(…, mmap_mode="r")` maps it
    smap.json         item ids by the items' own names

The same command again goes on where it was cut off, and of a changed catalogue encodes new and
changed items alone: vectors are kept beside the data (`recformer.data.item_vectors`).
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

import numpy as np
from lightning.fabric import Fabric

from recformer.cli import keep_freed_memory, parse_flags
from recformer.data.item_vectors import Vectors, count_missing
from recformer.data.items import TokenizedItems, cache_dir
from recformer.data.processed import ProcessedFolder
from recformer.files import UserError, atomic_write, write_json
from recformer.models import RecformerForSeqRec
from recformer.processes import group, say
from recformer.training.arguments import DeviceArguments, ModelArguments, flag
from recformer.training.item_encoder import catalogue_vectors, item_keys, vectors_key
from recformer.training.start import load_start_model
from recformer.training.trainer import Compute, RunEnvironment

ROWS_AT_ONCE = 8192  # written


@dataclass(kw_only=True)
class EncodeArguments(DeviceArguments, ModelArguments):
    """Encode all items of a processed folder."""

    model: str = field(
        metadata={
            "help": "Recformer folder, or a state-dict file beside its config.json and tokenizer; "
            "or a language model (folder or hub id)"
        }
    )
    data_path: str = flag(
        "finetune_data/Scientific", "processed folder, as `recformer process` writes it"
    )
    output_dir: str = flag("result", "folder for item_vectors.npy and smap.json")


def run(args: EncodeArguments) -> Vectors:
    """Encode, write, and say how long it took; returns the (N, H) float32 vectors, mapped.

    Raises:
        FileNotFoundError, UserError: as `ProcessedFolder.load` and `load_start_model`; or a model
            of `--method head`, whose item vectors are more than the encoder's.
    """
    args.check_devices()
    compute = Compute.of(args)
    precision = compute.precision
    data_path, output_dir = Path(args.data_path), Path(args.output_dir)
    folder = ProcessedFolder.load(data_path)
    fabric = Fabric(
        accelerator=compute.accelerator,
        strategy="ddp" if compute.num_processes > 1 else "auto",
        devices=compute.devices,
        num_nodes=group().nodes,
        precision=precision,
        plugins=[RunEnvironment()],
    )
    fabric.launch()  # from here on there are as many processes as were asked for

    beside = str(Path(args.model).parent)  # of a file: configuration and tokenizer
    model, tokenizer, report = load_start_model(
        RecformerForSeqRec, args.model, beside, None, False, args.overrides()
    )
    if getattr(model.config, "head", None) is not None:
        raise UserError(
            f"{args.model} was finetuned with --method head, whose item vectors are not those of "
            "its encoder: recformer recommend uses them; for the encoder's name its start weights"
        )
    say(report)
    model.to(fabric.device)
    output_dir.mkdir(parents=True, exist_ok=True)
    items = TokenizedItems.open_or_build(folder.items, tokenizer, cache_dir(data_path, output_dir))
    vectors_dir = cache_dir(data_path, output_dir, "vectors")
    missing = count_missing(
        item_keys(items), vectors_key(model, precision), model.config.hidden_size, vectors_dir
    )
    fabric.barrier()  # nobody encodes before the first process has counted
    started = time.monotonic()
    vectors = catalogue_vectors(model, items, vectors_dir, precision, fabric.autocast())
    seconds = time.monotonic() - started
    if fabric.is_global_zero:
        names = output_dir / "smap.json"
        names.unlink(missing_ok=True)  # cut off here, no vector stands beside another's name
        with atomic_write(output_dir / "item_vectors.npy", "wb") as handle:
            _write_array(handle, vectors)
        write_json(names, {name: row for row, name in enumerate(folder.asins)})
    others = "" if missing == len(items) else "; the others were kept, or have equal texts"
    say(
        f"{missing:,} of {len(items):,} items encoded in {seconds:.1f} s "
        f"({missing / seconds:,.0f} items/s){others}\n"
        f"written to {output_dir}: item_vectors.npy {vectors.shape}, smap.json"
    )
    return vectors


def _write_array(handle: IO[bytes], vectors: Vectors) -> None:
    """As `numpy.save`, whose last bytes are lost without a word on a disk that is full there."""
    np.lib.format.write_array_header_1_0(handle, np.lib.format.header_data_from_array_1_0(vectors))
    for start in range(0, len(vectors), ROWS_AT_ONCE):
        handle.write(np.ascontiguousarray(vectors[start : start + ROWS_AT_ONCE]).data)


def main(argv: Sequence[str] | None = None) -> None:
    """Parse flags and run."""
    args = parse_flags("encode", __doc__, EncodeArguments, argv)
    keep_freed_memory()
    run(args)
