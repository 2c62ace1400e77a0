"""Items and short histories beside sentence-transformers: from texts to vectors, same sizes.

    python -m benchmarks sentences
    python -m benchmarks.sentences --size MiniLM --dtype bfloat16

Both sides get the same made-up items (title, brand and category, 45 tokens on average), single
("items") or ten to a text ("histories"), tokenise and encode them with the weights of one BERT of
random numbers, and give the mean of the tokens' states; ours also the vector of `<s>`, by which a
pretrained Recformer is read. Ours reads a history with window 64, the peer with attention among all
tokens. The peer sorts by length and pads batches of 32, as it does by default. "Histories of known
items" are histories as training and recommending read them: of items whose tokens are stored.

`--onnx_python` names the interpreter of an environment with `sentence-transformers[onnx]`, whose
8-bit ONNX backend then takes turns, too, in a process of its own; without it that of this
environment, if it is there.

Both run in glibc as it is, and once more in one that keeps freed memory, as our programs do; so do
all rows after these. The last ones set a training step beside one of transformers' `BertModel`: on
the same items, which it gets padded, and on as many of equal length, where neither side pads.
"""

from __future__ import annotations

import argparse
import gc
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from functools import partial
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import BertConfig, BertModel, BertTokenizerFast

from benchmarks.encoder import (
    DTYPES,
    LENGTHS,
    SIZES,
    build_ours,
    operations,
    pack,
    products,
    step_of,
)
from benchmarks.measure import (
    REPEATS,
    Report,
    Work,
    add_flags,
    in_turns,
    left_out,
    pin_threads,
    row,
    run_alone,
)
from recformer.cli import exit_with_message, keep_freed_memory
from recformer.data.collators import pack_sequences
from recformer.data.items import ItemsInMemory
from recformer.models import RecformerForSeqRec
from recformer.training.item_encoder import encode_items, token_budget_batches
from recformer.training.start import load_start_model

PEER = "sentence-transformers"
ITEMS_A_HISTORY = 10
TOKENS = 8192  # of a batch of ours
#: Items of the items' rows, and histories of the histories' rows, by size.
AMOUNTS = {"MiniLM": (512, 48), "base": (128, 12), "tiny": (8, 2)}
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
ATTRIBUTES = ("title", "brand", "category")

Item = dict[str, str]


def write_model(folder: Path, size: str) -> None:
    """A BERT of random weights and a tokenizer of as many words."""
    values = SIZES[size]
    words = [f"w{n}" for n in range(values["vocab_size"] - len(SPECIAL) - len(ATTRIBUTES))]
    folder.mkdir(parents=True, exist_ok=True)
    vocab = folder / "vocab.txt"
    vocab.write_text("\n".join([*SPECIAL, *ATTRIBUTES, *words]), encoding="utf-8")
    BertTokenizerFast(vocab=str(vocab), vocab_file=str(vocab)).save_pretrained(folder)
    torch.manual_seed(0)
    BertModel(BertConfig(**values), add_pooling_layer=False).save_pretrained(folder)


def made_up_items(number: int, num_words: int) -> list[Item]:
    """Items whose sentences have 18 to 64 tokens, most of them about 45."""
    generator = np.random.default_rng(0)
    items = []
    for total in generator.normal(41, 9, number).round().clip(14, 60).astype(int):
        words = [f"w{n}" for n in generator.integers(num_words, size=total)]
        title = min(30, total - 4)
        parts = (words[:title], words[title : title + 2], words[title + 2 :])
        items.append({name: " ".join(part) for name, part in zip(ATTRIBUTES, parts)})
    return items


def text_of(items: list[Item]) -> str:
    """The words that our sentence of the items has."""
    return " ".join(f"{name} {value}" for item in items for name, value in item.items())


class Ours:
    """Recformer with the weights of the BERT."""

    def __init__(self, folder: Path, dtype: str, pooler: str) -> None:
        self.model, self.tokenizer, _ = load_start_model(
            RecformerForSeqRec, str(folder), str(folder), None, False, {"pooler_type": pooler}
        )
        self.model.eval().to(getattr(torch, dtype))

    def lengths(self, sequences: list[list[Item]]) -> list[int]:
        store = self.tokenised(sequences)
        borders = np.cumsum([0, *map(len, sequences)])
        return [1 + int(store.lengths[a:b].sum()) for a, b in pairwise(borders)]

    def tokenised(self, sequences: list[list[Item]]) -> ItemsInMemory:
        return ItemsInMemory.of([item for each in sequences for item in each], self.tokenizer)

    def encode(self, sequences: list[list[Item]]) -> Tensor:
        return self.encode_stored(self.tokenised(sequences), sequences)

    @torch.no_grad()
    def encode_stored(self, store: ItemsInMemory, sequences: list[list[Item]]) -> Tensor:
        if len(store) == len(sequences):
            return encode_items(self.model, store, nullcontext(), progress=False)
        borders = np.cumsum([0, *map(len, sequences)])
        rows = [np.arange(a, b) for a, b in pairwise(borders)]
        lengths = np.array([1 + int(store.lengths[row].sum()) for row in rows])
        found = torch.empty(len(rows), self.model.config.hidden_size)
        for batch in token_budget_batches(lengths, TOKENS):
            tokens = pack_sequences(store, [rows[row] for row in batch], self.model.config)
            found[torch.from_numpy(batch)] = self.model.longformer.encode(tokens).float()
        return found


def peer_encoder(folder: Path, dtype: str) -> Callable[[list[list[Item]]], Any]:
    from sentence_transformers import SentenceTransformer

    peer = SentenceTransformer(str(folder), device="cpu").to(getattr(torch, dtype))
    peer.max_seq_length = 512

    def encode(sequences: list[list[Item]]) -> Any:
        texts = [text_of(each) for each in sequences]
        return peer.encode(texts, show_progress_bar=False, convert_to_tensor=True)

    return encode


class OnnxPeer:
    """sentence-transformers' ONNX backend in 8 bits, in a process of its own; a call encodes."""

    def __init__(self, python: str, folder: Path, sequences: list[list[Item]]) -> None:
        texts = folder / f"texts{len(sequences)}.json"
        texts.write_text(json.dumps([text_of(each) for each in sequences]), encoding="utf-8")
        command = [python, str(Path(__file__).with_name("onnx_peer.py")), str(folder), str(texts)]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self._expect("ready")

    def _expect(self, word: str) -> None:
        assert self.process.stdout is not None
        for said in self.process.stdout:  # libraries print, too
            if said.strip() == word:
                return
        raise SystemExit(f"error: onnx_peer.py ended with status {self.process.wait()}")

    def __call__(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write("go\n")
        self.process.stdin.flush()
        self._expect("done")

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def sequences_of(size: str, what: str) -> list[list[Item]]:
    items, histories = AMOUNTS[size]
    words = SIZES[size]["vocab_size"] - len(SPECIAL) - len(ATTRIBUTES)
    if what == "items":
        return [[item] for item in made_up_items(items, words)]
    made = made_up_items(histories * ITEMS_A_HISTORY, words)
    return [made[n : n + ITEMS_A_HISTORY] for n in range(0, len(made), ITEMS_A_HISTORY)]


def encoding_case(folder: str, side: str, size: str, dtype: str, what: str, kept: bool) -> Work:
    """A call of one side: avg, cls or peer; `kept`: freed memory is."""
    if kept:
        keep_freed_memory()
    sequences = sequences_of(size, what)
    if side == "peer":
        encode = peer_encoder(Path(folder), dtype)
        return Work(lambda: encode(sequences))
    ours = Ours(Path(folder), dtype, side)
    return Work(lambda: ours.encode(sequences))


def rows(quick: bool) -> Iterator[dict[str, Any]]:
    """Both sizes, both dtypes, items and histories, as imported and with freed memory kept."""
    yield from rows_of(("tiny",) if quick else ("MiniLM", "base"), DTYPES)


def rows_of(
    sizes: Sequence[str], dtypes: Sequence[str], onnx_python: str | None = None
) -> Iterator[dict[str, Any]]:
    """The rows of some; without sentence-transformers the training steps alone."""
    cases = [(size, dtype) for size in sizes for dtype in dtypes]
    for kept in (False, True) if find_spec("sentence_transformers") is not None else ():
        if kept:  # from here on
            keep_freed_memory()
        for size, dtype in cases:
            yield from _encoding(size, dtype, kept)
    if find_spec("sentence_transformers") is None:
        left_out("items and histories", "sentence-transformers")
        keep_freed_memory()
    if onnx_python is None and find_spec("optimum") and find_spec("sentence_transformers"):
        onnx_python = sys.executable
    for size in sizes if onnx_python else ():
        yield from _beside_onnx(size, str(onnx_python))
    for size, dtype in cases:
        yield _training(size, dtype, "items", LENGTHS["items"])
        equal = [round(sum(LENGTHS["items"]) / len(LENGTHS["items"]))] * len(LENGTHS["items"])
        yield _training(size, dtype, "items of equal length", equal)


def _encoding(size: str, dtype: str, kept: bool) -> Iterator[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch, "bert")
        write_model(folder, size)
        memory: dict[tuple[str, str], float | None] = {}
        for side in ("avg", "peer"):
            for what in ("items", "histories"):
                alone = run_alone(encoding_case, str(folder), side, size, dtype, what, kept)
                memory[side, what] = alone["peak_memory_mb"]
        sides = {pooler: Ours(folder, dtype, pooler) for pooler in ("avg", "cls")}
        peer = peer_encoder(folder, dtype)
        setting = ", freed memory kept" if kept else ""
        for what in ("items", "histories"):
            yield from _compare(size, dtype, what, setting, sides, peer, memory)


def _compare(
    size: str,
    dtype: str,
    what: str,
    setting: str,
    sides: dict[str, Ours],
    peer: Callable[[list[list[Item]]], Any],
    memory: dict[tuple[str, str], float | None],
) -> Iterator[dict[str, Any]]:
    sequences = sequences_of(size, what)
    config = sides["avg"].model.config
    lengths = sides["avg"].lengths(sequences)
    product, product_operations = products(config, min(sum(lengths), TOKENS), getattr(torch, dtype))
    calls = {(what, pooler): partial(ours.encode, sequences) for pooler, ours in sides.items()}
    if what == "histories":
        store = sides["avg"].tokenised(sequences)
        for pooler, ours in sides.items():
            calls["histories of known items", pooler] = partial(
                ours.encode_stored, store, sequences
            )
    *seconds, peer_seconds, product_seconds = in_turns(
        REPEATS, *calls.values(), lambda: peer(sequences), product
    )
    for (name, pooler), ours_seconds in zip(calls, seconds):
        needed = operations(config, lengths, pooled=pooler == "cls")
        share = needed / ours_seconds / (product_operations / product_seconds)
        first = (name, pooler) == (what, "avg")
        yield row(
            f"{size}, {name}, {'mean' if pooler == 'avg' else '<s>'}, {dtype}{setting}",
            ours_seconds,
            PEER,
            peer_seconds,
            amount=len(sequences),
            unit=what,
            share_of_ceiling=share,
            peak_memory_mb=memory["avg", what] if first else None,
            peer_peak_memory_mb=memory["peer", what] if first else None,
            note=f"{sum(lengths):,} tokens"
            if first
            else ""
            if name == what
            else "the peer tokenises, ours does not",
        )


def _beside_onnx(size: str, python: str) -> Iterator[dict[str, Any]]:
    """Ours in both dtypes beside the 8-bit ONNX backend."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch, "bert")
        write_model(folder, size)
        ours = {dtype: Ours(folder, dtype, "avg") for dtype in DTYPES}
        for what in ("items", "histories"):
            sequences = sequences_of(size, what)
            peer = OnnxPeer(python, folder, sequences)
            *seconds, peer_seconds = in_turns(
                REPEATS, *(partial(one.encode, sequences) for one in ours.values()), peer
            )
            peer.close()
            for dtype, ours_seconds in zip(ours, seconds):
                yield row(
                    f"{size}, {what}, mean, ours {dtype}, peer int8",
                    ours_seconds,
                    f"{PEER}, ONNX in 8 bits",
                    peer_seconds,
                    amount=len(sequences),
                    unit=what,
                )


def _training(size: str, dtype: str, what: str, lengths: list[int]) -> dict[str, Any]:
    """A training step on sequences of these lengths beside one of BERT, which gets them padded."""
    gc.collect()
    ours = build_ours(size)
    bert = BertModel(BertConfig(**SIZES[size]), add_pooling_layer=False)
    packed = pack(lengths, ours.config.vocab_size)
    ids = packed.to_padded(packed.input_ids)
    mask = packed.to_padded(torch.ones_like(packed.input_ids))
    bert.train()
    adam = torch.optim.AdamW(bert.parameters(), lr=1e-6, fused=True)

    def step() -> None:
        bert.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
            pooled = bert(ids, mask).last_hidden_state[:, 0]
        pooled.float()[:, 0].sum().backward()
        adam.step()

    seconds, peer_seconds = in_turns(REPEATS, step_of(ours, packed, dtype), step)
    return row(
        f"{size}, {what}, training step, {dtype}",
        seconds,
        "transformers BertModel",
        peer_seconds,
        amount=packed.num_tokens,
        unit="tokens",
    )


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=list(AMOUNTS), nargs="+", default=["MiniLM", "base"])
    parser.add_argument("--dtype", choices=DTYPES, nargs="+", default=DTYPES)
    parser.add_argument(
        "--onnx_python", metavar="PYTHON", help="that has sentence-transformers[onnx]"
    )
    add_flags(parser)
    args = parser.parse_args(argv)
    report = Report(pin_threads(args.threads), args.json)
    onnx = " --onnx_python PYTHON" if args.onnx_python else ""
    rows = rows_of(args.size, args.dtype, args.onnx_python)
    report.add("sentences", rows, f"python -m benchmarks.sentences{onnx}")


if __name__ == "__main__":
    exit_with_message(main)
