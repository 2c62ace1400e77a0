"""The dense path: what the packed encoder gives, and what can be made of it."""

from __future__ import annotations

import copy
import shutil

import numpy as np
import pytest
import torch
from torch import Tensor

from recformer import PackedTokens, RecformerConfig, RecformerModel
from recformer.config import POOLER_TYPES
from recformer.data.items import ItemsInMemory
from recformer.models import HeadOptions, RecformerForCatalogue
from recformer.models.catalogue import token_bags
from recformer.models.dense import INPUTS, DenseEncoder, DenseItemEncoder
from tests.tiny import randomised, tiny_config

# Lengths below, at and beyond the window; alone, alike, and beside much shorter ones.
CASES = [([1], 2), ([1, 1, 3], 2), ([5, 1, 40, 90, 7], 8), ([64, 65], 64), ([70, 3, 130], 130)]


def padded(lengths: list[int], config: RecformerConfig, extra: int = 0) -> tuple[Tensor, ...]:
    """Random inputs in the order of `INPUTS`, padded to the longest and `extra` places more."""
    shape = (len(lengths), max(lengths) + extra)
    generator = torch.Generator().manual_seed(sum(lengths))

    def draw(high: int) -> Tensor:
        return torch.randint(high, shape, generator=generator)

    mask = (torch.arange(shape[1]) < torch.tensor(lengths)[:, None]).long()
    ids = torch.where(mask.bool(), draw(config.vocab_size), config.pad_token_id)
    return ids, mask, draw(3), draw(config.max_item_embeddings)


def encoder(window: int | list[int], **values: object) -> RecformerModel:
    fields = {"attention_window": window, "max_position_embeddings": 140} | values
    return randomised(RecformerModel(tiny_config(**fields)))


@torch.no_grad()
def packed_vectors(model: RecformerModel, inputs: tuple[Tensor, ...]) -> Tensor:
    return model.encode(PackedTokens.from_padded(*inputs))


@pytest.mark.parametrize("pooler", POOLER_TYPES)
@pytest.mark.parametrize(("lengths", "window"), CASES)
def test_dense_vectors_are_those_of_the_packed_encoder(lengths, window, pooler) -> None:
    model = encoder([window, 2], pooler_type=pooler).double()  # windows differ between layers
    inputs = padded(lengths, model.config)
    with torch.no_grad():
        found = DenseEncoder(model)(*inputs)
    torch.testing.assert_close(found, packed_vectors(model, inputs), rtol=1e-6, atol=1e-6)


def test_more_padding_changes_nothing() -> None:
    model = encoder(4, pooler_type="avg").double()
    tight, wide = (padded([9, 4], model.config, extra) for extra in (0, 30))
    wide = tuple(torch.cat([t, w[:, 9:]], dim=1) for t, w in zip(tight, wide, strict=True))
    with torch.no_grad():
        torch.testing.assert_close(DenseEncoder(model)(*wide), DenseEncoder(model)(*tight))


@pytest.mark.parametrize(("pad", "activation"), [(0, "gelu"), (1, "relu")])
def test_positions_begin_behind_the_pad_token(pad, activation) -> None:
    """BERT's pad token is 0, RoBERTa's 1."""
    model = encoder(4, pad_token_id=pad, hidden_act=activation).double()
    inputs = padded([30, 12], model.config)
    with torch.no_grad():
        found = DenseEncoder(model)(*inputs)
    torch.testing.assert_close(found, packed_vectors(model, inputs), rtol=1e-6, atol=1e-6)
    assert DenseEncoder(model).max_length == 140 - pad - 1


def test_weights_are_shared() -> None:
    model = encoder(4)
    dense = DenseEncoder(model)
    assert dense.state_dict().keys() == model.state_dict().keys()
    inputs = padded([5], model.config)
    with torch.no_grad():
        before = dense(*inputs)
        model.encoder.layer[0].output.dense.weight.mul_(2)
        assert not torch.equal(dense(*inputs), before)


def catalogue_model(**options: object) -> RecformerForCatalogue:
    head = HeadOptions(**({"bag_size": 6} | options)).as_dict()
    model = RecformerForCatalogue(tiny_config(item_num=3, head=head, pooler_type="avg"))
    randomised(model)
    with torch.no_grad():
        model.head.whitening.copy_(torch.randn(16, 16))
        model.head.mean.copy_(torch.randn(16) / 8)
        if model.head.options.bag_size:
            model.head.idf.copy_(torch.rand(50) + 1)
    return model


@pytest.mark.parametrize("options", [{}, {"bag_size": 0}, {"whiten": False}])
def test_text_vectors_of_the_head(options) -> None:
    """Of single items, repeated tokens among them."""
    model = catalogue_model(**options).double()
    ids = np.array([7, 8, 9, 7, 8, 5, 11], dtype=np.uint16)
    types = np.array([1, 2, 2, 1, 2, 1, 2], dtype=np.uint8)
    store = ItemsInMemory(ids, types, np.array([0, 5, 7]))
    inputs = torch.full((4, 2, 6), 0)
    for row, (start, stop) in enumerate([(0, 5), (5, 7)]):
        size = stop - start + 1
        inputs[0, row, 1:size] = torch.from_numpy(ids[start:stop].astype(np.int64))
        inputs[1, row, :size] = 1
        inputs[2, row, 1:size] = torch.from_numpy(types[start:stop].astype(np.int64))
        inputs[3, row, 1:size] = 1
    with torch.no_grad():
        vectors = packed_vectors(model.longformer, tuple(inputs))
        expected = model.head.text_vectors(vectors, token_bags(store))
        found = DenseItemEncoder(model)(*inputs)
    torch.testing.assert_close(found.float(), expected.float(), rtol=1e-5, atol=1e-6)
    assert found.shape == (2, 16 + (6 if model.head.options.bag_size else 0))


# What the packed encoder cannot do. --------------------------------------------------------------

DYNAMIC = {name: {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC} for name in INPUTS}


@pytest.mark.parametrize("pooler", POOLER_TYPES)
def test_torch_export_with_dynamic_batch_and_length(pooler) -> None:
    model = encoder(8, pooler_type=pooler)
    example = padded([12, 7], model.config)
    with torch.no_grad():
        program = torch.export.export(DenseEncoder(model), example, dynamic_shapes=DYNAMIC)
    for lengths in ([5, 1, 40], [90, 3]):
        inputs = padded(lengths, model.config)
        found = program.module()(*inputs)
        torch.testing.assert_close(found, packed_vectors(model, inputs), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "backend",
    [
        "aot_eager",
        pytest.param(
            "inductor",
            marks=[
                pytest.mark.slow,  # compiles C++ for most of a minute
                pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler"),
            ],
        ),
    ],
)
def test_torch_compile_in_one_graph(backend) -> None:
    model = encoder(8, pooler_type="avg")
    compiled = torch.compile(DenseEncoder(model), backend=backend, dynamic=True, fullgraph=True)
    for lengths in ([5, 2, 40], [90, 3]):
        inputs = padded(lengths, model.config)
        with torch.no_grad():
            found = compiled(*inputs)
        torch.testing.assert_close(found, packed_vectors(model, inputs), rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_torch_trace_and_dynamic_quantisation() -> None:
    model = encoder(8, pooler_type="avg")
    dense = DenseEncoder(model)
    with torch.no_grad():
        traced = torch.jit.trace(dense, padded([12, 7], model.config))
        inputs = padded([5, 2, 40], model.config)
        expected = packed_vectors(model, inputs)
        torch.testing.assert_close(traced(*inputs), expected, rtol=1e-4, atol=1e-5)
        small = torch.ao.quantization.quantize_dynamic(copy.deepcopy(dense), {torch.nn.Linear})
        cosines = torch.cosine_similarity(small(*inputs), expected)
    assert not torch.equal(small(*inputs), expected)  # it did quantise
    assert cosines.min() > 0.99
