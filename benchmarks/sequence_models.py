"""Training of the id-based baselines against the usual ways of doing it, in one run.

    python -m benchmarks gsasrec
    python -m benchmarks.sequence_models --data_path FOLDER --rectools_python PYTHON \
        --replay_python PYTHON

The first: training steps at the size of MovieLens-1M (128 sequences of 200 items, 3,416 items, 128
dimensions, 2 blocks), forward, backward and AdamW. gSASRec with 256 negatives a position, against
the same network whose loss gathers the 257 item vectors of every position, with the published form
of gBCE; same negatives. SASRec with the full softmax and a dropout of 0.5, against the same network
in plain torch: padded attention, `torch.nn.Dropout`, the cross-entropy of all scores. Same weights;
the losses are compared first, without dropout. The two take turns; medians count.

The second: an epoch of SASRec with full softmax (128 dimensions, 2 blocks, 50 items, batch 256) on
a processed folder against `SASRecModel` of RecTools 0.19 and `SasRec` of RePlay 0.22, one after the
other: ours and RecTools' by what two epochs take more than one, after a fit that warms up (ours
three times, the median), RePlay's by the second epoch of a fit. RecTools needs numpy below 2,
RePlay older pyarrow and scikit-learn, so each runs as a subprocess in an environment of its own:

    python -m venv rectools && rectools/bin/pip install "rectools[torch]==0.19.0" "numpy<2"
    python -m venv replay && replay/bin/pip install "replay-rec[torch]==0.22.0"
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.nn import functional as F

from baselines.sequence.collators import CausalCollator, ItemSequences
from baselines.sequence.item_table import ItemTable
from baselines.sequence.recommender import Objective, SequenceRecommender
from baselines.sequence.sasrec import SASRec, SelfAttention
from benchmarks.measure import REPEATS, Report, add_flags, in_turns, pin_threads, row
from recformer.cli import exit_with_message
from recformer.files import UserError
from recformer.models.dropout import Dropout
from recformer.models.losses import sample_negatives

NUM_ITEMS, LENGTH, HIDDEN, NEGATIVES, CALIBRATION = 3416, 200, 128, 256, 0.75
DROPOUT = 0.5

RECTOOLS = """
import json, sys, time
import pandas as pd, torch
from rectools import Columns
from rectools.dataset import Dataset
from rectools.models import SASRecModel
torch.set_num_threads(int(sys.argv[2]))
rows = [(int(u), i, 1.0, t) for u, s in json.load(open(sys.argv[1])).items() if len(s) > 1
        for t, i in enumerate(s)]
frame = pd.DataFrame(rows, columns=[Columns.User, Columns.Item, Columns.Weight, Columns.Datetime])
frame[Columns.Datetime] = pd.to_datetime(frame[Columns.Datetime], unit="D")
dataset = Dataset.construct(frame)
times = []
for epochs in (1, 1, 2):
    model = SASRecModel(n_factors=128, n_blocks=2, n_heads=2, session_max_len=50, batch_size=256,
                        loss="softmax", lr=1e-3, epochs=epochs, verbose=0, deterministic=False)
    started = time.perf_counter()
    model.fit(dataset)
    times.append(time.perf_counter() - started)
print(json.dumps(times[2] - times[1]))
"""

REPLAY = """
import json, logging, sys, tempfile, time, warnings
warnings.simplefilter("ignore")
logging.disable(logging.WARNING)
import lightning, pandas as pd, torch
from replay.data import FeatureHint, FeatureSource, FeatureType
from replay.data.nn import ParquetModule, TensorFeatureInfo, TensorFeatureSource, TensorSchema
from replay.nn.lightning import LightningModule
from replay.nn.sequential import SasRec
from replay.nn.transform.template import make_default_sasrec_transforms
torch.set_num_threads(int(sys.argv[2]))
sequences = [s for s in json.load(open(sys.argv[1])).values() if len(s) > 1]
number = {item: n for n, item in enumerate(sorted({item for s in sequences for item in s}))}
schema = TensorSchema(TensorFeatureInfo(
    "item_id", FeatureType.CATEGORICAL, is_seq=True, feature_hint=FeatureHint.ITEM_ID,
    feature_sources=[TensorFeatureSource(FeatureSource.INTERACTIONS, "item_id")],
    cardinality=len(number), padding_value=len(number), embedding_dim=128))
ends = []
class Clock(lightning.Callback):
    def on_train_epoch_end(self, trainer, module):
        ends.append(time.perf_counter())
with tempfile.TemporaryDirectory() as folder:
    file = folder + "/train.parquet"
    pd.DataFrame({"item_id": [[number[i] for i in s[-51:]] for s in sequences]}).to_parquet(file)
    data = ParquetModule(
        256, {"train": {"item_id": {"shape": 51, "padding": len(number)}}},
        {"train": make_default_sasrec_transforms(schema)["train"]}, train_path=file)
    model = SasRec.from_params(schema, embedding_dim=128, num_heads=2, num_blocks=2,
                               max_sequence_length=50, dropout=0.2)
    trainer = lightning.Trainer(
        max_epochs=2, accelerator="cpu", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, limit_val_batches=0,
        callbacks=[Clock()])
    trainer.fit(LightningModule(model), datamodule=data)
print(json.dumps(ends[1] - ends[0]))
"""


def gathered_loss(users: Tensor, table: Tensor, labels: Tensor, negatives: Tensor) -> Tensor:
    """gBCE as published: vectors of all candidates gathered, a clamped power in float64."""
    candidates = torch.cat([labels[:, None], negatives], dim=1)  # (P, 1 + K)
    scores = torch.einsum("pd,pkd->pk", users, F.embedding(candidates, table))
    alpha = negatives.shape[1] / (len(table) - 1)
    beta = alpha * ((1 - 1 / alpha) * CALIBRATION + 1 / alpha)
    least = 1e-10
    probability = scores[:, :1].double().sigmoid().clamp(least, 1 - least)
    most = torch.finfo(torch.float64).max
    adjusted = probability.pow(-beta).clamp(1 + least, most)
    positive = (1 / (adjusted - 1)).clamp(least, most).log()
    logits = torch.cat([positive, scores[:, 1:].double()], dim=1)
    truth = torch.zeros_like(logits)
    truth[:, 0] = 1
    return F.binary_cross_entropy_with_logits(logits, truth)


def rows(quick: bool) -> Iterator[dict[str, Any]]:
    """Training steps of gSASRec and of SASRec, each beside the usual way."""
    batch_size, length = (4, 8) if quick else (128, LENGTH)
    torch.manual_seed(0)
    sequences = torch.randint(NUM_ITEMS, (batch_size, length + 1))
    histories = ItemSequences(
        items=sequences[:, :-1].flatten(),
        offsets=torch.arange(batch_size + 1) * length,
        predict=torch.arange(batch_size * length),
    )
    labels = sequences[:, 1:].flatten()
    negatives = sample_negatives(labels, NUM_ITEMS, NEGATIVES)

    def two_models(objective: Objective) -> list[SequenceRecommender]:
        models = []
        for _ in range(2):
            torch.manual_seed(1)
            tables = [ItemTable(NUM_ITEMS, HIDDEN) for _ in range(2)]
            network = SASRec(HIDDEN, 2, 1, length, 0.0)
            models.append(SequenceRecommender(network, tables[0], objective, HIDDEN, tables[1]))
        return models

    def compared(
        what: str, peer: str, steps: list[Callable[[], float]], ready: Callable[[], None]
    ) -> dict[str, Any]:
        losses = steps[0](), steps[1]()  # also the warm-up
        if abs(losses[0] - losses[1]) > 1e-5:
            raise AssertionError(f"the losses differ: {losses}")
        ready()
        ours, theirs = in_turns(REPEATS, *steps)
        size = f"{batch_size} x {length} items"
        note = f"losses {losses[0]:.6f} and {losses[1]:.6f}"
        count = batch_size * length
        return row(what.format(size), ours, peer, theirs, amount=count, unit="positions", note=note)

    ours, theirs = two_models(Objective("gbce", NEGATIVES, CALIBRATION))
    yield compared(
        f"gSASRec training step, {{}}, {NEGATIVES} negatives",
        f"{NEGATIVES + 1} vectors gathered a position",
        [
            training_step(ours, lambda: ours.loss(ours.predictions(histories), labels, negatives)),
            training_step(
                theirs,
                lambda: gathered_loss(
                    theirs.predictions(histories), theirs.scored.all(), labels, negatives
                ),
            ),
        ],
        lambda: None,
    )

    fast, plain = two_models(Objective("softmax"))
    dropouts = [module for module in plain.modules() if isinstance(module, Dropout)]
    for module in dropouts:
        module.forward = partial(torch.nn.Dropout.forward, module)  # type: ignore[method-assign]

    def with_dropout() -> None:
        for module in (*fast.modules(), *plain.modules()):
            if isinstance(module, Dropout):
                module.p = DROPOUT
            elif isinstance(module, SelfAttention):
                module.dropout = DROPOUT

    def plain_loss() -> Tensor:
        with patch.dict(os.environ, RECFORMER_KERNEL="0"):
            users = plain.predictions(histories)
        return F.cross_entropy(users @ plain.scored.all().T, labels)

    yield compared(
        "SASRec training step, {}, full softmax",
        "the same in plain torch",
        [
            training_step(fast, lambda: fast.loss(fast.predictions(histories), labels)),
            training_step(plain, plain_loss),
        ],
        with_dropout,
    )


def training_step(model: SequenceRecommender, loss: Callable[[], Tensor]) -> Callable[[], float]:
    """Forward, backward and AdamW; returns the loss."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)

    def step() -> float:
        optimizer.zero_grad()
        value = loss()
        value.backward()
        optimizer.step()
        return value.item()

    return step


def sasrec_epochs(data_path: Path, peers: dict[str, tuple[str, str]]) -> Iterator[dict[str, Any]]:
    """Rows: seconds of an epoch, ours and of each peer.

    Args:
        data_path: processed folder.
        peers: interpreter and program of each, by name.

    Raises:
        UserError: an environment cannot run its peer.
    """
    from baselines.models import build
    from baselines.settings import settings_of
    from recformer.data.datamodule import SeqRecDataModule
    from recformer.data.processed import ProcessedFolder
    from recformer.training.lit import LitWrapper
    from recformer.training.trainer import build_trainer

    folder = ProcessedFolder.load(data_path)
    built = build("sasrec", settings_of("sasrec", {}), folder)
    assert isinstance(built.train_collator, CausalCollator)
    data = SeqRecDataModule(folder, built.train_collator, built.eval_collator, batch_size=256)
    times = []
    for epochs in (1, 1, 2, 1, 2, 1, 2):
        module = LitWrapper(built.model, learning_rate=1e-3, schedule="constant")
        with tempfile.TemporaryDirectory() as scratch:  # Lightning leaves a checkpoint
            trainer = build_trainer(Path(scratch), epochs, "cpu", 1, "32-true", [])
            trainer.limit_val_batches = 0
            started = time.perf_counter()
            trainer.fit(module, data.train_dataloader())
            times.append(time.perf_counter() - started)
    ours = statistics.median(two - one for one, two in zip(times[1::2], times[2::2]))
    for name, (python, program) in peers.items():
        theirs = peer_epoch(name, python, program, data_path / "train.json")
        yield row(f"SASRec epoch on {data_path.name}, full softmax", ours, name, theirs)


def peer_epoch(name: str, python: str, program: str, train: Path) -> float:
    """Seconds of an epoch of a peer, which its program prints last.

    Raises:
        UserError: the environment cannot run it.
    """
    command = [python, "-c", program, str(train), str(torch.get_num_threads())]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        raise UserError(f"{python} could not run {name}: {error}") from error
    if done.returncode != 0:
        raise UserError(f"{python} could not run {name}: {done.stderr.strip()[-300:]}")
    return float(json.loads(done.stdout.strip().splitlines()[-1]))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.sequence_models",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--data_path", type=Path, required=True, help="processed folder")
    for peer in ("RecTools", "RePlay"):
        parser.add_argument(
            f"--{peer.lower()}_python", metavar="PYTHON", help=f"of an environment that has {peer}"
        )
    add_flags(parser)
    args = parser.parse_args(argv)
    given = {
        "RecTools 0.19": (args.rectools_python, RECTOOLS),
        "RePlay 0.22": (args.replay_python, REPLAY),
    }
    peers = {name: peer for name, peer in given.items() if peer[0]}
    if not peers:
        parser.error("no peer: give --rectools_python, --replay_python or both")
    report = Report(pin_threads(args.threads), args.json)
    command = "python -m benchmarks.sequence_models --data_path FOLDER --PEER_python PYTHON"
    report.add("sequence_models", sasrec_epochs(args.data_path, peers), command)


if __name__ == "__main__":
    exit_with_message(main)
