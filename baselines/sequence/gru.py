"""GRU4Rec: a recurrent network over item vectors (Hidasi et al., ICLR 2016).

Its ranking losses of 2018 are `--loss bpr_max` and `top1_max` (`baselines/sequence/losses.py`), its
sampling of negatives `--negative_power 0.75`.

Shapes: B sequences, T items laid end to end, G sequences of a group of L places, D hidden.
"""

from __future__ import annotations

from torch import Tensor, nn

from baselines.sequence.padding import by_groups
from baselines.sequence.recommender import SequenceNetwork


class GRU4Rec(SequenceNetwork):
    """From item vectors to hidden states.

    Args:
        hidden_size: D, of item vectors and of the recurrent state.
        num_layers: recurrent layers.
        dropout: of item vectors, and between layers.
    """

    bidirectional = False

    def __init__(self, hidden_size: int, num_layers: int, dropout: float) -> None:
        super().__init__()
        self.dropout = nn.Dropout(dropout)
        between = dropout if num_layers > 1 else 0.0
        self.gru = nn.GRU(hidden_size, hidden_size, num_layers, batch_first=True, dropout=between)

    def forward(self, vectors: Tensor, offsets: Tensor) -> Tensor:
        """Hidden states (T, D) of vectors (T, D), as `SASRec.forward`."""
        return by_groups(self.dropout(vectors), offsets, lambda padded, _mask: self.gru(padded)[0])
