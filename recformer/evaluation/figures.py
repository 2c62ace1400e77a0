"""Report of an evaluation: figures, their intervals, and both for slices of the users.

`recformer.evaluation.evaluator.Evaluator` knows ranks alone. With the processed folder beside it,
`detailed_figures` says how sure every figure is and for whom it holds. Every model's `metrics.json`
holds what this function returns.

Shapes: U evaluated users, N items.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from recformer.data.processed import ProcessedFolder
from recformer.evaluation.evaluator import Evaluator
from recformer.evaluation.metrics import per_user_metrics
from recformer.evaluation.ranks import TargetRanks
from recformer.evaluation.statistics import bootstrap_interval
from recformer.files import UserError

SplitName = Literal["val", "test"]

#: A target with at least so many training interactions is frequent, with fewer rare, with none
#: cold. The usual data sets are 5-cores: their makers hold that an item needs five to be learned.
FREQUENT = 5

#: Most items of a history in each slice by length; the last slice has longer ones. Recformer reads
#: the newest 50 items, so the last slice is what it does not see whole.
LENGTHS = (5, 10, 20, 50)
USERS_AT_ONCE = 65_536  # whose histories are laid out

#: Bootstrap resamples per interval. An end is then uncertain by a twelfth of a standard error;
#: `recformer.evaluation.compare` draws ten times as many.
RESAMPLES = 1_000


def detailed_figures(
    evaluator: Evaluator,
    folder: ProcessedFolder,
    split: SplitName,
    sampled: Evaluator | None = None,
) -> dict[str, Any]:
    """Figures of a split with 95 % bootstrap intervals, for all users and for slices of them.

    Coverage and Gini have no intervals: they are no means over users.

    Args:
        evaluator: with the ranks of users of that split, all or some; in several processes gathered
            before.
        folder: the data they come from.
        split: whose targets were ranked.
        sampled: with the ranks of the same targets among sampled negatives.

    Returns:
        `Evaluator.compute()`, with `intervals` ({metric: [low, high]}) and `slices` ({name:
        {`num_users`, metrics, `intervals`}}, see `slices`). Slices without users are left out.
        Where some test users alone were ranked also `drawn_from`, of how many.
        With `sampled` also `sampled`: metrics and `intervals`, every name with its label, as in
        "NDCG@10 (100 sampled)".

    Raises:
        UserError: there are no users, or they are not of this split.
    """
    state, values = evaluator.state(), per_user(evaluator)
    figures: dict[str, Any] = dict(evaluator.compute())
    figures["intervals"] = intervals(values)
    figures["slices"] = {}
    for name, chosen in slices(folder, split, state["user_id"], state["target"]).items():
        part = {metric: x[chosen] for metric, x in values.items()}
        figures["slices"][name] = {
            "num_users": int(chosen.sum()),
            **{metric: float(x.mean()) for metric, x in part.items()},
            "intervals": intervals(part),
        }
    if split == "test" and len(state["user_id"]) < (count := len(folder.eval_examples(split))):
        figures["drawn_from"] = count
    if sampled is not None:
        label = f"({sampled.state()['num_candidates'][0] - 1} sampled)"
        values = {f"{name} {label}": x for name, x in per_user(sampled).items()}
        figures["sampled"] = {name: float(x.mean()) for name, x in values.items()}
        figures["sampled"]["intervals"] = intervals(values)
    return figures


def per_user(evaluator: Evaluator) -> dict[str, NDArray[np.float64]]:
    """Figures of every user by ascending id, (U,) each."""
    state = evaluator.state()
    ranks = TargetRanks(state["above"], state["tied"], state["num_candidates"])
    return per_user_metrics(ranks, evaluator.ks, evaluator.ties)


def check_sampled_negatives(folder: ProcessedFolder, count: int) -> None:
    """Refuse more sampled negatives than some test user leaves, before any long work.

    Raises:
        UserError: names the user and the largest possible number.
    """
    examples = folder.eval_examples("test")
    left = [
        folder.num_items - len(np.union1d(examples.histories[row], examples.targets[row]))
        for row in range(len(examples))
    ]
    if left and (least := min(left)) < count:
        raise UserError(
            f"--sampled_negatives {count}: user {examples.user_ids[left.index(least)]} has met all "
            f"but {least} of {folder.num_items} items; ask for at most {least}"
        )


def intervals(values: Mapping[str, NDArray[np.float64]]) -> dict[str, list[float]]:
    """95 % bootstrap interval of the mean of every metric's values (U,), as [low, high]."""
    return {name: list(bootstrap_interval(x, resamples=RESAMPLES)) for name, x in values.items()}


def slices(
    folder: ProcessedFolder,
    split: SplitName,
    user_ids: NDArray[np.int64],
    targets: NDArray[np.int64],
) -> dict[str, NDArray[np.bool_]]:
    """Slices of the users, bool (U,) each; three partitions.

    `cold target`, `rare target`, `frequent target`: by the target's training interactions, none,
    fewer than `FREQUENT`, or more. `history 1-5` and so on: by the number of items before the
    target. `first-time target`, `repeat target`: whether it is among them.

    Args:
        folder: the data.
        split: "val" or "test".
        user_ids, targets: (U,), users ascending.

    Raises:
        UserError: a user without this target in that split.
    """
    examples = folder.eval_examples(split)
    rows = np.searchsorted(examples.user_ids, user_ids)
    known = rows < len(examples)
    known[known] = (examples.user_ids[rows[known]] == user_ids[known]) & (
        examples.targets[rows[known]] == targets[known]
    )
    if not known.all():
        user, target = user_ids[~known][0], targets[~known][0]
        raise UserError(
            f"user {user} was ranked for item {target}, which is not the {split} target of that "
            f"user in {folder.path}: the ranks belong to another folder or split"
        )
    count = np.bincount(folder.train.items, minlength=folder.num_items)[targets]
    found = {
        "cold target": count == 0,
        "rare target": (count > 0) & (count < FREQUENT),
        "frequent target": count >= FREQUENT,
    }
    lengths = examples.histories.lengths[rows]
    least = 1
    for most in LENGTHS:
        found[f"history {least}-{most}"] = (lengths >= least) & (lengths <= most)
        least = most + 1
    found[f"history {least}+"] = lengths >= least
    repeat = np.zeros(len(examples), bool)
    for start in range(0, len(examples), USERS_AT_ONCE):
        own = examples.histories.between(start, start + USERS_AT_ONCE)
        of_row = own.rows + start
        repeat[of_row[own.items == examples.targets[of_row]]] = True
    repeat = repeat[rows]
    found |= {"first-time target": ~repeat, "repeat target": repeat}
    return {name: chosen for name, chosen in found.items() if chosen.any()}
