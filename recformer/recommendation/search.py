"""The best rows of a view for user vectors: exactly, or among those that an index finds.

Shapes: B users, N rows, H hidden, k rows a user.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from recformer.evaluation.additions import Additions, PairTerms
from recformer.evaluation.exact import of_length_one, pair_scores
from recformer.evaluation.top_items import BestSoFar, top_items_by_vectors
from recformer.recommendation.approximate import ApproximateIndex
from recformer.recommendation.view import Offered, Rows, View, places_among

FEW_USERS = 64  # up to which reading the table takes longer than multiplying
GATHERED = 1 / 8  # of the rows at most, if those that are offered are copied for the search

Pairs = tuple[NDArray[np.int64], NDArray[np.int64]]
Best = tuple[NDArray[np.int64], NDArray[np.float64]]


def best_rows(
    view: View,
    users: Tensor,
    k: int,
    offered: Offered,
    seen: Pairs | None = None,
    additions: Additions | None = None,
    index: ApproximateIndex | None = None,
) -> Best:
    """Rows of the k best for each user and their scores, (B, k), -1 where there are fewer.

    Args:
        view: the catalogue.
        users: (B, H).
        k: rows a user.
        offered: rows that may be among them.
        seen, additions: as in `top_items_by_vectors`, by row.
        index: finds candidates, which are scored exactly; None: all rows are compared.
    """
    rows, mask = offered.only, None
    many = len(offered.out) > 0 if rows is None else len(rows) > GATHERED * len(view)
    if many:
        mask, rows = offered.mask(len(view)), None
    count = int(mask.sum()) if mask is not None else len(view) if rows is None else len(rows)
    k = min(k, max(count, 1))
    if index is not None and rows is None:
        return _by_index(index, view, users, k, mask, count, seen, additions)
    return _exactly(view, users, k, rows, mask, seen, additions)


def _exactly(
    view: View,
    users: Tensor,
    k: int,
    rows: NDArray[np.int64] | None,
    mask: NDArray[np.bool_] | None,
    seen: Pairs | None,
    additions: Additions | None,
) -> Best:
    if rows is not None:  # rows of the catalogue become places among `rows`
        if seen is not None:
            inside, places = places_among(rows, seen[1])
            seen = (seen[0][inside], places[inside])
        if additions is not None:
            users_of, items_of, values = map(np.asarray, additions)
            inside, places = places_among(rows, items_of)
            additions = (users_of[inside], places[inside], values[inside])
    table: Any = Rows(view.tables, rows)
    norms: Any = Rows(view.norms, rows)
    units: Any = None
    if view.units is not None and rows is None and len(users) <= FEW_USERS:
        units = Rows(view.units)
    items, scores = top_items_by_vectors(
        users, table, k, seen, additions=additions, offered=mask, norms=norms, units=units
    )
    return (items if rows is None else np.append(rows, -1)[items]), scores


def _by_index(
    index: ApproximateIndex,
    view: View,
    users: Tensor,
    k: int,
    mask: NDArray[np.bool_] | None,
    count: int,
    seen: Pairs | None,
    additions: Additions | None,
) -> Best:
    """Candidates of the index, rows that it does not know, and those with an addition."""
    num_users = len(users)
    none = np.empty(0, np.int64)
    seen = (none, none) if seen is None else seen
    hidden = np.bincount(seen[0], minlength=num_users)
    found = index.candidates(users, 2 * k + int(hidden.max(initial=0)), mask)
    owner, rows = np.nonzero(found >= 0)[0], found[found >= 0]
    since = np.arange(index.rows, len(view))
    if mask is not None:
        since = since[mask[since]]
    if len(since):
        more = _exactly(view, users, min(k, len(since)), since, None, _within(seen, since), None)[0]
        owner = np.append(owner, np.nonzero(more >= 0)[0])
        rows = np.append(rows, more[more >= 0])
    terms = PairTerms.of(additions, num_users, len(view))
    mine = np.ones(len(terms.rows), bool) if mask is None else mask[terms.cols]
    owner, rows = np.append(owner, terms.rows[mine]), np.append(rows, terms.cols[mine])
    keys = np.unique(owner * len(view) + rows)
    keys = np.setdiff1d(keys, seen[0] * len(view) + seen[1], assume_unique=False)
    owner, rows = np.divmod(keys, len(view))

    units, _ = of_length_one(users, 0)
    distinct, place = np.unique(rows, return_inverse=True)
    vectors = view.at(distinct)[torch.from_numpy(place).to(users.device)]
    cosines = pair_scores(units[torch.from_numpy(owner).to(users.device)], vectors, True)
    best = BestSoFar(num_users, k)
    best.offer(owner, rows, cosines.cpu().numpy() + terms.at(owner, rows))
    # What a filter leaves may lie where the index did not look: those users are searched exactly.
    possible = np.minimum(k, count - hidden)
    short = np.flatnonzero((best.items >= 0).sum(axis=1) < possible)
    if len(short):
        number = {user: place for place, user in enumerate(short.tolist())}
        theirs = np.isin(seen[0], short)
        again = (np.array([number[u] for u in seen[0][theirs]], np.int64), seen[1][theirs])
        theirs = np.isin(terms.rows, short)
        added = (
            np.array([number[u] for u in terms.rows[theirs]], np.int64),
            terms.cols[theirs],
            terms.values[theirs],
        )
        exact = _exactly(view, users[torch.from_numpy(short)], k, None, mask, again, added)
        best.items[short], best.scores[short] = exact
    return best.items, best.scores


def _within(seen: Pairs, rows: NDArray[np.int64]) -> Pairs:
    kept = np.isin(seen[1], rows)
    return seen[0][kept], seen[1][kept]
