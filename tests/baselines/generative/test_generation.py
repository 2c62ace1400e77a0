"""Generation of items: search by hand and against scores of all items, TIGER and GPT-2 on codes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import lightning
import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from baselines.generative import gpt2_codes
from baselines.generative.accuracy import (
    CodeAccuracy,
    format_code_accuracy,
    format_code_losses,
)
from baselines.generative.entropy import CodeEntropies
from baselines.generative.gpt2_codes import Gpt2Codes, Gpt2CodesTrainCollator
from baselines.generative.recommender import (
    NO_ITEM,
    CodeHistoryCollator,
    CodeRanks,
    CodeRecommender,
    CodeUsers,
    Generated,
    Read,
    pad_items,
    ranks_among,
)
from baselines.generative.tiger import Tiger, TigerTrainCollator
from baselines.sequence.item_table import CodeItemEmbedding
from baselines.settings import Gpt2CodesSettings, TigerSettings
from recformer.data.batches import EvalBatch, TrainBatch
from recformer.data.collators import EvalExample, TrainExample
from recformer.data.sequences import Sequences
from recformer.files import UserError
from recformer.training.lit import LitWrapper

MAX_ITEMS = 4
SIZES = [4, 4, 5]  # one code more at the last level than any item has


def tiger(codes: np.ndarray, **options: Any) -> Tiger:
    sizes = {"hidden_size": 16, "num_heads": 2, "num_layers": 2}
    sizes |= {"head_size": 8, "feed_forward_size": 32}
    return Tiger(codes, SIZES, TigerSettings(**sizes | options))


def gpt2(codes: np.ndarray, **options: Any) -> Gpt2Codes:
    sizes = {"hidden_size": 16, "num_layers": 2, "num_heads": 2, "max_length": MAX_ITEMS}
    return Gpt2Codes(codes, SIZES, Gpt2CodesSettings(**sizes | options))


MODELS = pytest.mark.parametrize("make", [tiger, gpt2])
Make = Callable[..., CodeRecommender]


@pytest.fixture(scope="module")
def codes() -> np.ndarray:
    """Different codes of 40 items, in no order."""
    every = np.stack(np.unravel_index(np.arange(64), (4, 4, 4)), axis=1)
    return np.random.default_rng(0).permutation(every)[:40]


def randomised(model: CodeRecommender) -> CodeRecommender:
    """Weights so large that the model prefers some items clearly."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model.eval()


def examples(num_items: int, users: int = 6) -> list[EvalExample]:
    """Histories of 1 to 7 items, some longer than MAX_ITEMS."""
    draw = np.random.default_rng(2)
    return [
        EvalExample(u, draw.integers(0, num_items, 1 + u % 7), int(draw.integers(num_items)))
        for u in range(users)
    ]


# By token: START, codes 0 and 1 of level 1, codes 0 and 1 of level 2.
FIRST = (0.0, 0.6, 0.4, 0.0, 0.0)
SECOND = {1: (0.0, 0.0, 0.0, 0.5, 0.5), 2: (0.0, 0.0, 0.0, 0.9, 0.1)}


class TwoLevels(CodeRecommender):
    """Items 0: (0, 0), 1: (0, 1), 2: (1, 0), and the probabilities above for every user.

    The first code is 0 with .6 and 1 with .4. After 0 both second codes have .5. After 1, 0 has .9
    and 1, which is no item, .1. So the items have .3, .3 and .36.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(np.array([[0, 0], [0, 1], [1, 0]]), [2, 2], **options)

    def start(self, history: Tensor) -> tuple[Tensor, Read]:
        users = len(history)
        logits = torch.tensor(FIRST).log().expand(users, 1, -1)
        return logits, Read([], [], torch.zeros(users, 1, 0, dtype=torch.bool))

    def step(self, read: Read, parents: Tensor, tokens: Tensor) -> tuple[Tensor, Read]:
        assert (parents == 0).all()
        return torch.tensor([[SECOND[t] for t in row] for row in tokens.tolist()]).log(), read


HISTORY, TARGET = torch.tensor([[2, 1]]), torch.tensor([1])
SEEN = torch.tensor([0, 0]), torch.tensor([2, 1])


def ranks_of(model: CodeRecommender, batch: EvalBatch[Tensor], filter_seen: bool) -> CodeRanks:
    return model.rank(model.read(batch.history, batch.seen), batch.labels, filter_seen)


def test_greedy_takes_the_best_code_and_misses_the_best_item() -> None:
    greedy = TwoLevels(num_beams=1).generate(HISTORY)
    assert greedy.items.tolist() in ([[0]], [[1]])
    assert greedy.log_probs.exp().tolist() == [[pytest.approx(0.3)]]
    generated = TwoLevels(num_beams=2).generate(HISTORY)
    assert generated.items[0, 0] == 2
    assert generated.log_probs.exp().tolist() == [[pytest.approx(0.36), pytest.approx(0.3)]]


def test_no_more_beams_than_items() -> None:
    generated = TwoLevels(num_beams=50).generate(HISTORY)
    assert sorted(generated.items[0].tolist()) == [0, 1, 2]  # and never (1, 1)


def test_scores_by_hand() -> None:
    scores = TwoLevels().score_items(HISTORY)
    assert scores.exp().tolist() == [[pytest.approx(p) for p in (0.3, 0.3, 0.36)]]


@pytest.mark.parametrize("exact_rank", [False, True])
def test_ranks_by_hand(exact_rank: bool) -> None:
    model = TwoLevels(exact_rank=exact_rank)
    ranks = model.rank(model.read(HISTORY, SEEN), TARGET, filter_seen=False)
    assert (ranks.above, ranks.tied, ranks.num_candidates) == (1, 1, 3)
    assert ranks.codes_right == 0  # the best item is 2: (1, 0), the target 1: (0, 1)
    # Items 1 and 2 were seen, but 1 is the target.
    ranks = model.rank(model.read(HISTORY, SEEN), TARGET, filter_seen=True)
    assert (ranks.above, ranks.tied, ranks.num_candidates) == (0, 1, 2)
    assert ranks.codes_right in (1, 2)  # 0: (0, 0) and 1: (0, 1) are equally likely


def test_excluded_items_leave_their_places_to_others() -> None:
    generated = TwoLevels(num_beams=2).generate(HISTORY, torch.tensor([[True, False, True]]))
    assert generated.items.tolist() == [[1, NO_ITEM]]
    assert generated.log_probs.tolist() == [[pytest.approx(np.log(0.3)), -np.inf]]


def test_no_beam_is_spent_on_beginnings_of_excluded_items_alone() -> None:
    # The most likely first code is 0, but nothing is left behind it.
    generated = TwoLevels(num_beams=1).generate(HISTORY, torch.tensor([[True, True, False]]))
    assert generated.items.tolist() == [[2]]
    assert generated.log_probs.exp().tolist() == [[pytest.approx(0.36)]]


def test_recommended_items_by_hand() -> None:
    model = TwoLevels(num_beams=2)
    best = model.recommend(model.read(HISTORY, SEEN), 3, False)
    assert (best[0, 0], best[0, 2]) == (2, NO_ITEM)
    assert best[0, 1] in (0, 1)
    assert model.recommend(model.read(HISTORY, SEEN), 2, True).tolist() == [[0, NO_ITEM]]
    # All scores are known: there are more items than beams.
    model = TwoLevels(num_beams=1, exact_rank=True)
    users = model.read(HISTORY, SEEN)
    assert model.recommend(users, 4, False).tolist() == [[2, 0, 1, NO_ITEM]]
    assert model.recommend(users, 2, True).tolist() == [[0, NO_ITEM]]


@pytest.mark.parametrize("exact_rank", [False, True])
def test_ranks_recommendations_and_ranks_among_few_do_not_depend_on_each_other(
    exact_rank: bool, codes: np.ndarray
) -> None:
    batch = CodeHistoryCollator(MAX_ITEMS)(examples(len(codes)))
    batch = replace(batch, labels=batch.seen[1][batch.seen[0].diff(prepend=torch.tensor([-1])) > 0])
    model = randomised(tiger(codes, num_beams=5, exact_rank=exact_rank))
    others = np.stack([np.delete(np.arange(40), label)[:7] for label in batch.labels.tolist()])
    calls: dict[str, Callable[[CodeUsers], np.ndarray]] = {
        "rank": lambda users: model.rank(users, batch.labels, False).above,
        "rank unseen": lambda users: model.rank(users, batch.labels, True).above,
        "recommend": lambda users: model.recommend(users, 4, False),
        "recommend unseen": lambda users: model.recommend(users, 4, True),
        "among": lambda users: model.rank_among(users, batch.labels, others).above,
    }
    alone = {n: call(model.read(batch.history, batch.seen)) for n, call in calls.items()}
    for names in (list(calls), list(calls)[::-1]):
        users = model.read(batch.history, batch.seen)
        for name in names:
            assert calls[name](users).tolist() == alone[name].tolist(), name
    seen = set(zip(*(side.tolist() for side in batch.seen), strict=True))
    found = {(row, item) for row, items in enumerate(alone["recommend unseen"]) for item in items}
    assert not found & seen  # the targets, which were all seen, neither


def test_code_accuracy_in_words() -> None:
    assert format_code_accuracy({"1": 0.5, "2": 0.25}) == (
        "codes of the best item that are right, no figures of items: first 1 0.5000, first 2 0.2500"
    )


def test_losses_of_codes_by_hand() -> None:
    # Item 1 is (0, 1): .6, then .5 after it; item 2 is (1, 0): .4, then .9.
    model = TwoLevels()
    history = torch.tensor([[2, 1], [0, 1]])
    users = model.read(history, (torch.tensor([0, 1]), torch.tensor([2, 0])))
    losses = model.code_losses(users, torch.tensor([1, 2])).neg().exp()
    torch.testing.assert_close(losses, torch.tensor([[0.6, 0.5], [0.4, 0.9]]))
    ranks = model.rank(users, torch.tensor([1, 2]), filter_seen=False)
    np.testing.assert_allclose(np.exp(-ranks.code_losses), [[0.6, 0.5], [0.4, 0.9]], rtol=1e-6)


def test_entropies_by_hand() -> None:
    # First codes 0, 0, 1, 1; second codes 0, 0, 0, 1: the second is known after 0.
    codes = np.array([[0, 0], [0, 1], [1, 0], [1, 1]])
    found = CodeEntropies.of(codes, np.array([0, 0, 2, 3]))
    quarter = -(0.75 * np.log(0.75) + 0.25 * np.log(0.25))
    assert found.alone == [pytest.approx(np.log(2)), pytest.approx(quarter)]
    assert found.given_before == [pytest.approx(np.log(2)), pytest.approx(np.log(2) / 2)]
    one = CodeEntropies.of(codes, np.array([1, 1]))
    assert (one.alone, one.given_before) == ([0, 0], [0, 0])


def test_entropies_leave_out_items_that_nothing_stands_before() -> None:
    codes = np.array([[0, 0], [0, 1], [1, 0], [1, 1]])
    train = Sequences.from_lists([[3, 0, 0], [2, 2], [], [1], [3, 3], []])
    expected = CodeEntropies.of(codes, np.array([0, 0, 2, 3]))
    assert CodeEntropies.of_training(codes, train) == expected


def test_losses_in_words() -> None:
    entropies = {"alone": [2.5, 1.5], "given_before": [2.5, 0.75]}
    assert format_code_losses({"1": 2.125, "2": 0.5}, entropies) == (
        "loss of the target's codes in nats (their entropy in training after the codes before, and "
        "alone): code 1 2.125 (2.500, 2.500), code 2 0.500 (0.750, 1.500)"
    )


@MODELS
def test_training_loss_is_that_of_its_codes(make: Make, codes: np.ndarray) -> None:
    """And of one padded batch as of the groups of similar lengths that it is cut into."""
    model = randomised(make(codes))
    draw = np.random.default_rng(3)
    rows = [draw.integers(0, 40, 2 + place % 4) for place in range(60)]
    collator: Any = {tiger: TigerTrainCollator, gpt2: Gpt2CodesTrainCollator}[make](MAX_ITEMS)
    whole = model.training_loss(collator([TrainExample(u, row, u) for u, row in enumerate(rows)]))
    parts = [whole[f"code_loss@{level}"].item() for level in (1, 2, 3)]
    assert whole["loss"].item() == pytest.approx(np.mean(parts), rel=1e-6)
    sums, count = np.zeros(3), 0
    for user, row in enumerate(rows):
        one = model.training_loss(collator([TrainExample(user, row, user)]))
        number = 1 if make is tiger else len(row)
        sums += [number * one[f"code_loss@{level}"].item() for level in (1, 2, 3)]
        count += number
    np.testing.assert_allclose(parts, sums / count, rtol=1e-5)


def test_ranks_among_generated_items() -> None:
    generated = Generated(
        torch.tensor([[4, 2, 7], [4, 2, 7], [4, 2, 7], [5, NO_ITEM, NO_ITEM]]),
        torch.tensor([[-1.0, -2.0, -2.0]] * 3 + [[-1.0, -torch.inf, -torch.inf]]),
    )
    ranks = ranks_among(generated, torch.tensor([4, 7, 9, 9]), torch.tensor([10, 10, 10, 8]))
    assert ranks.above.tolist() == [0, 1, 9, 7]  # not generated: the last of the candidates
    assert ranks.tied.tolist() == [0, 1, 0, 0]


@MODELS
def test_a_beam_as_large_as_the_catalogue_is_the_exact_ranking(
    make: Make, codes: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "baselines.generative.recommender.ITEMS_AT_ONCE", 7
    )  # prefixes over the borders
    batch = CodeHistoryCollator(MAX_ITEMS)(examples(len(codes)))
    model = randomised(make(codes, num_beams=len(codes)))
    scores, generated = model.score_items(batch.history), model.generate(batch.history)
    torch.testing.assert_close(generated.log_probs, scores.gather(1, generated.items))
    assert [sorted(row) for row in generated.items.tolist()] == [list(range(40))] * 6
    searched = ranks_of(model, batch, filter_seen=True)
    model.exact_rank = True
    exact = ranks_of(model, batch, filter_seen=True)
    for name in ("above", "tied", "num_candidates", "codes_right"):
        assert getattr(searched, name).tolist() == getattr(exact, name).tolist()


@MODELS
def test_scores_are_those_of_transformers_own_forward(make: Make, codes: np.ndarray) -> None:
    batch = CodeHistoryCollator(MAX_ITEMS)(examples(len(codes)))
    model = randomised(make(codes))
    scores = model.score_items(batch.history)
    for user, history in enumerate(batch.history):
        one = history[history != NO_ITEM][None].expand(len(codes), -1)  # no padding
        with torch.no_grad():
            if isinstance(model, Tiger):
                inputs = model.history_tokens(one)
                logits = model.t5(input_ids=inputs, labels=model.item_tokens).logits
            else:
                inputs = torch.cat([model.input_ids(one), model.item_tokens], dim=1)
                logits = model.gpt2(input_ids=inputs).logits[:, -4:-1]
        log_probs = logits.log_softmax(-1).gather(2, model.item_tokens[..., None])
        torch.testing.assert_close(scores[user], log_probs.sum((1, 2)))


@MODELS
def test_as_many_items_as_beams_although_most_are_seen(make: Make, codes: np.ndarray) -> None:
    batch = CodeHistoryCollator(MAX_ITEMS)(examples(len(codes)))
    model = randomised(make(codes, num_beams=5))
    excluded = torch.ones(6, 40, dtype=torch.bool)
    left = torch.rand(6, 40, generator=torch.Generator().manual_seed(0)).topk(7).indices
    excluded.scatter_(1, left, False)
    generated = model.generate(batch.history, excluded)
    assert (generated.items != NO_ITEM).all()
    assert not excluded.gather(1, generated.items).any()
    everything = randomised(make(codes, num_beams=7)).generate(batch.history, excluded)
    assert everything.items.sort(1).values.tolist() == left.sort(1).values.tolist()


@MODELS
@pytest.mark.gpu
@pytest.mark.parametrize("exact_rank", [False, True])
def test_a_gpu_recommends_the_same(make: Make, codes: np.ndarray, exact_rank: bool) -> None:
    batch = CodeHistoryCollator(MAX_ITEMS)(examples(len(codes)))
    model = randomised(make(codes, num_beams=6, exact_rank=exact_rank))
    ranks = ranks_of(model, batch, filter_seen=True)
    expected = model.recommend(model.read(batch.history, batch.seen), 8, True)
    model.cuda()
    batch = batch.to("cuda")
    assert ranks_of(model, batch, filter_seen=True).above.tolist() == ranks.above.tolist()
    best = model.recommend(model.read(batch.history, batch.seen), 8, True)
    assert best.tolist() == expected.tolist()


@MODELS
@pytest.mark.parametrize("num_beams", [1, 5])
def test_beams_are_different_items_best_first(
    make: Make, codes: np.ndarray, num_beams: int
) -> None:
    batch = CodeHistoryCollator(MAX_ITEMS)(examples(len(codes)))
    model = randomised(make(codes, num_beams=num_beams))
    generated, scores = model.generate(batch.history), model.score_items(batch.history)
    assert generated.items.shape == (6, num_beams)
    assert all(len(set(row)) == num_beams for row in generated.items.tolist())
    torch.testing.assert_close(generated.log_probs, scores.gather(1, generated.items))
    assert (generated.log_probs.diff(dim=1) <= 0).all()


@MODELS
def test_greedy_is_a_walk_along_the_best_codes(make: Make, codes: np.ndarray) -> None:
    batch = CodeHistoryCollator(MAX_ITEMS)(examples(len(codes)))
    model = randomised(make(codes, num_beams=1))
    logits, _ = model.start(batch.history)
    for user, item in enumerate(model.generate(batch.history).items[:, 0].tolist()):
        first = {int(code) for code in codes[:, 0]}
        token = model.item_tokens[item, 0].item()
        assert token - 1 == max(first, key=lambda code: logits[user, 0, code + 1].item())


@MODELS
def test_neither_batch_nor_padding_moves_a_user(make: Make, codes: np.ndarray) -> None:
    users = examples(len(codes))
    model = randomised(make(codes, num_beams=8))
    together = model.generate(CodeHistoryCollator(MAX_ITEMS)(users).history)
    for row, user in enumerate(users):
        alone = model.generate(CodeHistoryCollator(MAX_ITEMS)([user]).history)
        assert together.items[row].tolist() == alone.items[0].tolist()
        torch.testing.assert_close(together.log_probs[row], alone.log_probs[0])


@MODELS
def test_only_the_newest_items_are_read_in_their_order(make: Make, codes: np.ndarray) -> None:
    def scores(*items: int) -> Tensor:
        return model.score_items(pad_items([np.array(items)], MAX_ITEMS))

    model = randomised(make(codes))
    assert torch.equal(scores(9, 8, 1, 2, 3, 4), scores(1, 2, 3, 4))
    assert not torch.allclose(scores(1, 2, 3, 4), scores(1, 2, 4, 3))


@MODELS
def test_the_target_is_never_read_in_evaluation(make: Make, codes: np.ndarray) -> None:
    users = examples(len(codes))
    other = [EvalExample(e.user_id, e.items, (e.target + 1) % len(codes)) for e in users]
    model = randomised(make(codes))
    one, two = (
        model.generate(CodeHistoryCollator(MAX_ITEMS)(batch).history) for batch in (users, other)
    )
    assert torch.equal(one.items, two.items)
    assert torch.equal(one.log_probs, two.log_probs)


def test_tiger_reads_what_is_before_the_target(codes: np.ndarray) -> None:
    items = np.arange(20)  # an item's id is its place
    collator = TigerTrainCollator(MAX_ITEMS)
    batch = collator([TrainExample(0, items, seed) for seed in range(40)])
    model = tiger(codes)
    inputs = model.encoder_inputs(batch.history)
    for label, history, row in zip(batch.labels, batch.history, inputs["input_ids"]):
        expected = list(range(max(0, label - MAX_ITEMS), label))
        assert history[history != NO_ITEM].tolist() == expected
        assert row[row != 0].tolist() == model.item_tokens[expected].flatten().tolist()
    assert len(set(batch.labels.tolist())) > 10
    assert (
        inputs["attention_mask"].sum(1).tolist() == (3 * (batch.history != NO_ITEM).sum(1)).tolist()
    )


def test_gpt2_cannot_look_ahead(codes: np.ndarray) -> None:
    model = randomised(gpt2(codes))
    tokens = model.input_ids(torch.tensor([[3, 1, 4, 1]]))
    changed = model.input_ids(torch.tensor([[3, 1, 5, 9]]))
    with torch.no_grad():
        one, two = (model.gpt2(input_ids=ids).logits[0] for ids in (tokens, changed))
    assert torch.equal(one[:7], two[:7])  # START and the codes of two items
    assert not torch.allclose(one[-1], two[-1])


def test_gpt2_learns_every_code_of_every_item(codes: np.ndarray) -> None:
    model = randomised(gpt2(codes, dropout=0.0))
    batch = Gpt2CodesTrainCollator(MAX_ITEMS)(
        [TrainExample(0, np.array([7, 5, 3, 1, 2, 9]), 0), TrainExample(1, np.array([6, 8]), 0)]
    )
    assert batch.labels.tolist() == [[5, 3, 1, 2, 9], [6, 8, *[NO_ITEM] * 3]]
    # The chain rule: a sequence's log-probability is that of its items, one after another.
    total = 0.0
    for items in ([5, 3, 1, 2, 9], [6, 8]):
        for place, item in enumerate(items):
            history = torch.tensor([items[:place]], dtype=torch.int64)
            scores = model.score_items(history)
            total += scores[0, item].item()
    assert model.training_loss(batch)["loss"].item() == pytest.approx(-total / (7 * 3), rel=1e-5)


def test_tiger_may_ask_for_the_last_item_alone() -> None:
    items = np.array([5, 6, 7, 8, 9, 4])
    examples = [TrainExample(0, items[:length], seed=length) for length in (2, 3, 6)]
    batch = TigerTrainCollator(MAX_ITEMS, last=True)(examples)
    assert batch.labels.tolist() == [6, 7, 4]
    assert batch.history.tolist() == [[5, *[NO_ITEM] * 3], [5, 6, NO_ITEM, NO_ITEM], [6, 7, 8, 9]]


def test_tiger_learns_the_codes_of_the_target(codes: np.ndarray) -> None:
    model = randomised(tiger(codes))
    batch = TrainBatch(torch.tensor([6, 7]), torch.tensor([[1, 2, NO_ITEM], [3, 4, 5]]))
    scores = model.score_items(batch.history)
    expected = -(scores[0, 6] + scores[1, 7]).item() / (2 * 3)
    assert model.training_loss(batch)["loss"].item() == pytest.approx(expected, rel=1e-5)


def test_users_have_tokens_before_their_history(codes: np.ndarray) -> None:
    model = randomised(tiger(codes, user_tokens=3, num_beams=8))
    assert model.t5.config.vocab_size == 1 + sum(SIZES) + 3
    items = [np.array([5]), np.array([7, 8])]
    batch = CodeHistoryCollator(MAX_ITEMS, 3)(
        [EvalExample(user, row, 0) for user, row in zip((1, 5), items)]
    )
    assert batch.history.tolist() == [[-3, 5, NO_ITEM], [-4, 7, 8]]
    first = 1 + sum(SIZES)
    inputs = model.encoder_inputs(batch.history)
    tokens = model.item_tokens.tolist()
    assert inputs["input_ids"].tolist() == [
        [first + 1, *tokens[5], 0, 0, 0],
        [first + 2, *tokens[7], *tokens[8]],
    ]
    assert inputs["attention_mask"].tolist() == [[1] * 4 + [0] * 3, [1] * 7]
    trained = TigerTrainCollator(MAX_ITEMS, last=True, user_tokens=3)(
        [TrainExample(4, np.array([5, 6]), 0), TrainExample(2, np.array([5, 7, 6]), 0)]
    )
    assert trained.history.tolist() == [[-3, 5, NO_ITEM], [-4, 5, 7]]

    # Neither the batch nor its padding moves a user; transformers' own forward gives the scores.
    users = examples(len(codes))
    collator = CodeHistoryCollator(MAX_ITEMS, 3)
    scores = model.score_items(collator(users).history)
    for row, user in enumerate(users):
        inputs = model.encoder_inputs(collator([user]).history)
        own = inputs["input_ids"].expand(len(codes), -1)
        with torch.no_grad():
            logits = model.t5(input_ids=own, labels=model.item_tokens).logits
        expected = logits.log_softmax(-1).gather(2, model.item_tokens[..., None]).sum((1, 2))
        torch.testing.assert_close(scores[row], expected)
    one, same, other = (
        model.score_items(collator([replace(users[3], user_id=user_id)]).history)
        for user_id in (0, 6, 7)
    )
    assert torch.equal(one, same)
    assert not torch.allclose(one, other)


def test_what_only_the_user_tells_is_learned_by_its_token(codes: np.ndarray) -> None:
    """Four users met item 1; what each met next differs."""
    rows = [TrainExample(user, np.array([1, 10 + user]), 0) for user in range(4)]
    found = {}
    for user_tokens in (0, 4):
        torch.manual_seed(0)
        model = tiger(codes, user_tokens=user_tokens, dropout=0.0)
        batch = TigerTrainCollator(MAX_ITEMS, user_tokens=user_tokens)(rows)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        for _ in range(60):
            model.training_loss(batch)["loss"].backward()
            optimizer.step()
            optimizer.zero_grad()
        found[user_tokens] = model.eval().generate(batch.history).items[:, 0].tolist()
    assert found[4] == [10, 11, 12, 13]
    assert len(set(found[0])) == 1


@MODELS
def test_a_toy_grammar_is_learned(make: Make, codes: np.ndarray) -> None:
    """The next of 12 items is the one 5 places on."""
    sequences = [(np.arange(2 + start % 5) * 5 + start) % 12 for start in range(36)]
    collator = {tiger: TigerTrainCollator, gpt2: Gpt2CodesTrainCollator}[make](MAX_ITEMS)
    model = make(codes[:12], num_beams=3, dropout=0.0, hidden_size=32, num_layers=1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    model.train()
    for epoch in range(160):
        batch = collator([TrainExample(0, items, epoch) for items in sequences])
        loss = model.training_loss(batch)["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()
    users = [EvalExample(u, np.array([u, (u + 5) % 12]), (u + 10) % 12) for u in range(12)]
    ranks = ranks_of(model, CodeHistoryCollator(MAX_ITEMS)(users), filter_seen=False)
    assert ranks.above.tolist() == [0] * 12
    assert ranks.codes_right.tolist() == [3] * 12


@MODELS
def test_saved_and_loaded_ranks_alike(make: Make, codes: np.ndarray, tmp_path: Any) -> None:
    history = CodeHistoryCollator(MAX_ITEMS)(examples(len(codes))).history
    model = randomised(make(codes, num_beams=9))
    torch.save(model.state_dict(), tmp_path / "model.pt")
    state = torch.load(tmp_path / "model.pt", weights_only=True)
    loaded = make(codes, num_beams=9).eval()
    loaded.load_state_dict(state)
    assert torch.equal(loaded.generate(history).log_probs, model.generate(history).log_probs)
    with pytest.raises(UserError, match="trained with other codes"):
        make(codes[::-1]).load_state_dict(state)
    # A new item gets a code of its own; those that were there keep their scores.
    grown = make(np.concatenate([codes, [[0, 0, 4]]])).eval()
    grown.load_state_dict(state)
    torch.testing.assert_close(grown.score_items(history)[:, :-1], model.score_items(history))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"codebook_size": [4, 3, 5]}, r"codebook_size is \[4, 3, 5\], but .* need \[4, 4, 4\]"),
        ({"codebook_size": [4, 4]}, r"codebook_size is \[4, 4\]"),
    ],
)
def test_what_is_refused(options: dict[str, Any], message: str, codes: np.ndarray) -> None:
    with pytest.raises(UserError, match=message):
        Gpt2Codes(codes, **options)
    with pytest.raises(UserError, match="--num_beams 0: must be at least 1"):
        gpt2(codes, num_beams=0)
    with pytest.raises(UserError, match="num_beams is 0"):
        TwoLevels(num_beams=0)


def test_processes_count_by_their_codes(codes: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    """GPT-2 predicts as many codes as a sequence has; each process counts by its own number."""
    seen: list[int] = []
    monkeypatch.setattr(gpt2_codes, "mean_over_processes", lambda loss, n: seen.append(n) or loss)
    model = randomised(gpt2(codes))
    rows = [np.array([3, 1]), np.array([2, 5, 7]), np.arange(9)]
    examples = [TrainExample(0, row, 0) for row in rows]
    batch = Gpt2CodesTrainCollator(MAX_ITEMS)(examples)
    loss = model.training_loss(batch)["loss"].item()
    assert seen == [3 * (2 + 3 + MAX_ITEMS + 1)]
    collator = Gpt2CodesTrainCollator(MAX_ITEMS)
    alone = [model.training_loss(collator([e]))["loss"].item() for e in examples]
    parts = zip(seen[1:], alone, strict=True)
    assert loss == pytest.approx(sum(n * x for n, x in parts) / seen[0], rel=1e-5)


def test_padding_of_items() -> None:
    sequences: Sequence[np.ndarray] = [np.array([1, 2, 3]), np.array([4])]
    assert pad_items(sequences, 2).tolist() == [[2, 3], [4, NO_ITEM]]


def test_code_accuracy_is_logged_beside_the_figures_of_items(codes: np.ndarray) -> None:
    model = randomised(tiger(codes))
    users = examples(len(codes), users=10)
    best = model.generate(CodeHistoryCollator(MAX_ITEMS)(users).history).items[:, 0].tolist()
    near = [np.flatnonzero((codes[:, :2] == codes[item, :2]).all(1))[-1] for item in best]
    targets = [*best[:3], *near[3:7], *[e.target for e in users[7:]]]
    users = [EvalExample(e.user_id, e.items, int(t)) for e, t in zip(users, targets)]
    ranks = ranks_of(model, CodeHistoryCollator(MAX_ITEMS)(users), filter_seen=False)
    trainer = lightning.Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[CodeAccuracy(CodeEntropies.of(codes, np.arange(40)))],
    )
    loader = DataLoader(users, batch_size=4, collate_fn=CodeHistoryCollator(MAX_ITEMS))
    (figures,) = trainer.test(LitWrapper(model, num_items=len(codes)), loader, verbose=False)
    for level in (1, 2, 3):
        expected = sum(right >= level for right in ranks.codes_right.tolist()) / 10
        assert figures[f"test/codes_right@{level}"] == pytest.approx(expected)
    expected_losses = model.code_losses(
        CodeUsers(*model.start(pad_items([e.items for e in users], MAX_ITEMS)), SEEN),
        torch.tensor([e.target for e in users]),
    ).mean(0)
    for level in (1, 2, 3):
        assert figures[f"test/code_loss@{level}"] == pytest.approx(
            expected_losses[level - 1].item(), rel=1e-5
        )
    assert figures["test/codes_right@2"] > 0.65 > figures["test/codes_right@3"] > 0.25
    assert figures["test/Recall@10"] > 0.25


def test_item_vectors_from_codes() -> None:
    table = CodeItemEmbedding(np.array([[0, 1], [1, 1], [0, 0]]), [2, 2], hidden_size=2)
    with torch.no_grad():
        table.weight.copy_(torch.tensor([[1.0, 0.0], [2.0, 0.0], [0.0, 10.0], [0.0, 20.0]]))
    vectors = table()
    assert vectors.tolist() == [[1.0, 20.0], [2.0, 20.0], [1.0, 10.0]]
    vectors[:2].sum().backward()
    assert table.weight.grad.tolist() == [[1, 1], [1, 1], [0, 0], [2, 2]]
    with pytest.raises(UserError, match=r"sizes are \[2, 1\]"):
        CodeItemEmbedding(np.array([[0, 1]]), [2, 1], hidden_size=2)
