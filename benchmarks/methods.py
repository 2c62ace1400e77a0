"""The price of `finetune --method head` beside that of the published method, in one run.

    python -m benchmarks.methods --data_path FOLDER --pretrain_ckpt ENCODER --pooler_type avg

Both start from the same checkpoint on the same folder, in 16 bits where this machine is good at
them, and train one epoch, the encoding of all items included: the published first stage trains the
encoder on one target a user (batches of 32, softmax over all items), the head (batches of 128) on
all targets. Then the two finetuned folders recommend ten items for the same histories, in turns;
medians count.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning import Callback

from benchmarks.measure import REPEATS, header, in_turns, line, pin_threads, row
from recformer.cli import exit_with_message
from recformer.data.catalogue import write_catalogue
from recformer.data.collators import RecformerEvalCollator, RecformerTrainCollator
from recformer.data.datamodule import SeqRecDataModule
from recformer.data.histories import HistoryEvalCollator, NextItemCollator
from recformer.data.items import TokenizedItems
from recformer.data.processed import ProcessedFolder
from recformer.models import RecformerForSeqRec
from recformer.models.catalogue import HeadOptions, RecformerForCatalogue
from recformer.recommendation import CatalogueRecommender
from recformer.training.callbacks import HeadTable, ItemTable
from recformer.training.lit import LitWrapper
from recformer.training.start import load_start_model
from recformer.training.trainer import build_trainer, cpu_has_bfloat16

USERS = 256  # recommended to
METHODS = ("published", "head")


def trained(
    method: str, data: ProcessedFolder, start: Callable[[], tuple], folder: Path
) -> tuple[float, CatalogueRecommender]:
    """Seconds of one epoch from `start()`, items encoded too, and what recommends after it.

    Args:
        method: `published` or `head`.
        data: what is trained on.
        start: gives a `RecformerForSeqRec` and its tokenizer.
        folder: an empty one; the model goes there.
    """
    model, tokenizer = start()
    store = TokenizedItems.open_or_build(data.items, tokenizer, folder / "tokenized")
    vectors = folder / "vectors"
    config = model.config
    table: Callback
    collators: tuple[Callable, Callable]
    if method == "head":
        config.head = (options := HeadOptions()).as_dict()
        encoder, model = model.longformer, RecformerForCatalogue(config)
        model.longformer.load_state_dict(encoder.state_dict())
        interactions = np.bincount(data.train.items, minlength=data.num_items)
        table = HeadTable(store, interactions, vectors)
        length = options.max_history
        collators = NextItemCollator(length), HistoryEvalCollator(length)
        batch_size, learning_rate = 128, 1e-3
    else:
        table = ItemTable(store, True, vectors)
        collators = RecformerTrainCollator(store, config), RecformerEvalCollator(store, config)
        batch_size, learning_rate = 32, 1e-4
    module = LitWrapper(model, learning_rate=learning_rate, warmup_steps=50)
    precision = "bf16-mixed" if cpu_has_bfloat16() else "32-true"
    trainer = build_trainer(folder, 1, "cpu", 1, precision, [table])
    trainer.limit_val_batches = 0
    trainer.logger = None
    loader = SeqRecDataModule(data, *collators, batch_size).train_dataloader()
    model.train()
    started = time.perf_counter()
    trainer.fit(module, loader)
    seconds = time.perf_counter() - started
    if method == "head":
        model.refresh_table()
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    write_catalogue(folder / "model", data)
    return seconds, CatalogueRecommender.load(folder / "model")


def rows(
    data_path: str, start: Callable[[ProcessedFolder], tuple], scratch: Path
) -> Iterator[dict[str, Any]]:
    """An epoch of both, then recommending by both.

    Args:
        data_path: processed folder.
        start: gives a `RecformerForSeqRec` for the folder, and its tokenizer.
        scratch: an empty folder.
    """
    data = ProcessedFolder.load(data_path)
    seconds, recommenders = {}, {}
    for method in METHODS:
        (scratch / method).mkdir()
        seconds[method], recommenders[method] = trained(
            method, data, lambda: start(data), scratch / method
        )
    yield row(
        f"finetune --method head, first epoch of {data.num_users:,} users",
        seconds["head"],
        "--method published",
        seconds["published"],
    )
    histories = data.eval_examples("test").histories
    count = min(USERS, data.num_users)
    names = [[data.asins[item] for item in histories[user]] for user in range(count)]
    ours, peer = in_turns(
        REPEATS,
        lambda: recommenders["head"].recommend(names, k=10),
        lambda: recommenders["published"].recommend(names, k=10),
    )
    yield row(
        f"recommend 10 of {data.num_items:,} items to {count} users",
        ours,
        "--method published",
        peer,
        amount=count,
        unit="users",
    )


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.methods",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--data_path", required=True, help="processed folder")
    parser.add_argument("--pretrain_ckpt", required=True, help="as of recformer finetune")
    shape = {"pooler_type": str, "max_token_num": int, "max_attr_length": int}
    for name, kind in shape.items():
        parser.add_argument(f"--{name}", type=kind, help="as of recformer finetune")
    parser.add_argument("--threads", type=int, help="default: the cores this process may use")
    args = parser.parse_args(argv)
    overrides = {name: getattr(args, name) for name in shape if getattr(args, name) is not None}

    def start(data: ProcessedFolder) -> tuple:
        torch.manual_seed(0)
        own = overrides | {"item_num": data.num_items, "finetune_negative_sample_size": -1}
        return load_start_model(
            RecformerForSeqRec, args.pretrain_ckpt, args.pretrain_ckpt, None, False, own
        )[:2]

    print(f"{pin_threads(args.threads)} threads, torch {torch.__version__}")
    print(header())
    with tempfile.TemporaryDirectory() as scratch:
        for values in rows(args.data_path, start, Path(scratch)):
            print(line(values), flush=True)


if __name__ == "__main__":
    exit_with_message(main)
