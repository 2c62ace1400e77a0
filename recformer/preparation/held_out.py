"""Items that are held out of training and become targets."""

from __future__ import annotations

import numpy as np

from recformer.files import UserError
from recformer.preparation.drawing import draw_names, draws_of
from recformer.preparation.log_arrays import Histories, HistoryPiece
from recformer.preparation.splits import DROPPED, TEST, TRAIN, VAL, Split


def hold_out_items(histories: Histories, split: Split, *, share: float, seed: int) -> Split:
    """Keep a seeded draw of items out of training and make them targets of val and test.

    Cold items leave every training sequence. The rest goes by what was split before:

    Leave-one-out: a user with cold items is tested on the last of them; what comes later is left
    out, what lies between it and the cold item before it is history of the test only. That earlier
    cold item is the validation target, where there is none the item before the last. Of the users
    with a single cold item and something after it, a seeded half validates on it instead and is
    tested on their last item. Users who do not validate (`val_users`) are tested only.

    Temporal: a user's items after a cut end at the last cold one, where there is one.

    Args:
        histories: U users, N items.
        split: leave-one-out or temporal.
        share: of the N items, rounded, at least one.
        seed: of the draws of items and users.

    Raises:
        UserError: nothing is left to train on.
    """
    number = max(1, round(share * len(histories.item_names)))
    is_cold = draw_names(histories.item_names, number, seed)
    temporal = split.about["name"] == "temporal"
    draws = np.empty(0)
    validates = np.ones(len(histories.sequences), dtype=bool)
    if not temporal:
        draws = draws_of(histories.user_names, seed)
        if "val_users" in split.about:
            for piece in histories.pieces():
                validating = piece.sequences.rows[split.parts[piece.entries] == VAL]
                own = np.bincount(validating, minlength=len(piece.sequences))
                validates[piece.users] = own > 0
    # Half of the largest draw, not 0.5: where users were sampled by the same seed, the lowest draws
    # are all that is left.
    half = draws[validates].max(initial=0) / 2 if len(draws) else 0.0
    parts = histories.array(len(split.parts), "int8")
    is_target = np.zeros(len(is_cold), dtype=bool)
    taken_out = dropped = trained = 0
    for piece in histories.pieces():
        cold = is_cold[piece.sequences.items]
        own = split.parts[piece.entries].copy()
        if temporal:
            _end_at_cold(piece, cold, own)
        else:
            users = piece.users
            own = _leave_cold_out(piece, cold, own, draws[users] < half, validates[users])
        cold_in_train = cold & (own == TRAIN)
        own[cold_in_train] = DROPPED
        taken_out += int(cold_in_train.sum())
        dropped += int((own == DROPPED).sum())
        trained += int((own == TRAIN).sum())
        for part in (VAL, TEST):
            targets = _last_place(piece, own == part)
            is_target[piece.sequences.items[targets[targets >= 0]]] = True
        parts[piece.entries] = own
    if not trained:
        raise UserError(
            f"--cold_items {share} leaves nothing to train on: name a smaller share of the items"
        )
    return Split(
        parts,
        {
            **split.about,
            "cold_items": share,
            "cold_seed": seed,
            "num_cold_items": number,
            "cold_items_that_are_targets": int((is_cold & is_target).sum()),
            "cold_interactions_taken_out_of_train": taken_out,
            "interactions_dropped": dropped,
        },
    )


def _end_at_cold(piece: HistoryPiece, cold: np.ndarray, parts: np.ndarray) -> None:
    """A user's items after a cut end at the last cold one, where there is one."""
    rows, places = piece.sequences.rows, np.arange(len(parts))
    for part in (VAL, TEST):
        members = parts == part
        last = _last_place(piece, members & cold)[rows]
        parts[members & (last >= 0) & (places > last)] = DROPPED


def _leave_cold_out(
    piece: HistoryPiece,
    cold: np.ndarray,
    parts: np.ndarray,
    in_lower_half: np.ndarray,
    may_validate: np.ndarray,
) -> np.ndarray:
    """Parts of leave-one-out where some items are cold; the last two are of users, bool."""
    sequences = piece.sequences
    rows, places = sequences.rows, np.arange(len(parts))
    last = _last_place(piece, cold)
    earlier = _last_place(piece, cold & (places < last[rows]))
    ends = sequences.offsets[1:] - 1
    single = (last >= 0) & (earlier < 0) & (last < ends) & may_validate
    heads = single & in_lower_half

    # Where the test target and the validation target stand; -1: there is none.
    test_at = np.where(heads, ends, last)
    val_at = np.where(heads, last, earlier)
    warm_before = _last_place(piece, ~cold & (places < last[rows]))
    num_warm = np.bincount(rows[~cold & (places < last[rows])], minlength=len(sequences))
    val_at = np.where((val_at < 0) & (num_warm >= 2), warm_before, val_at)
    val_at = np.where(may_validate, val_at, -1)

    touched = (last >= 0)[rows]
    first_test = np.where(val_at >= 0, val_at + 1, test_at)
    new = np.full(len(parts), TRAIN, dtype=np.int8)
    new[places >= first_test[rows]] = TEST
    new[places == val_at[rows]] = VAL
    new[places > test_at[rows]] = DROPPED
    return np.where(touched, new, parts)


def _last_place(piece: HistoryPiece, chosen: np.ndarray) -> np.ndarray:
    """The last chosen place of every row, -1 where none is chosen."""
    last = np.full(len(piece.sequences), -1, dtype=np.int64)
    places = np.flatnonzero(chosen)
    last[piece.sequences.rows[places]] = places  # places ascend: the last one stays
    return last
