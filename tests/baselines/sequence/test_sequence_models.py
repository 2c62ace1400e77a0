"""SASRec, gSASRec, BERT4Rec, their text-enhanced forms and Hugging Face networks."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from torch.nn import functional as F

from baselines import models
from baselines.__main__ import main, run
from baselines.arguments import BaselineArguments, read_config
from baselines.semantic_ids.ids import SemanticIds
from baselines.sequence import candidates as candidates_module
from baselines.sequence import padding
from baselines.sequence.candidates import candidate_scores
from baselines.sequence.collators import (
    CausalCollator,
    ItemHistoryCollator,
    ItemSequences,
    MaskedCollator,
    met_before,
)
from baselines.sequence.gru import GRU4Rec
from baselines.sequence.huggingface import HuggingFaceNetwork
from baselines.sequence.item_table import ItemTable, nearest_items
from baselines.sequence.recommender import Objective, SequenceRecommender
from baselines.sequence.sasrec import SASRec
from baselines.settings import LOSSES, settings_of
from recformer.cli import flags_parser
from recformer.data.collators import EvalExample, TrainExample
from recformer.data.processed import ProcessedFolder, Sequences, write_processed
from recformer.files import UserError, read_json
from recformer.models import kernel

GOLDEN = Path(__file__).parents[2] / "golden"
N, D = 12, 16


def network(kind: str, **sizes) -> torch.nn.Module:
    sizes = {"hidden_size": D, "num_layers": 2, "num_heads": 2, "max_length": 8} | sizes
    torch.manual_seed(1)
    if kind == "sasrec":
        return SASRec(dropout=0.0, **sizes)
    if kind == "gru4rec":
        return GRU4Rec(D, 2, 0.0)
    arch, objective = kind.split()
    return HuggingFaceNetwork(arch, objective, dropout=0.0, **sizes)


NETWORKS = (
    "sasrec", "gru4rec", "gpt2 clm", "bert causal", "bert masked", "electra clm", "electra mlm",
    "albert mlm", "modernbert mlm", "llama clm", "xlnet clm", "xlnet mlm", "opt clm", "falcon clm",
)  # fmt: skip


def made(kind: str = "sasrec", items: str = "id", separate: bool = False, **objective):
    torch.manual_seed(0)
    vectors = np.random.default_rng(0).normal(size=(N, 5)).astype(np.float32)
    codes = np.stack([np.arange(N) % 3, np.arange(N) // 3], axis=1)
    table = [ItemTable(N, D, items, vectors, codes) for _ in range(2)]
    return SequenceRecommender(
        network(kind), table[0], Objective(**objective), D, table[1] if separate else None,
        torch.from_numpy(nearest_items(vectors, 2)),
    )  # fmt: skip


def train_examples(*sequences: list[int]) -> list[TrainExample]:
    return [TrainExample(u, np.array(s, dtype=np.int32), u) for u, s in enumerate(sequences)]


def eval_examples(*histories: list[int]) -> list[EvalExample]:
    return [EvalExample(u, np.array(h, dtype=np.int32), 1) for u, h in enumerate(histories)]


# Collators


def test_causal_batches_by_hand():
    batch = CausalCollator(3)(train_examples([5, 6, 7, 8, 9], [1, 2]))
    assert batch.history.items.tolist() == [6, 7, 8, 1]
    assert batch.labels.tolist() == [7, 8, 9, 2]
    assert batch.history.offsets.tolist() == [0, 3, 4]
    assert batch.history.predict.tolist() == [0, 1, 2, 3]


def test_masked_batches_hide_at_least_the_last_item():
    batch = MaskedCollator(3, N, 1e-9)(train_examples([5, 6, 7, 8], [1, 2]))
    assert batch.history.items.tolist() == [6, 7, N, 1, N]
    assert batch.labels.tolist() == [8, 2]
    assert batch.history.predict.tolist() == [2, 4]
    everything = MaskedCollator(3, N, 1.0)(train_examples([5, 6, 7, 8], [1, 2]))
    assert everything.history.items.tolist() == [N] * 5
    assert everything.labels.tolist() == [6, 7, 8, 1, 2]


def test_masks_belong_to_the_example_not_to_the_batch():
    examples = train_examples(*[list(range(8))] * 6)
    collate = MaskedCollator(8, N, 0.3)
    together = collate(examples).history.items.reshape(6, 8)
    alone = [collate([example]).history.items for example in examples]
    assert torch.equal(together, torch.stack(alone))
    share = (together == N).float().mean()
    assert 0.1 < share < 0.6


def test_histories_by_hand():
    batch = ItemHistoryCollator(3)(eval_examples([5, 6, 7, 8], [2]))
    assert batch.history.items.tolist() == [6, 7, 8, 2]
    assert batch.history.predict.tolist() == [2, 3]
    hidden = ItemHistoryCollator(3, N)(eval_examples([5, 6, 7, 8], [2]))
    assert hidden.history.items.tolist() == [7, 8, N, 2, N]
    assert hidden.history.predict.tolist() == [2, 4]
    assert batch.seen[1].tolist() == [5, 6, 7, 8, 2]  # what is filtered is the whole history


# Networks


def test_sasrec_by_the_kernel_is_sasrec_in_torch(monkeypatch):
    if kernel.library() is None:
        pytest.skip("no AVX-512, or no C++ compiler")
    torch.manual_seed(0)
    sasrec = SASRec(64, 2, 2, 12, dropout=0.5)
    lengths = [1, 12, 5, 3]
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    vectors = torch.randn(sum(lengths), 64)
    results = []
    for switch in ("0", "1"):
        monkeypatch.setenv("RECFORMER_KERNEL", switch)
        sasrec.eval().zero_grad()
        own = vectors.clone().requires_grad_()
        hidden = sasrec(own, offsets)
        (hidden * vectors.flip(0)).sum().backward()
        grads = [own.grad, *(p.grad for p in sasrec.parameters())]
        results.append([hidden.detach(), *(g.clone() for g in grads)])
        torch.manual_seed(1)
        attention = sasrec.transformer_blocks[0].multihead_attention.train()
        dropped = sasrec(vectors, offsets)  # of the weights of attention alone
        assert not torch.allclose(dropped, hidden, atol=1e-2)
        attention.eval()
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


def test_golden_gsasrec():
    """Hidden states, logits and losses of the published implementation, weights by its file."""
    values, info = np.load(GOLDEN / "gsasrec_tiny.npz"), read_json(GOLDEN / "gsasrec_tiny.json")
    n = info["num_items"]
    model = SequenceRecommender(
        SASRec(16, 2, 2, 12, 0.5), ItemTable(n, 16), Objective("gbce", 7), 16, ItemTable(n, 16)
    ).eval()
    models.load_published(model, GOLDEN / "gsasrec_tiny_ckpt.pt", [str(i + 1) for i in range(n)])
    sequences = [row[row != n + 1] - 1 for row in values["positives"]]
    batch = CausalCollator(12)(train_examples(*sequences))
    hidden = model.predictions(batch.history)

    def real(name: str, shift: int = 0) -> torch.Tensor:  # without the published left padding
        rows = values[name][:, shift:]
        parts = [row[len(row) - len(s) + 1 :] for row, s in zip(rows, sequences, strict=True)]
        return torch.from_numpy(np.concatenate(parts))

    torch.testing.assert_close(hidden, real("hidden"), atol=1e-5, rtol=1e-5)
    negatives = real("negatives", 1) - 1
    candidates = torch.cat([batch.labels[:, None], negatives], dim=1)
    scores = candidate_scores(hidden, model.scored.all(), candidates)
    torch.testing.assert_close(scores, real("logits"), atol=1e-5, rtol=1e-5)
    for t, expected in info["losses"].items():
        model.objective = Objective("gbce", 7, float(t))
        loss = model.loss(hidden, batch.labels, negatives)
        assert loss.item() == pytest.approx(expected, abs=1e-6)
    histories = [row[row != n + 1] - 1 for row in values["history"]]
    last = model.predictions(ItemHistoryCollator(12)(eval_examples(*histories)).history)
    expected = torch.from_numpy(values["scores"])
    torch.testing.assert_close(last @ model.scored.all().T, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", NETWORKS)
def test_neighbours_in_the_batch_change_nothing(kind, monkeypatch):
    model = network(kind).eval()
    vectors = torch.randn(11, D)
    together = model(vectors, torch.tensor([0, 3, 4, 11]))
    monkeypatch.setitem(padding.CALL_COST, "cpu", 0)  # each length becomes a group
    assert [g.mask.shape for g in padding.length_groups(torch.tensor([0, 3, 4, 11]))] == [
        (1, 1), (1, 3), (1, 7)
    ]  # fmt: skip
    torch.testing.assert_close(
        model(vectors, torch.tensor([0, 3, 4, 11])), together, atol=1e-5, rtol=1e-5
    )
    alone = [model(vectors[a:b], torch.tensor([0, b - a])) for a, b in ((0, 3), (3, 4), (4, 11))]
    torch.testing.assert_close(together, torch.cat(alone), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", NETWORKS)
def test_the_future_cannot_leak(kind):
    model = network(kind).eval()
    vectors = torch.randn(7, D)
    changed = vectors.clone()
    changed[5:] = torch.randn(2, D)
    before, after = model(vectors, torch.tensor([0, 7])), model(changed, torch.tensor([0, 7]))
    moved = (before - after).abs().amax(dim=1) > 1e-6
    expected = [True] * 7 if model.bidirectional else [False] * 5 + [True] * 2
    assert moved.tolist() == expected


@pytest.mark.parametrize("kind", NETWORKS)
def test_what_is_trained_gets_a_gradient(kind):
    """Several processes wait for the gradient of every trained parameter."""
    model = network(kind)
    trained = [p for p in model.parameters() if p.requires_grad]
    gradients = torch.autograd.grad(
        model(torch.randn(7, D), torch.tensor([0, 3, 7])).square().sum(), trained, allow_unused=True
    )
    assert all(gradient is not None for gradient in gradients)


def test_sizes_are_those_asked_for():
    """A layer: attention 4 D^2 + 4 D, feed-forward 2 * 4 D^2 + 4 D + D, two norms 4 D."""
    layer = 12 * D * D + 13 * D
    for arch, name in (("bert", "BertLayer"), ("distilbert", "TransformerBlock")):
        parts = network(f"{arch} masked").modules()
        first = next(part for part in parts if type(part).__name__ == name)
        assert sum(p.numel() for p in first.parameters()) == layer


def test_architectures_that_do_not_fit_are_refused_by_name():
    sizes = {"hidden_size": D, "num_layers": 1, "num_heads": 2, "max_length": 8, "dropout": 0.0}
    for arch, objective, message in (
        ("nothing", "causal", "no model type"),
        ("transfo-xl", "clm", "no model type"),  # in no supported release
        ("gpt2", "masked", "but with clm; --objective mlm goes with --arch bert, electra"),
        ("opt", "mlm", "looks back only: --objective clm is for it"),
        ("deberta", "clm", "looks both ways: --objective mlm or rtd"),
        ("gpt2", "sideways", "expected one of clm, mlm, plm, rtd"),
        ("resnet", "causal", "--arch resnet"),
        ("levit", "masked", "--arch levit"),
        ("longformer", "masked", "--arch longformer takes no item vectors"),
    ):
        with pytest.raises(UserError, match=message):
            HuggingFaceNetwork(arch, objective, **sizes)


class Added(torch.nn.Module):
    """The one feature, times two, added to the item vectors."""

    def forward(self, vectors, features):
        (feature,) = features
        return vectors + 2 * feature[:, None]


@pytest.mark.parametrize("kind", ["sasrec", "bert masked"])
def test_features_of_the_places_reach_all_but_hidden_items(kind):
    model = made(kind)
    model.input_features = Added()
    items = torch.tensor([3, 5, 7 if kind == "sasrec" else N])
    features = (torch.tensor([0.5, 0.0, 1.0]),)
    batch = ItemSequences(items, torch.tensor([0, 3]), torch.tensor([2]), features)
    table = model.inputs.all()
    last = table[7] + 2 if kind == "sasrec" else model.hidden_item
    torch.testing.assert_close(model.embed(batch), torch.stack([table[3] + 1, table[5], last]))
    assert batch.to("cpu").features[0].tolist() == [0.5, 0.0, 1.0]


# Item vectors


@pytest.mark.parametrize("kind", ["id", "frozen", "init", "add", "codes"])
def test_all_vectors_are_those_of_single_items(kind):
    model = made(items=kind)
    table = model.inputs
    some = torch.tensor([[3, 0], [11, 3]])
    torch.testing.assert_close(table(some), table.all()[some])
    table.eval()
    with torch.no_grad():
        kept = table.all()
        assert table.all() is kept or kind == "id"
        for parameter in table.parameters():
            parameter += 1
        table.train()
        table.eval()
        assert not torch.equal(table.all(), kept) or kind == "id"


def test_text_vectors_stay_and_learned_ones_move():
    trained = {
        kind: sum(p.numel() for p in made(items=kind).inputs.parameters())
        for kind in ("id", "frozen", "init", "add", "codes")
    }
    projection = 5 * D + D + D * D + D
    assert trained == {
        "id": N * D,
        "frozen": projection,
        "init": N * 5 + projection,
        "add": N * D + projection,
        "codes": (3 + 4) * D,
    }
    assert not any("text_vectors" in key for key in made(items="frozen").state_dict())


def test_codes_are_summed():
    table = made(items="codes").inputs
    weight = table.code_embedding.weight
    # Item 7 has the codes (7 % 3, 7 // 3) = (1, 2); the second level starts at row 3.
    torch.testing.assert_close(table(torch.tensor(7)), weight[1] + weight[3 + 2])


def test_nearest_items_by_hand():
    vectors = np.array([[1, 0], [2, 0.1], [0, 1], [0.1, 3]], dtype=np.float32)
    assert nearest_items(vectors, 1, chunk_size=3)[:, 0].tolist() == [1, 0, 3, 2]


# Objectives


def test_sampled_softmax_over_all_other_items_is_the_full_softmax():
    users, labels = torch.randn(4, D), torch.tensor([0, 5, 5, 11])
    others = torch.tensor([[i for i in range(N) if i != label] for label in labels])
    for cosine in (False, True):
        sampled = made(loss="sampled_softmax", temperature=0.5, cosine=cosine)
        full = made(loss="softmax", temperature=0.5, cosine=cosine)
        torch.testing.assert_close(
            sampled.loss(users, labels, others), full.loss(users, labels), atol=1e-5, rtol=1e-5
        )


@pytest.mark.parametrize("count", [N - 1, 1000])
def test_more_negatives_than_items_are_all_others_once(count):
    users, labels = torch.randn(4, D), torch.tensor([0, 5, 5, 11])
    others = torch.tensor([[i for i in range(N) if i != label] for label in labels])
    sampled, full = made(loss="sampled_softmax", num_negatives=count), made(loss="softmax")
    torch.testing.assert_close(sampled.loss(users, labels), full.loss(users, labels))
    gbce = made(loss="gbce", num_negatives=count)
    torch.testing.assert_close(gbce.loss(users, labels), gbce.loss(users, labels, others))


def test_gbce_without_calibration_is_binary_cross_entropy():
    users, labels = torch.randn(3, D), torch.tensor([0, 5, 11])
    negatives = torch.tensor([[1, 2], [3, 3], [4, 6]])
    table = made().scored.all()
    scores = torch.stack([table[labels], *table[negatives].unbind(1)], 1) @ users[..., None]
    truth = torch.tensor([1.0, 0, 0]).expand(3, 3)
    expected = F.binary_cross_entropy_with_logits(scores[..., 0], truth)
    for options in ({"loss": "bce"}, {"loss": "gbce", "calibration": 0.0}):
        loss = made(**options).loss(users, labels, negatives)
        assert loss.item() == pytest.approx(expected.item(), abs=1e-6)


def test_what_stands_before_a_prediction_is_known_once():
    batch = CausalCollator(5)(train_examples([5, 6, 5, 7, 8], [1, 2]))
    rows, items = met_before(batch.history)
    found = set(zip(rows.tolist(), items.tolist(), strict=True))
    assert found == {(0, 5), (1, 5), (1, 6), (2, 5), (2, 6), (3, 5), (3, 6), (3, 7), (4, 1)}
    assert len(rows) == len(found)


@pytest.mark.parametrize("cosine", [True, False])
def test_items_of_the_history_have_a_score_of_their_own(cosine):
    model = made(history_term=True, cosine=cosine, temperature=0.5).eval()
    with torch.no_grad():
        model.history_factor.fill_(0.3)
        model.history_bias.fill_(0.2)
    examples = train_examples([5, 6, 5, 7, 8], [1, 2])
    batch = CausalCollator(5)(examples)
    with torch.no_grad():
        users, table = model.predictions(batch.history), model.item_vectors()
        if cosine:
            users, table = F.normalize(users, dim=-1), F.normalize(table, dim=-1)
        scores = users @ table.T / 0.5
        known = [[5], [5, 6], [5, 6], [5, 6, 7], [1]]
        for row, items in enumerate(known):
            scores[row, items] = 0.3 * scores[row, items] + 0.2
        expected = F.cross_entropy(scores, batch.labels)
    loss = model.training_loss(batch)
    assert loss.item() == pytest.approx(expected.item(), abs=1e-5)
    loss.backward()
    assert model.history_factor.grad.abs() > 0
    assert model.history_bias.grad.abs() > 0

    batch = ItemHistoryCollator(5)(eval_examples([5, 6, 5, 7], [1]))
    for target in range(N):
        read = model.read(batch.history, batch.seen)
        ranks = model.rank(read, torch.full((2,), target), False)
        for row, place in ((0, 3), (1, 4)):  # the same histories as in training
            assert ranks.above[row] == int((scores[place] > scores[place, target] + 1e-6).sum())


def test_in_batch_candidates_are_the_different_targets_and_their_hard_negatives():
    users, labels = torch.randn(4, D), torch.tensor([2, 7, 2, 9])
    model = made(loss="in_batch")
    table = model.scored.all()[[2, 7, 9]]
    expected = F.cross_entropy(users @ table.T, torch.tensor([0, 1, 0, 2]))
    assert model.loss(users, labels).item() == pytest.approx(expected.item(), abs=1e-6)
    hard = made(loss="in_batch", hard_negatives=2)
    pool = sorted({2, 7, 9, *hard.similar_items[[2, 7, 9]].flatten().tolist()})
    scores = users @ hard.scored.all()[pool].T
    expected = F.cross_entropy(scores, torch.tensor([pool.index(i) for i in labels.tolist()]))
    assert hard.loss(users, labels).item() == pytest.approx(expected.item(), abs=1e-6)


@pytest.mark.parametrize("all_items", [True, False])
def test_negatives_of_a_large_catalogue_are_read_alone(monkeypatch, all_items):
    """The same loss and gradients whether all items are scored or those drawn."""
    monkeypatch.setattr(models.ItemTable, "num_items", N, raising=False)
    users, labels = torch.randn(2, D, requires_grad=True), torch.tensor([0, 5])
    negatives = torch.tensor([[1, 2], [3, 5]])
    model = made("sasrec", "frozen", loss="sampled_softmax")
    if not all_items:
        monkeypatch.setattr(ItemTable, "all", lambda self: pytest.fail("all items were read"))
    else:
        model.scored.num_items = 3  # so that the candidates seem to be many
        monkeypatch.setattr(ItemTable, "all", lambda self: self(torch.arange(N)))
    loss = model.loss(users, labels, negatives)
    scores = users[:, None] @ model.scored(torch.cat([labels[:, None], negatives], 1)).mT
    expected = F.cross_entropy(scores[:, 0], torch.zeros(2, dtype=torch.long))
    assert loss.item() == pytest.approx(expected.item(), abs=1e-5)


@pytest.mark.parametrize("per_candidate", [0, 1000])
def test_candidate_scores_and_gradients_either_way(monkeypatch, per_candidate):

    monkeypatch.setattr(candidates_module, "ITEMS_PER_CANDIDATE", per_candidate)
    monkeypatch.setattr(candidates_module, "CANDIDATE_ELEMENTS", 40)  # several chunks
    users = torch.randn(5, 4, dtype=torch.float32, requires_grad=True)
    table = torch.randn(9, 4, requires_grad=True)
    candidates = torch.tensor([[0, 0, 8], [1, 2, 3], [8, 7, 8], [4, 4, 4], [5, 0, 6]])
    upstream = torch.randn(5, 3)
    scores = candidate_scores(users, table, candidates)
    ours = torch.autograd.grad(scores, (users, table), upstream)
    expected = (table[candidates] @ users[..., None])[..., 0]
    torch.testing.assert_close(scores, expected)
    for mine, right in zip(
        ours, torch.autograd.grad(expected, (users, table), upstream), strict=True
    ):
        torch.testing.assert_close(mine, right)


def test_ranks_among_all_other_items_and_the_items_recommended_agree_with_the_ranks():
    for options in ({}, {"cosine": True, "temperature": 0.1}):
        model = made(**options).eval()
        batch = ItemHistoryCollator(8)(eval_examples([5, 6, 7], [2], [0, 3]))
        others = np.array([[i for i in range(N) if i != 1]] * 3)
        with torch.no_grad():
            users = model.read(batch.history, batch.seen)
            best = model.recommend(users, N, False)
            among = model.rank_among(users, batch.labels, others)
            ranks = model.rank(users, batch.labels, False)
        assert among.above.tolist() == ranks.above.tolist()
        assert [row.tolist().index(1) for row in best] == ranks.above.tolist()
        unseen = model.recommend(users, N, True)
        assert not set(unseen[0]) & {5, 6, 7}


# The command


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Every item is followed by the next one round a circle of six."""
    path = tmp_path_factory.mktemp("data") / "folder"
    sequences = [[(start + i) % 6 for i in range(6 + start)] for start in range(6)] * 3
    write_processed(
        path,
        train=Sequences.from_lists([s[:-2] for s in sequences]),
        val=Sequences.from_lists([s[-2:-1] for s in sequences]),
        test=Sequences.from_lists([s[-1:] for s in sequences]),
        user_names=[f"u{i}" for i in range(len(sequences))],
        asins=[str(i + 1) for i in range(6)],
        meta={str(i + 1): {"title": f"{'abcdef'[i] * 3} thing"} for i in range(6)},
        dataset={},
    )
    return path


@pytest.fixture(scope="module")
def encoder(tmp_path_factory) -> str:
    """A sentence encoder with random weights."""
    from transformers import BertConfig, BertModel, BertTokenizerFast

    path = tmp_path_factory.mktemp("encoder")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "thing"] + [c * 3 for c in "abcdef"]
    (path / "vocab.txt").write_text("\n".join(words))
    BertTokenizerFast(str(path / "vocab.txt")).save_pretrained(path)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(words), hidden_size=8, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=16, max_position_embeddings=128,
    )  # fmt: skip
    model = BertModel(config)
    torch.nn.init.normal_(model.embeddings.word_embeddings.weight)  # words that differ clearly
    model.save_pretrained(path)
    return str(path)


@pytest.fixture(scope="module")
def semantic_ids(data, tmp_path_factory) -> str:
    """Two levels of codes for the six items."""
    path = tmp_path_factory.mktemp("codes") / "semantic_ids.json"
    codes = np.array([[i % 2, i // 2] for i in range(6)])
    SemanticIds([str(i + 1) for i in range(6)], codes, 2, [2, 3], "test", "none").save(path)
    return str(path)


SMALL = {
    "hidden_size": 16, "num_layers": 1, "num_heads": 2, "max_length": 5, "dropout": 0.0,
    "num_train_epochs": 30, "batch_size": 6, "learning_rate": 1e-2, "verbose": 10, "device": [-1],
    "metric_ks": [1, 5],
}  # fmt: skip
LONGER = {
    "num_train_epochs": 120, "verbose": 40, "mask_probability": 0.4, "learning_rate": 3e-3
}  # fmt: skip  # a sixth of the labels
MODELS: dict[str, dict] = {
    "sasrec": {},
    "sasrec sampled": {
        "model": "sasrec", "loss": "sampled_softmax", "num_negatives": 3, "negative_power": 0.75,
        "logq": True, "label_smoothing": 0.05,
    },
    "gru4rec": {"num_heads": None, "loss": "bpr_max", "num_negatives": 3, "negative_power": 0.75},
    "gsasrec": {"num_negatives": 4},
    "bert4rec": LONGER,
    "transformer": {},
    "xlnet plm": {"model": "transformer", "arch": "xlnet", "objective": "plm"} | LONGER,
    "electra rtd": {
        "model": "transformer", "arch": "electra", "objective": "rtd", **LONGER,
        "learning_rate": 5e-3,
    },
    "sasrec frozen": {"model": "sasrec", "items": "frozen"},
    "sasrec init": {
        "model": "sasrec", "items": "init", "cosine": True, "temperature": 0.2,
        "num_train_epochs": 60,
    },
    "gsasrec add": {"model": "gsasrec", "items": "add", "num_negatives": 4},
    "sasrec codes": {"model": "sasrec", "items": "codes"},
    "tiger": {
        "num_train_epochs": 100, "verbose": 50, "num_beams": 6, "max_length": 2, "num_layers": 2,
    },
    "gpt2_codes": {"num_beams": 3},
    "t4r": {
        "model": "bert4rec", "items": "add", "loss": "in_batch", "hard_negatives": 2,
        "cosine": True, "temperature": 0.3, **LONGER,
    },
}  # fmt: skip


def arguments(
    data: Path, output: Path, name: str, encoder: str = "", codes: str = "", **more
) -> BaselineArguments:
    own = dict(MODELS[name])
    own.setdefault("model", name.split()[0])
    if own.get("items", "id") != "id":
        own["text_encoder"] = encoder
    if own.get("items") == "codes" or own["model"] in models.GENERATE:
        own |= {"semantic_ids": codes, "text_encoder": None}
    return BaselineArguments(data_path=str(data), output_dir=str(output), **SMALL | own | more)


@pytest.mark.parametrize("name", MODELS)
def test_every_model_learns_a_circle_and_ranks_the_same_when_loaded(
    data, encoder, semantic_ids, tmp_path, name
):
    result = run(arguments(data, tmp_path, name, encoder, semantic_ids))
    assert result["test"]["Recall@1"] == 1, name  # the next item is always ranked first
    assert result["test"]["Coverage@1"] == 0.5  # every other item is the target of somebody
    assert min(result["parameters"], result["train_seconds"]) > 0
    if "code_accuracy" in result["test"]:
        assert result["test"]["code_accuracy"] == {"1": 1, "2": 1}
    folder = ProcessedFolder.load(data)
    built = models.load(tmp_path / "best_model", folder)
    examples = folder.eval_examples("test")
    rows = [
        EvalExample(int(u), examples.histories[i], int(t))
        for i, (u, t) in enumerate(zip(examples.user_ids, examples.targets, strict=True))
    ]
    batch = built.eval_collator(rows)
    with torch.no_grad():
        ranks = built.model.rank(built.model.read(batch.history, batch.seen), batch.labels, False)
    import pyarrow.parquet as pq

    written = pq.read_table(tmp_path / "ranks" / "trained_test.parquet")
    assert ranks.above.tolist() == written["above"].to_pylist()
    assert (tmp_path / "curves.png").exists()


@pytest.mark.parametrize("name", ["sasrec codes", "gpt2_codes"])
def test_codes_that_were_made_again_are_refused(data, tmp_path, name):
    """The same items and the same sizes, but other codes, in the file of the training."""
    path = tmp_path / "semantic_ids.json"
    asins = [str(i + 1) for i in range(6)]
    codes = np.array([[i % 2, i // 2] for i in range(6)])
    SemanticIds(asins, codes, 2, [2, 3], "test", "none").save(path)
    args = arguments(data, tmp_path / "run", name, codes=str(path), num_train_epochs=1, verbose=1)
    result = run(args)
    best, folder = tmp_path / "run" / "best_model", ProcessedFolder.load(data)
    models.load(best, folder)
    assert run(args)["test"] == result["test"]
    for changed, sizes in ((codes[::-1], [2, 3]), (codes, [2, 4])):
        SemanticIds(asins, changed, 2, sizes, "test", "none").save(path)
        with pytest.raises(UserError, match="trained with other codes than .*semantic_ids.json"):
            models.load(best, folder)
        with pytest.raises(UserError, match="another run .different: semantic_ids_hash"):
            run(args)


def test_the_largest_cut_off_tells_how_many_items_are_generated(
    data, semantic_ids, tmp_path, capsys
):
    def beams(place: str, **more) -> int:
        given = {"num_train_epochs": 1, "verbose": 1, "num_beams": None} | more
        args = arguments(data, tmp_path / place, "gpt2_codes", codes=semantic_ids, **given)
        return run(args)["settings"]["num_beams"]

    assert beams("default") == 50
    assert beams("deeper", metric_ks=[5, 100]) == 100
    printed = capsys.readouterr().out
    assert "no more items are generated" not in printed
    assert "codes of the best item that are right, no figures of items: first 1 " in printed
    assert beams("exact", num_beams=1, exact_rank=True) == 1
    assert "no more items are generated" not in capsys.readouterr().out
    assert beams("greedy", num_beams=1) == 1
    assert "--num_beams 5 or --exact_rank gives them in full" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["popularity", "text_neighbours", "cooccurrence", "sknn", "vsknn"])
def test_models_without_training_go_the_same_way(data, tmp_path, name):
    result = run(
        BaselineArguments(data_path=str(data), output_dir=str(tmp_path), model=name, device=[-1])
    )
    assert (result["stages"], result["parameters"]) == ({}, 0)
    assert result["test"] == read_json(tmp_path / "metrics.json")["test"]
    if name == "cooccurrence":
        assert result["test"]["MRR"] == 1


def test_a_run_that_is_cut_off_ends_as_one_that_is_not(data, tmp_path, monkeypatch):
    whole = run(arguments(data, tmp_path / "whole", "gsasrec", num_train_epochs=4, verbose=1))
    step, count = SequenceRecommender.training_loss, 0

    def failing(self, batch):
        nonlocal count
        count += 1
        if count == 8:
            raise RuntimeError("cut off")
        return step(self, batch)

    cut = arguments(data, tmp_path / "cut", "gsasrec", num_train_epochs=4, verbose=1)
    monkeypatch.setattr(SequenceRecommender, "training_loss", failing)
    with pytest.raises(RuntimeError, match="cut off"):
        run(cut)
    monkeypatch.setattr(SequenceRecommender, "training_loss", step)
    again = run(cut)
    assert again["test"] == whole["test"]
    rows = [
        [
            {k: v for k, v in row.items() if k != "seconds"}
            for row in r["stages"]["training"]["rows"]
        ]
        for r in (whole, again)
    ]
    assert rows[0] == rows[1]


def test_gradients_do_not_depend_on_the_number_of_processes(monkeypatch):
    """Processes average gradients; the loss is weighted so that it is the mean over predictions."""
    model = made()
    collate = CausalCollator(8)
    examples = train_examples([0, 1, 2, 3, 4], [5, 6])
    whole = model.training_loss(collate(examples))
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda total: total.fill_(5.0))
    parts = [model.training_loss(collate([example])) for example in examples]
    assert sum(parts).item() / 2 == pytest.approx(whole.item(), abs=1e-6)


def test_a_published_file_can_be_evaluated_and_wrong_ones_are_refused(data, tmp_path):
    made_settings = {"hidden_size": 16, "num_layers": 1, "num_heads": 2, "max_length": 6}
    settings = settings_of("gsasrec", made_settings)
    folder = ProcessedFolder.load(data)
    model = models.build("gsasrec", settings, folder).model
    state = {}
    for key, value in model.state_dict().items():
        if key.startswith("network."):
            state[key.removeprefix("network.")] = value
        else:
            rows = torch.cat([torch.zeros(1, 16), value, torch.zeros(1, 16)])
            side = {"inputs": "item", "outputs": "output"}[key.split(".")[0]]
            state[f"{side}_embedding.weight"] = rows
    torch.save(state, tmp_path / "published.pt")
    flags = ["--model", "gsasrec", "--data_path", str(data), "--output_dir", str(tmp_path / "out")]
    flags += ["--hidden_size", "16", "--num_layers", "1", "--max_length", "6", "--device", "-1"]
    main([*flags, "--from_published", str(tmp_path / "published.pt"), "--evaluate_only"])
    assert list(read_json(tmp_path / "out" / "metrics.json")["evaluations"]) == ["published"]
    fresh = models.build(
        "gsasrec", replace(settings, from_published=str(tmp_path / "published.pt")), folder
    )
    assert torch.equal(fresh.model.outputs.item_embedding.weight, model.outputs.all())
    with pytest.raises(UserError, match="no gSASRec of this size"):
        models.load_published(
            models.build("gsasrec", replace(settings, num_layers=2), folder).model,
            tmp_path / "published.pt", folder.asins,
        )  # fmt: skip
    with pytest.raises(UserError, match="numbers 1 to N"):
        models.load_published(model, tmp_path / "published.pt", ["a"] * 6)
    torch.save({"state_dict": state, "epoch": 3}, tmp_path / "training.pt")
    models.load_published(fresh.model, tmp_path / "training.pt", folder.asins)
    (tmp_path / "text.pt").write_text("hello")
    with pytest.raises(UserError, match="no checkpoint"):
        models.load_published(model, tmp_path / "text.pt", folder.asins)


def test_more_hard_negatives_than_items_are_refused(data, encoder):
    settings = {"loss": "in_batch", "hard_negatives": 6, "text_encoder": encoder}
    with pytest.raises(UserError, match="--hard_negatives 6: an item has only 5 others"):
        models.build("sasrec", settings_of("sasrec", settings), ProcessedFolder.load(data))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--model", "sasrec", "--arch", "gpt2"], "--arch is no flag of --model sasrec"),
        (["--model", "sasrec", "--loss", "nothing"], "--loss nothing"),
        (["--hidden_size", "10", "--num_heads", "3"], "does not divide"),
        (["--items", "frozen"], "--text_encoder goes with"),
        (["--text_encoder", "x"], "--text_encoder goes with"),
        (["--items", "codes"], "--semantic_ids FILE go together"),
        (["--hard_negatives", "3", "--text_encoder", "x"], "--loss in_batch"),
        (["--evaluate_only"], "--from_published"),
        (["--patience", "0"], "--patience 0"),
        (["--model", "tiger"], "--model tiger needs --semantic_ids FILE"),
        (["--model", "tiger", "--num_beams", "0"], "--num_beams 0"),
        (["--dropout", "1"], "--dropout 1"),
    ],
)
def test_flags_that_make_no_sense_are_refused(data, tmp_path, flags, message):
    with pytest.raises(UserError, match=message):
        main(["--data_path", str(data), "--output_dir", str(tmp_path), *flags])
    assert not list(tmp_path.iterdir())


def test_configurations_that_ship_are_read_and_flags_win(
    data, tmp_path, repository, monkeypatch, capsys
):
    shipped = sorted((repository / "baselines" / "configs").glob("*.yaml"))
    assert len(shipped) >= 4
    for path in shipped:
        parser = flags_parser("baseline", None, BaselineArguments)
        (args,) = parser.parse_args_into_dataclasses(read_config(str(path)))
        settings_of(args.model, args.own())
    seen = []
    monkeypatch.setattr("baselines.__main__.run", seen.append)
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump({"model": "gsasrec", "hidden_size": 32, "batch_size": 7}))
    main(["--config", str(config), "--hidden_size", "64"])
    assert (seen[0].model, seen[0].hidden_size, seen[0].batch_size) == ("gsasrec", 64, 7)
    config.write_text("model: gsasrec\nprotocol: sampled\nseparate_outputs: false\nitems: null\n")
    (tmp_path / "sampled.yaml").write_text("evaluation:\n  filter_seen: true\n  metric_ks: [5]\n")
    monkeypatch.chdir(tmp_path)
    config.write_text(config.read_text().replace("sampled", "sampled.yaml"))
    main(["--config", str(config)])
    assert (seen[1].filter_seen, seen[1].metric_ks) == (True, [5])  # the protocol's
    assert seen[1].own() == {"separate_outputs": False}
    for text, message in (
        ("model: sasrek", "invalid choice: 'sasrek'"),
        ("batch_size: 2.5", "invalid int value: '2.5'"),
    ):
        config.write_text(text)
        with pytest.raises(SystemExit):
            main(["--config", str(config)])
        assert message in capsys.readouterr().err
    config.write_text("hiden_size: 3")
    with pytest.raises(UserError, match="hiden_size is no flag"):
        read_config(str(config))
    config.write_text("[" * 20_000)
    with pytest.raises(UserError, match="config.yaml is no YAML: nested too deep"):
        read_config(str(config))
    config.write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match="config.yaml is no YAML: .*invalid start byte"):
        read_config(str(config))


def test_configurations_of_the_package_have_names(tmp_path, monkeypatch, repository):
    expected = read_config(str(repository / "baselines/configs/t4r.yaml"))
    monkeypatch.chdir(tmp_path)  # no checkout here
    assert read_config("t4r") == read_config("t4r.yaml") == expected
    with pytest.raises(FileNotFoundError, match="--config none: .* gsasrec_ml1m, .*, t4r"):
        read_config("none")


def test_names_of_losses_are_those_of_the_help():
    text = BaselineArguments.__dataclass_fields__["loss"].metadata["help"]
    assert all(name in text for name in LOSSES)


@pytest.mark.parametrize("place", ["two", pytest.param("nodes", marks=pytest.mark.slow)])
def test_two_processes_and_two_nodes_end_as_one(data, tmp_path, repository, two_nodes, place):
    """Two processes of three users a step against one of six, through the command."""
    figures = []
    runs = [("one", 1, 6), ("two", 2, 3)] + [("nodes", 1, 3)] * (place == "nodes")
    for where, processes, batch_size in runs:
        output = tmp_path / where
        command = [sys.executable, "-m", "baselines", "--model", "sasrec", "--data_path", str(data)]
        command += ["--output_dir", str(output), "--num_processes", str(processes)]
        command += ["--batch_size", str(batch_size), "--num_train_epochs", "3", "--dropout", "0"]
        command += ["--hidden_size", "16", "--num_layers", "1", "--device", "-1"]
        if where == "nodes":
            started = two_nodes(*command)
            said = [node.communicate() for node in started]
            assert [node.returncode for node in started] == [0, 0], said
            assert said[1][0] == ""  # one rank prints
            assert "users" in said[0][0]
        else:
            done = subprocess.run(
                command, cwd=repository, capture_output=True, text=True, check=False
            )
            assert done.returncode == 0, done.stderr[-2000:]
        figures.append(read_json(output / "metrics.json"))
    one, two, *nodes = figures
    assert two["test"] == one["test"]
    losses = [[r["val/MRR"] for r in f["stages"]["training"]["rows"]] for f in figures]
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)
    assert [f["test"] for f in nodes] == [one["test"]] * len(nodes)
    assert losses[2:] == [losses[1]] * len(nodes)
