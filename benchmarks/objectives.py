"""Architectures and objectives of sequence models: time of an epoch beside SASRec's, and padding.

    python -m benchmarks objectives
    python -m benchmarks.objectives --data_path FOLDER

Both sides of a row train on the same batches (128 users; forward, backward, AdamW), full softmax,
128 dimensions, 2 layers, 2 heads; feed-forward layers are 128 wide, as SASRec's, so that the
networks are of equal size but for the projection behind attention, which SASRec has not. The
generated data have lengths as Scientific's (5 items on average, 50 at most). A note gives the
epoch in times of the peer's, and the share of padding among what is computed. "one padded batch" is
the same model with every sequence padded to the longest of its batch.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from baselines.models import build
from baselines.sequence import padding
from baselines.settings import settings_of
from benchmarks.measure import REPEATS, Report, add_flags, in_turns, pin_threads, row
from recformer.cli import exit_with_message
from recformer.data.batches import TrainBatch
from recformer.data.datamodule import SeqRecDataModule
from recformer.data.processed import ProcessedFolder, Sequences, write_processed

BATCH_SIZE, HIDDEN, NUM_ITEMS = 128, 128, 4385
SASREC = ("SASRec", "sasrec", {})
CASES: list[tuple[str, str, dict[str, Any]]] = [
    ("gpt2 clm", "transformer", {}),
    ("llama clm", "transformer", {"arch": "llama"}),
    ("bert mlm", "bert4rec", {}),
    ("xlnet clm", "transformer", {"arch": "xlnet"}),
    ("xlnet mlm", "transformer", {"arch": "xlnet", "objective": "mlm"}),
    ("xlnet plm", "transformer", {"arch": "xlnet", "objective": "plm"}),
    ("electra mlm", "transformer", {"arch": "electra", "objective": "mlm"}),
    ("electra rtd", "transformer", {"arch": "electra", "objective": "rtd"}),
    ("gru4rec", "gru4rec", {}),
]
EXTRA = {"electra rtd": "electra mlm", "xlnet plm": "xlnet mlm"}  # what an objective adds


class Training:
    """A model with its batches of an epoch.

    Args:
        name: of the row.
        model, own: as `build` takes them.
        folder: the data.
        num_batches: of an epoch at most.
    """

    def __init__(
        self, name: str, model: str, own: dict[str, Any], folder: ProcessedFolder, num_batches: int
    ) -> None:
        self.name = name
        width = {"feed_forward_size": HIDDEN} if model in ("transformer", "bert4rec") else {}
        torch.manual_seed(0)
        built = build(model, settings_of(model, {"hidden_size": HIDDEN} | width | own), folder)
        self.model: Any = built.model
        assert built.train_collator is not None
        data = SeqRecDataModule(folder, built.train_collator, built.eval_collator, BATCH_SIZE)
        loader = zip(range(num_batches), data.train_dataloader(), strict=False)
        self.batches: list[TrainBatch] = [batch for _, batch in loader]
        weights = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(weights, lr=1e-3, fused=True)

    def epoch(self) -> None:
        """All steps."""
        for batch in self.batches:
            self.optimizer.zero_grad()
            loss = self.model.training_loss(batch)
            (loss["loss"] if isinstance(loss, dict) else loss).backward()
            self.optimizer.step()

    def padded_epoch(self) -> None:
        """All steps, every sequence padded to the longest of its batch."""
        with one_call():
            self.epoch()

    @property
    def num_items(self) -> int:
        """Items of all batches."""
        return sum(len(batch.history.items) for batch in self.batches)

    def padding(self) -> float:
        """Share of padding among what the network computes."""
        groups = [padding.length_groups(batch.history.offsets) for batch in self.batches]
        return 1 - self.num_items / sum(group.mask.numel() for g in groups for group in g)

    @property
    def size(self) -> int:
        """Trained weights of the network, item vectors apart."""
        return sum(p.numel() for p in self.model.network.parameters() if p.requires_grad)


@contextmanager
def one_call() -> Iterator[None]:
    """Batches are padded whole."""
    kept = padding.CALL_COST["cpu"]
    padding.CALL_COST["cpu"] = 2**40
    try:
        yield
    finally:
        padding.CALL_COST["cpu"] = kept


def rows(quick: bool) -> Iterator[dict[str, Any]]:
    """Rows on generated data."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = generated(Path(scratch), 40 if quick else 16 * BATCH_SIZE)
        yield from rows_of(folder, 1 if quick else 8)


def rows_of(folder: ProcessedFolder, num_batches: int) -> Iterator[dict[str, Any]]:
    """Every architecture against SASRec and against whole batches, and what objectives add."""
    peer = Training(*SASREC, folder, num_batches)
    made = {case[0]: Training(*case, folder, num_batches) for case in CASES}
    for ours in made.values():
        note = f"{ours.size:,} and {peer.size:,} weights"
        yield _row(ours, ours.epoch, peer.name, peer.epoch, note)
    for name in ("gpt2 clm", "bert mlm"):
        ours = made[name]
        with one_call():
            before = ours.padding()
        note = f"padding {ours.padding():.0%}, of whole batches {before:.0%}"
        yield _row(ours, ours.epoch, "one padded batch", ours.padded_epoch, note)
    for name, other in EXTRA.items():
        yield _row(made[name], made[name].epoch, other, made[other].epoch)


def _row(
    ours: Training, run: Callable[[], None], peer: str, other: Callable[[], None], note: str = ""
) -> dict[str, Any]:
    seconds, peer_seconds = in_turns(REPEATS, run, other)
    note = f"{seconds / peer_seconds:.2f} x {peer}" + (f"; {note}" if note else "")
    what = f"epoch of {ours.name}, {len(ours.batches)} batches"
    return row(what, seconds, peer, peer_seconds, amount=ours.num_items, unit="items", note=note)


def generated(path: Path, num_users: int) -> ProcessedFolder:
    """Sequences whose lengths and item counts are spread as Scientific's."""
    generator = np.random.default_rng(0)
    lengths = np.minimum(3 + generator.geometric(0.33, num_users) ** 1.3, 50).astype(int)
    popularity = 1 / (np.arange(NUM_ITEMS) + 30)
    popularity /= popularity.sum()
    lists = [generator.choice(NUM_ITEMS, n, p=popularity).tolist() for n in lengths]
    write_processed(
        path,
        train=Sequences.from_lists(lists),
        val=Sequences.from_lists([[0]] * num_users),
        test=Sequences.from_lists([[0]] * num_users),
        user_names=[str(user) for user in range(num_users)],
        asins=[str(item) for item in range(NUM_ITEMS)],
        meta={},
        dataset={},
    )
    return ProcessedFolder.load(path)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.objectives",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--data_path", type=Path, required=True, help="processed folder")
    parser.add_argument("--batches", type=int, default=10**9, help="of an epoch; default: all")
    add_flags(parser)
    args = parser.parse_args(argv)
    report = Report(pin_threads(args.threads), args.json)
    rows = rows_of(ProcessedFolder.load(args.data_path), args.batches)
    report.add("objectives", rows, "python -m benchmarks.objectives --data_path FOLDER")


if __name__ == "__main__":
    exit_with_message(main)
