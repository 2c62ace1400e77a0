"""Text vectors against encoders called one text at a time, and what the store saves."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import BertModel

from baselines import text_vectors as module
from baselines.__main__ import main as baseline
from baselines.text_vectors import text_vectors
from recformer import RecformerForSeqRec, RecformerTokenizer
from recformer.data.processed import ProcessedFolder, Sequences, write_processed
from recformer.files import UserError, read_json
from tests.tiny import tiny_bert, tiny_recformer

TITLES = ["alpha beta gamma", None, "beta", " ", "alpha " * 200, "beta"]
# [CLS] words [SEP], cut to 96
TOKEN_IDS = [[2, 5, 6, 7, 3], None, [2, 6, 3], None, [2] + 94 * [5] + [3], [2, 6, 3]]


@pytest.fixture
def folder(tmp_path: Path) -> ProcessedFolder:
    asins = [f"A{item}" for item in range(len(TITLES))]
    write_processed(
        tmp_path / "folder",
        train=Sequences.from_lists([[0, 1]]),
        val=Sequences.from_lists([[2]]),
        test=Sequences.from_lists([[3]]),
        user_names=["U"],
        asins=asins,
        meta={a: {"title": t} for a, t in zip(asins, TITLES, strict=True) if t is not None},
        dataset={},
    )
    return ProcessedFolder.load(tmp_path / "folder")


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_bert(tmp_path_factory.mktemp("encoder"), ["alpha", "beta", "gamma"])


@pytest.fixture(scope="module")
def recformer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_recformer(tmp_path_factory.mktemp("recformer"), ["alpha beta gamma title"])


@pytest.mark.parametrize("budget", [1, 6, 8192])  # alone, "beta" padded, all together
def test_vectors_are_means_over_tokens(
    folder: ProcessedFolder, encoder: Path, monkeypatch: pytest.MonkeyPatch, budget: int
) -> None:
    monkeypatch.setattr(module, "TOKENS_PER_BATCH", budget)
    vectors = text_vectors(folder, encoder)
    model = BertModel.from_pretrained(encoder).eval()
    for vector, tokens in zip(vectors, TOKEN_IDS, strict=True):
        expected = np.zeros(8)
        if tokens is not None:
            with torch.no_grad():
                hidden = model(torch.tensor([tokens])).last_hidden_state[0]
            expected = hidden.mean(0).numpy()
            expected /= np.linalg.norm(expected)
        np.testing.assert_allclose(vector, expected, atol=1e-6)
    assert vectors[2].tobytes() == vectors[5].tobytes()


def encoded_texts(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Number of texts of every batch that is encoded from now on."""
    counts: list[int] = []
    pooled = module._mean_pooled

    def counting(model: object, token_ids: list[list[int]], tokenizer: object) -> np.ndarray:
        counts.append(len(token_ids))
        return pooled(model, token_ids, tokenizer)

    monkeypatch.setattr(module, "_mean_pooled", counting)
    return counts


def test_texts_are_encoded_once(
    folder: ProcessedFolder, encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts = encoded_texts(monkeypatch)
    first = text_vectors(folder, encoder)
    assert sum(counts) == 3  # beta comes twice
    assert [path.name for path in (folder.path / "vectors").iterdir()] != []
    again = text_vectors(folder, encoder)
    assert sum(counts) == 3
    np.testing.assert_array_equal(first, again)
    folder.items[1]["title"] = "gamma"
    changed = text_vectors(folder, encoder)
    assert sum(counts) == 4
    np.testing.assert_array_equal(changed[[0, 2, 3, 4, 5]], first[[0, 2, 3, 4, 5]])
    assert np.linalg.norm(changed[1]) == pytest.approx(1)
    text_vectors(folder, encoder, tmp_path / "elsewhere")
    assert sum(counts) == 8


def test_another_tokenizer_or_other_weights_are_another_encoder(
    folder: ProcessedFolder, encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts = encoded_texts(monkeypatch)
    first = text_vectors(folder, encoder)
    (tmp_path / "other").mkdir()
    other = tiny_bert(tmp_path / "other", ["gamma", "beta", "alpha"])  # the same weights
    swapped = text_vectors(folder, other)
    assert sum(counts) == 6
    np.testing.assert_allclose(swapped[2], first[2], atol=1e-6)
    assert np.abs(swapped[4] - first[4]).max() > 0.01
    model = BertModel.from_pretrained(encoder)
    with torch.no_grad():
        model.embeddings.word_embeddings.weight[6] += 1
    model.save_pretrained(other)
    text_vectors(folder, other)
    assert sum(counts) == 9


def test_weights_that_nobody_reads_do_not_count(
    folder: ProcessedFolder, encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An encoder without a pooler gets a random one from transformers, another each time."""
    (tmp_path / "bare").mkdir()
    bare = tiny_bert(tmp_path / "bare", ["alpha", "beta", "gamma"])
    BertModel.from_pretrained(encoder, add_pooling_layer=False).save_pretrained(bare)
    expected = text_vectors(folder, encoder)
    counts = encoded_texts(monkeypatch)
    for _ in range(2):
        np.testing.assert_array_equal(text_vectors(folder, bare), expected)
    assert counts == []


def test_missing_weights_are_refused(
    folder: ProcessedFolder, encoder: Path, tmp_path: Path
) -> None:
    (tmp_path / "half").mkdir()
    half = tiny_bert(tmp_path / "half", ["alpha", "beta", "gamma"])
    state = BertModel.from_pretrained(encoder).state_dict()
    del state["encoder.layer.0.output.dense.weight"]
    BertModel.from_pretrained(encoder).save_pretrained(half, state_dict=state)
    with pytest.raises(UserError, match="lacks weights of a BertModel: .*output.dense.weight"):
        text_vectors(folder, half)


def test_a_recformer_reads_items_as_in_training(folder: ProcessedFolder, recformer: Path) -> None:
    vectors = text_vectors(folder, recformer)
    assert vectors.shape == (6, 16)
    model = RecformerForSeqRec.from_pretrained(recformer).eval()
    tokenizer = RecformerTokenizer.from_pretrained(recformer)
    for row, item in enumerate(folder.items):
        expected = np.zeros(16)
        if row not in (1, 3):
            with torch.no_grad():
                batch = tokenizer([[item]], return_tensor=True)
                expected = model.longformer(**batch).pooler_output[0].numpy()
            expected /= np.linalg.norm(expected)
        np.testing.assert_allclose(vectors[row], expected, atol=1e-5)
    # The file keeps what the model gives; without text it is zero for the caller alone, each time.
    assert not text_vectors(folder, recformer)[[1, 3]].any()


def test_a_recformer_as_a_file_beside_its_folder_s_files(
    folder: ProcessedFolder, recformer: Path
) -> None:
    state = RecformerForSeqRec.from_pretrained(recformer).state_dict()
    torch.save(state | {"item_embedding.weight": torch.ones(3, 16)}, recformer / "model.bin")
    np.testing.assert_array_equal(
        text_vectors(folder, recformer / "model.bin"), text_vectors(folder, recformer)
    )


def test_what_is_no_encoder(folder: ProcessedFolder, encoder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nothing gives no text encoder"):
        text_vectors(folder, tmp_path / "nothing")
    torch.save(BertModel.from_pretrained(encoder).state_dict(), tmp_path / "bert.bin")
    with pytest.raises(UserError, match="bert.bin is a BERT or RoBERTa language model"):
        text_vectors(folder, tmp_path / "bert.bin")
    for item in folder.items:
        item.clear()
    with pytest.raises(UserError, match="no item of .* has any text"):
        text_vectors(folder, encoder)


def test_a_read_only_folder_leaves_vectors_in_the_user_s_cache(
    folder: ProcessedFolder, encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write anywhere
    text_vectors(folder, encoder)
    assert not (folder.path / "vectors").exists()
    (store,) = (tmp_path / "cache" / "recformer" / "vectors").iterdir()
    assert store.name.startswith("item_vectors-")


def test_a_finished_run_of_other_texts_is_not_reported_as_this_one(
    folder: ProcessedFolder, encoder: Path, tmp_path: Path
) -> None:
    flags = ["--data_path", str(folder.path), "--device", "-1", "--num_train_epochs", "1"]
    for name, own in (
        ("words", ["--model", "text_neighbours"]),
        ("vectors", ["--model", "text_neighbours", "--text_encoder", str(encoder)]),
        ("sasrec", ["--model", "sasrec", "--items", "frozen", "--text_encoder", str(encoder)]),
        ("popularity", ["--model", "popularity"]),
    ):
        baseline([*flags, *own, "--output_dir", str(tmp_path / name)])
        texts = read_json(folder.path / "meta_data.json")
        before = json.dumps(texts)
        texts["A2"]["title"] = "gamma gamma"
        (folder.path / "meta_data.json").write_text(json.dumps(texts))
        if name == "popularity":  # which reads none
            baseline([*flags, *own, "--output_dir", str(tmp_path / name)])
        else:
            with pytest.raises(UserError, match=r"another run \(different: content_hash\)"):
                baseline([*flags, *own, "--output_dir", str(tmp_path / name)])
        (folder.path / "meta_data.json").write_text(before)
        baseline([*flags, *own, "--output_dir", str(tmp_path / name)])
