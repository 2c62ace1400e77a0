"""Any transformer of Hugging Face as the sequence model, over item vectors in place of words.

BERT4Rec (Sun et al., CIKM 2019) is `bert` that fills in hidden items; GPT-2 over items predicts the
next one (Transformers4Rec, RecSys 2021). The architecture is built from its configuration class,
with random weights.

Shapes: B sequences, T items laid end to end, L longest sequence, D hidden.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel

from baselines.id_sequences import places
from recformer.files import UserError

OBJECTIVES = ("causal", "masked")


class HuggingFaceNetwork(nn.Module):
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
            "intermediate_size": 4 * hidden_size,
            "embedding_size": hidden_size,
            "head_dim": hidden_size // num_heads,
            "max_position_embeddings": max_length + 8,  # some families start after the padding id
            "is_decoder": not self.bidirectional,
            "use_cache": False,
            # The table of words is not used.
            "vocab_size": 2,
            "pad_token_id": 0,
            "bos_token_id": 0,
            "eos_token_id": 0,
        }
        for name in list(config.to_dict()):
            if "drop" in name and isinstance(getattr(config, name), float):
                wanted[name] = dropout
        for name, value in wanted.items():
            if hasattr(config, name):
                setattr(config, name, value)
        try:
            self.model = AutoModel.from_config(config)
            # No gradient ever reaches it, which several processes would stumble over.
            self.model.get_input_embeddings().weight.requires_grad_(False)
        except (ValueError, TypeError, NotImplementedError) as error:
            raise UserError(f"--arch {arch} cannot be built over item vectors: {error}") from error
        self._check(arch, hidden_size)

    def forward(self, vectors: Tensor, offsets: Tensor) -> Tensor:
        """Hidden states (T, D) of vectors (T, D); see `baselines.sasrec.SASRec.forward`."""
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
        training = self.training
        self.eval()
        vectors = torch.linspace(-1, 1, 4 * hidden_size).reshape(4, hidden_size).sin()
        other = vectors.clone()
        other[3] = -vectors[3].flip(0)  # a constant added would be taken away by LayerNorm
        offsets = torch.tensor([0, 4])
        try:
            before, after = self(vectors, offsets), self(other, offsets)
        except (TypeError, ValueError, RuntimeError, KeyError, AttributeError) as error:
            raise UserError(f"--arch {arch} takes no item vectors: {error}") from error
        sees_future = not torch.allclose(before[0], after[0], rtol=0, atol=1e-7)
        if sees_future != self.bidirectional:
            raise UserError(
                f"--arch {arch} looks {'both ways' if sees_future else 'back only'}: "
                f"--objective {'masked' if sees_future else 'causal'} is for it"
            )
        self.train(training)
