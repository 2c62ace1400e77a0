"""The encoder as ONNX: the vectors of the packed encoder, in onnxruntime."""

from __future__ import annotations

import importlib.util
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from recformer.commands.export import main
from recformer.data.collators import pack_sequences
from recformer.data.items import ItemsInMemory
from recformer.export import onnx as export_onnx
from recformer.export.onnx import OnnxEncoder, export_encoder, inputs_of
from recformer.files import UserError, read_json
from recformer.models import HeadOptions, RecformerForCatalogue, RecformerForSeqRec
from recformer.models.catalogue import token_bags
from recformer.tokenization import RecformerTokenizer
from tests.tiny import randomised, tiny_config, tiny_recformer

pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")

WORDS = ("tent", "lamp", "stove", "rope", "boots", "map")
ITEMS = [{"title": f"{a} {b} " * (1 + i % 4)} for i, (a, b) in enumerate(pairwise(WORDS))]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> RecformerTokenizer:
    folder = tiny_recformer(tmp_path_factory.mktemp("words"), ["title", *WORDS])
    return RecformerTokenizer.from_pretrained(folder)


def config_like(tokenizer: RecformerTokenizer, **values: object):
    fields = {"max_token_num": 120, "max_position_embeddings": 130, "max_item_embeddings": 20}
    config = tiny_config(vocab_size=300, max_attr_length=20, **(fields | values))
    tokenizer.config = config
    return config


@pytest.mark.parametrize("pooler", ["cls", "avg"])
def test_vectors_of_histories(tokenizer: RecformerTokenizer, tmp_path: Path, pooler: str) -> None:
    config = config_like(tokenizer, pooler_type=pooler, attention_window=8)
    model = randomised(RecformerForSeqRec(config))
    manifest = export_encoder(model, tokenizer, ITEMS, tmp_path / "onnx", "tiny", int8=True)
    assert manifest["greatest_difference"] <= 1e-4
    assert manifest["max_length"] == 120
    assert read_json(tmp_path / "onnx" / "manifest.json")["int8_cosines"]["least"] > 0.98

    # Other batch sizes and lengths than those of the export, to far beyond the window.
    store = ItemsInMemory.of(ITEMS, tokenizer)
    rows = [np.arange(n) % len(ITEMS) for n in (12, 1, 3)]
    with torch.no_grad():
        expected = model.encode(pack_sequences(store, rows, config)).numpy()
    inputs = inputs_of(tokenizer, [[ITEMS[row] for row in each] for each in rows])
    assert inputs["input_ids"].shape[1] > 80
    encode = OnnxEncoder(tmp_path / "onnx" / "encoder.onnx")
    np.testing.assert_allclose(encode(inputs), expected, atol=1e-4)
    small = OnnxEncoder(tmp_path / "onnx" / "encoder.int8.onnx")(inputs)
    assert np.abs(small - expected).max() > 1e-4  # it is quantised
    assert np.corrcoef(small.ravel(), expected.ravel())[0, 1] > 0.98


def test_vectors_of_items_by_a_head(tokenizer: RecformerTokenizer, tmp_path: Path) -> None:
    head = HeadOptions(bag_size=6).as_dict()
    config = config_like(tokenizer, pooler_type="avg", item_num=3, head=head, pad_token_id=1)
    model = randomised(RecformerForCatalogue(config))
    manifest = export_encoder(model, tokenizer, ITEMS, tmp_path / "onnx", "tiny")
    assert (manifest["reads"], manifest["normalised"], manifest["dimension"]) == (
        "an item",
        True,
        22,
    )
    store = ItemsInMemory.of(ITEMS, tokenizer)
    with torch.no_grad():
        rows = list(np.arange(len(ITEMS))[:, None])
        vectors = model.longformer.encode(pack_sequences(store, rows, config))
        expected = model.head.text_vectors(vectors, token_bags(store)).numpy()
    found = OnnxEncoder(tmp_path / "onnx" / "encoder.onnx")(
        inputs_of(tokenizer, [[item] for item in ITEMS])
    )
    np.testing.assert_allclose(found, expected, atol=1e-4)
    assert not (tmp_path / "onnx" / "encoder.int8.onnx").exists()


def test_a_file_that_gives_other_vectors_is_not_kept(
    tokenizer: RecformerTokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = randomised(RecformerForSeqRec(config_like(tokenizer)))
    call = OnnxEncoder.__call__
    monkeypatch.setattr(OnnxEncoder, "__call__", lambda self, inputs: call(self, inputs) + 2e-4)
    with pytest.raises(UserError, match="differ by 0.0002"):
        export_encoder(model, tokenizer, ITEMS, tmp_path / "onnx", "tiny")
    assert list(tmp_path.iterdir()) == []


def test_missing_packages_are_said_before_anything_is_read(monkeypatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        export_onnx, "find_spec", lambda name: None if name == "onnxscript" else find(name)
    )
    with pytest.raises(UserError, match=r"ONNX needs onnxscript: pip install 'recformer\[onnx\]'"):
        main(["--model", "nowhere", "--forms", "onnx"])
