"""A processed folder whose few users are judged on what they were trained on.

A model that cannot learn a few hundred sequences by heart has a fault, or a learning rate that does
not suit it: no figure of it on held-out items means anything before.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from recformer.data.processed import EvalExamples, ProcessedFolder, Sequences
from recformer.data.sequences import offsets_of
from recformer.files import UserError, sha256_of


@dataclass(frozen=True, eq=False)
class OverfitView(ProcessedFolder):
    """Training sequences of some users of a folder, whose last items are the targets.

    `split_hash` is one of its own, so that figures are not laid beside those of held-out items.

    Attributes:
        offsets: int64 (U+1,), `interaction_offsets` of the whole folder.
    """

    offsets: np.ndarray

    @classmethod
    def of(cls, folder: ProcessedFolder, num_users: int, seed: int) -> OverfitView:
        """A seeded sample of the users that can be trained on; all others have no sequence.

        Raises:
            UserError: there are not so many.
        """
        users = folder.train_users
        if num_users > len(users):
            raise UserError(
                f"--overfit_users {num_users}: {folder.path} has {len(users)} users to train on"
            )
        chosen = np.sort(np.random.default_rng(seed).choice(users, num_users, replace=False))
        lengths = np.zeros(folder.num_users, dtype=np.int64)
        lengths[chosen] = folder.train.lengths[chosen]
        kept = np.repeat(lengths > 0, folder.train.lengths)
        nothing = Sequences(np.zeros(folder.num_users + 1, np.int64), np.zeros(0, np.int32))
        return cls(
            path=folder.path,
            train=Sequences(offsets_of(lengths), folder.train.items[kept]),
            val=nothing,
            test=nothing,
            num_users=folder.num_users,
            num_items=folder.num_items,
            items=folder.items,
            asins=folder.asins,
            split_hash=sha256_of(folder.split_hash, "overfit", *map(str, chosen.tolist())),
            num_without_metadata=folder.num_without_metadata,
            dataset=folder.dataset,
            offsets=folder.interaction_offsets(),
        )

    def interaction_offsets(self) -> np.ndarray:
        return self.offsets

    def eval_examples(self, split: Literal["val", "test"]) -> EvalExamples:
        """The last item of every training sequence after those before it, whatever the split."""
        users = self.train_users
        last = self.train.offsets[users + 1] - 1
        before = np.ones(len(self.train.items), dtype=bool)
        before[last] = False
        histories = Sequences(offsets_of(self.train.lengths[users] - 1), self.train.items[before])
        targets = self.train.items[last].astype(np.int64)
        return EvalExamples(users, histories, targets, 0, self.offsets[users])
