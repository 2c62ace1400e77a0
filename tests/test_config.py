"""RecformerConfig: published defaults, Longformer's files, what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig, LongformerConfig

from recformer import PAPER, RecformerConfig


def test_defaults_are_those_of_the_published_class() -> None:
    config = RecformerConfig()
    assert config.model_type == "recformer"
    assert (config.max_attr_num, config.max_attr_length) == (12, 8)
    assert (config.max_item_embeddings, config.max_token_num) == (32, 2048)
    assert (config.token_type_size, config.pooler_type, config.temp) == (4, "cls", 0.05)
    assert (config.mlm_weight, config.item_num, config.finetune_negative_sample_size) == (0.1, 0, 0)


def test_the_paper_sets_what_every_published_script_sets() -> None:
    config = RecformerConfig(**PAPER)
    assert (config.max_attr_num, config.max_attr_length) == (3, 32)
    assert (config.max_item_embeddings, config.max_token_num) == (51, 1024)
    assert config.layer_windows == [64] * 12


def test_a_longformer_file_is_read_and_its_fields_set_as_in_the_published_readme(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    LongformerConfig(vocab_size=50265, attention_window=[512] * 12).save_pretrained(tmp_path)
    config = RecformerConfig.from_pretrained(tmp_path)
    assert not caplog.records  # no warning about the other model type
    assert (config.vocab_size, config.max_attr_num) == (50265, 12)
    config.max_attr_num = 3
    config.max_attr_length = 32
    config.max_item_embeddings = 51
    config.attention_window = [64] * 12
    assert config.model_type == "recformer"

    config.save_pretrained(tmp_path / "saved")
    again = AutoConfig.from_pretrained(tmp_path / "saved")
    assert type(again) is RecformerConfig
    assert (again.max_attr_num, again.max_item_embeddings) == (3, 51)
    assert again.layer_windows == [64] * 12


def test_every_field_survives_saving(tmp_path: Path) -> None:
    values: dict[str, Any] = {
        "attention_window": [4, 6],
        "num_hidden_layers": 2,
        "token_type_size": 5,
        "max_token_num": 77,
        "max_item_embeddings": 9,
        "max_attr_num": 2,
        "max_attr_length": 6,
        "pooler_type": "avg",
        "temp": 0.1,
        "mlm_weight": 0.3,
        "item_num": 13,
        "finetune_negative_sample_size": 4,
    }
    RecformerConfig(**values).save_pretrained(tmp_path)
    config = RecformerConfig.from_pretrained(tmp_path)
    assert {name: getattr(config, name) for name in values} == values


def test_a_window_may_be_one_number_or_one_per_layer() -> None:
    assert RecformerConfig(num_hidden_layers=3, attention_window=8).layer_windows == [8, 8, 8]
    config = RecformerConfig(num_hidden_layers=2, attention_window=[8, 2])
    assert config.layer_windows == [8, 2]
    assert config.attention_window == [8, 2]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"attention_window": 7}, "even, got 7"),
        ({"attention_window": 0}, "positive and even, got 0"),
        ({"attention_window": [8] * 5}, "5 entries for 12 layers"),
        ({"pooler_type": "mean"}, "'avg' or 'avg_published', got 'mean'"),
        ({"hidden_size": 100}, "100 is not a multiple of num_attention_heads 12"),
        ({"temp": 0.0}, "temp must be above 0"),
        ({"hidden_dropout_prob": 1.0}, "hidden_dropout_prob must be from 0 to below 1"),
    ],
)
def test_values_no_model_can_have_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RecformerConfig(**values).check()
