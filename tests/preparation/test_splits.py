"""Histories and splits, by hand and against plain loops."""

from __future__ import annotations

from collections import defaultdict

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from recformer.data.processed import Sequences
from recformer.preparation.filters import count_duplicates
from recformer.preparation.splits import (
    Histories,
    Interactions,
    build_histories,
    sample_users,
    split_leave_one_out,
)


def interactions(*events: tuple[str, str, int]) -> Interactions:
    users = {user: place for place, user in enumerate(dict.fromkeys(e[0] for e in events))}
    items = {item: place for place, item in enumerate(dict.fromkeys(e[1] for e in events))}
    return Interactions(
        users=np.array([users[e[0]] for e in events], dtype=np.int32),
        items=np.array([items[e[1]] for e in events], dtype=np.int32),
        times=np.array([e[2] for e in events], dtype=np.int64),
        user_names=list(users),
        item_names=list(items),
    )


def leave_one_out(sequences: Sequences) -> tuple[Sequences, Sequences, Sequences]:
    names = [str(user) for user in range(len(sequences))]
    histories = Histories(sequences, names, [], {})
    return split_leave_one_out(histories).sequences(histories)


def rows(sequences: Sequences) -> list[list[int]]:
    return [sequences[row].tolist() for row in range(len(sequences))]


EVENTS = interactions(
    ("late", "d", 9),
    ("few", "x", 1),
    ("early", "b", 5),
    ("late", "a", 3),
    ("early", "d", 5),
    ("early", "c", 2),
    ("late", "b", 3),
)


def test_ids_are_given_by_first_appearance_and_time_sort_is_stable() -> None:
    histories = build_histories(EVENTS, min_interactions=3)
    # Users by their first line. Items: d, a, b of `late` in file order, then c of `early`.
    assert histories.user_names == ["late", "early"]
    assert histories.item_names == ["d", "a", "b", "c"]
    # late: a and b are of the same time, a stands first. early: c, then b before d.
    assert rows(histories.sequences) == [[1, 2, 0], [3, 2, 0]]
    assert histories.counts == {
        "users": 3,
        "users_with_too_few_interactions": 1,
        "users_not_sampled": 0,
        "users_kept": 2,
        "interactions_kept": 6,
    }


def test_everyone_is_kept_by_default() -> None:
    histories = build_histories(EVENTS)
    assert histories.user_names == ["late", "few", "early"]
    assert histories.item_names == ["d", "a", "b", "x", "c"]
    assert rows(histories.sequences) == [[1, 2, 0], [3], [4, 2, 0]]


def test_nobody_is_left() -> None:
    histories = build_histories(EVENTS, min_interactions=4)
    assert len(histories.sequences) == 0
    assert histories.user_names == histories.item_names == []
    assert histories.counts["users_with_too_few_interactions"] == 3


def test_interactions_without_events() -> None:
    nothing = interactions()
    assert count_duplicates(nothing) == 0
    assert len(build_histories(nothing).sequences) == 0


def test_duplicates_repeat_user_item_and_time() -> None:
    events = interactions(
        ("u", "a", 1), ("u", "a", 1), ("u", "a", 2), ("v", "a", 1), ("u", "b", 1), ("u", "a", 1)
    )
    assert count_duplicates(events) == 2
    assert rows(build_histories(events).sequences) == [[0, 0, 1, 0, 0], [0]]  # all kept


def test_leave_one_out_by_hand() -> None:
    histories = Sequences.from_lists([[4, 5, 6, 7], [1, 2], [3, 2, 1], [], [9]])
    train, val, test = leave_one_out(histories)
    assert rows(train) == [[4, 5], [1, 2], [3], [], [9]]
    assert rows(val) == [[6], [], [2], [], []]
    assert rows(test) == [[7], [], [1], [], []]


def test_a_sample_depends_on_seed_and_name_alone() -> None:
    names = [f"user {number}" for number in range(4000)]
    sample = sample_users(names, 0.25, seed=1)
    assert 900 < sample.sum() < 1100
    assert (sample_users(names[::-1], 0.25, seed=1)[::-1] == sample).all()
    assert (sample <= sample_users(names, 0.5, seed=1)).all()  # the larger one has them all
    assert 150 < (sample & sample_users(names, 0.25, seed=2)).sum() < 350  # a sixteenth of them
    assert sample_users(names, 1.0, seed=1).all()


def test_sampled_histories_are_those_of_the_sampled_users() -> None:
    events = [(f"u{n % 40}", f"i{n * 7 % 30}", n % 11) for n in range(400)]
    sample = build_histories(interactions(*events), user_sample_rate=0.5, seed=3)
    kept = set(sample.user_names)
    assert 8 < len(kept) < 32
    alone = build_histories(interactions(*(event for event in events if event[0] in kept)))
    assert (sample.user_names, sample.item_names) == (alone.user_names, alone.item_names)
    assert rows(sample.sequences) == rows(alone.sequences)
    assert sample.counts["users_not_sampled"] == 40 - len(kept)


def published_algorithm(
    events: list[tuple[str, str, int]], min_interactions: int
) -> tuple[dict[str, int], dict[str, int], dict[int, list[int]]]:
    """User map, item map and sorted histories as the published script makes them."""
    reviews = defaultdict(list)
    for user, item, time in events:
        reviews[user].append((item, time))
    users: dict[str, int] = {}
    items: dict[str, int] = {}
    histories = {}
    for user, met in reviews.items():
        if len(met) >= min_interactions:
            users[user] = len(users)
            ids = [(items.setdefault(item, len(items)), time) for item, time in met]
            histories[users[user]] = [item for item, _ in sorted(ids, key=lambda pair: pair[1])]
    return users, items, histories


@given(
    st.lists(
        st.tuples(st.sampled_from("ABCDE"), st.sampled_from("vwxyz"), st.integers(-3, 3)),
        max_size=60,
    ),
    st.integers(1, 6),
)
def test_against_the_published_algorithm(
    events: list[tuple[str, str, int]], min_interactions: int
) -> None:
    users, items, expected = published_algorithm(events, min_interactions)
    histories = build_histories(interactions(*events), min_interactions=min_interactions)
    assert histories.user_names == list(users)
    assert histories.item_names == list(items)
    assert dict(enumerate(rows(histories.sequences))) == expected

    train, val, test = leave_one_out(histories.sequences)
    for user, history in expected.items():
        parts = (train[user].tolist(), val[user].tolist(), test[user].tolist())
        if len(history) < 3:
            assert parts == (history, [], [])
        else:
            assert parts == (history[:-2], history[-2:-1], history[-1:])
