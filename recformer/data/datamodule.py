"""The one data module: any model trains on a processed folder with it and its own collators."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import cycle, islice
from typing import Any

import numpy as np
import torch.distributed
from lightning import LightningDataModule
from torch.utils.data import DataLoader, Dataset, Sampler

from recformer.data.collators import EvalExample, TrainExample
from recformer.data.processed import EvalExamples, ProcessedFolder, Sequences
from recformer.data.token_batches import HistoryTokens, cut_by_tokens
from recformer.files import UserError
from recformer.processes import rank_and_world

TEST_SEED = 19  # of the sample of test users: one for all runs

EVAL_BATCH_SIZE = 64  # users; memory only, no figure depends on it


class TrainDataset(Dataset):
    """Training sequences of at least two items, fetched a batch at a time by (row, seed) pairs.

    Args:
        sequences: one a user.
        user_ids: rows to train on, None for all of two items or more.
        starts: where each sequence begins among the folder's interactions.
        every_prefix: an example is a sequence up to one of its items, each but the first.
    """

    def __init__(
        self,
        sequences: Sequences,
        user_ids: np.ndarray | None = None,
        starts: np.ndarray | None = None,
        every_prefix: bool = False,
    ) -> None:
        self.sequences = sequences
        self.starts = sequences.offsets if starts is None else starts
        self.user_ids = np.flatnonzero(sequences.lengths >= 2) if user_ids is None else user_ids
        self.lengths = sequences.lengths[self.user_ids]
        if every_prefix:
            counts = self.lengths - 1  # of targets
            self.user_ids = np.repeat(self.user_ids, counts)
            place = np.arange(len(self.user_ids)) - np.repeat(np.cumsum(counts) - counts, counts)
            self.lengths = place + 2

    def __len__(self) -> int:
        return len(self.user_ids)

    def __getitem__(self, keys: list[tuple[int, int]]) -> list[TrainExample]:
        rows = [(int(self.user_ids[row]), int(self.lengths[row]), seed) for row, seed in keys]
        return [
            TrainExample(user, self.sequences[user][:length], seed, int(self.starts[user]))
            for user, length, seed in rows
        ]


class EvalDataset(Dataset):
    """One example per evaluated user; `rows` of all `examples`."""

    def __init__(self, examples: EvalExamples, rows: np.ndarray) -> None:
        self.examples = examples
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> EvalExample:
        examples, row = self.examples, int(self.rows[index])
        user_id, target = int(examples.user_ids[row]), int(examples.targets[row])
        start = 0 if examples.starts is None else int(examples.starts[row])
        return EvalExample(user_id, examples.histories[row], target, start)


class EpochBatchSampler(Sampler[list[tuple[int, int]]]):
    """Shuffled batches of (row, seed) that depend on (seed, epoch) alone.

    The order is drawn for the whole group of processes and each takes its part of every global
    batch, so that W processes x batch b see what one process x batch W*b sees; a last batch that
    does not divide by W loses the rest. Lightning calls `set_epoch`, also after a resume.

    Args:
        num_rows: rows to train on.
        batch_size: rows a process and batch.
        seed: of order and targets.
        max_tokens: tokens a process and batch instead; histories of about the same length then go
            together.
        tokens: of rows (P,) with seeds (P,), for `max_tokens`.
    """

    def __init__(
        self,
        num_rows: int,
        batch_size: int,
        seed: int,
        max_tokens: int | None = None,
        tokens: Callable[[np.ndarray, np.ndarray], np.ndarray] | None = None,
    ) -> None:
        self.num_rows = num_rows
        self.batch_size = batch_size
        self.seed = seed
        self.max_tokens, self.tokens = max_tokens, tokens
        self.epoch = 0
        self._num_batches: dict[int, int] = {}

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        """Batches an epoch.

        By tokens: counted on epoch 0, then the same for every epoch, although targets differ; one
        that makes more leaves some of its last window out.
        """
        _, world = rank_and_world()
        if self.max_tokens is None:
            full, rest = divmod(self.num_rows, self.batch_size * world)
            return full + (rest >= world)
        if world not in self._num_batches:
            order, seeds = self._drawn(0)
            self._num_batches[world] = sum(1 for _ in self._together(0, order, seeds, world))
        return self._num_batches[world]

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        rank, world = rank_and_world()
        order, seeds = self._drawn(self.epoch)
        # An epoch that makes fewer batches begins again; Lightning would leave out its validation.
        batches = cycle(self._together(self.epoch, order, seeds, world))
        for rows in islice(batches, len(self)):
            share = len(rows) // world
            if self.max_tokens is None:
                rows = rows[rank * share : (rank + 1) * share]
            else:
                rows = rows[rank::world]
            yield [(int(row), int(seeds[row])) for row in rows]

    def _drawn(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The order of the rows, and by row, whatever the order, the seed of its target."""
        generator = np.random.default_rng([self.seed, epoch])
        order = generator.permutation(self.num_rows)
        return order, generator.integers(2**62, size=self.num_rows)

    def _together(
        self, epoch: int, order: np.ndarray, seeds: np.ndarray, world: int
    ) -> Iterator[np.ndarray]:
        """Rows of each batch over all processes."""
        if self.max_tokens is not None and self.tokens is not None:
            tokens = self.tokens(order, seeds[order])
            draws = np.random.default_rng([self.seed, epoch, 2])
            for places in cut_by_tokens(tokens, self.max_tokens, world, draws):
                yield order[places]
            return
        for start in range(0, len(order), self.batch_size * world):
            rows = order[start : start + self.batch_size * world]
            if len(rows) >= world:
                yield rows


class ShareSampler(Sampler[int]):
    """Every `world`-th row from `rank` on: each row once over all processes, nothing repeated."""

    def __init__(self, num_rows: int) -> None:
        self.num_rows = num_rows

    def __len__(self) -> int:
        rank, world = rank_and_world()
        return len(range(rank, self.num_rows, world))

    def __iter__(self) -> Iterator[int]:
        rank, world = rank_and_world()
        return iter(range(rank, self.num_rows, world))


class LazyLoader(DataLoader):
    """A loader whose workers begin at the first batch that is asked for.

    Lightning makes the iterator of an epoch before it tells the sampler which epoch it is, or a
    resumed run which one it goes on with; workers would fetch batches of another order by then.
    """

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        yield from super().__iter__()


def _sample(count: int, size: int | None, seed: int) -> np.ndarray:
    """Ascending rows of a sample of `size` of `count`; of all where that is no fewer."""
    if size is None or size >= count:
        return np.arange(count)
    return np.sort(np.random.default_rng(seed).choice(count, size, replace=False))


class SeqRecDataModule(LightningDataModule):
    """Loaders over a processed folder.

    Args:
        folder: the data.
        train_collator: list of `TrainExample` -> batch for `training_loss`.
        eval_collator: list of `EvalExample` -> batch for `rank`.
        batch_size: users a process and step.
        num_workers: loader processes; they share the memory-mapped item store.
        eval_users: size of a seeded sample of validation users, None for all.
        seed: order of training, draws of targets, sample of validation users.
        test_users: size of a sample of test users, None for all; it depends on the data alone, so
            that runs over the same data judge the same users.
        max_tokens: tokens a process and step instead of `batch_size` users.
        tokens: of `max_tokens`; from sequences, and the rows to train on, to what counts tokens.
        every_prefix: an epoch has every beginning of a training sequence, see `TrainDataset`.

    Raises:
        UserError: nobody to train on, or nobody to evaluate.
    """

    def __init__(
        self,
        folder: ProcessedFolder,
        train_collator: Callable,
        eval_collator: Callable,
        batch_size: int,
        num_workers: int = 0,
        eval_users: int | None = None,
        seed: int = 42,
        test_users: int | None = None,
        max_tokens: int | None = None,
        tokens: Callable[[Sequences, np.ndarray], HistoryTokens] | None = None,
        every_prefix: bool = False,
    ) -> None:
        super().__init__()
        self.folder = folder
        self.train_collator = train_collator
        self.eval_collator = eval_collator
        self.num_workers = num_workers
        self.train_set = TrainDataset(
            folder.train, folder.train_users, folder.interaction_offsets(), every_prefix
        )
        self.train_sampler = EpochBatchSampler(
            len(self.train_set),
            batch_size,
            seed,
            max_tokens,
            None if tokens is None else tokens(self.train_set.sequences, self.train_set.user_ids),
        )
        validation, test = folder.eval_examples("val"), folder.eval_examples("test")
        self.val_set = EvalDataset(validation, _sample(len(validation), eval_users, seed))
        self.test_set = EvalDataset(test, _sample(len(test), test_users, TEST_SEED))
        for name, examples in (("val", self.val_set), ("test", self.test_set)):
            if len(examples) == 0:
                raise UserError(f"{folder.path} has no user with a {name} target and a history")
        if len(self.train_set) == 0:
            raise UserError(f"{folder.path} has no training sequence of two items or more")

    def train_dataloader(self) -> DataLoader:
        return LazyLoader(
            self.train_set,
            batch_size=None,  # the sampler yields whole batches; Lightning sets epochs on `sampler`
            sampler=self.train_sampler,
            collate_fn=self.train_collator,
            num_workers=self.num_workers,
            pin_memory=torch.cuda.is_available(),
        )

    def _eval_dataloader(self, rows: EvalDataset) -> DataLoader:
        return DataLoader(
            rows,
            batch_size=EVAL_BATCH_SIZE,
            sampler=ShareSampler(len(rows)),
            collate_fn=self.eval_collator,
            num_workers=self.num_workers,
            pin_memory=torch.cuda.is_available(),
        )

    def val_dataloader(self) -> DataLoader:
        return self._eval_dataloader(self.val_set)

    def test_dataloader(self) -> DataLoader:
        return self._eval_dataloader(self.test_set)
