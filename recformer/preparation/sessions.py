"""Sessions: what a user does in one go, as sequences of their own.

A session is named by a column, or ends where its user pauses for longer than a gap. Before its own
items a sequence may have those of the last sessions of the same user (session-aware).

Shapes: M interactions, S sessions.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from recformer.data.processed import Sequences
from recformer.files import UserError
from recformer.preparation.splits import Histories, Interactions
from recformer.preparation.times import units_a_second


def split_at_gaps(interactions: Interactions, gap: int, units: int | None = None) -> Interactions:
    """Sessions in place of users: a new one begins after a pause longer than `gap` seconds.

    Session k of user `ann` is called `ann/k`, from 1. Interactions stay in the order of the source,
    and sessions are numbered in the order of their first interaction there.

    Args:
        interactions: M interactions with times.
        gap: seconds; a pause of exactly so many does not end a session.
        units: of the times in a second; None: told by their size.

    Raises:
        UserError: there are no times, or no moments.
    """
    check_times(interactions.has_times)
    most = gap * (units or units_a_second(interactions.times, "--session_gap"))
    users, times = interactions.users, interactions.times
    order = np.lexsort((times, users))
    same_user = users[order][1:] == users[order][:-1]
    paused = np.diff(times[order]) > most
    begins = np.concatenate([[True], ~same_user | paused])[: len(users)]
    number = np.cumsum(begins) - 1  # of the session, along `order`
    first_of_user = np.concatenate([[True], ~same_user])[: len(users)]
    within = number - np.maximum.accumulate(np.where(first_of_user, number, 0)) + 1

    sessions = np.empty(len(users), dtype=np.int64)
    sessions[order] = number
    first = np.full(int(begins.sum()), len(users), dtype=np.int64)  # place in the source
    np.minimum.at(first, sessions, np.arange(len(users)))
    by_appearance = np.argsort(first, kind="stable")
    codes = np.empty(len(first), dtype=np.int32)
    codes[by_appearance] = np.arange(len(first), dtype=np.int32)

    owners, places = users[order][begins], within[begins]
    names = [f"{interactions.user_names[owners[s]]}/{places[s]}" for s in by_appearance]
    return replace(interactions, users=codes[sessions], user_names=names, owners=users)


def check_times(has_times: bool) -> None:
    """Refuse a source without times."""
    if not has_times:
        raise UserError(
            "--session_gap needs times, the interactions have none: name their column with "
            "--time_column"
        )


def check_owners(interactions: Interactions) -> int:
    """Sessions whose interactions are of more than one user; all but the first user's are wrong.

    Args:
        interactions: M interactions of sessions, whose owners are known.
    """
    assert interactions.owners is not None
    pairs = np.unique(np.stack([interactions.users, interactions.owners]), axis=1)
    return int((np.bincount(pairs[0]) > 1).sum())


def with_previous_sessions(histories: Histories, count: int) -> Histories:
    """Every session with the last sessions of the same user before it.

    Earlier is what had ended when the session began; sessions of a user that overlap in time do not
    precede each other.

    Args:
        histories: S sessions with times and owners.
        count: at most so many sessions before each.

    Returns:
        S sequences; `context` says which of their items belong to earlier sessions.
    """
    sequences, times, owners = histories.sequences, histories.times, histories.owners
    assert times is not None
    assert owners is not None
    starts, ends = sequences.offsets[:-1], sequences.offsets[1:]
    begin, end = times[starts], times[ends - 1]
    order = np.lexsort((np.arange(len(owners)), begin, owners))
    places: list[np.ndarray] = [np.empty(0, np.int64)] * len(owners)
    own_from = np.zeros(len(owners), dtype=np.int64)
    before: list[int] = []
    last_owner = -1
    for session in order.tolist():
        if owners[session] != last_owner or last_owner < 0:  # nobody's session has none before
            before, last_owner = [], owners[session]
        earlier = [other for other in before if end[other] < begin[session]][-count:]
        context = np.concatenate(
            [np.empty(0, np.int64), *(np.arange(starts[s], ends[s]) for s in earlier)]
        )
        context = context[np.argsort(times[context], kind="stable")]  # of sessions that overlap
        places[session] = np.append(context, np.arange(starts[session], ends[session]))
        own_from[session] = len(context)
        before = [*before, session][-(count + _OVERLAPS) :]
    lengths = np.array([len(own) for own in places], dtype=np.int64)
    every = np.concatenate(places) if places else np.empty(0, np.int64)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    within = np.arange(len(every)) - np.repeat(offsets[:-1], lengths)
    return replace(
        histories,
        sequences=Sequences(offsets, sequences.items[every]),
        times=times[every],
        extra=None if histories.extra is None else histories.extra[every],
        context=within < np.repeat(own_from, lengths),
        counts=histories.counts | {"sessions_with_earlier_ones": int((own_from > 0).sum())},
    )


# Sessions of one user that run at the same time and are looked at beyond the ones asked for.
_OVERLAPS = 16
