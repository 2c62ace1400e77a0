"""Language models as the start of a Recformer: every tensor where it belongs, same outputs.

Shapes: L tokens, H hidden.
"""

from __future__ import annotations

import json
from pathlib import Path

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertModel,
    DistilBertConfig,
    DistilBertModel,
    LongformerConfig,
    LongformerForMaskedLM,
    LongformerModel,
    PreTrainedModel,
    RobertaConfig,
    RobertaForMaskedLM,
    RobertaModel,
)

from recformer.checkpoints.backbones import backbone_config, from_backbone, load_backbone
from recformer.checkpoints.loading import load_checkpoint
from recformer.checkpoints.reading import read_state_dict
from recformer.config import PAPER
from recformer.files import UserError
from recformer.models import RecformerForPretraining, RecformerForSeqRec, RecformerModel
from recformer.packing import PackedTokens
from tests.tiny import ITEMS, SIZES, randomised, same, snapshot, tiny_config


def tokens(length: int, first: int) -> PackedTokens:
    """One sequence of `length` tokens, all of different ids, without a token that means padding."""
    ids = torch.cat([torch.tensor([first]), torch.arange(10, 10 + length - 1)])
    types = torch.tensor([0] + [1 + i % 2 for i in range(length - 1)])
    items = torch.tensor([0] + [1 + i // 4 for i in range(length - 1)])
    return PackedTokens(ids, types, items, torch.tensor([0, length]))


def hidden_states(model: RecformerModel, packed: PackedTokens) -> Tensor:
    """(L, H) hidden states with the item positions, which no backbone has, taken out."""
    with torch.no_grad():
        model.embeddings.item_position_embeddings.weight.zero_()
        return model.encode_tokens(packed)[0]


def saved(model: PreTrainedModel, folder: Path) -> Path:
    randomised(model).save_pretrained(folder)
    return folder


def save_bert_tokenizer(folder: Path) -> None:
    """[CLS] is 2 and [SEP] 3: what the ids of `<s>` and `</s>` must become."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{i}" for i in range(45))]
    (folder / "vocab.txt").write_text("\n".join(words) + "\n")


def test_bert_gives_the_same_hidden_states(tmp_path: Path) -> None:
    """With a window over the whole sequence ours is full attention, so the two must agree: this
    holds weights, the shift of positions, token types, `<s>` projections and epsilon at once."""
    bert = BertModel(BertConfig(**SIZES, max_position_embeddings=30), add_pooling_layer=False)
    folder = saved(bert, tmp_path / "bert")
    save_bert_tokenizer(folder)
    model, report = load_backbone(RecformerModel, folder, attention_window=64, max_token_num=29)
    packed = tokens(12, first=2)
    with torch.no_grad():
        expected = bert(packed.input_ids[None]).last_hidden_state[0]
    torch.testing.assert_close(hidden_states(model, packed), expected, atol=1e-5, rtol=1e-5)
    assert model.config.bos_token_id == 2
    assert model.config.eos_token_id == 3
    assert model.config.pad_token_id == 0
    assert report.notes == ["[CLS] (id 2) plays <s>"]


def test_roberta_gives_the_same_hidden_states(tmp_path: Path) -> None:
    roberta = RobertaModel(
        RobertaConfig(**SIZES, max_position_embeddings=30, pad_token_id=1, type_vocab_size=1),
        add_pooling_layer=False,
    )
    folder = saved(roberta, tmp_path / "roberta")
    model, report = load_backbone(RecformerModel, folder, attention_window=64, max_token_num=28)
    packed = tokens(12, first=0)
    with torch.no_grad():
        expected = roberta(packed.input_ids[None]).last_hidden_state[0]
    torch.testing.assert_close(hidden_states(model, packed), expected, atol=1e-5, rtol=1e-5)
    assert "embeddings.position_embeddings.weight" in report.copied
    assert (model.config.bos_token_id, model.config.eos_token_id) == (0, 2)


def test_longformer_gives_the_same_hidden_states(tmp_path: Path) -> None:
    longformer = LongformerModel(
        LongformerConfig(
            **SIZES,
            attention_window=[4, 8],
            max_position_embeddings=60,
            type_vocab_size=1,
            pad_token_id=1,
        ),
        add_pooling_layer=False,
    )
    folder = saved(longformer, tmp_path / "longformer")
    model, report = load_backbone(RecformerModel, folder, attention_window=[4, 8], max_token_num=50)
    packed = tokens(27, first=0)
    at_start = torch.zeros(1, 27, dtype=torch.long)
    at_start[0, 0] = 1
    with torch.no_grad():
        expected = longformer(
            packed.input_ids[None], global_attention_mask=at_start
        ).last_hidden_state[0]
    torch.testing.assert_close(hidden_states(model, packed), expected, atol=1e-5, rtol=1e-5)
    query = "encoder.layer.0.attention.self.query"
    own = longformer.state_dict()
    assert torch.equal(model.state_dict()[f"{query}_global.weight"], own[f"{query}_global.weight"])
    assert f"{query}_global.weight" in report.copied


def test_every_row_of_a_bert_is_where_it_belongs(tmp_path: Path) -> None:
    bert = randomised(BertForMaskedLM(BertConfig(**SIZES, max_position_embeddings=6)))
    bert.save_pretrained(tmp_path)
    save_bert_tokenizer(tmp_path)
    config, state, report = from_backbone(tmp_path, max_token_num=15)
    own = {key.removeprefix("bert."): value for key, value in bert.state_dict().items()}

    theirs = own["embeddings.position_embeddings.weight"]
    # Row 0 is never used; token i stands at row 1 + i and holds BERT's row i, again from 0 after 5.
    rows = [0, *range(6), *range(6), 0, 1, 2]
    ours = state["embeddings.position_embeddings.weight"]
    assert torch.equal(ours, theirs[rows])
    assert config.max_position_embeddings == len(rows) == 16

    first_type = own["embeddings.token_type_embeddings.weight"][0]
    for row in state["embeddings.token_type_embeddings.weight"]:
        assert torch.equal(row, first_type)
    assert state["embeddings.token_type_embeddings.weight"].shape == (4, 16)

    for layer in range(2):
        for name in ("query", "key", "value"):
            for kind in ("weight", "bias"):
                local = f"encoder.layer.{layer}.attention.self.{name}.{kind}"
                at_start = f"encoder.layer.{layer}.attention.self.{name}_global.{kind}"
                assert torch.equal(state[at_start], own[local])
                assert state[at_start].data_ptr() != state[local].data_ptr()
                assert at_start in report.filled

    for key, theirs_key in {
        "lm_head.dense.weight": "cls.predictions.transform.dense.weight",
        "lm_head.layer_norm.bias": "cls.predictions.transform.LayerNorm.bias",
        "lm_head.decoder.weight": "embeddings.word_embeddings.weight",
        "lm_head.decoder.bias": "cls.predictions.bias",
        "lm_head.bias": "cls.predictions.bias",
    }.items():
        assert torch.equal(state[key], own[theirs_key]), key

    items = state["embeddings.item_position_embeddings.weight"]
    assert items.shape == (PAPER["max_item_embeddings"], 16)
    assert 0.018 < items.std() < 0.022
    assert list(report.new) == ["embeddings.item_position_embeddings.weight"]
    assert "row p holds the backbone's row p - 1; 6 positions repeated to make 15" in str(report)


def test_every_tensor_is_accounted_for(tmp_path: Path) -> None:
    """The report names each key of the target once and each unused one of the file."""
    for number, model in enumerate(
        (
            BertModel(BertConfig(**SIZES)),
            BertForMaskedLM(BertConfig(**SIZES)),
            RobertaForMaskedLM(RobertaConfig(**SIZES)),
            LongformerForMaskedLM(LongformerConfig(**SIZES)),
            randomised(RecformerForPretraining(tiny_config(max_token_num=30))),
        )
    ):
        folder = saved(model, tmp_path / str(number))
        for lm_head in (True, False):
            config, state, report = from_backbone(folder, lm_head=lm_head, max_token_num=20)
            accounted = [*report.copied, *report.filled, *report.new]
            assert sorted(accounted) == sorted(state)
            target = RecformerForPretraining if lm_head else RecformerModel
            loaded = load_checkpoint(target(config), state)
            assert len(loaded.copied) == len(state)
            assert not loaded.new
            assert not loaded.left_over
        in_file = read_state_dict(folder)
        has_pooler = "pooler.dense.weight" in in_file
        assert ("pooler.dense.weight" in report.left_over) == has_pooler
        heads = {key for key in in_file if key.startswith(("lm_head.", "cls."))}
        assert heads <= set(report.left_over)


def test_roberta_file_without_its_tied_decoder(tmp_path: Path) -> None:
    roberta = randomised(RobertaForMaskedLM(RobertaConfig(**SIZES, pad_token_id=1)))
    roberta.save_pretrained(tmp_path)
    assert "lm_head.decoder.weight" not in load_file(tmp_path / "model.safetensors")
    model, report = load_backbone(RecformerForPretraining, tmp_path, max_token_num=20)
    own, theirs = model.state_dict(), roberta.state_dict()
    words = theirs["roberta.embeddings.word_embeddings.weight"]
    assert torch.equal(own["lm_head.decoder.weight"], words)
    assert torch.equal(own["lm_head.dense.weight"], theirs["lm_head.dense.weight"])
    assert torch.equal(own["lm_head.decoder.bias"], theirs["lm_head.bias"])
    assert torch.equal(own["lm_head.bias"], theirs["lm_head.bias"])
    assert "tie" in report.filled["lm_head.decoder.weight"]
    # a copy, not the same tensor: the published decoder is a parameter of its own
    decoder = model.lm_head.decoder.weight
    assert decoder.data_ptr() != model.longformer.embeddings.word_embeddings.weight.data_ptr()


def test_longformer_keeps_its_head(tmp_path: Path) -> None:
    longformer = LongformerForMaskedLM(LongformerConfig(**SIZES, tie_word_embeddings=False))
    saved(longformer, tmp_path)
    model, report = load_backbone(RecformerForPretraining, tmp_path, max_token_num=20)
    own, theirs = model.state_dict(), longformer.state_dict()
    assert torch.equal(own["lm_head.decoder.weight"], theirs["lm_head.decoder.weight"])
    assert "lm_head.decoder.weight" in report.copied
    assert list(report.new) == ["embeddings.item_position_embeddings.weight"]


def test_a_backbone_without_a_head_gets_a_new_one(tmp_path: Path) -> None:
    bert = BertModel(BertConfig(**SIZES))
    saved(bert, tmp_path)
    model, report = load_backbone(RecformerForPretraining, tmp_path, max_token_num=20)
    words = bert.state_dict()["embeddings.word_embeddings.weight"]
    assert torch.equal(model.lm_head.decoder.weight, words)
    assert model.lm_head.bias.tolist() == [0.0] * 50
    assert model.lm_head.layer_norm.weight.tolist() == [1.0] * 16
    assert 0.016 < model.lm_head.dense.weight.std() < 0.024
    assert "lm_head.dense.weight" in report.new
    # the same seed draws the same tensors, another seed others
    again, _ = load_backbone(RecformerForPretraining, tmp_path, max_token_num=20)
    assert same(snapshot(model), snapshot(again))
    other, _ = load_backbone(RecformerForPretraining, tmp_path, max_token_num=20, seed=1)
    assert not torch.equal(model.lm_head.dense.weight, other.lm_head.dense.weight)


def test_old_names_of_layer_norms(tmp_path: Path) -> None:
    bert = randomised(BertModel(BertConfig(**SIZES)))
    state = {
        "bert."
        + key.replace("LayerNorm.weight", "LayerNorm.gamma").replace(
            "LayerNorm.bias", "LayerNorm.beta"
        ): value
        for key, value in bert.state_dict().items()
    }
    bert.config.save_pretrained(tmp_path)
    torch.save(state, tmp_path / "pytorch_model.bin")
    _, converted, report = from_backbone(tmp_path, lm_head=False, max_token_num=20)
    key = "encoder.layer.1.output.LayerNorm.weight"
    assert torch.equal(converted[key], bert.state_dict()[key])
    assert sorted(report.left_over) == ["bert.pooler.dense.bias", "bert.pooler.dense.weight"]


def test_the_configuration_is_the_papers_unless_told_otherwise(tmp_path: Path) -> None:
    config = LongformerConfig(
        **SIZES, attention_window=8, layer_norm_eps=1e-7, hidden_act="relu", pad_token_id=1
    )
    saved(LongformerModel(config), tmp_path)
    ours, _, _ = from_backbone(tmp_path)
    for name, value in PAPER.items():
        assert getattr(ours, name) == value, name
    assert (ours.layer_norm_eps, ours.hidden_act) == (1e-7, "relu")
    assert ours.max_position_embeddings == 1024 + 2
    chosen = {"max_token_num": 64, "max_attr_num": 2, "pooler_type": "avg", "item_num": 5}
    ours, state, _ = from_backbone(tmp_path, attention_window=6, **chosen)
    for name, value in (chosen | {"attention_window": 6}).items():
        assert getattr(ours, name) == value, name
    assert ours.max_position_embeddings == 512  # more than needed: nothing is cut off
    assert len(state["embeddings.position_embeddings.weight"]) == 512
    assert backbone_config(tmp_path, attention_window=6, **chosen).to_dict() == ours.to_dict()


def test_backbone_config_needs_no_weights(tmp_path: Path) -> None:
    BertConfig(**SIZES, max_position_embeddings=6).save_pretrained(tmp_path)
    config = backbone_config(tmp_path, max_token_num=15)
    assert (config.hidden_size, config.pad_token_id) == (16, 0)
    assert config.max_position_embeddings == 16
    with pytest.raises(FileNotFoundError, match="holds no weights"):
        from_backbone(tmp_path)


def test_wrong_overrides_are_refused(tmp_path: Path) -> None:
    saved(BertModel(BertConfig(**SIZES)), tmp_path)
    with pytest.raises(UserError, match=r"hidden_size=32 cannot be set for a backbone.*has 16"):
        from_backbone(tmp_path, hidden_size=32)
    with pytest.raises(UserError, match="'max_tokens' is not a field of RecformerConfig"):
        from_backbone(tmp_path, max_tokens=32)
    from_backbone(tmp_path, hidden_size=16, max_token_num=20)


def test_a_recformer_folder_is_a_backbone_too(tmp_path: Path) -> None:
    model = randomised(RecformerForSeqRec(tiny_config(max_token_num=20, pooler_type="avg")))
    table = torch.randn(ITEMS, 16)
    model.init_item_embedding(table)
    model.save_pretrained(tmp_path)
    again, report = load_backbone(RecformerForSeqRec, tmp_path)
    assert same(snapshot(again), snapshot(model))
    assert again.config.pooler_type == "avg"
    assert again.config.max_token_num == 20
    assert not report.new
    assert not report.filled

    # another catalogue, shorter histories, longer sequences
    other, report = load_backbone(
        RecformerForSeqRec, tmp_path, item_num=3, max_item_embeddings=4, max_token_num=60
    )
    assert other.item_embedding is None
    assert report.left_over == {"item_embedding.weight": "7 items, of another catalogue"}
    own, before = other.longformer.embeddings, model.longformer.embeddings
    assert torch.equal(
        own.item_position_embeddings.weight, before.item_position_embeddings.weight[:4]
    )
    rows = [*range(40), *range(2, 24)]
    assert torch.equal(own.position_embeddings.weight, before.position_embeddings.weight[rows])
    with pytest.raises(UserError, match=r"max_item_embeddings=6.*trained with 5 item positions"):
        load_backbone(RecformerForSeqRec, tmp_path, max_item_embeddings=6)

    pretraining, report = load_backbone(RecformerForPretraining, tmp_path)
    assert "lm_head.dense.weight" in report.new
    assert torch.equal(
        pretraining.longformer.embeddings.token_type_embeddings.weight,
        before.token_type_embeddings.weight,
    )


def test_other_families_are_refused_by_name(tmp_path: Path) -> None:
    config = DistilBertConfig(vocab_size=50, dim=16, n_layers=1, n_heads=2, hidden_dim=24)
    saved(DistilBertModel(config), tmp_path / "distilbert")
    with pytest.raises(UserError, match="is of model type 'distilbert', which cannot be"):
        from_backbone(tmp_path / "distilbert")

    bert = tmp_path / "relative"
    saved(BertModel(BertConfig(**SIZES)), bert)
    values = json.loads((bert / "config.json").read_text())
    values["position_embedding_type"] = "relative_key"
    (bert / "config.json").write_text(json.dumps(values))
    with pytest.raises(UserError, match="position_embedding_type 'relative_key'"):
        from_backbone(bert)


def test_weights_that_belie_their_configuration_are_refused(tmp_path: Path) -> None:
    saved(BertModel(BertConfig(**SIZES)), tmp_path)
    shallow = json.loads((tmp_path / "config.json").read_text()) | {"num_hidden_layers": 1}
    (tmp_path / "config.json").write_text(json.dumps(shallow))
    with pytest.raises(UserError, match=r"deeper than its config\.json says"):
        from_backbone(tmp_path)
    deep = shallow | {"num_hidden_layers": 3}
    (tmp_path / "config.json").write_text(json.dumps(deep))
    with pytest.raises(UserError, match=r"lacks encoder\.layer\.2\.attention\.self\.query\.weight"):
        from_backbone(tmp_path)
    wide = shallow | {"num_hidden_layers": 2, "vocab_size": 60}
    (tmp_path / "config.json").write_text(json.dumps(wide))
    with pytest.raises(UserError, match=r"word_embeddings\.weight is \(50, 16\).*\(60, 16\)"):
        load_backbone(RecformerModel, tmp_path)


def test_sentence_transformers_folder_with_a_subfolder(tmp_path: Path) -> None:
    saved(BertModel(BertConfig(**SIZES)), tmp_path / "0_Transformer")
    (tmp_path / "modules.json").write_text(json.dumps([{"idx": 0, "path": "0_Transformer"}]))
    config, _, _ = from_backbone(tmp_path, max_token_num=20)
    assert config.hidden_size == 16


def test_hub_names_are_looked_up_in_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(FileNotFoundError, match="'someone/bert' is no folder here, and the hub"):
        from_backbone("someone/bert")
    repository = tmp_path / "cache" / "models--someone--bert"
    bert = BertModel(BertConfig(**SIZES))
    saved(bert, repository / "snapshots" / "0123")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0123")
    _, state, report = from_backbone("someone/bert", max_token_num=20)
    key = "embeddings.word_embeddings.weight"
    assert torch.equal(state[key], bert.state_dict()[key])
    assert report.source == "someone/bert"
    (repository / "snapshots" / "0123" / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"has a config\.json, but none of"):
        from_backbone("someone/bert")


def test_what_is_no_folder_is_said_so(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"has no config\.json"):
        from_backbone(tmp_path)
    (tmp_path / "x.bin").write_bytes(b"x")
    with pytest.raises(UserError, match=r"x\.bin is a file; a backbone is a folder"):
        from_backbone(tmp_path / "x.bin")
    for absent in (tmp_path / "absent", "./absent", "pretrain_ckpt/here/absent.bin"):
        with pytest.raises(FileNotFoundError, match=r"absent\S* does not exist, expected a model"):
            from_backbone(absent)
