"""The contract of a recommender: users are read once, then ranked in any order and number."""

from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data._utils.pin_memory import pin_memory

from recformer.data.batches import EvalBatch, PairBatch, TrainBatch
from recformer.evaluation.additions import Additions
from recformer.evaluation.recommender import ScoreRecommender, VectorRecommender
from recformer.packing import PackedTokens

ITEMS = torch.tensor([[2.0, 0.0], [1.0, 1.0], [0.0, 5.0], [4.0, 4.0], [-1.0, 0.0]])
USERS = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
TARGETS, OTHERS = torch.tensor([1, 0]), np.array([[0, 2], [4, 1]])
SEEN = (torch.tensor([0, 0, 1]), torch.tensor([0, 4, 2]))


class Vectors(VectorRecommender[Tensor]):
    """Histories are the users' vectors; items of the history are raised by `bonus`."""

    def __init__(self, bonus: float = 0.0) -> None:
        super().__init__()
        self.bonus, self.reads = bonus, 0

    def user_vectors(self, history: Tensor) -> Tensor:
        self.reads += 1
        return history

    def item_vectors(self) -> Tensor:
        return ITEMS

    def history_terms(self, history: Tensor, vectors: Tensor) -> Additions | None:
        assert torch.equal(vectors, history)
        return (*SEEN, torch.full((3,), self.bonus)) if self.bonus else None


class Scores(ScoreRecommender[Tensor]):
    """The cosines of the same vectors as scores, rounded so that equal ones tie."""

    def scores(self, history: Tensor) -> Tensor:
        cosines = torch.nn.functional.cosine_similarity(history[:, None], ITEMS[None], dim=-1)
        return cosines.round(decimals=4)


@pytest.mark.parametrize("bonus", [0.0, 1.5])
def test_vectors_and_their_history_terms_by_hand(bonus: float) -> None:
    # cosines of user 0: 1, .7, 0, .7, -1; of user 1: 0, .7, 1, .7, 0
    model = Vectors(bonus)
    users = model.read(USERS, SEEN)
    ranks = model.rank(users, TARGETS, False)
    # with the bonus user 0 has 2.5, .7, 0, .7, .5; user 1 has 0, .7, 2.5, .7, 0
    assert (ranks.above.tolist(), ranks.tied.tolist()) == ([1, 3], [1, 1])
    ranks = model.rank(users, TARGETS, True)
    assert (ranks.above.tolist(), ranks.num_candidates.tolist()) == ([0, 2], [3, 4])
    expected = [[0, 1, 3, 4, 2], [2, 1, 3, 0, 4]] if bonus else [[0, 1, 3, 2, 4], [2, 1, 3, 0, 4]]
    assert model.recommend(users, 5, False).tolist() == expected
    assert model.recommend(users, 4, True).tolist() == [[1, 3, 2, -1], [1, 3, 0, 4]]
    among = model.rank_among(users, TARGETS, OTHERS)
    assert (among.above.tolist(), among.tied.tolist()) == ([1, 1], [0, 1])
    scores = model.top_items(users, 1, False)[1]
    assert scores.tolist() == [[1 + bonus], [1 + bonus]]
    assert model.reads == 1


@pytest.mark.parametrize("model", [Vectors(), Vectors(0.3), Scores()])
def test_no_call_depends_on_another(model: Vectors | Scores) -> None:
    calls = [
        lambda users: model.rank(users, TARGETS, False).above.tolist(),
        lambda users: model.rank(users, TARGETS, True).above.tolist(),
        lambda users: model.recommend(users, 3, True).tolist(),
        lambda users: model.rank_among(users, TARGETS, OTHERS).above.tolist(),
    ]
    alone = [call(model.read(USERS, SEEN)) for call in calls]
    for order in permutations(range(4)):
        users = model.read(USERS, SEEN)
        found = {place: calls[place](users) for place in order}
        assert [found[place] for place in range(4)] == alone


def test_scores_are_ranked_as_the_vectors_they_come_from() -> None:
    one, other = Vectors(), Scores()
    for filter_seen in (False, True):
        ranks = [m.rank(m.read(USERS, SEEN), TARGETS, filter_seen) for m in (one, other)]
        assert ranks[0].above.tolist() == ranks[1].above.tolist()
        best = [m.recommend(m.read(USERS, SEEN), 3, filter_seen) for m in (one, other)]
        assert best[0].tolist() == best[1].tolist()


def packed() -> PackedTokens:
    ids = torch.arange(3)
    return PackedTokens(ids, ids, ids, torch.tensor([0, 3]))


def test_batches_move_as_a_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    batch = EvalBatch(TARGETS, packed(), torch.tensor([5, 6]), SEEN)
    moved = batch.to("meta")
    devices = [moved.labels, moved.history.input_ids, moved.user_ids, *moved.seen]
    assert [tensor.device.type for tensor in devices] == ["meta"] * 5
    pairs = PairBatch(TARGETS, packed(), packed(), TARGETS, TARGETS, mlm_b=SEEN).to("meta")
    assert pairs.num_tokens == 9  # side b twice
    assert pairs.mlm_a is None
    assert pairs.mlm_b is not None
    assert pairs.mlm_b[0].device.type == pairs.b.cu_seqlens.device.type == "meta"
    # What torch's loader does where there is a GPU.
    pinned = []
    monkeypatch.setattr(Tensor, "pin_memory", lambda self: pinned.append(self) or self)
    again = pin_memory(TrainBatch(TARGETS, packed()))
    assert isinstance(again, TrainBatch)
    assert len(pinned) == 5


def test_a_copy_to_a_device_is_not_waited_for() -> None:
    asked = []

    class Part:
        def to(self, device: str, non_blocking: bool) -> Part:
            asked.append(non_blocking)
            return self

    batch = TrainBatch(TARGETS, Part())
    for device in ("meta", "cpu"):
        batch.to(device)
    batch.to("meta", non_blocking=False)
    assert asked == [True, False, False]


def test_lightning_moves_a_batch() -> None:
    from lightning.fabric.utilities.apply_func import move_data_to_device

    moved = move_data_to_device(TrainBatch(TARGETS, packed()), torch.device("meta"))
    assert isinstance(moved, TrainBatch)
    assert moved.history.cu_seqlens.device.type == moved.labels.device.type == "meta"


@pytest.mark.parametrize("model", [Vectors(), Vectors(0.3), Scores()])
@pytest.mark.parametrize("filter_seen", [True, False])
def test_ranks_and_recommendations_together_are_those_alone(model, filter_seen) -> None:
    users = model.read(USERS, SEEN)
    ranks, items = model.rank_and_recommend(users, TARGETS, 3, filter_seen)
    alone = model.rank(users, TARGETS, filter_seen)
    assert (ranks.above.tolist(), ranks.tied.tolist()) == (
        alone.above.tolist(),
        alone.tied.tolist(),
    )
    assert items.tolist() == model.recommend(users, 3, filter_seen).tolist()


class Raised(Vectors):
    """Items of the history, here the first of each batch's rows, are raised by `bonus`."""

    def history_terms(self, history: Tensor, vectors: Tensor) -> Additions | None:
        if len(history) > 1:
            return None  # a batch may have no terms
        return torch.tensor([0]), torch.tensor([4]), torch.tensor([self.bonus])


def test_users_of_several_batches_are_joined() -> None:
    model = Raised(3.0)
    parts = [
        model.read(USERS[1:], (torch.tensor([0]), torch.tensor([2]))),
        model.read(USERS, SEEN),
        model.read(USERS[:1], (torch.tensor([0, 0]), torch.tensor([0, 4]))),
    ]
    targets = [TARGETS[1:], TARGETS, TARGETS[:1]]
    ranks, items = model.rank_and_recommend(model.join(parts), torch.cat(targets), 4, True)
    apart = [
        model.rank_and_recommend(part, target, 4, True)
        for part, target in zip(parts, targets, strict=True)
    ]
    assert ranks.above.tolist() == [n for each, _ in apart for n in each.above.tolist()]
    assert items.tolist() == [row for _, each in apart for row in each.tolist()]
    assert items[0].tolist() == [4, 1, 3, 0]  # raised above all, item 2 is in the history
    with pytest.raises(TypeError, match="Scores does not join users"):
        Scores().join([Scores().read(USERS, SEEN)] * 2)
