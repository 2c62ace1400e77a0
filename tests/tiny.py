"""Small Recformers for the tests of checkpoints, backbones and conversion."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from transformers import BertConfig, BertModel, BertTokenizerFast, PreTrainedModel

from recformer.config import RecformerConfig
from recformer.models import RecformerForPretraining, RecformerForSeqRec
from recformer.tokenization import train_tokenizer

SIZES = {
    "vocab_size": 50,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
ITEMS = 7


def tiny_config(**values: object) -> RecformerConfig:
    fields = SIZES | {
        "pad_token_id": 1,
        "max_position_embeddings": 40,
        "max_item_embeddings": 5,
        "attention_window": 4,
        "layer_norm_eps": 1e-5,
    }
    return RecformerConfig(**(fields | values))


def randomised(model: PreTrainedModel) -> PreTrainedModel:
    """Every tensor different from its initial value, biases and LayerNorms too."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model.eval()


def released(items: int | None = None, lm_head: bool = True) -> dict[str, Tensor]:
    """A state dict with the keys of a released file, buffer included."""
    model = randomised(RecformerForPretraining(tiny_config()))
    state = {key: value.clone() for key, value in model.state_dict().items()}
    state["longformer.embeddings.position_ids"] = torch.arange(40)[None]
    if not lm_head:
        state = {key: value for key, value in state.items() if not key.startswith("lm_head.")}
    if items is not None:
        state["item_embedding.weight"] = torch.randn(items, 16)
    return state


def snapshot(model: PreTrainedModel) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in model.state_dict().items()}


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)


def tiny_bert(path: Path, words: list[str], positions: int = 128) -> Path:
    """A random BERT of 8 hidden units that knows `words` (ids 5, 6, …), as a folder."""
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]
    (path / "vocab.txt").write_text("\n".join(vocabulary))
    tokenizer = BertTokenizerFast(vocab_file=str(path / "vocab.txt"))
    if len(tokenizer) != len(vocabulary):  # transformers 5 reads a vocabulary by another name
        tokenizer = BertTokenizerFast(vocab={word: row for row, word in enumerate(vocabulary)})
    tokenizer.save_pretrained(path)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=positions,
        initializer_range=0.5,
    )
    BertModel(config).save_pretrained(path)
    return path


def tiny_recformer(path: Path, texts: list[str]) -> Path:
    """A random Recformer with a tokenizer of its own, as a folder."""
    train_tokenizer(texts, 300, path)
    config = tiny_config(vocab_size=300, max_token_num=30, max_attr_length=20)
    randomised(RecformerForSeqRec(config)).save_pretrained(path)
    return path
