"""Reading checkpoints, and loading them with every key accounted for."""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertModel,
    LongformerConfig,
    LongformerModel,
    RobertaConfig,
    RobertaForMaskedLM,
)

from recformer.checkpoints.loading import LoadReport, load_checkpoint
from recformer.checkpoints.names import describe_state_dict
from recformer.checkpoints.reading import read_state_dict
from recformer.files import UserError
from recformer.models import RecformerForPretraining, RecformerForSeqRec, RecformerModel
from tests.tiny import ITEMS, SIZES, randomised, released, same, snapshot, tiny_config

# --- reading ----------------------------------------------------------------------------------


def test_reads_what_torch_and_safetensors_wrote(tmp_path: Path) -> None:
    state = {"a.weight": torch.arange(6.0).reshape(2, 3), "a.bias": torch.tensor([1.0])}
    torch.save(state, tmp_path / "new.bin")
    torch.save(state, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    torch.save({"state_dict": state, "epoch": 3, "callbacks": {"x": {}}}, tmp_path / "lit.ckpt")
    torch.save({"module": state, "step": 7}, tmp_path / "mp_rank_00_model_states.pt")
    save_file(state, tmp_path / "x.safetensors")
    shutil.copy(tmp_path / "x.safetensors", tmp_path / "safetensors_by_another_name.bin")
    for path in sorted(tmp_path.iterdir()):
        assert same(read_state_dict(path), state), path.name


def test_reads_folders_whole_and_in_shards(tmp_path: Path) -> None:
    model = randomised(RecformerModel(tiny_config()))
    model.save_pretrained(tmp_path / "whole")
    model.save_pretrained(tmp_path / "shards", max_shard_size="4KB")
    assert len(list((tmp_path / "shards").glob("model-*.safetensors"))) > 2
    assert same(read_state_dict(tmp_path / "whole"), snapshot(model))
    assert same(read_state_dict(tmp_path / "shards"), snapshot(model))
    # what today's zero_to_fp32.py writes: pickled shards and their index
    folder = tmp_path / "zero"
    folder.mkdir()
    state = snapshot(model)
    names = [f"pytorch_model-0000{i}-of-00002.bin" for i in (1, 2)]
    weight_map = {key: names[i % 2] for i, key in enumerate(state)}
    for name in names:
        torch.save({k: state[k] for k in state if weight_map[k] == name}, folder / name)
    index = folder / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    assert same(read_state_dict(folder), state)
    assert same(read_state_dict(index), state)
    (folder / names[1]).unlink()
    with pytest.raises(FileNotFoundError, match=r"00002-of-00002\.bin does not exist, but"):
        read_state_dict(folder)
    torch.save({}, folder / names[1])
    with pytest.raises(UserError, match="expected tensors by name"):
        read_state_dict(folder)
    torch.save({"another": torch.ones(1)}, folder / names[1])
    with pytest.raises(UserError, match="which its shards do not hold"):
        read_state_dict(folder)


@pytest.mark.parametrize("kind", ["zip", "legacy", "safetensors"])
def test_a_truncated_file_is_called_so(tmp_path: Path, kind: str) -> None:
    state = {f"layer.{i}.weight": torch.randn(64, 64) for i in range(4)}
    path = tmp_path / "whole"
    if kind == "safetensors":
        save_file(state, path)
    else:
        torch.save(state, path, _use_new_zipfile_serialization=kind == "zip")
    content = path.read_bytes()
    cut = tmp_path / "cut.bin"
    for tenths in range(1, 10):
        cut.write_bytes(content[: len(content) * tenths // 10])
        with pytest.raises(UserError, match=r"cut\.bin is truncated or corrupt"):
            read_state_dict(cut)
    cut.write_bytes(content[:20])
    with pytest.raises(UserError, match=r"cut\.bin is truncated or corrupt"):
        read_state_dict(cut)


def test_what_is_no_checkpoint_is_named(tmp_path: Path) -> None:
    def file(content: bytes) -> Path:
        path = tmp_path / "model.bin"
        path.write_bytes(content)
        return path

    with pytest.raises(FileNotFoundError, match=r"nowhere\.bin does not exist"):
        read_state_dict(tmp_path / "nowhere.bin")
    with pytest.raises(UserError, match="is empty"):
        read_state_dict(file(b""))
    with pytest.raises(UserError, match=r"is a web page in place of the weights.*b'<html>"):
        read_state_dict(file(b"<html><body>404</body></html>"))
    with pytest.raises(UserError, match="Git LFS pointer"):
        read_state_dict(file(b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n"))
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(UserError, match="holds a list, expected tensors by name"):
        read_state_dict(tmp_path / "list.pt")
    torch.save({"epoch": 3}, tmp_path / "dict.pt")
    with pytest.raises(UserError, match="a dict with the keys epoch"):
        read_state_dict(tmp_path / "dict.pt")


def test_pickled_objects_are_refused_not_run(tmp_path: Path) -> None:
    path = tmp_path / "objects.ckpt"
    torch.save({"a": torch.ones(1), "args": argparse.Namespace(lr=1)}, path)
    with pytest.raises(UserError, match=r"pickled objects \(argparse\.Namespace\)"):
        read_state_dict(path)


def test_folders_without_weights_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="holds no weights"):
        read_state_dict(tmp_path)
    (tmp_path / "latest").write_text("global_step10")
    with pytest.raises(
        FileNotFoundError, match=r"global_step10 does not exist, but .*latest names"
    ):
        read_state_dict(tmp_path)


# --- loading ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "prefix",
    ["", "_forward_module.model.", "model.", "module.", "_forward_module.model._orig_mod."],
)
def test_prefixes_of_wrappers_come_off(prefix: str) -> None:
    state = released()
    model = RecformerForPretraining(tiny_config())
    report = load_checkpoint(model, {prefix + key: value for key, value in state.items()})
    del state["longformer.embeddings.position_ids"]
    assert same(snapshot(model), state)
    assert set(report.copied) == set(state)
    assert not report.filled
    assert not report.new
    assert report.left_over == {
        prefix + "longformer.embeddings.position_ids": "a buffer, not a weight"
    }


def test_the_encoder_loads_with_and_without_its_prefix() -> None:
    state = released(lm_head=False)
    bare = {key.removeprefix("longformer."): value for key, value in state.items()}
    for source in (state, bare):
        encoder, recommender = RecformerModel(tiny_config()), RecformerForSeqRec(tiny_config())
        load_checkpoint(encoder, source)
        report = load_checkpoint(recommender, source)
        for key, value in snapshot(encoder).items():
            assert torch.equal(value, bare[key])
            assert torch.equal(recommender.state_dict()["longformer." + key], value)
        assert recommender.item_embedding is None
        assert not report.new


def test_a_released_file_loads_into_every_class(tmp_path: Path) -> None:
    torch.save(released(), tmp_path / "recformer_pretrain_ckpt.bin")
    model = RecformerForSeqRec(tiny_config())
    report = load_checkpoint(model, tmp_path / "recformer_pretrain_ckpt.bin")
    assert {k: v for k, v in report.left_over.items() if k.startswith("lm_head")} == {
        f"lm_head.{name}": "the model has no masked-language-model head"
        for name in (
            "bias",
            "dense.weight",
            "dense.bias",
            "layer_norm.weight",
            "layer_norm.bias",
            "decoder.weight",
            "decoder.bias",
        )
    }
    assert len(report.left_over) == 8
    assert set(report.copied) == set(model.state_dict())
    load_checkpoint(RecformerModel(tiny_config()), tmp_path / "recformer_pretrain_ckpt.bin")


def test_a_head_may_be_absent_only_by_name() -> None:
    state = released(lm_head=False)
    model = RecformerForPretraining(tiny_config())
    before = snapshot(model)
    with pytest.raises(UserError, match=r"lacks 7 of the 57 tensors.*lm_head\.decoder\.\{weight"):
        load_checkpoint(model, state)
    assert same(snapshot(model), before)
    report = load_checkpoint(model, state, allow_missing=["lm_head.*"])
    assert set(report.new) == {key for key in before if key.startswith("lm_head.")}
    assert torch.equal(model.state_dict()["lm_head.dense.weight"], before["lm_head.dense.weight"])
    with pytest.raises(ValueError, match=r"no key of the model fits 'lm_heads\.\*'"):
        load_checkpoint(model, state, allow_missing=["lm_heads.*"])


def test_one_name_of_the_shared_bias_is_enough() -> None:
    for absent, present in (("decoder.bias", "bias"), ("bias", "decoder.bias")):
        state = released()
        del state[f"lm_head.{absent}"]
        model = RecformerForPretraining(tiny_config())
        report = load_checkpoint(model, state)
        assert list(report.filled) == [f"lm_head.{absent}"]
        assert torch.equal(model.state_dict()[f"lm_head.{absent}"], state[f"lm_head.{present}"])


def test_item_vectors_come_with_a_finetuned_file() -> None:
    state = released(items=ITEMS, lm_head=False)
    model = RecformerForSeqRec(tiny_config())
    report = load_checkpoint(model, state)
    assert model.item_embedding is not None
    assert torch.equal(model.item_embedding.weight, state["item_embedding.weight"])
    assert model.config.item_num == ITEMS
    assert "item_embedding.weight" in report.copied

    other = RecformerForSeqRec(tiny_config(item_num=9))
    with pytest.raises(UserError, match=r"item_embedding\.weight is \(7, 16\) in the file and \(9"):
        load_checkpoint(other, state)
    report = load_checkpoint(other, state, item_table=False)
    assert other.item_embedding is None
    assert report.left_over["item_embedding.weight"] == "not asked for"

    report = load_checkpoint(RecformerModel(tiny_config()), state)
    assert report.left_over["item_embedding.weight"] == "the model has no item table"


def test_a_file_without_item_vectors_leaves_those_of_the_model() -> None:
    model = RecformerForSeqRec(tiny_config(item_num=ITEMS), with_item_embedding=True)
    assert model.item_embedding is not None
    before = model.item_embedding.weight.clone()
    report = load_checkpoint(model, released(lm_head=False))
    assert torch.equal(model.item_embedding.weight, before)
    assert report.new == {"item_embedding.weight": "no item table in the file: the model's stays"}


def test_other_shapes_are_refused_before_anything_changes() -> None:
    state = released()
    state["longformer.embeddings.word_embeddings.weight"] = torch.zeros(51, 16)
    state["longformer.encoder.layer.1.intermediate.dense.bias"] = torch.zeros(25)
    model = RecformerForPretraining(tiny_config())
    before = snapshot(model)
    with pytest.raises(UserError) as caught:
        load_checkpoint(model, state)
    message = str(caught.value)
    assert "embeddings.word_embeddings.weight is (51, 16) in the file and (50, 16)" in message
    assert "encoder.layer.1.intermediate.dense.bias is (25,) in the file and (24,)" in message
    assert same(snapshot(model), before)


def test_a_deeper_model_is_refused() -> None:
    model = RecformerModel(tiny_config(num_hidden_layers=1))
    with pytest.raises(UserError, match="for which the model has no layer"):
        load_checkpoint(model, released())


def test_unknown_keys_are_reported() -> None:
    state = released() | {"teacher.weight": torch.ones(2)}
    report = load_checkpoint(RecformerForPretraining(tiny_config()), state)
    assert report.left_over["teacher.weight"] == "nothing in the model has this name"
    doubled = released() | {"model.lm_head.bias": torch.zeros(50)}
    with pytest.raises(UserError, match=r"lm_head\.bias and model\.lm_head\.bias are the same"):
        load_checkpoint(RecformerForPretraining(tiny_config()), doubled)


def test_half_precision_files_become_the_dtype_of_the_model() -> None:
    state = {key: value.half() for key, value in released().items()}
    model = RecformerForPretraining(tiny_config())
    load_checkpoint(model, state)
    own = model.state_dict()["lm_head.dense.weight"]
    assert own.dtype == torch.float32
    assert torch.equal(own, state["lm_head.dense.weight"].float())


def test_the_checkpoint_of_another_model_is_refused_by_kind(tmp_path: Path) -> None:
    model = RecformerForSeqRec(tiny_config())
    gsasrec = {
        "item_embedding.weight": torch.zeros(39, 16),
        "transformer_blocks.0.multihead_attention.query_proj.weight": torch.zeros(16, 16),
        "seq_norm.weight": torch.zeros(16),
    }
    with pytest.raises(UserError, match="looks like a SASRec or gSASRec model, expected a Rec"):
        load_checkpoint(model, gsasrec)
    for backbone, kind in (
        (BertForMaskedLM(BertConfig(**SIZES)), "a BERT language model"),
        (BertModel(BertConfig(**SIZES)), "a BERT or RoBERTa language model"),
        (RobertaForMaskedLM(RobertaConfig(**SIZES)), "a RoBERTa language model"),
        (LongformerModel(LongformerConfig(**SIZES)), "a Longformer language model"),
    ):
        torch.save(backbone.state_dict(), tmp_path / "x.bin")
        with pytest.raises(UserError, match=rf"x\.bin looks like {kind}, .*load_backbone"):
            load_checkpoint(model, tmp_path / "x.bin")
    assert describe_state_dict(released()) == "a Recformer"
    assert describe_state_dict({"odd": torch.ones(1)}).startswith("an unknown model (its first")


def test_the_report_is_short_and_complete() -> None:
    report = LoadReport(
        "x.bin",
        "RecformerModel",
        copied=["a", "b"],
        filled={
            f"encoder.layer.{i}.attention.self.query_global.{kind}": "from query"
            for i in range(12)
            for kind in ("weight", "bias")
        },
        new={"c.weight": "zero"},
        left_over={"position_ids": "a buffer"},
        notes=["a fact"],
    )
    assert str(report).splitlines() == [
        "x.bin -> RecformerModel: 2 tensors copied, 24 filled, 1 new, 1 left over",
        "  filled: encoder.layer.*.attention.self.query_global.{weight,bias} (from query)",
        "  new: c.weight (zero)",
        "  left over: position_ids (a buffer)",
        "  a fact",
    ]
