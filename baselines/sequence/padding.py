"""Sequences laid end to end as a few padded batches, each of similar lengths.

Transformers of Hugging Face read padded batches. Padding every sequence to the longest of its
batch makes most of what they compute padding; groups of similar lengths, one call each, do not, at
the same outputs.

Shapes: B sequences, T items laid end to end, G sequences of a group, L the longest of it, D hidden.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

# What a further call costs, in items of padding: 2 layers of 128 on 2 CPU cores take 2 to 3 ms a
# call and 4 to 6 us an item. A GPU is waiting for calls, not for items.
CALL_COST = {"cpu": 512}
CALL_COST_ELSEWHERE = 16_384


@dataclass(frozen=True)
class Group:
    """Sequences that are padded together.

    Attributes:
        places: int64 (t,), where its items stand among the T, sequence by sequence.
        slots: int64 (t,), where they stand among the G x L.
        mask: bool (G, L), True where an item stands, t of them.
        full: whether that is everywhere.
    """

    places: Tensor
    slots: Tensor
    mask: Tensor
    full: bool

    def padded(self, values: Tensor) -> Tensor:
        """Values (T, ...) of all items -> those of the group (G, L, ...), 0 where none stands."""
        empty = values.new_zeros(self.mask.numel(), *values.shape[1:])
        filled = empty.index_copy(0, self.slots, values.index_select(0, self.places))
        return filled.unflatten(0, self.mask.shape)

    def of_items(self, padded: Tensor) -> Tensor:
        """Values (G, L, ...) -> those of the items (t, ...)."""
        return padded.flatten(0, 1).index_select(0, self.slots)


def length_groups(offsets: Tensor) -> list[Group]:
    """The sequences that begin at offsets (B+1,), in groups with the least padding and few calls.

    The sum of G x L over groups, plus a constant a group, is as small as it can be. The host waits
    once for a device, for the offsets.
    """
    device = offsets.device
    starts = offsets.cpu().numpy()
    lengths = np.diff(starts)
    groups = []
    for rows in row_groups(lengths, CALL_COST.get(device.type, CALL_COST_ELSEWHERE)):
        columns = np.arange(lengths[rows[-1]])
        mask = columns < lengths[rows, None]
        places = (starts[rows, None] + columns)[mask]
        there = [
            torch.from_numpy(values).to(device) for values in (places, np.flatnonzero(mask), mask)
        ]
        groups.append(Group(there[0], there[1], there[2], full=bool(mask.all())))
    return groups


def by_groups(
    vectors: Tensor, offsets: Tensor, network: Callable[[Tensor, Tensor | None], Tensor]
) -> Tensor:
    """Hidden states (T, D) of vectors (T, D) by a network that reads padded batches.

    Args:
        vectors: of items laid end to end.
        offsets: (B+1,) of the sequences.
        network: vectors (G, L, D) and bool (G, L), where an item stands, None for everywhere ->
            hidden states (G, L, D).
    """
    groups = length_groups(offsets)
    hidden = torch.cat(
        [g.of_items(network(g.padded(vectors), None if g.full else g.mask)) for g in groups]
    )
    places = torch.cat([group.places for group in groups])
    return hidden.new_empty(hidden.shape).index_copy(0, places, hidden)


def row_groups(lengths: NDArray[np.int64], call_cost: int) -> list[NDArray[np.int64]]:
    """Rows of these lengths (B,) in groups, the shortest first, with the least padding.

    The sum of rows x longest over groups, plus `call_cost` a group, is as small as it can be.
    """
    order = lengths.argsort(kind="stable")
    return [order[start:stop] for start, stop in _cuts(lengths[order], call_cost)]


def _cuts(lengths: np.ndarray, call_cost: int) -> list[tuple[int, int]]:
    """Slices of ascending lengths (B,) whose padded sizes and calls cost least, in order."""
    values, counts = np.unique(lengths, return_counts=True)
    ends = np.append(0, counts.cumsum())
    least = np.zeros(len(values) + 1)  # of the shortest so many different lengths
    first = np.zeros(len(values) + 1, dtype=np.int64)  # where the last group of that begins
    for last in range(1, len(values) + 1):
        costs = least[:last] + (ends[last] - ends[:last]) * values[last - 1] + call_cost
        first[last] = costs.argmin()
        least[last] = costs[first[last]]
    cuts, last = [], len(values)
    while last:
        cuts.append((int(ends[first[last]]), int(ends[last])))
        last = int(first[last])
    return cuts[::-1]
