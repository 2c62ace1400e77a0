"""Sampled negatives of an evaluation."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from recformer.evaluation.ranks import Pairs, _int64, checked_ids, not_compared
from recformer.files import UserError

NEGATIVES_SEED = 0  # the same for all runs, which would else be ranked among different items


def sample_unseen(
    user_ids: ArrayLike,
    targets: ArrayLike,
    seen: Pairs,
    num_items: int,
    count: int,
    seed: int = NEGATIVES_SEED,
) -> NDArray[np.int64]:
    """Draw items that are neither a user's target nor in the user's history.

    The draw depends on seed, user, history and target alone: not on the batch, the process or the
    model, so that every model is ranked among the same items.

    Args:
        user_ids, targets: (B,).
        seen: (rows, cols), the items of the histories as in `count_ranks`.
        num_items: N.
        count: of items a user, all different and equally likely.
        seed: of the draws.

    Returns:
        int64 (B, count).

    Raises:
        UserError: a user has met so many items that fewer than `count` are left.
    """
    users, items = _int64(user_ids, "user_ids"), checked_ids(targets, "targets", num_items)
    rows, cols, num_left = not_compared(seen, items, num_items)
    offsets = np.searchsorted(rows, np.arange(len(users) + 1))
    drawn = np.empty((len(users), count), dtype=np.int64)
    for row, user in enumerate(users):
        left = int(num_left[row]) - 1  # without the target
        if left < count:
            raise UserError(
                f"user {user} leaves {left} of {num_items} items to sample from, which is fewer "
                f"than {count}: ask for at most {left} sampled negatives"
            )
        places = np.random.default_rng([seed, user]).choice(left, count, replace=False)
        taken = cols[offsets[row] : offsets[row + 1]]  # ascending
        # the j-th item that is not taken comes after all taken ones with fewer than j + 1 before
        drawn[row] = places + np.searchsorted(taken - np.arange(len(taken)), places, side="right")
    return drawn
