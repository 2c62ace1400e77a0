"""The values of the paper, in one place."""

from __future__ import annotations

from typing import Any

# Section 3.1.4 and the published scripts.
PAPER: dict[str, Any] = {
    "max_attr_num": 3,
    "max_attr_length": 32,
    "max_item_embeddings": 51,
    "max_token_num": 1024,
    "attention_window": 64,
    "pooler_type": "cls",
    "temp": 0.05,
    "mlm_weight": 0.1,
}
