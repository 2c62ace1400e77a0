"""The two methods side by side: both are trained and recommend; speed is not asserted."""

from __future__ import annotations

from pathlib import Path

from benchmarks.methods import rows
from recformer.data.processed import ProcessedFolder
from recformer.models import RecformerForSeqRec
from recformer.training.start import load_start_model
from tests import test_finetune

shop = test_finetune.data  # the fixture


def test_an_epoch_and_recommending_of_both(shop: Path, tmp_path: Path) -> None:
    overrides = {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "max_token_num": 48,
        "finetune_negative_sample_size": -1,
    }

    def start(data: ProcessedFolder) -> tuple:
        shape = overrides | {"item_num": data.num_items}
        tokenizer = str(shop / "tokenizer")
        return load_start_model(RecformerForSeqRec, None, "", tokenizer, True, shape)[:2]

    epoch, recommending = rows(str(shop / "folder"), start, tmp_path)
    assert epoch["what"] == "finetune --method head, first epoch of 40 users"
    assert recommending["what"] == "recommend 10 of 24 items to 40 users"
    assert min(epoch["ours_seconds"], epoch["peer_seconds"]) > 0
    assert recommending["amount"] == 40
