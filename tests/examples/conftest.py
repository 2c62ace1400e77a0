"""A shop of 80 customers with a finetuned head, under the names that the documentation uses."""

from __future__ import annotations

from pathlib import Path

import pytest

from recformer.__main__ import main
from scripts.fresh_fixtures import shop
from tests.tiny import tiny_bert

KINDS = ["tent", "lamp", "pan", "rope", "camping", "lighting", "kitchen", "climbing"]
BRANDS = ["acme", "borex", "cirrus"]
COLOURS = ["red", "green", "blue", "black", "white"]
WORDS = [*KINDS, *BRANDS, *COLOURS, "number", "title", "brand", "category", *map(str, range(12))]


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`finetune_data/MyShop`, `encoder`, `result` of a head of one epoch, `runs/popularity`."""
    place = tmp_path_factory.mktemp("examples")
    shop(place, lambda *_: None)
    (place / "encoder").mkdir()
    tiny_bert(place / "encoder", WORDS, positions=512)
    data = str(place / "finetune_data" / "MyShop")
    main(
        [
            "process",
            "--file_path",
            str(place / "purchases.csv"),
            "--meta_file_path",
            str(place / "products.csv"),
            "--output_path",
            data,
        ]
    )
    main(
        [
            "finetune",
            "--method",
            "head",
            "--pretrain_ckpt",
            str(place / "encoder"),
            "--pooler_type",
            "avg",
            "--data_path",
            data,
            "--max_token_num",
            "64",
            "--num_train_epochs",
            "1",
            "--output_dir",
            str(place / "result"),
        ]
    )
    main(["baseline", "--model", "popularity", "--data_path", data,
          "--output_dir", str(place / "runs" / "popularity")])  # fmt: skip
    return place
