"""Any transformer of Hugging Face as the sequence model, over item vectors in place of words.

BERT4Rec (Sun et al., CIKM 2019) is `bert` that fills in hidden items; GPT-2 over items predicts the
next one (Transformers4Rec, RecSys 2021). The architecture is built from its configuration class,
with random weights. `objectives.py` says which objectives it may have. Transformer-XL, which
Transformers4Rec has too, is in no supported release of transformers; XLNet has its attention.

Shapes: B sequences, T items laid end to end, G sequences of a group of L places, D hidden.
"""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModel

from baselines.sequence.collators import ItemSequences
from baselines.sequence.objectives import check_goes_with, objective_named
from baselines.sequence.padding import by_groups
from baselines.sequence.recommender import SequenceNetwork
from recformer.files import UserError

# What families call the size of their feed-forward layers.
FEED_FORWARD = ("intermediate_size", "ffn_dim", "ffn_hidden_size", "d_inner", "hidden_dim")


class HuggingFaceNetwork(SequenceNetwork):
    """From item vectors to hidden states through `AutoModel`.

    Args:
        arch: model type, e.g. `gpt2` or `bert`; it must take `inputs_embeds`.
        objective: one of `baselines.sequence.objectives.OBJECTIVES`.
        hidden_size, num_layers, num_heads, dropout: of the configuration.
        max_length: longest sequence.
        feed_forward_size: width of the feed-forward layers, 0 for 4 x `hidden_size`.

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
        feed_forward_size: int = 0,
    ) -> None:
        super().__init__()
        objective = objective_named(objective)
        check_goes_with(arch, objective)
        self.bidirectional = objective != "clm"
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
            **dict.fromkeys(FEED_FORWARD, feed_forward_size or 4 * hidden_size),
            "n_inner": feed_forward_size or None,
            "embedding_size": hidden_size,
            "word_embed_proj_dim": hidden_size,
            "head_dim": hidden_size // num_heads,
            "d_head": hidden_size // num_heads,
            "max_position_embeddings": max_length + 8,  # some families start after the padding id
            "is_decoder": not self.bidirectional,
            "attn_type": "bi" if self.bidirectional else "uni",
            "use_cache": False,
            "use_mems_eval": False,
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
                if getattr(config, name, None) == "gelu_new":
                    wanted[name] = "gelu_pytorch_tanh"  # the same function, in one kernel
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
        return by_groups(vectors, offsets, self._padded)

    def _padded(self, vectors: Tensor, mask: Tensor | None) -> Tensor:
        # Padding stands behind: who looks back only needs no mask against it.
        needed = mask.long() if self.bidirectional and mask is not None else None
        return self.model(inputs_embeds=vectors, attention_mask=needed)[0]

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
                f"--objective {'mlm or rtd' if sees_future else 'clm'} is for it"
            )

    def _freeze_unused(self, hidden_size: int) -> None:
        """The table of words, poolers and the like: no gradient reaches them, which several
        processes would wait for, and they are no parameters of this model."""
        parameters = list(self.parameters())
        sequences = ItemSequences(torch.arange(2), torch.tensor([0, 2]), torch.tensor([1]))
        with torch.enable_grad():
            hidden = self.predictions(torch.ones(2, hidden_size), sequences)
            gradients = torch.autograd.grad(hidden.sum(), parameters, allow_unused=True)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.requires_grad_(gradient is not None)
