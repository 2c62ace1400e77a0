"""Any transformer of Hugging Face as the sequence model, over item vectors in place of words.

BERT4Rec (Sun et al., CIKM 2019) is `bert` that fills in hidden items; GPT-2 over items predicts the
next one (Transformers4Rec, RecSys 2021). The architecture is built from its configuration class,
with random weights.

Shapes: B sequences, T items laid end to end, L longest sequence, D hidden.
"""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModel

from baselines.sequence.collators import places
from baselines.sequence.recommender import SequenceNetwork
from recformer.files import UserError

OBJECTIVES = ("causal", "masked")
# What families call the size of their feed-forward layers.
FEED_FORWARD = ("intermediate_size", "ffn_dim", "ffn_hidden_size", "d_inner", "hidden_dim")


class HuggingFaceNetwork(SequenceNetwork):
    """From item vectors to hidden states through `AutoModel`.

    Args:
        arch: model type, e.g. `gpt2` or `bert`; it must take `inputs_embeds`.
        objective: `causal`, the next item from the ones before it; `masked`, hidden items from both
            sides.
        hidden_size, num_layers, num_heads, dropout: of the configuration.
        max_length: longest sequence.

    Raises:
        UserError: an architecture that does not exist, takes no vectors, or looks the wrong way.
    """

    def __init__(
        self,
        arch: str,
        objective: str,
        hidden_size: int,
        num_layers: int,
        num_heads: int,
        max_length: int,
        dropout: float,
    ) -> None:
        super().__init__()
        if objective not in OBJECTIVES:
            raise UserError(f"--objective {objective}: expected {' or '.join(OBJECTIVES)}")
        self.bidirectional = objective == "masked"
        try:
            config = AutoConfig.for_model(arch)
        except ValueError:
            raise UserError(
                f"--arch {arch} is no model type of the installed transformers, e.g. gpt2 or bert"
            ) from None
        wanted: dict[str, Any] = {
            "hidden_size": hidden_size,
            "num_hidden_layers": num_layers,
            "num_attention_heads": num_heads,
            "num_key_value_heads": num_heads,
            **dict.fromkeys(FEED_FORWARD, 4 * hidden_size),
            "embedding_size": hidden_size,
            "word_embed_proj_dim": hidden_size,
            "head_dim": hidden_size // num_heads,
            "d_head": hidden_size // num_heads,
            "max_position_embeddings": max_length + 8,  # some families start after the padding id
            "is_decoder": not self.bidirectional,
            "use_cache": False,
            # The table of words is not used.
            "vocab_size": 2,
            "pad_token_id": 0,
            "bos_token_id": 0,
            "eos_token_id": 0,
        }
        try:
            for name in list(config.to_dict()):
                if "drop" in name and isinstance(getattr(config, name), float):
                    wanted[name] = dropout
            for name, value in wanted.items():
                if hasattr(config, name):
                    # XLNet knows no longest sequence; Falcon makes head_dim of the others
                    with suppress(NotImplementedError, AttributeError):
                        setattr(config, name, value)
            self.model = AutoModel.from_config(config)
        except Exception as error:  # hundreds of families have no kind of error in common
            raise UserError(f"--arch {arch} cannot be built over item vectors: {error}") from error
        self.eval()
        self._check(arch, hidden_size)
        self._freeze_unused(hidden_size)
        self.train()

    def forward(self, vectors: Tensor, offsets: Tensor) -> Tensor:
        """Hidden states (T, D) of vectors (T, D), as `SASRec.forward`."""
        row, column, lengths = places(offsets)
        longest = int(lengths.max())
        padded = vectors.new_zeros(len(lengths), longest, vectors.shape[1])  # (B, L, D)
        padded[row, column] = vectors
        mask = torch.arange(longest, device=vectors.device) < lengths[:, None]
        hidden = self.model(inputs_embeds=padded, attention_mask=mask.long())[0]
        return hidden[row, column]

    @torch.no_grad()
    def _check(self, arch: str, hidden_size: int) -> None:
        """One forward pass shows whether it takes vectors and which way it looks."""
        vectors = torch.linspace(-1, 1, 6 * hidden_size).reshape(6, hidden_size).sin()
        other = vectors.clone()
        other[3] = -vectors[3].flip(0)  # a constant added would be taken away by LayerNorm
        offsets = torch.tensor([0, 4, 6])  # the shorter one is padded
        try:
            before, after = self(vectors, offsets), self(other, offsets)
        except Exception as error:  # as above
            raise UserError(f"--arch {arch} takes no item vectors: {error}") from error
        sees_future = not torch.allclose(before[0], after[0], rtol=0, atol=1e-7)
        if sees_future != self.bidirectional:
            raise UserError(
                f"--arch {arch} looks {'both ways' if sees_future else 'back only'}: "
                f"--objective {'masked' if sees_future else 'causal'} is for it"
            )

    def _freeze_unused(self, hidden_size: int) -> None:
        """The table of words, poolers and the like: no gradient reaches them, which several
        processes would wait for, and they are no parameters of this model."""
        parameters = list(self.parameters())
        with torch.enable_grad():
            hidden = self(torch.ones(2, hidden_size), torch.tensor([0, 2]))
            gradients = torch.autograd.grad(hidden.sum(), parameters, allow_unused=True)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.requires_grad_(gradient is not None)
