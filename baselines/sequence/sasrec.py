"""SASRec (Kang and McAuley, ICDM 2018), in the form of the published gSASRec.

Pre-normed causal self-attention over item vectors and learned positions. Positions are counted from
the end, as the published left padding does: the newest of L places is L - 1 for every user.

Shapes: B sequences, T items laid end to end, L longest sequence, D hidden, A heads.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from baselines.sequence.collators import places
from baselines.sequence.recommender import SequenceNetwork
from recformer.models import fused
from recformer.models.dropout import with_fast_dropout

# offsets (B+1,) of the sequences, row and column (T,) the place of each item among (B, L), and B, L
Layout = tuple[Tensor, Tensor, Tensor, tuple[int, int]]


class SelfAttention(nn.Module):
    """Causal attention whose queries are normalised and whose keys and values are not.

    published: there is no projection of the output, and keys and values are those before the norm.
    """

    def __init__(self, hidden_size: int, num_heads: int, dropout: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.dropout = dropout
        self.query_proj = nn.Linear(hidden_size, hidden_size)
        self.key_proj = nn.Linear(hidden_size, hidden_size)
        self.val_proj = nn.Linear(hidden_size, hidden_size)

    def forward(self, normed: Tensor, hidden: Tensor, layout: Layout) -> Tensor:
        """normed and hidden (T, D) of items laid end to end."""
        offsets, row, column, size = layout
        parts = self.query_proj(normed), self.key_proj(hidden), self.val_proj(hidden)
        dropout = self.dropout if self.training else 0.0
        if fused.attends(parts[0], self.num_heads):
            return fused.causal_attention(torch.cat(parts, dim=1), offsets, self.num_heads, dropout)

        def heads(values: Tensor) -> Tensor:  # (T, D) -> (B, A, L, D / A)
            padded = values.new_zeros(*size, values.shape[1])
            padded[row, column] = values
            return padded.unflatten(2, (self.num_heads, -1)).transpose(1, 2)

        # Padding stands behind, where the causal mask hides it from every real item.
        query, key, value = (heads(part) for part in parts)
        mixed = F.scaled_dot_product_attention(query, key, value, dropout_p=dropout, is_causal=True)
        return mixed.transpose(1, 2).flatten(2)[row, column]


class Block(nn.Module):
    """Attention and a feed-forward layer, each with its residual.

    published: the residuals start from the normalised input, not from the input.
    """

    def __init__(self, hidden_size: int, num_heads: int, dropout: float) -> None:
        super().__init__()
        self.first_norm = nn.LayerNorm(hidden_size)
        self.second_norm = nn.LayerNorm(hidden_size)
        self.multihead_attention = SelfAttention(hidden_size, num_heads, dropout)
        self.dense1 = nn.Linear(hidden_size, hidden_size)
        self.dense2 = nn.Linear(hidden_size, hidden_size)
        self.dropout = nn.Dropout(dropout)

    def forward(self, hidden: Tensor, layout: Layout) -> Tensor:
        normed = self.first_norm(hidden)
        attended = self.multihead_attention(normed, hidden, layout) + normed
        attended = self.second_norm(attended)
        inner = self.dropout(F.relu(self.dense1(attended)))
        return attended + self.dropout(self.dense2(inner))


class SASRec(SequenceNetwork):
    """The network of SASRec, from item vectors to hidden states.

    `SequenceRecommender` adds item vectors, the loss and the ranking.

    Args:
        hidden_size: D.
        num_layers: blocks.
        num_heads: A.
        max_length: longest sequence.
        dropout: of embeddings, attention weights and feed-forward layers.
    """

    bidirectional = False

    def __init__(
        self, hidden_size: int, num_layers: int, num_heads: int, max_length: int, dropout: float
    ) -> None:
        super().__init__()
        self.max_length = max_length
        self.position_embedding = nn.Embedding(max_length, hidden_size)
        self.embeddings_dropout = nn.Dropout(dropout)
        self.transformer_blocks = nn.ModuleList(
            Block(hidden_size, num_heads, dropout) for _ in range(num_layers)
        )
        self.seq_norm = nn.LayerNorm(hidden_size)
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.xavier_normal_(module.weight)
        with_fast_dropout(self)

    def forward(self, vectors: Tensor, offsets: Tensor) -> Tensor:
        """Hidden states of every item.

        Args:
            vectors: (T, D) of items laid end to end, oldest first.
            offsets: (B+1,) of the sequences, none longer than `max_length`.

        Returns:
            (T, D).
        """
        row, column, lengths = places(offsets, len(vectors))
        layout = offsets, row, column, (len(lengths), int(lengths.max()))
        position = self.max_length - lengths[row] + column
        hidden = self.embeddings_dropout(vectors + self.position_embedding(position))
        for block in self.transformer_blocks:
            hidden = block(hidden, layout)
        return self.seq_norm(hidden)
