"""The exported encoder: NDCG it loses in 8 bits, and its speed beside the packed encoder's.

    python -m benchmarks.onnx_encoder --model result/best_model --data_path FOLDER [--users 500]

The model is exported as `recformer export --forms onnx --int8` does. All items are then encoded by
the packed encoder, by onnxruntime in float32 and by onnxruntime with 8-bit weights, and the test
users of the processed folder ranked by each (every item, ties by their expected value). Of a model
with a head the item table is made from these vectors; histories need no encoder. Of any other the
histories are encoded as well, so `--users` draws some of the users, by seed 0. Batches of
onnxruntime are padded, sorted by length. Nothing else should run on the machine.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.measure import pin_threads
from recformer.cli import exit_with_message, keep_freed_memory
from recformer.data.collators import pack_sequences
from recformer.data.histories import histories_of
from recformer.data.items import ItemsInMemory
from recformer.data.processed import ProcessedFolder
from recformer.evaluation.metrics import per_user_metrics
from recformer.evaluation.ranking import rank_by_vectors
from recformer.export.onnx import OnnxEncoder, export_encoder, inputs_of
from recformer.models import RecformerForCatalogue, RecformerForSeqRec
from recformer.models.catalogue import token_bags
from recformer.tokenization import Item, RecformerTokenizer
from recformer.training.item_encoder import encode_items, token_budget_batches
from recformer.training.start import load_start_model

TOKENS = 4096  # of a padded batch

# (B, D) vectors of B sequences of items, oldest first.
Encode = Callable[[Sequence[Sequence[Item]]], NDArray[np.float32]]


def encoders(
    model: RecformerForSeqRec | RecformerForCatalogue, tokenizer: RecformerTokenizer, folder: Path
) -> Iterator[tuple[str, Encode]]:
    """The exported encoder in float32 and in 8 bits."""
    for name, file in (("float32", "encoder.onnx"), ("int8", "encoder.int8.onnx")):
        run = OnnxEncoder(folder / file, torch.get_num_threads())

        def encode(
            sequences: Sequence[Sequence[Item]], run: OnnxEncoder = run
        ) -> NDArray[np.float32]:
            lengths = np.array([len(tokenizer.encode(each)["input_ids"]) for each in sequences])
            found = None
            for rows in token_budget_batches(lengths, TOKENS):
                vectors = run(inputs_of(tokenizer, [sequences[row] for row in rows]))
                if found is None:
                    found = np.empty((len(sequences), vectors.shape[1]), np.float32)
                found[rows] = vectors
            assert found is not None
            return found

        yield f"onnxruntime, {name}", encode


def packed(
    model: RecformerForSeqRec | RecformerForCatalogue, tokenizer: RecformerTokenizer
) -> Encode:
    """The packed encoder, and the head behind it."""

    def encode(sequences: Sequence[Sequence[Item]]) -> NDArray[np.float32]:
        headed = isinstance(model, RecformerForCatalogue)
        if headed or all(len(each) == 1 for each in sequences):
            store = ItemsInMemory.of([item for (item,) in sequences], tokenizer)
            vectors = encode_items(model.longformer, store, progress=False)
            if isinstance(model, RecformerForCatalogue):
                vectors = model.head.text_vectors(vectors, token_bags(store))
            return vectors.numpy()
        store = ItemsInMemory.of([item for each in sequences for item in each], tokenizer)
        borders = np.cumsum([len(each) for each in sequences])
        rows = np.split(np.arange(len(store)), borders[:-1])
        lengths = np.array([1 + int(store.lengths[row].sum()) for row in rows])
        found = np.empty((len(rows), model.config.hidden_size), np.float32)
        for batch in token_budget_batches(lengths, TOKENS):
            tokens = pack_sequences(store, [rows[row] for row in batch], model.config)
            found[batch] = model.longformer.encode(tokens).numpy()
        return found

    return encode


@torch.no_grad()
def figures(
    model: RecformerForSeqRec | RecformerForCatalogue,
    folder: ProcessedFolder,
    encode: Encode,
    users: NDArray[np.int64],
) -> tuple[NDArray[np.float64], float]:
    """NDCG@10 of each user, and items encoded a second."""
    started = time.perf_counter()
    vectors = torch.from_numpy(encode([[item] for item in folder.items]))
    speed = len(folder.items) / (time.perf_counter() - started)
    examples = folder.eval_examples("test")
    chosen = [examples.histories[int(row)] for row in users]  # item ids, oldest first
    additions = None
    if isinstance(model, RecformerForCatalogue):
        vectors = model.head.item_vectors(vectors)
        histories = histories_of(chosen, model.head.options.max_history)
        user_vectors = model.head.user_vectors(histories, vectors)
        known = vectors[histories.distinct].double()
        cosines = (user_vectors[histories.rows].double() * known).sum(dim=-1)
        added = model.head.history_additions(histories, cosines)
        additions = (histories.rows, histories.distinct, added)
    else:
        texts = [[folder.items[item] for item in history] for history in chosen]
        user_vectors = torch.from_numpy(encode(texts))
    ranks = rank_by_vectors(user_vectors, vectors, examples.targets[users], additions=additions)
    return per_user_metrics(ranks, (10,))["NDCG@10"], speed


def load(
    path: str, pooler: str | None
) -> tuple[RecformerForSeqRec | RecformerForCatalogue, RecformerTokenizer]:
    """A finetuned folder with a head, or anything that finetuning can start from."""
    config = Path(path) / "config.json"
    if config.is_file() and '"head": {' in config.read_text(encoding="utf-8"):
        model = RecformerForCatalogue.from_pretrained(path).eval()
        return model, RecformerTokenizer.from_pretrained(path, model.config)
    overrides = {} if pooler is None else {"pooler_type": pooler}
    started, tokenizer, _ = load_start_model(RecformerForSeqRec, path, path, None, False, overrides)
    return started.eval(), tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True)
    parser.add_argument("--data_path", required=True)
    parser.add_argument("--users", type=int, help="test users, drawn by seed 0 (default: all)")
    parser.add_argument("--pooler_type", help="of a language model")
    parser.add_argument("--threads", type=int)
    args = parser.parse_args()
    pin_threads(args.threads)
    keep_freed_memory()
    model, tokenizer = load(args.model, args.pooler_type)
    folder = ProcessedFolder.load(Path(args.data_path))
    users = np.arange(len(folder.eval_examples("test")))
    if args.users is not None and args.users < len(users):
        users = np.sort(np.random.default_rng(0).choice(users, args.users, replace=False))
    with tempfile.TemporaryDirectory() as place:
        export_encoder(model, tokenizer, folder.items, Path(place, "onnx"), args.model, int8=True)
        cases = [("packed encoder", packed(model, tokenizer))]
        cases += encoders(model, tokenizer, Path(place, "onnx"))
        first = None
        print(
            f"{len(users):,} users, {len(folder.items):,} items, {torch.get_num_threads()} threads"
        )
        print(f"{'':22} NDCG@10  difference (95 %)       items/s")
        for name, encode in cases:
            values, speed = figures(model, folder, encode, users)
            first = values if first is None else first
            change = values - first
            error = 1.96 * change.std(ddof=1) / len(change) ** 0.5
            print(
                f"{name:22} {values.mean():.5f}  {change.mean():+.5f} +- {error:.5f}  {speed:9.0f}",
                flush=True,
            )


if __name__ == "__main__":
    exit_with_message(main)
