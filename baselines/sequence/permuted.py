"""Permutation language modelling over items (XLNet: Yang et al., NeurIPS 2019).

For a factorisation order z of the items of a sequence the likelihood is the product over t of
p(x_z(t) | x_z(1), …, x_z(t-1)) (section 2.2, equation 3); as there, only the last places of an
order are predicted, so that each has context (partial prediction, section 2.3). Two streams make it
possible: the content stream h reads an item and what its place may see; the query stream g knows a
place, not its item, and predicts (equations for g and h, section 2.3).

`order` says who sees whom: context has 0 and is seen by all, predicted items have 1, 2, …, and
are seen by those with a higher number. That is the permutation mask of transformers'
`DataCollatorForPermutationLanguageModeling`. At evaluation the place after the history is the one
that is predicted; its content is seen by nobody.

Shapes: B sequences, T items laid end to end, P predictions, G sequences of a group of L places, M
most predictions of one of them, D hidden.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from baselines.sequence.collators import ItemSequences
from baselines.sequence.huggingface import HuggingFaceNetwork
from baselines.sequence.padding import length_groups


def permutation_mask(order: Tensor) -> Tensor:
    """1 where a place may not see another one, as `XLNetModel` takes it.

    Args:
        order: int64 (G, L), 0 for context.

    Returns:
        float32 (G, L, L); [g, i, j] is 1 where i may not see j: j is predicted, and not before i.
    """
    before = order[:, :, None] > order[:, None, :]
    return (~before & (order > 0)[:, None, :]).float()


class PermutedNetwork(HuggingFaceNetwork):
    """XLNet with both of its streams: predictions are the query stream's.

    Args:
        arch: `xlnet`.
        sizes: as `HuggingFaceNetwork`.
    """

    hides_items = False  # the masks do

    def __init__(self, arch: str, *sizes: Any) -> None:
        super().__init__(arch, "plm", *sizes)

    def predictions(self, vectors: Tensor, sequences: ItemSequences) -> Tensor:
        """Hidden states (P, D) at `sequences.predict`; without an `order` all see context alone."""
        order = sequences.order
        if order is None:
            order = torch.zeros_like(sequences.items)
            order[sequences.predict] = 1
        number = torch.full_like(sequences.items, -1)  # of the prediction at a place
        number[sequences.predict] = torch.arange(len(sequences.predict), device=number.device)
        numbers, parts = [], []
        for group in length_groups(sequences.offsets):
            predicted = torch.zeros_like(group.mask)
            own = number[group.places]
            predicted[group.mask] = own >= 0
            rows, columns = predicted.nonzero().unbind(1)
            slot = predicted.cumsum(1)[rows, columns] - 1  # of a prediction among its sequence's
            mapping = vectors.new_zeros(len(predicted), int(slot.max()) + 1, predicted.shape[1])
            mapping[rows, slot, columns] = 1
            hidden = self.model(
                inputs_embeds=group.padded(vectors),
                attention_mask=group.mask.float(),
                perm_mask=permutation_mask(group.padded(order)),
                target_mapping=mapping,
            )[0]  # (G, M, D)
            numbers.append(own[own >= 0])
            parts.append(hidden[rows, slot])
        hidden = torch.cat(parts)
        return hidden.new_empty(hidden.shape).index_copy(0, torch.cat(numbers), hidden)
