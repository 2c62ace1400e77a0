"""Data and models that a stranger has or would have downloaded, for `fresh_machine.py`."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

Run = Callable[..., None]  # a Python program and its arguments, with the clone's packages


def shop(folder: Path, _: Run) -> None:
    """`purchases.csv` and `products.csv`: 80 customers who each like one kind of four."""
    kinds = {"tent": "Camping", "lamp": "Lighting", "pan": "Kitchen", "rope": "Climbing"}
    makers, colours = ("Acme", "Borex", "Cirrus"), ("red", "green", "blue", "black", "white")
    rows = [
        f"{kind}-{n},{colours[n % 5]} {kind} number {n},{makers[n % 3]},{category}"
        for kind, category in kinds.items()
        for n in range(12)
    ]
    (folder / "products.csv").write_text("item_id,title,brand,category\n" + "\n".join(rows) + "\n")
    names = list(kinds)
    log = [
        f"customer-{user},{names[user % 4]}-{(5 * user + step) % 12},{1_600_000_000 + 3600 * step}"
        for user in range(80)
        for step in range(7)
    ]
    (folder / "purchases.csv").write_text("user_id,item_id,timestamp\n" + "\n".join(log) + "\n")


MAKE_MINILM = """
import sys
from pathlib import Path
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

torch.manual_seed(0)
words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
letters = "abcdefghijklmnopqrstuvwxyz0123456789.,-&'"
words += [*letters, *("##" + letter for letter in letters)]
words += "tent lamp pan rope red green blue black white number title brand category".split()
words += "acme borex cirrus camping lighting kitchen climbing".split()
backend = Tokenizer(models.WordPiece({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
backend.normalizer = normalizers.BertNormalizer(lowercase=True)
backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
backend.post_processor = processors.TemplateProcessing(
    single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
)
snapshot = Path(sys.argv[1])
PreTrainedTokenizerFast(
    tokenizer_object=backend, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]",
    sep_token="[SEP]", mask_token="[MASK]", model_max_length=512,
).save_pretrained(snapshot)
config = BertConfig(
    vocab_size=len(words), hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
    intermediate_size=64, max_position_embeddings=512, initializer_range=0.2,
)
BertModel(config).save_pretrained(snapshot)
"""


MAKE_LONGFORMER = """
import sys
from transformers import LongformerConfig

LongformerConfig(
    vocab_size=500, hidden_size=24, num_hidden_layers=12, num_attention_heads=2,
    intermediate_size=48, max_position_embeddings=4098, attention_window=[512] * 12,
    pad_token_id=1, bos_token_id=0, eos_token_id=2, sep_token_id=2, type_vocab_size=1,
).save_pretrained(sys.argv[1])
"""


MAKE_RELEASED = """
import torch
from recformer import (
    RecformerConfig, RecformerForPretraining, RecformerForSeqRec, RecformerModel
)

config = RecformerConfig.from_pretrained("allenai/longformer-base-4096")
config.max_attr_num, config.max_attr_length, config.max_item_embeddings = 3, 32, 51
config.max_token_num, config.attention_window = 1024, [64] * 12
torch.save(RecformerModel(config).state_dict(), "recformer_ckpt.bin")
head = {
    name: value for name, value in RecformerForPretraining(config).state_dict().items()
    if name.startswith("lm_head.")
}
torch.save(RecformerForSeqRec(config).state_dict() | head, "recformer_seqrec_ckpt.bin")
"""


def hub_model(name: str, program: str) -> Callable[[Path, Run], None]:
    """A fixture that puts a model into the hub's cache, as if it had been downloaded."""

    def make(folder: Path, run: Run) -> None:
        cache = folder.parent / "home" / ".cache" / "huggingface" / "hub"
        model = cache / f"models--{name.replace('/', '--')}"
        snapshot = model / "snapshots" / ("0" * 40)
        snapshot.mkdir(parents=True, exist_ok=True)
        (model / "refs").mkdir(exist_ok=True)
        (model / "refs" / "main").write_text("0" * 40)
        run(program, str(snapshot))

    return make


def pretraining(folder: Path, _: Run) -> None:
    """`pretrain_data/` filled, from the quickstart's sample."""
    for path in (folder / "quickstart_run" / "pretrain_data").glob("*.json"):
        shutil.copy(path, folder / "pretrain_data" / path.name)


def released(_: Path, run: Run) -> None:
    """Files as the paper's authors published them, of a tiny model."""
    run(MAKE_RELEASED)


FIXTURES: Mapping[str, Callable[[Path, Run], None]] = {
    "shop": shop,
    "minilm": hub_model("sentence-transformers/all-MiniLM-L6-v2", MAKE_MINILM),
    "longformer": hub_model("allenai/longformer-base-4096", MAKE_LONGFORMER),
    "pretraining": pretraining,
    "released": released,
}
