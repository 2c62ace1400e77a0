"""Warnings and notes of an audit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from recformer.data.processed import DATASET_FILE, INTERACTION_FILE, ProcessedFolder
from recformer.preparation.audit.page import cell, percent

# Share of the targets, items, users or interactions from which on a fault is warned of. A fault of
# this share of the targets can move Recall by .005: models of one table differ by about as much,
# and with ten thousand users a paired test sees it.
MATTERS = 0.005

# Share of the training interactions with the most popular 1 % of the items. A fifth and a model
# that knows nothing but this list looks good; MovieLens and Amazon's 5-cores are well below.
CONCENTRATED = 0.2

# Share of the histories that max_token_num cuts. What is cut is the oldest, which matters least.
CUT = 0.1

# An item of fewer words is nearly without text: `gift card` names a kind of thing, not a thing.
FEW_WORDS = 3
DAY = {"s": 86_400, "ms": 86_400_000, "us": 86_400_000_000, "ns": 86_400_000_000_000}

UNITS = {"s": "seconds", "ms": "milliseconds", "us": "microseconds", "ns": "nanoseconds"}

Figure = dict[str, Any]  # {"count": int, "share": float}


def _figure(count: Any, total: int) -> Figure:
    return {"count": int(count), "share": int(count) / total if total else 0.0}


def _warnings(found: dict[str, Any]) -> list[dict[str, Any]]:
    """Of each kind of flaw the largest share, where it is large enough to matter."""
    warnings: list[dict[str, Any]] = []

    def warn(kind: str, figures: Sequence[Figure], message: str, least: float = MATTERS) -> None:
        share = max(figure["share"] for figure in figures)
        if share > 0 and share >= least:
            warnings.append({"kind": kind, "share": share, "message": message})

    for kind, key, what in (
        ("without_metadata", "without_metadata", "have no metadata"),
        ("empty_texts", "empty", "have metadata without one word of text"),
        ("near_empty_texts", "near_empty", f"have fewer than {FEW_WORDS} words of text"),
        ("identical_texts", "identical", "have the very text of another, so they tie"),
    ):
        items, targets = found["texts"][key]["items"], found["texts"][key]["test_targets"]
        message = f"{cell(items)} items {what}; {cell(targets)} test targets are among them"
        warn(kind, (items, targets), message)

    unread = found["texts"]["not_read"]
    if unread["attributes"]:
        names = ", ".join(f"{name} of {cell(each)}" for name, each in unread["attributes"].items())
        message = (
            f"{names} items are stored and not read: the model reads the first "
            f"{unread['max_attr_num']} attributes of an item (--attributes of processing chooses "
            f"them, --max_attr_num of training reads more)"
        )
        warn("attributes_not_read", list(unread["attributes"].values()), message, least=0)

    for kind, key, what in (
        ("consecutive_repeats", "consecutive", "repeat the one before"),
        ("repeats", "again", "are with an item that the user met before"),
    ):
        figure = found["repeats"][key]
        warn(kind, [figure], f"{cell(figure)} interactions {what}")

    for kind, key, what in (
        ("seen_targets", "in_history", "targets stand in the user's history already"),
        ("cold_targets", "cold", "targets were never trained on: models of ids cannot find them"),
        ("without_history", "without_history", "targets have no history and are left out"),
        (
            "targets_decided_by_ties",
            "decided_by_ties",
            "targets share their time with another item of the user: the order of the file made "
            "them the target",
        ),
    ):
        val, test = (found["targets"][name].get(key) for name in ("val", "test"))
        meant = kind == "cold_targets" and "cold_items" in found["split"]
        if val is not None and not meant:
            warn(kind, (val, test), f"{cell(val)} val and {cell(test)} test {what}")

    top = found["popularity"]["top_1_percent"]
    message = (
        f"the most popular 1 % of the items make up {percent(top['train']['share'])} of training "
        f"and are the targets of {cell(top['test_targets'])} test users: their list alone may look "
        f"like a model"
    )
    warn("concentrated_popularity", [top["train"]], message, CONCENTRATED)

    if found["times"] is not None:
        times = found["times"]
        tied, users = times["tied"], times["users_ordered_by_ties"]
        message = (
            f"{cell(tied)} interactions share their time with another of the user; the order of "
            f"{cell(users)} users is that of the file"
        )
        warn("tied_times", (tied, users), message)
        odd = times["odd"]
        unit = times["unit"]
        message = (
            f"{cell(odd)} times are not between 1973 and 2100 in {UNITS[unit]}, as most are"
            if unit
            else f"{cell(odd)} times lie so far from the others that no clock can have shown both"
        )
        message += f", the first is {odd['first']}: another unit, or a number that stands for none"
        warn("odd_times", [odd], message, least=0)
        figure = times["users_out_of_order"]
        message = f"{cell(figure)} users have a later interaction before an earlier one"
        warn("out_of_order", [figure], message, least=0)
        if "after_the_cut" in times:
            val, test = times["after_the_cut"]["val"], times["after_the_cut"]["test"]
            message = (
                f"{cell(val)} interactions of train are not before the val cut, {cell(test)} of "
                f"train and val not before the test cut"
            )
            warn("train_after_the_cut", (val, test), message, least=0)
            if times["synthetic"]:
                shares = (times["commonest_start"], times["commonest_gap"])
                warn(
                    "synthetic_times",
                    shares,
                    f"{_synthetic(times)}: a temporal split means nothing",
                )
        else:
            figure = times["train_after_own_target"]
            message = f"{cell(figure)} training interactions are later than their user's target"
            warn("train_after_the_cut", [figure], message, least=0)

    if found["tokens"] is not None:
        cut, same = found["tokens"]["cut_by_max_token_num"], found["tokens"]["identical"]
        limits = found["tokens"]["limits"]
        message = f"{cell(cut)} test histories are cut to {limits['max_token_num']} tokens"
        warn("cut_histories", [cut], message, CUT)
        items, targets = same["items"], same["test_targets"]
        message = (
            f"{cell(items)} items have the very tokens of another, attributes cut to "
            f"{limits['max_attr_length']}, so they tie; {cell(targets)} test targets are among them"
        )
        warn("identical_tokens", (items, targets), message)
    return warnings


def _synthetic(times: Mapping[str, Any]) -> str:
    start, gap = times["commonest_start"], times["commonest_gap"]
    return (
        f"times look synthetic ({percent(start['share'])} of users start at {start['time']}, "
        f"{percent(gap['share'])} of the gaps between interactions are {gap['gap']})"
    )


def _notes(data: ProcessedFolder, found: dict[str, Any]) -> list[str]:
    """Peculiarities that do no harm, and checks that could not be made."""
    notes = []
    if "sample" in found:
        sample = found["sample"]
        notes.append(
            f"figures of users and interactions are of a seeded sample of {sample['users']:,} of "
            f"{sample['of']:,} users; what was trained on, popularity and new items are of all "
            f"{sample['interactions_of']:,} interactions"
        )
    times, split = found["times"], found["split"]
    if data.dataset is None:
        notes.append(f"no {DATASET_FILE}: whether the files belong together was not audited")
    if not split["recorded"]:
        name = split["name"].replace("_", "-")
        notes.append(f"how the folder was split is not recorded, its shape is that of {name}")
    if times is None:
        has_file = (data.path / INTERACTION_FILE).is_file()
        why = "the source has no times" if has_file else f"no {INTERACTION_FILE}"
        notes.append(f"{why}: ties, order and what lies after a cut in time were not audited")
    else:
        if split["name"] == "leave_one_out":
            share = times["mean_share_of_train_after_a_target"]
            notes.append(
                f"{_synthetic(times)}: nothing can be said about time"
                if times["synthetic"]
                else f"leave-one-out looks into the future: {percent(share)} of the training "
                f"interactions are later than a test target (mean over targets)"
            )
        unit = times["unit"]
        if unit and not times["synthetic"] and not times["resolution"] % DAY[unit]:
            notes.append("times are known to the day")
        if times["duplicates"]["count"]:
            notes.append(
                f"{cell(times['duplicates'])} interactions repeat user, item and time of another "
                f"(--deduplicate)"
            )
    for name, figure in found["texts"]["attributes"].items():
        if not figure["count"]:
            notes.append(f"no item has a value of {name!r}")
    val, test = found["targets"]["val"], found["targets"]["test"]
    if "cold_items" in split:
        notes.append(
            f"items were held out: {cell(val['cold'])} val and {cell(test['cold'])} test targets "
            f"were never trained on"
        )
    key = "nothing_before_the_part"
    if val[key]["count"] or test[key]["count"]:
        notes.append(
            f"{cell(val[key])} val and {cell(test[key])} test users have no history but earlier "
            f"items of that part"
        )
    return notes
