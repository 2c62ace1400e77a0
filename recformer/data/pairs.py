"""Pairs of pretraining: a history and the item that followed it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import cycle, islice
from typing import Any

import numpy as np
import torch
from lightning import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from recformer.config import RecformerConfig
from recformer.data.batches import NO_LABEL, PairBatch
from recformer.data.collators import pack_sequences
from recformer.data.draws import uniform
from recformer.data.items import TokenizedItems
from recformer.data.masking import WholeWordMasker
from recformer.data.pretraining import SPLITS, PretrainingData
from recformer.data.processed import Sequences
from recformer.data.token_batches import cut_by_tokens
from recformer.packing import PackedTokens
from recformer.processes import rank_and_world

# Streams of random numbers that belong to a sequence in an epoch.
TARGET_STREAM = 0


@dataclass(frozen=True)
class PairExample:
    """History and target, and the seed that masks are drawn from."""

    row: int
    history: np.ndarray  # (n,) item ids, oldest first, n >= 1
    target: int
    seed: int


def target_positions(lengths: np.ndarray, seeds: np.ndarray) -> np.ndarray:
    """Uniform places of the targets in [max(1, (n - 1) // 2), n - 1] (paper, section 2.3.2).

    The published code also draws 0, which leaves an empty history (a defect).

    Args:
        lengths: (P,) n, at least 2.
        seeds: (P,) uint64.
    """
    least = np.maximum(1, (lengths - 1) // 2)
    draw = uniform(seeds, np.zeros_like(lengths), TARGET_STREAM)
    return least + (draw * (lengths - least)).astype(np.int64)


def pair_seeds(seed: int, epoch: int, rows: np.ndarray) -> np.ndarray:
    """Seed of each sequence in an epoch, (P,) uint64, whatever its batch or process."""
    base = np.random.default_rng([seed, epoch]).integers(2**63, dtype=np.uint64)
    numbers = uniform(np.full(len(rows), base), rows, TARGET_STREAM)
    return (numbers * 2.0**53).astype(np.uint64)


class PairDataset(Dataset):
    """Pairs of a split, fetched a batch at a time by (row, seed)."""

    def __init__(self, sequences: Sequences) -> None:
        self.sequences = sequences

    def __getitem__(self, keys: list[tuple[int, int]]) -> list[PairExample]:
        rows, seeds = (np.array(column) for column in zip(*keys, strict=True))
        lengths = self.sequences.offsets[rows + 1] - self.sequences.offsets[rows]
        places = target_positions(lengths, seeds.astype(np.uint64))
        examples = []
        for row, place, seed in zip(rows.tolist(), places.tolist(), seeds.tolist(), strict=True):
            items = self.sequences[row]
            examples.append(PairExample(row, items[:place], int(items[place]), seed))
        return examples


class PairBatchSampler(Sampler[list[tuple[int, int]]]):
    """Batches of (row, seed), a function of seed, epoch and processes times batch size alone.

    Batches are drawn for all processes together and dealt out, so that W processes with batches of
    b train on what one process with batches of W * b does. Every process gets equally many pairs.

    Args:
        sequences, token_ends: of a split; see `PretrainingData`.
        config: `max_item_embeddings` and `max_token_num` are read.
        batch_size: pairs a process and batch.
        max_tokens: tokens a process and batch instead, of both sides; pairs of about the same
            length then go together.
        seed: of order and targets.
        shuffle: otherwise the order of the file, the same targets every epoch.
    """

    def __init__(
        self,
        sequences: Sequences,
        token_ends: np.ndarray,
        config: RecformerConfig,
        batch_size: int,
        max_tokens: int | None,
        seed: int,
        shuffle: bool = True,
    ) -> None:
        self.sequences, self.token_ends = sequences, token_ends
        self.max_items, self.max_token_num = config.max_item_embeddings - 1, config.max_token_num
        self.batch_size, self.max_tokens = batch_size, max_tokens
        self.seed, self.shuffle = seed, shuffle
        self.epoch = 0
        self.served = 0  # batches of this epoch that were handed out, by this run or before it
        self._resume: dict[str, int] | None = None
        self._num_batches: dict[int, int] = {}

    def set_epoch(self, epoch: int) -> None:
        if self.shuffle:
            self.epoch = epoch

    def begin(self) -> None:
        """Start the epoch, or where a restored state says that it stopped."""
        resume, self._resume = self._resume, None
        goes_on = resume is not None and resume["epoch"] == self.epoch
        self.served = resume["served"] if resume is not None and goes_on else 0

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self.epoch, "served": self.served}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self._resume = dict(state)

    def __len__(self) -> int:
        return self.num_batches(rank_and_world()[1])

    def num_batches(self, world: int) -> int:
        """Batches an epoch with `world` processes.

        By tokens: counted on epoch 0, then the same for every epoch, although targets and tokens
        differ.
        """
        if self.max_tokens is None:
            full, rest = divmod(len(self.sequences), self.batch_size * world)
            return full + (rest >= world)
        if world not in self._num_batches:
            self._num_batches[world] = sum(1 for _ in self._global_batches(0, world))
        return self._num_batches[world]

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        rank, world = rank_and_world()
        start = self.served
        # An epoch that makes fewer batches begins again; Lightning would leave out its validation.
        batches = islice(cycle(self._global_batches(self.epoch, world)), len(self))
        for number, rows in enumerate(batches):
            if number >= start:
                rows = rows[rank::world]
                seeds = pair_seeds(self.seed, self.epoch, rows)
                yield list(zip(rows.tolist(), seeds.tolist(), strict=True))

    def _global_batches(self, epoch: int, world: int) -> Iterator[np.ndarray]:
        """Rows of each batch over all processes, as many as the processes divide."""
        generator = np.random.default_rng([self.seed, epoch, 1])
        order = np.arange(len(self.sequences))
        if self.shuffle:
            order = generator.permutation(order)
        if self.max_tokens is not None:
            draws = np.random.default_rng([self.seed, epoch, 2]) if self.shuffle else None
            tokens = self.tokens(order, epoch)
            for places in cut_by_tokens(tokens, self.max_tokens, world, draws):
                yield order[places]
            return
        for start in range(0, len(order), self.batch_size * world):
            rows = order[start : start + self.batch_size * world]
            rows = rows[: len(rows) // world * world]
            if len(rows):
                yield rows

    def tokens(self, rows: np.ndarray, epoch: int) -> np.ndarray:
        """Tokens of both sides of each pair, (P,)."""
        offsets = self.sequences.offsets
        first = offsets[rows]
        places = target_positions(offsets[rows + 1] - first, pair_seeds(self.seed, epoch, rows))
        target = first + places
        oldest = np.maximum(first, target - self.max_items)
        history = self.token_ends[target] - self.token_ends[oldest]
        item = self.token_ends[target + 1] - self.token_ends[target]
        return np.minimum(history + 1, self.max_token_num) + np.minimum(
            item + 1, self.max_token_num
        )


class PretrainCollator:
    """Packed batches of pairs, with masked copies of their tokens where there is a masker.

    Labels are the targets' places in `pool`, or their ids without one.
    """

    def __init__(
        self,
        store: TokenizedItems,
        config: RecformerConfig,
        masker: WholeWordMasker | None,
        pool: np.ndarray | None = None,
    ) -> None:
        self.store, self.config, self.masker, self.pool = store, config, masker, pool

    def __call__(self, examples: Sequence[PairExample]) -> PairBatch:
        targets = np.array([example.target for example in examples])
        seeds = np.array([example.seed for example in examples], dtype=np.uint64)
        a = pack_sequences(self.store, [e.history for e in examples], self.config)
        b = pack_sequences(self.store, list(targets[:, None]), self.config)
        places = targets if self.pool is None else np.searchsorted(self.pool, targets)
        masked_a = None if self.masker is None else self.masker(a, seeds)
        masked_b = None if self.masker is None else self.masker(b, seeds + np.uint64(1))
        return PairBatch(
            labels=torch.from_numpy(places),
            a=a,
            b=b,
            target_ids=torch.from_numpy(targets),
            user_ids=torch.tensor([example.row for example in examples]),
            mlm_a=masked_a,
            mlm_b=masked_b,
            masked_before=(
                None
                if masked_a is None or masked_b is None
                else (_before(a, masked_a[1]), _before(b, masked_b[1]))
            ),
        )


def _before(packed: PackedTokens, labels: Tensor) -> np.ndarray:
    """Tokens that are to be predicted before each sequence, and all of them, int64 (B + 1,)."""
    found = np.append(0, np.cumsum(labels.numpy() != NO_LABEL))
    return found[packed.host_borders]


class ResumableLoader(DataLoader):
    """A loader of a `PairBatchSampler` that counts what it has handed out and can go on there."""

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        sampler: PairBatchSampler = self.sampler  # type: ignore[assignment]
        sampler.begin()
        for batch in super().__iter__():
            sampler.served += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        return self.sampler.state_dict()  # type: ignore[attr-defined]

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.sampler.load_state_dict(state)  # type: ignore[attr-defined]


class PretrainDataModule(LightningDataModule):
    """Loaders of pairs.

    Args:
        data: sequences and items.
        config: of the model.
        masker: None for no masked copies.
        batch_size, max_tokens, seed: see `PairBatchSampler`; validation has fixed counts.
        num_workers: loader processes; they share the mapped files.

    Attributes:
        pool: (N,) item ids that validation ranks, ascending: all that occur in the dev sequences.
        samplers: of "train" and "dev".
    """

    def __init__(
        self,
        data: PretrainingData,
        config: RecformerConfig,
        masker: WholeWordMasker | None,
        batch_size: int,
        max_tokens: int | None,
        num_workers: int,
        seed: int,
    ) -> None:
        super().__init__()
        self.pool = np.unique(data.sequences["dev"].items).astype(np.int64)
        self.num_workers = num_workers
        self.loaders: dict[str, Callable[[], DataLoader]] = {}
        self.samplers: dict[str, PairBatchSampler] = {}
        for split in SPLITS:
            training = split == "train"
            sampler = PairBatchSampler(
                data.sequences[split],
                data.token_ends[split],
                config,
                batch_size,
                max_tokens if training else None,
                seed,
                shuffle=training,
            )
            self.samplers[split] = sampler
            pool = None if training else self.pool
            collator = PretrainCollator(data.store, config, masker, pool)
            self.loaders[split] = partial(
                self._loader, PairDataset(data.sequences[split]), sampler, collator
            )

    def _loader(
        self, pairs: PairDataset, sampler: PairBatchSampler, collator: PretrainCollator
    ) -> DataLoader:
        return ResumableLoader(
            pairs,
            batch_size=None,  # the sampler yields whole batches; Lightning sets epochs on `sampler`
            sampler=sampler,
            collate_fn=collator,
            num_workers=self.num_workers,
            pin_memory=torch.cuda.is_available(),
        )

    # Lightning keeps the state of loaders too, but has made them before it restores it where the
    # length of the schedule depends on them.
    def state_dict(self) -> dict[str, int]:
        return self.samplers["train"].state_dict()

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        self.samplers["train"].load_state_dict(state_dict)

    def train_dataloader(self) -> DataLoader:
        return self.loaders["train"]()

    def val_dataloader(self) -> DataLoader:
        return self.loaders["dev"]()
