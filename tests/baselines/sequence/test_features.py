"""Features joined with item vectors, by hand and through whole models."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from baselines.models import build
from baselines.sequence.collators import CausalCollator, ItemHistoryCollator, MaskedCollator
from baselines.sequence.features import (
    FeatureAggregation,
    FeatureVector,
    InteractionFeatures,
    embedding_size,
)
from baselines.settings import AGGREGATIONS, settings_of
from recformer.data.collators import EvalExample, TrainExample
from recformer.data.datamodule import SeqRecDataModule
from recformer.data.features import Encoded, Feature
from recformer.data.processed import ProcessedFolder, join_splits
from recformer.data.windows import Windows
from recformer.files import UserError
from tests.preparation.test_features import WINDOWS, process

D = 4
CAT = Encoded(Feature("c", "cat", "item", 2, 1), np.array([2, 0, 1, 3]), num_rows=4)
FLOAT = Encoded(
    Feature("f", "float", "item", 4, 1),
    np.array([0.5, 0.0, -1.0, 2.0], dtype=np.float32),
    present=np.array([True, False, True, True]),
)
LIST = Encoded(
    Feature("l", "list", "item", 2, 1), np.array([2, 3, 3]), None, np.array([0, 2, 2, 3, 3]), 4
)


def plain(encoded: Encoded, bins: int = 0) -> FeatureVector:
    """Without the LayerNorm, so that numbers can be followed."""
    torch.manual_seed(0)
    vector = FeatureVector(encoded, D, bins)
    vector.norm = torch.nn.Identity()
    return vector


def test_vectors_of_each_kind() -> None:
    places = torch.tensor([0, 1, 2, 3])
    vector = plain(CAT)
    assert torch.equal(vector(places), vector.table.weight[[2, 0, 1, 3]])
    assert torch.equal(vector(places[1:3]), torch.zeros(2, D))  # missing and unknown, untrained
    vector = plain(FLOAT)
    with torch.no_grad():
        vector.missing.fill_(7.0)
    expected = vector.bins.weight[:, 0] * 2.0 + vector.bins.bias
    torch.testing.assert_close(vector(places)[3], expected)
    assert torch.equal(vector(places)[1], torch.full((D,), 7.0))
    vector = plain(FLOAT, bins=3)
    shares = (vector.bins.weight[:, 0] * 0.5 + vector.bins.bias).softmax(0)
    torch.testing.assert_close(vector(places)[0], shares @ vector.rows)
    vector = plain(LIST)
    table = vector.table.weight
    expected = torch.stack([(table[2] + table[3]) / 2, table[0], table[3], table[0]])
    torch.testing.assert_close(vector(places), expected)
    torch.testing.assert_close(vector(places.flip(0)), expected.flip(0))


def test_a_features_vectors_are_normed() -> None:
    found = FeatureVector(CAT, 64, 0)(torch.tensor([0, 3]))
    torch.testing.assert_close(found.mean(1), torch.zeros(2), atol=1e-6, rtol=0)
    torch.testing.assert_close(found.std(1, correction=0), torch.full((2,), 0.1), atol=1e-2, rtol=0)


@pytest.mark.parametrize("how", ["concat", "sum", "product"])
def test_aggregations(how: str) -> None:
    torch.manual_seed(1)
    module = FeatureAggregation([CAT, FLOAT], D, how).eval()
    items, places = torch.randn(3, D), torch.tensor([3, 1, 0])
    first, second = (vector(places) for vector in module.vectors)
    if how == "concat":
        expected = module.projection(torch.cat([items, first, second], dim=1))
        assert first.shape == (3, embedding_size(2, D))
    else:
        total = first + second
        expected = items + total if how == "sum" else items * (1 + total)
    torch.testing.assert_close(module(items, places), expected)


def test_dropout_leaves_out_whole_features_and_swaps_take_other_places() -> None:
    module = FeatureAggregation([CAT], D, "sum", dropout=0.5).train()
    torch.manual_seed(0)
    places = torch.zeros(2000, dtype=torch.long)
    found = module(torch.zeros(2000, D), places)
    whole = module.vectors[0](places[:1])[0]
    dropped = (found == 0).all(dim=1)
    assert dropped.float().mean().item() == pytest.approx(0.5, abs=0.05)
    torch.testing.assert_close(found[~dropped], (2 * whole).expand(int((~dropped).sum()), D))
    module = FeatureAggregation([CAT], D, "sum", swap_noise=0.4).train()
    places = torch.arange(2000) % 2 * 3  # categories 2 and 3 by turns
    changed = (module(torch.zeros(2000, D), places) - module.vectors[0](places)).abs().sum(1) > 1e-6
    assert changed.float().mean().item() == pytest.approx(0.2, abs=0.04)  # half are of another one
    assert torch.equal(module.eval()(torch.zeros(9, D), places[:9]), module.vectors[0](places[:9]))


def test_places_that_are_no_interactions_have_no_features() -> None:
    module = InteractionFeatures([CAT], D, "sum").eval()
    items = torch.randn(2, D)
    found = module(items, (torch.tensor([-1, 3]),))
    assert torch.equal(found[0], items[0])
    assert not torch.equal(found[1], items[1])


def test_batches_know_which_interactions_they_hold() -> None:
    example = TrainExample(0, np.array([5, 6, 7, 8]), 1, start=100)
    for collator, expected in (
        (CausalCollator(2), [101, 102]),  # reads 6, 7, predicts 7, 8
        (CausalCollator(9), [100, 101, 102]),
        (MaskedCollator(3, 50, 0.1), [101, 102, 103]),
    ):
        features = collator([example]).history.features
        assert features is not None
        assert features[0].tolist() == expected
    held_out = EvalExample(0, np.array([5, 6, 7, 8]), 9, start=100)
    for history, places in (
        (ItemHistoryCollator(2), [102, 103]),
        (ItemHistoryCollator(3, 50), [102, 103, -1]),
    ):
        features = history([held_out]).history.features
        assert features is not None
        assert features[0].tolist() == places


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> ProcessedFolder:
    names = ["brand", "price", "tags:list", "views:float", "hour"]
    return process(tmp_path_factory.mktemp("features"), *WINDOWS, "--features", *names)


@pytest.mark.parametrize("part", ["train", "val", "test"])
def test_examples_lie_where_their_interactions_do(data: ProcessedFolder, part: str) -> None:
    windows = Windows.of(data)
    assert windows is not None
    joined = join_splits(data.train, data.val, data.test)
    for folder in (windows.view(2), data):
        module = SeqRecDataModule(folder, CausalCollator(9), ItemHistoryCollator(9), 4)
        if part == "train":
            count = len(module.train_set)
            examples = module.train_set[[(row, 0) for row in range(count)]]
        else:
            found = module.val_set if part == "val" else module.test_set
            examples = [found[row] for row in range(len(found))]
        assert examples
        for example in examples:
            end = example.start + len(example.items)
            np.testing.assert_array_equal(example.items, joined.items[example.start : end])
            if part != "train":
                assert joined.items[end] == example.target


PLM = {"arch": "xlnet", "objective": "plm"}
TEXTS = {"items": "add", "text_encoder": "some"}  # beside the features


@pytest.mark.parametrize(
    ("model", "how", "more"),
    [
        *((m, how, {}) for m in ("sasrec", "bert4rec", "gru4rec") for how in AGGREGATIONS),
        ("transformer", "concat", PLM),
        ("sasrec", "concat", TEXTS),
        ("gru4rec", "product", TEXTS),
    ],
)
def test_models_train_on_features_and_rank_with_them(
    data: ProcessedFolder,
    model: str,
    how: str,
    more: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    windows = Windows.of(data)
    assert windows is not None
    view = windows.view(2)
    given = {"hidden_size": 8, "features": how, "soft_one_hot": 3, "dropout": 0.0, **more}
    vectors = np.random.default_rng(0).normal(size=(view.num_items, 6)).astype(np.float32)
    monkeypatch.setattr("baselines.models.keyed_text_vectors", lambda *_: (vectors, "key"))
    built = build(model, settings_of(model, given), view)
    module = SeqRecDataModule(view, built.train_collator, built.eval_collator, 4)
    batch = built.train_collator(
        module.train_set[[(row, 0) for row in range(len(module.train_set))]]
    )
    loss = built.model.training_loss(batch)
    (loss["loss"] if isinstance(loss, dict) else loss).backward()
    for name, parameter in built.model.named_parameters():
        if "features" in name:
            assert parameter.grad is not None, name
    built.model.eval()
    examples = [module.test_set[row] for row in range(len(module.test_set))]
    batch = built.eval_collator(examples)
    with torch.no_grad():
        before = built.model.user_vectors(batch.history)
        table = built.model.item_vectors().clone()
        # another brand of an item changes its vector, and only its
        brand = built.model.inputs.features.vectors[0]
        brand.values[0] = 3
        built.model.train(), built.model.eval()
        changed = (built.model.item_vectors() != table).any(dim=1)
        assert changed.nonzero().flatten().tolist() == [0]
        # another hour of the newest interaction changes what is predicted
        hour = built.model.input_features.vectors[-1]
        hour.values[:] = 3
        assert not torch.allclose(built.model.user_vectors(batch.history), before)


def test_what_does_not_go_together_is_refused(data: ProcessedFolder, tmp_path: Path) -> None:
    settings = settings_of(
        "transformer", {"arch": "electra", "objective": "rtd", "features": "sum", "hidden_size": 8}
    )
    with pytest.raises(UserError, match="--objective rtd: the feature price of interactions"):
        build("transformer", settings, data)
    for given in (
        {"swap_noise": 0.1},
        {"features": "mean"},
        {"features": "sum", "swap_noise": 1.0},
    ):
        with pytest.raises(UserError, match="--features|--swap_noise"):
            settings_of("sasrec", given)
    bare = process(tmp_path, *WINDOWS)
    with pytest.raises(UserError, match="has no features: process the data with --features"):
        build("sasrec", settings_of("sasrec", {"features": "sum"}), bare)
