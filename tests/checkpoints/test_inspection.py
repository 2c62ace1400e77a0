"""`recformer inspect`: what a file is, in words."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import BertConfig, BertModel, DistilBertConfig, DistilBertModel

from recformer.checkpoints.inspection import inspect_checkpoint
from recformer.commands.inspect import main
from recformer.models import RecformerForPretraining, RecformerForSeqRec
from tests.tiny import ITEMS, SIZES, randomised, released, tiny_config

SHAPE = (
    "shape: vocab_size 50, max_position_embeddings 40, token_type_size 4, max_item_embeddings 5, "
    "intermediate_size 24, hidden_size 16, num_hidden_layers 2"
)
HEAD_LEFT_OVER = (
    "left over: lm_head.bias, lm_head.dense.{weight,bias}, lm_head.layer_norm.{weight,bias}, "
    "lm_head.decoder.{weight,bias} (the model has no masked-language-model head)"
)


def described(path: Path) -> list[str]:
    """The lines after the first, whose path differs from run to run, without their indent."""
    first, *rest = inspect_checkpoint(path).splitlines()
    assert first.startswith(f"{path}: ")
    return [first.removeprefix(f"{path}: "), *(line.strip() for line in rest)]


def test_a_released_file(tmp_path: Path) -> None:
    path = tmp_path / "recformer_ckpt.bin"
    torch.save(released(), path)
    lines = described(path)
    # 8,372 weights, the bias that stands under two names twice, and the buffer
    assert lines[:3] == [
        "a state dict, a Recformer",
        "58 tensors, 8,412 values, 0.0 MB, float32 and int64",
        SHAPE,
    ]
    assert lines[3] == "with a masked-language-model head, no items"
    assert lines[4].startswith("no config.json: heads, window, pooling and item lengths do not")
    assert lines[5:] == [
        "loads into RecformerForPretraining: 57 tensors copied, 0 filled, 0 new, 1 left over",
        "left over: longformer.embeddings.position_ids (a buffer, not a weight)",
        "loads into RecformerForSeqRec: 50 tensors copied, 0 filled, 0 new, 8 left over",
        HEAD_LEFT_OVER,
        "left over: longformer.embeddings.position_ids (a buffer, not a weight)",
    ]


def test_a_finetuned_folder(tmp_path: Path) -> None:
    model = randomised(RecformerForSeqRec(tiny_config(max_token_num=20, pooler_type="avg")))
    model.init_item_embedding(torch.ones(ITEMS, 16))
    model.save_pretrained(tmp_path)
    lines = described(tmp_path)
    assert lines[0] == "a model folder (a safetensors file), a Recformer"
    assert lines[3] == f"with no masked-language-model head, vectors of {ITEMS} items"
    assert lines[4] == (
        f"{tmp_path / 'config.json'}: num_attention_heads 2, attention_window 4, pooler_type avg, "
        "temp 0.05, max_token_num 20, max_attr_num 12, max_attr_length 8"
    )
    assert lines[5].startswith("does not load into RecformerForPretraining: it lacks 7 of the 57")
    assert (
        lines[6] == "loads into RecformerForSeqRec: 51 tensors copied, 0 filled, 0 new, 0 left over"
    )
    assert (
        inspect_checkpoint(tmp_path / "model.safetensors").splitlines()[5:]
        == (inspect_checkpoint(tmp_path).splitlines()[5:])
    )


def test_a_lightning_checkpoint_with_a_hole(tmp_path: Path) -> None:
    """The configuration is that of the run's start; a diverged run is called so."""
    RecformerForPretraining(tiny_config(max_token_num=20)).save_pretrained(tmp_path / "start")
    state = {"model." + key: value for key, value in released(lm_head=False).items()}
    del state["model.longformer.embeddings.position_ids"]
    del state["model.longformer.encoder.layer.1.output.dense.bias"]
    state["model.longformer.encoder.layer.0.output.dense.bias"][2] = float("inf")
    content = {"state_dict": state, "epoch": 3, "global_step": 70, "pytorch-lightning_version": "2"}
    path = tmp_path / "epoch=3.ckpt"
    torch.save(content, path)
    lines = described(path)
    assert lines[0] == "a Lightning checkpoint, a Recformer"
    assert lines[2] == "written at epoch 3, global_step 70, pytorch-lightning_version 2"
    assert lines[3] == ("NOT FINITE: values of model.longformer.encoder.layer.*.output.dense.bias")
    assert lines[4] == SHAPE
    assert lines[6].startswith(f"{tmp_path / 'start' / 'config.json'}: num_attention_heads 2, ")
    assert "lacks 8 of the 57 tensors" in lines[7]
    assert lines[8] == (
        "does not load into RecformerForSeqRec: it lacks 1 of the 50 tensors of the model: "
        "longformer.encoder.layer.*.output.dense.bias"
    )
    assert lines[9] == f"to release it: recformer convert --checkpoint {path}"


def test_frozen_words_left_out_are_a_hole_not_a_crash(tmp_path: Path) -> None:
    state = released()
    del state["longformer.embeddings.word_embeddings.weight"]
    torch.save(state, tmp_path / "pytorch_model.bin")
    text = "\n".join(described(tmp_path))
    assert "vocab_size 50" in text  # the head knows it too
    assert "RecformerForSeqRec: it lacks 1 of the 50 tensors of the model: longformer.emb" in text


def test_language_models(tmp_path: Path) -> None:
    randomised(BertModel(BertConfig(**SIZES))).save_pretrained(tmp_path / "bert")
    lines = described(tmp_path / "bert")
    assert lines[0] == "a model folder (a safetensors file), a BERT or RoBERTa language model"
    assert (
        lines[2] == "as the start of a Recformer: 35 tensors copied, 15 filled, 7 new, 2 left over"
    )
    assert lines[-1] == (
        f"to start from it: recformer start-weights --model_name_or_path {tmp_path / 'bert'}"
    )
    torch.save(BertModel(BertConfig(**SIZES)).state_dict(), tmp_path / "bert.bin")
    assert described(tmp_path / "bert.bin")[-1].startswith("a backbone is a folder with its config")

    config = DistilBertConfig(vocab_size=50, dim=16, n_layers=1, n_heads=2, hidden_dim=24)
    DistilBertModel(config).save_pretrained(tmp_path / "distilbert")
    lines = described(tmp_path / "distilbert")
    assert lines[0].endswith("a DistilBERT")
    assert lines[-1].startswith("not one of ours")


def test_unknown_prefix(tmp_path: Path) -> None:
    state = {"student." + key: value for key, value in released().items()}
    torch.save(state, tmp_path / "x.bin")
    assert described(tmp_path / "x.bin")[-1].startswith(
        "its keys have a prefix that is unknown here: student.longformer.embeddings."
    )


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "x.bin"
    torch.save(released(), path)
    main([str(path)])
    assert capsys.readouterr().out == inspect_checkpoint(path) + "\n"
    with pytest.raises(SystemExit):
        main(["--help"])
    assert "a folder of shards" in " ".join(capsys.readouterr().out.split())

    path.write_bytes(b"<!DOCTYPE html><html><body>Google Drive - Virus scan warning</body></html>")
    result = subprocess.run(
        [sys.executable, "-m", "recformer", "inspect", str(path)],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=Path(__file__).resolve().parents[2],
    )
    assert result.returncode == 1
    assert result.stderr == (
        f"error: {path} is a web page in place of the weights (it begins with b'<!DOCTYPE ht'): "
        "open it in a browser and download the file that it asks you to confirm\n"
    )
