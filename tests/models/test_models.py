"""The networks against golden vectors, against transformers' Longformer, and by invariance."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModel, LongformerConfig, LongformerModel

import recformer
from recformer import (
    PackedTokens,
    RecformerConfig,
    RecformerForPretraining,
    RecformerForSeqRec,
    RecformerModel,
)
from recformer.models import encoder as encoder_module

GOLDEN = Path(__file__).parents[1] / "golden"
META = json.loads((GOLDEN / "recformer_tiny.json").read_text())
Arrays = dict[str, Tensor]


@pytest.fixture(scope="module")
def golden() -> Arrays:
    with np.load(GOLDEN / "recformer_tiny.npz") as arrays:
        return {name: torch.from_numpy(np.asarray(arrays[name])) for name in arrays.files}


@pytest.fixture(scope="module")
def released() -> Arrays:
    """A state dict as published, with the `position_ids` buffer."""
    return torch.load(GOLDEN / "recformer_tiny_pretraining_ckpt.bin", weights_only=True)


def golden_config(**changes: Any) -> RecformerConfig:
    return RecformerConfig(**{**META["config"], **changes})


def side(golden: Arrays, name: str) -> Arrays:
    return {key[2:]: value for key, value in golden.items() if key.startswith(f"{name}_")}


def both_sides(golden: Arrays) -> Arrays:
    return {f"{key}_{s}": value for s in "ab" for key, value in side(golden, s).items()}


def masked(golden: Arrays) -> Arrays:
    return {key: value for key, value in golden.items() if key.startswith("mlm_")}


def tiny_config(**changes: Any) -> RecformerConfig:
    values: dict[str, Any] = {
        "vocab_size": 60,
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 24,
        "max_position_embeddings": 200,
        "attention_window": 8,
        "max_item_embeddings": 6,
    }
    return RecformerConfig(**{**values, **changes})


def random_batch(lengths: list[int], vocab_size: int = 60, items: int = 6) -> PackedTokens:
    size = sum(lengths)
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0)
    item_positions = torch.randint(1, items, (size,))
    types = torch.randint(1, 3, (size,))
    for values in (item_positions, types):
        values[cu_seqlens[:-1]] = 0
    ids = torch.randint(3, vocab_size, (size,))
    return PackedTokens(ids, types, item_positions, cu_seqlens)


def padded_inputs(packed: PackedTokens, extra: int = 0, pad: int = 1) -> Arrays:
    """The published padded form, with `extra` more columns than needed."""
    length = int(packed.lengths.max()) + extra
    mask = packed.to_padded(torch.ones_like(packed.input_ids), length)
    first = torch.zeros_like(mask)
    first[:, 0] = 1
    return {
        "input_ids": packed.to_padded(packed.input_ids - pad, length) + pad,
        "attention_mask": mask,
        "global_attention_mask": first,
        "token_type_ids": packed.to_padded(packed.token_type_ids - 3, length) + 3,
        "item_position_ids": packed.to_padded(packed.item_position_ids, length),
    }


def close(got: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(got, expected, rtol=0, atol=tolerance)


# --- golden vectors -------------------------------------------------------------------------


def test_golden_encoder(golden: Arrays, released: Arrays) -> None:
    model = RecformerForPretraining(golden_config()).eval()
    model.load_state_dict(released)  # position_ids is dropped, everything else must fit
    output = model.longformer(**side(golden, "a"))
    close(output.last_hidden_state, golden["hidden_a"])
    close(output.pooler_output, golden["pooled_a"])
    hidden, pooled = model.longformer(**side(golden, "b"), return_dict=False)
    close(pooled, golden["pooled_b"])
    assert hidden.shape == (*golden["b_input_ids"].shape, 32)


def test_golden_pretraining_losses_and_gradients(golden: Arrays, released: Arrays) -> None:
    model = RecformerForPretraining(golden_config())
    model.load_state_dict(released)
    output = model(**both_sides(golden), **masked(golden))
    close(output.loss, golden["loss_total"])
    close(output.logits, golden["logits"])
    assert output.cl_correct_num == golden["cl_correct_num"]
    assert output.cl_total_num == 6

    output.loss.backward()
    parameters = dict(model.named_parameters())
    assert parameters.keys() == META["grad_norms"].keys()
    for name, expected in META["grad_norms"].items():
        grad = parameters[name].grad
        assert grad is not None, name
        if name.endswith(("key.bias", "key_global.bias")):  # zero in exact arithmetic
            assert grad.norm() < 1e-7, name
        else:
            assert grad.norm().item() == pytest.approx(expected, rel=1e-4), name
    names = [name for name in golden if name.startswith("grad__")]
    assert len(names) == 5
    for name in names:
        difference = parameters[name.removeprefix("grad__")].grad - golden[name]
        assert difference.norm() < 1e-4 * golden[name].norm(), name


def test_golden_contrastive_loss_alone(golden: Arrays, released: Arrays) -> None:
    model = RecformerForPretraining(golden_config())
    model.load_state_dict(released)
    output = model(**both_sides(golden))
    close(output.loss, golden["loss_contrastive"])
    loss, logits, correct, total = model(**both_sides(golden), return_dict=False)
    close(loss, golden["loss_contrastive"])
    close(logits, golden["logits"])
    assert (correct, total) == (golden["cl_correct_num"], 6)


def test_golden_recommendation(golden: Arrays, released: Arrays) -> None:
    model = RecformerForSeqRec(golden_config()).eval()
    left = model.load_state_dict(released, strict=False)
    assert not left.missing_keys
    assert {key.split(".")[0] for key in left.unexpected_keys} == {"lm_head"}
    model.init_item_embedding(golden["item_embeddings"])
    inputs, labels = side(golden, "a"), golden["seqrec_labels"]
    close(model(**inputs), golden["seqrec_scores"])
    close(
        model(**inputs, candidates=golden["seqrec_candidates"]), golden["seqrec_candidate_scores"]
    )
    close(model(**inputs, labels=labels), golden["seqrec_loss"])
    close(model(**inputs, labels=labels[:, None]), golden["seqrec_loss"])


# --- transformers' Longformer ---------------------------------------------------------------


def as_longformer(model: RecformerModel) -> LongformerModel:
    """transformers' Longformer with the same weights; the extra embeddings become zero."""
    with torch.no_grad():
        model.embeddings.token_type_embeddings.weight.zero_()
        model.embeddings.item_position_embeddings.weight.zero_()
    config = model.config
    peer = LongformerModel(
        LongformerConfig(
            **{
                name: getattr(config, name)
                for name in (
                    "vocab_size",
                    "hidden_size",
                    "num_hidden_layers",
                    "num_attention_heads",
                    "intermediate_size",
                    "max_position_embeddings",
                    "pad_token_id",
                    "layer_norm_eps",
                )
            },
            attention_window=config.layer_windows,
        ),
        add_pooling_layer=False,
    )
    state = model.state_dict()
    del state["embeddings.item_position_embeddings.weight"]
    state["embeddings.token_type_embeddings.weight"] = torch.zeros(2, config.hidden_size)
    peer.load_state_dict(state)
    return peer.eval()


@pytest.mark.parametrize(
    ("window", "lengths"),
    [(8, [37, 1, 8, 120, 2]), ([4, 32], [63, 64, 65, 5]), (64, [150, 33]), (4, [9, 1])],
)
def test_hidden_states_are_those_of_longformer(window: int | list[int], lengths: list[int]) -> None:
    model = RecformerModel(tiny_config(attention_window=window, initializer_range=0.3)).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.3)
    peer = as_longformer(model)
    packed = random_batch(lengths)
    inputs = padded_inputs(packed)
    output = model(**inputs)
    with torch.no_grad():
        expected = peer(
            inputs["input_ids"], inputs["attention_mask"], inputs["global_attention_mask"]
        ).last_hidden_state
    expected = expected * inputs["attention_mask"][:, :, None]
    close(output.last_hidden_state, expected)
    close(output.pooler_output, expected[:, 0])
    close(model.encode(packed), expected[:, 0])


def test_gradients_are_those_of_longformer() -> None:
    model = RecformerModel(tiny_config(initializer_range=0.3)).eval()
    peer = as_longformer(model)
    packed = random_batch([37, 1, 8, 60])
    inputs = padded_inputs(packed)
    weight = torch.randn(4, 60, 16) * inputs["attention_mask"][:, :, None]
    (model(**inputs).last_hidden_state * weight).sum().backward()
    expected = peer(inputs["input_ids"], inputs["attention_mask"], inputs["global_attention_mask"])
    (expected.last_hidden_state * weight).sum().backward()
    theirs = dict(peer.named_parameters())
    for name, parameter in model.named_parameters():
        if "token_type" in name or "item_position" in name:
            continue
        ours, other = parameter.grad, theirs[name].grad
        assert ours is not None
        assert (ours - other).norm() <= 1e-4 * other.norm() + 1e-4, name


# --- invariances ----------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["cls", "avg"])
def encoder(request: pytest.FixtureRequest) -> RecformerModel:
    torch.manual_seed(1)
    return RecformerModel(tiny_config(pooler_type=request.param, initializer_range=0.2)).eval()


def test_padding_changes_nothing(encoder: RecformerModel) -> None:
    packed = random_batch([13, 1, 40])
    hidden, pooled = encoder.encode_tokens(packed)
    for extra in (0, 1, 50):
        output = encoder(**padded_inputs(packed, extra))
        close(output.pooler_output, pooled, 1e-6)
        close(output.last_hidden_state, packed.to_padded(hidden, 40 + extra), 1e-6)
        assert not output.last_hidden_state[1, 1:].any()


def test_order_and_batch_size_change_nothing(encoder: RecformerModel) -> None:
    parts = [random_batch([n]) for n in (13, 1, 40, 64, 2)]
    alone = torch.cat([encoder.encode(part) for part in parts])
    close(encoder.encode(PackedTokens.cat(parts)), alone, 1e-6)
    order = [3, 0, 4, 2, 1]
    shuffled = encoder.encode(PackedTokens.cat([parts[i] for i in order]))
    close(shuffled, alone[order], 1e-6)


def test_masks_may_be_left_out(encoder: RecformerModel) -> None:
    packed = random_batch([13, 1, 40])
    inputs = padded_inputs(packed)
    expected = encoder(**inputs).pooler_output
    del inputs["attention_mask"], inputs["global_attention_mask"]
    assert torch.equal(encoder(**inputs).pooler_output, expected)


def test_position_ids_may_be_given(encoder: RecformerModel) -> None:
    packed = random_batch([13, 5])
    inputs = padded_inputs(packed)
    usual = torch.arange(2, 15).expand(2, -1)
    expected = encoder(**inputs).pooler_output
    assert torch.equal(encoder(**inputs, position_ids=usual).pooler_output, expected)
    moved = encoder(**inputs, position_ids=usual + 1).pooler_output
    assert not torch.allclose(moved, expected)


def test_only_neighbours_and_first_tokens_matter() -> None:
    """Token 20 of one layer of window 8 sees 16..24 and `<s>`, and nothing of other sequences."""
    model = RecformerModel(tiny_config(num_hidden_layers=1, initializer_range=0.3)).eval()
    packed = random_batch([30, 30])
    before, _ = model.encode_tokens(packed)
    for place, seen in [(0, True), (15, False), (16, True), (24, True), (25, False), (30, False)]:
        ids = packed.input_ids.clone()
        ids[place] = ids[place] % 50 + 4
        changed = PackedTokens(
            ids, packed.token_type_ids, packed.item_position_ids, packed.cu_seqlens
        )
        after, _ = model.encode_tokens(changed)
        assert bool((after[20] - before[20]).abs().max() > 1e-4) == seen, place
        # `<s>` of the first sequence sees all of it
        assert bool((after[0] - before[0]).abs().max() > 1e-5) == (place < 30), place


def test_avg_pooling_is_the_mean_over_real_tokens() -> None:
    """For lengths that are no multiple of the window too, with `<s>` counted once."""
    torch.manual_seed(1)
    model = RecformerModel(tiny_config(pooler_type="avg")).eval()
    lengths = [13, 1, 40, 8]
    hidden, pooled = model.encode_tokens(random_batch(lengths))
    by_hand = torch.stack([rows.mean(dim=0) for rows in hidden.split(lengths)])
    close(pooled, by_hand, 1e-6)
    close(pooled[1], hidden[13], 1e-7)


def test_avg_as_published_counts_the_first_token_twice() -> None:
    """The attention mask times the global mask plus one: 2 at `<s>`, 1 at the others."""
    torch.manual_seed(1)
    model = RecformerModel(tiny_config(pooler_type="avg_published")).eval()
    lengths = [13, 1, 40, 8]
    hidden, pooled = model.encode_tokens(random_batch(lengths))
    by_hand = [(rows[0] + rows.sum(dim=0)) / (len(rows) + 1) for rows in hidden.split(lengths)]
    close(pooled, torch.stack(by_hand), 1e-6)


# --- precision, training --------------------------------------------------------------------


def test_bfloat16_points_the_same_way(encoder: RecformerModel) -> None:
    packed = random_batch([13, 1, 40, 100])
    with torch.no_grad():
        expected = encoder.encode(packed)
        with torch.autocast("cpu", torch.bfloat16):
            autocast = encoder.encode(packed)
        copy = RecformerModel(encoder.config).eval()
        copy.load_state_dict(encoder.state_dict())
        weights = copy.bfloat16().encode(packed)
    for got in (autocast, weights):
        assert got.dtype == torch.bfloat16
        assert torch.cosine_similarity(got.float(), expected).min() > 0.9999


@pytest.mark.parametrize("hidden_act", ["gelu", "relu"])
def test_inference_computes_what_training_does(
    hidden_act: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encoder_module, "CPU_INNER_BYTES", 1)  # pieces as small as they get
    config = tiny_config(hidden_act=hidden_act, initializer_range=0.2)
    model = RecformerModel(config).double().eval()
    packed = random_batch([190, 1, 190, 100, 150])
    expected = model.encode_tokens(packed)
    with torch.no_grad():
        got = model.encode_tokens(packed)
    for a, b in zip(got, expected, strict=True):
        close(a, b, 1e-12)


def test_layer_norms_in_float32_change_nothing(
    encoder: RecformerModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under autocast a GPU gives the output of LayerNorm in float32, a CPU does not."""

    def layer_norm(self: torch.nn.LayerNorm, x: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            return F.layer_norm(x.float(), self.normalized_shape, self.weight, self.bias, self.eps)

    packed = random_batch([13, 1, 40])

    def vectors() -> list[Tensor]:
        with torch.autocast("cpu", torch.bfloat16):
            outputs = [encoder.encode(packed), *encoder.encode_tokens(packed)]
        return [output.detach() for output in outputs]

    expected = vectors()
    monkeypatch.setattr(torch.nn.LayerNorm, "forward", layer_norm)
    for got, before in zip(vectors(), expected, strict=True):
        assert got.dtype == torch.bfloat16
        assert torch.cosine_similarity(got.float(), before.float()).min() > 0.999


@pytest.mark.gpu
@pytest.mark.parametrize("pooler_type", ["cls", "avg"])
def test_a_gpu_gives_the_same_vectors_and_gradients(pooler_type: str) -> None:
    check_device(pooler_type, "cuda")


def check_device(pooler_type: str, device: str) -> None:
    """Vectors and gradients in float32 and under autocast, against those in float64 on the CPU."""
    model = RecformerModel(tiny_config(pooler_type=pooler_type, initializer_range=0.2)).eval()
    packed, weight = random_batch([13, 1, 40, 100]), torch.randn(4, 16)

    def run(model: RecformerModel, device: str, autocast: bool) -> tuple[Tensor, Tensor]:
        model.zero_grad()
        with torch.autocast(device, torch.bfloat16, enabled=autocast):
            pooled = model.encode(packed.to(device))
        (pooled * weight.to(pooled)).sum().backward()
        grads = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        return pooled.detach().double().cpu(), grads.double().cpu()

    exact = run(model.double(), "cpu", False)
    model = model.float().to(device)
    for got, expected in zip(run(model, device, False), exact, strict=True):
        assert (got - expected).norm() < 1e-5 * expected.norm()
    for got, expected in zip(run(model, device, True), exact, strict=True):
        assert torch.cosine_similarity(got.flatten(), expected.flatten(), dim=0) > 0.99
    with torch.no_grad():
        inferred = [model.encode(packed.to(device))]
        with torch.autocast(device, torch.bfloat16):
            inferred.append(model.encode(packed.to(device)))
        copy = RecformerModel(model.config).eval()
        copy.load_state_dict(model.state_dict())
        inferred.append(copy.bfloat16().to(device).encode(packed.to(device)))
    for vectors in inferred:
        assert torch.cosine_similarity(vectors.double().cpu(), exact[0]).min() > 0.999
    loss = model.train().encode(packed.to(device)).square().sum()  # with dropout
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("pooler_type", ["cls", "avg"])
@pytest.mark.parametrize("autocast", [False, True])
def test_every_parameter_has_a_gradient(pooler_type: str, autocast: bool) -> None:
    """Distributed training stops at a parameter without one; those that do nothing get zeros."""
    model = RecformerForSeqRec(tiny_config(pooler_type=pooler_type, initializer_range=0.3))
    model.init_item_embedding(torch.randn(9, 16))
    packed = random_batch([13, 1, 40])
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = model.loss(model.encode(packed), torch.tensor([1, 0, 8]))
    loss.backward()
    last = "longformer.encoder.layer.1.attention.self."
    for name, parameter in model.longformer.named_parameters(prefix="longformer"):
        assert parameter.grad is not None, name
        idle = name.endswith("key_global.bias") or (
            pooler_type == "cls"
            and name.startswith((last + "query.", last + "key.", last + "value."))
        )
        if idle:
            assert not parameter.grad.any(), name
        elif not name.endswith("key.bias"):
            assert parameter.grad.any(), name
    assert model.item_embedding is not None
    assert model.item_embedding.weight.grad is None


def test_bfloat16_gradients_point_the_same_way() -> None:
    model = RecformerForSeqRec(
        tiny_config(initializer_range=0.2, hidden_dropout_prob=0, attention_probs_dropout_prob=0)
    )
    model.init_item_embedding(torch.randn(9, 16))
    packed, labels = random_batch([13, 2, 70]), torch.tensor([1, 0, 8])
    grads = []
    for autocast in (False, True):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = model.loss(model.encode(packed), labels)
        loss.backward()
        grads.append(
            torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        )
    assert torch.cosine_similarity(*grads, dim=0) > 0.99


@pytest.mark.parametrize("name", ["hidden_dropout_prob", "attention_probs_dropout_prob"])
def test_dropout_works_in_training_alone(name: str) -> None:
    probabilities = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    model = RecformerModel(tiny_config(**{**probabilities, name: 0.3}))
    packed = random_batch([13, 40])
    model.train()
    assert not torch.equal(model.encode(packed), model.encode(packed))
    model.eval()
    assert torch.equal(model.encode(packed), model.encode(packed))


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("first_only", [False, True])
def test_gradient_checkpointing_changes_nothing(
    first_only: bool, use_reentrant: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encoder_module, "CPU_INNER_BYTES", 1)  # not cut up: dropout comes again
    model = RecformerModel(tiny_config(initializer_range=0.2)).train()
    packed = random_batch([13, 1, 190, 190])

    def run() -> Tensor:
        torch.manual_seed(2)
        model.zero_grad()
        output = model.encode(packed) if first_only else model.encode_tokens(packed)[0]
        output.square().sum().backward()
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    plain = run()
    enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
    enable({"use_reentrant": use_reentrant})
    assert all(layer.gradient_checkpointing for layer in model.encoder.layer)
    torch.testing.assert_close(run(), plain, rtol=1e-5, atol=1e-6)


def test_a_side_without_masked_tokens_adds_zero(golden: Arrays, released: Arrays) -> None:
    model = RecformerForPretraining(golden_config())
    model.load_state_dict(released)
    inputs, mlm = both_sides(golden), masked(golden)
    plain = model(**inputs).loss
    whole = model(**inputs, **mlm).loss
    mlm["mlm_labels_b"] = torch.full_like(mlm["mlm_labels_b"], -100)
    a_only = model(**inputs, **mlm).loss
    assert plain < a_only < whole
    alone = model(
        **inputs, mlm_input_ids_a=mlm["mlm_input_ids_a"], mlm_labels_a=mlm["mlm_labels_a"]
    )
    close(a_only, alone.loss, 1e-6)
    mlm["mlm_labels_a"] = torch.full_like(mlm["mlm_labels_a"], -100)
    loss = model(**inputs, **mlm).loss
    close(loss, plain, 1e-6)
    loss.backward()
    assert model.lm_head.dense.weight.grad is not None
    assert not model.lm_head.dense.weight.grad.any()


# --- item table -----------------------------------------------------------------------------


def test_sampled_softmax_with_every_negative_is_the_full_one() -> None:
    model = RecformerForSeqRec(tiny_config(item_num=7)).eval()
    model.init_item_embedding(torch.randn(7, 16))
    pooled, labels = torch.randn(4, 16), torch.tensor([0, 6, 3, 3])
    full = model.loss(pooled, labels)
    model.config.finetune_negative_sample_size = 6
    close(model.loss(pooled, labels), full, 1e-6)
    model.config.finetune_negative_sample_size = 2
    assert model.loss(pooled, labels) < full  # fewer terms in the sum


def test_item_tables() -> None:
    model = RecformerForSeqRec(tiny_config())
    with pytest.raises(ValueError, match="call init_item_embedding first"):
        model.similarity_score(torch.randn(2, 16))
    with pytest.raises(ValueError, match="set config.item_num"):
        model.init_item_embedding()
    with pytest.raises(ValueError, match=r"\(4, 15\), expected \(items, 16\)"):
        model.init_item_embedding(torch.randn(4, 15))
    vectors = torch.randn(4, 16)
    model.init_item_embedding(vectors)
    assert model.config.item_num == 4
    assert model.item_embedding is not None
    assert not model.item_embedding.weight.requires_grad
    model.config.item_num = 6
    model.init_item_embedding()
    assert model.item_embedding.weight.shape == (6, 16)
    assert model.item_embedding.weight.requires_grad
    scores = model.similarity_score(vectors)
    by_hand = torch.cosine_similarity(vectors[:, None], model.item_embedding.weight[None], dim=-1)
    close(scores, by_hand / 0.05, 1e-4)


# --- files ----------------------------------------------------------------------------------


def test_a_finetuned_file_brings_its_item_table(golden: Arrays, released: Arrays) -> None:
    state = {k: v for k, v in released.items() if not k.startswith("lm_head.")}
    state["item_embedding.weight"] = golden["item_embeddings"]
    model = RecformerForSeqRec(golden_config(item_num=0)).eval()
    model.load_state_dict(state)
    assert model.config.item_num == 23
    close(model(**side(golden, "a")), golden["seqrec_scores"])
    assert "longformer.embeddings.position_ids" in state  # the caller's dict is left alone


def test_left_over_and_missing_keys_are_errors(released: Arrays) -> None:
    with pytest.raises(RuntimeError, match=r"Unexpected key.*lm_head\.dense\.weight"):
        RecformerForSeqRec(golden_config()).load_state_dict(released)
    state = {k: v for k, v in released.items() if "layer.1.output.dense.bias" not in k}
    with pytest.raises(RuntimeError, match=r"Missing key.*layer\.1\.output\.dense\.bias"):
        RecformerForPretraining(golden_config()).load_state_dict(state)
    bare = {k.removeprefix("longformer."): v for k, v in released.items() if "lm_head" not in k}
    RecformerModel(golden_config()).load_state_dict(bare)


def test_published_keys(released: Arrays) -> None:
    ours = RecformerForPretraining(golden_config()).state_dict()
    assert {k: v.shape for k, v in ours.items()} == {
        k: v.shape for k, v in released.items() if not k.endswith("position_ids")
    }


def same_state(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    first, second = a.state_dict(), b.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


@pytest.mark.parametrize("tie_word_embeddings", [True, False])
def test_saved_pretraining_folders_load(tmp_path: Path, tie_word_embeddings: bool) -> None:
    config = tiny_config(tie_word_embeddings=tie_word_embeddings)
    model = RecformerForPretraining(config)
    torch.nn.init.normal_(model.lm_head.bias)
    assert not torch.equal(
        model.lm_head.decoder.weight, model.longformer.embeddings.word_embeddings.weight
    )
    model.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").is_file()
    again, report = RecformerForPretraining.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values())
    assert same_state(model, again)
    assert again.lm_head.decoder.bias is again.lm_head.bias

    bare = AutoModel.from_pretrained(tmp_path)
    assert type(bare) is RecformerModel
    assert same_state(model.longformer, bare)
    recommender = RecformerForSeqRec.from_pretrained(tmp_path)
    assert same_state(model.longformer, recommender.longformer)
    assert recommender.item_embedding is None


def test_saved_recommenders_load_with_their_items(tmp_path: Path) -> None:
    model = RecformerForSeqRec(tiny_config()).eval()
    model.init_item_embedding(torch.randn(5, 16))
    model.save_pretrained(tmp_path)
    again, report = RecformerForSeqRec.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values())
    assert again.config.item_num == 5
    assert same_state(model, again)
    assert not again.item_embedding.weight.requires_grad
    inputs = padded_inputs(random_batch([13, 4]))
    assert torch.equal(model(**inputs), again.eval()(**inputs))


def test_fresh_weights_are_longformers() -> None:
    model = RecformerForPretraining(tiny_config(hidden_size=128, initializer_range=0.02))
    words = model.longformer.embeddings.word_embeddings.weight
    assert not words[1].any()  # padding
    assert words.std().item() == pytest.approx(0.02, rel=0.1)
    query = model.longformer.encoder.layer[0].attention.self.query
    assert query.weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert not query.bias.any()
    assert (model.longformer.embeddings.LayerNorm.weight == 1).all()


# --- what is refused ------------------------------------------------------------------------

Change = Callable[[Arrays], Arrays]


def with_value(name: str, value: Any) -> Change:
    return lambda inputs: {**inputs, name: value(inputs) if callable(value) else value}


def global_elsewhere(inputs: Arrays) -> Tensor:
    mask = inputs["global_attention_mask"].clone()
    mask[1, 3] = 1
    return mask


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (with_value("global_attention_mask", global_elsewhere), "global_attention_mask must be 1"),
        (with_value("inputs_embeds", torch.zeros(2, 7, 16)), "inputs_embeds is not supported"),
        (with_value("head_mask", torch.ones(2, 2)), "head_mask is not supported"),
        (with_value("output_attentions", True), "output_attentions is not supported"),
        (with_value("output_hidden_states", True), "output_hidden_states is not supported"),
        (with_value("input_ids", None), "input_ids is required"),
        (with_value("item_position_ids", None), "item_position_ids is required"),
        (with_value("attention_mask", lambda i: i["attention_mask"].flip(1)), "right-padded"),
        (with_value("attention_mask", lambda i: i["attention_mask"] * 0), "without a single token"),
    ],
)
def test_refused_inputs_are_named(change: Change, message: str) -> None:
    model = RecformerModel(tiny_config())
    inputs = padded_inputs(random_batch([7, 4]))
    with pytest.raises(ValueError, match=message):
        model(**change(inputs))


def test_pretraining_refuses_by_name(golden: Arrays) -> None:
    model = RecformerForPretraining(golden_config())
    inputs = both_sides(golden)
    with pytest.raises(ValueError, match="mlm_input_ids_a and mlm_labels_a go together"):
        model(**inputs, mlm_input_ids_a=golden["mlm_input_ids_a"])
    with pytest.raises(ValueError, match="head_mask is not supported"):
        model(**inputs, head_mask=torch.ones(1))
    with pytest.raises(ValueError, match="input_ids_b is required"):
        model(**{**inputs, "input_ids_b": None})
    with pytest.raises(ValueError, match="side a has 6 sequences and side b 5"):
        model(**{k: v[:5] if k.endswith("_b") else v for k, v in inputs.items()})


def test_sequences_longer_than_the_positions_are_refused_before_any_work() -> None:
    model = RecformerModel(tiny_config(max_position_embeddings=22))  # rows 2..21: 20 tokens
    model.encode(random_batch([20, 3]))
    with pytest.raises(ValueError, match=r"21 tokens needs position 22.*to 20 tokens"):
        model.encode(random_batch([3, 21]))
    inputs = padded_inputs(random_batch([3]))
    with pytest.raises(ValueError, match="needs position 22"):
        model(**inputs, position_ids=torch.tensor([[20, 21, 22]]))


def test_empty_batches_and_sequences_are_refused() -> None:
    model = RecformerModel(tiny_config())
    none = torch.zeros(0, dtype=torch.long)
    with pytest.raises(ValueError, match="no sequence"):
        model.encode(PackedTokens(none, none, none, torch.tensor([0])))
    packed = random_batch([3])
    empty = PackedTokens(
        packed.input_ids,
        packed.token_type_ids,
        packed.item_position_ids,
        torch.tensor([0, 3, 3]),
    )
    with pytest.raises(ValueError, match="without a token"):
        model.encode(empty)


def test_the_package_offers_the_published_names() -> None:
    for name in set(recformer.__all__) - {"PAPER"}:
        assert getattr(recformer, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        recformer.Nothing  # noqa: B018
