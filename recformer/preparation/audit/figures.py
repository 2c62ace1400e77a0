"""Figures of an audit: flaws of a processed folder that can spoil an evaluation, counted.

Writes audit.json and audit.html, one page with plots that needs no other file.
`recformer process` runs it at its end. A folder of the published scripts, without
dataset.json and interactions.parquet, is audited as far as it goes, and the notes say what was not.

In audit.json a figure is `{"count": …, "share": …}`, the share being of what its place in the file
says: of interactions, users, items, or of the evaluated users of a split, who have one target each.

Shapes: U users, N items, M interactions, E evaluated users of a split.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from recformer.data.processed import (
    EvalExamples,
    ProcessedFolder,
    join_splits,
    read_times,
)
from recformer.evaluation.metrics import gini
from recformer.files import UserError, atomic_write, write_json
from recformer.paper import PAPER
from recformer.preparation.audit.page import page
from recformer.preparation.audit.sample import about_sample, sampled, times_of
from recformer.preparation.audit.warnings import DAY, FEW_WORDS, Figure, _figure, _notes, _warnings
from recformer.preparation.text import count_words

if TYPE_CHECKING:  # counts of tokens are asked for; the rest needs no transformers
    from recformer.tokenization import RecformerTokenizer

AUDIT_FILE = "audit.json"
PAGE_FILE = "audit.html"

# Share of the users who begin at one and the same time. Real logs have a few at most, made-up
# times all; less than all, as a split may have dropped some users' first interactions.
SAME_START = 0.5
# Share of the gaps between a user's interactions that are one and the same, not zero. Made-up times
# (position x constant) have all; less than all for the same reason.
SAME_GAP = 0.8

LIMITS = ("max_token_num", "max_item_embeddings", "max_attr_num", "max_attr_length")
PARTS = ("train", "val", "test")
TRAIN, VAL, TEST = range(3)
TOKENIZED_AT_ONCE = 8192  # items: bounds memory
BARS = 40  # of a histogram
PERCENTILES = (0, 5, 25, 50, 75, 95, 100)

# Interactions that are looked at; of a larger folder those of a seeded sample of its users.
MOST_AUDITED = 20_000_000


@dataclass(frozen=True, eq=False)
class _Log:
    """Every interaction: users in the order of their ids, each one's train, val and test.

    Attributes:
        rows: int64 (M,) user ids.
        items: int32 (M,).
        parts: int8 (M,) TRAIN, VAL or TEST.
        ends: int64 (U, 3), where each user's part ends (the place after its last interaction).
        times: int64 (M,), None where they are not known.
    """

    rows: np.ndarray
    items: np.ndarray
    parts: np.ndarray
    ends: np.ndarray
    times: np.ndarray | None

    @classmethod
    def of(cls, data: ProcessedFolder, whole: ProcessedFolder) -> _Log:
        """Of some users of a whole folder, or of all of them."""
        lengths = np.stack([data.train.lengths, data.val.lengths, data.test.lengths], axis=1)
        joined = join_splits(data.train, data.val, data.test)
        parts = np.tile(np.arange(3, dtype=np.int8), len(lengths))
        return cls(
            rows=joined.rows,
            items=joined.items,
            parts=np.repeat(parts, lengths.ravel()),
            ends=joined.offsets[:-1, None] + lengths.cumsum(axis=1),
            times=read_times(data) if data is whole else times_of(data, whole),
        )

    @property
    def num_users(self) -> int:
        """Users that have an interaction."""
        return _distinct(self.rows)

    @cached_property
    def same_user(self) -> np.ndarray:
        """Whether an interaction and the one before it are one user's, bool (M-1,)."""
        return self.rows[1:] == self.rows[:-1]

    @cached_property
    def tied(self) -> np.ndarray:
        """Whether an interaction has user and time of the one before it, bool (M-1,)."""
        assert self.times is not None
        return self.same_user & (self.times[1:] == self.times[:-1])

    @cached_property
    def moments(self) -> np.ndarray:
        """A number for every user and time, int64 (M,): tied interactions share it."""
        return np.concatenate([[0], np.cumsum(~self.tied)])

    @cached_property
    def arbitrary(self) -> np.ndarray:
        """Interactions whose place among those of their moment is the file's choice, bool (M,).

        Where a moment has one item alone there is nothing to choose.
        """
        mixed = np.zeros(len(self.rows), dtype=bool)
        mixed[self.moments[1:][self.tied & (self.items[1:] != self.items[:-1])]] = True
        return mixed[self.moments]


def audit(data: ProcessedFolder, tokenizer: RecformerTokenizer | None = None) -> dict[str, Any]:
    """The content of audit.json.

    Args:
        data: the folder.
        tokenizer: None counts words alone.

    Returns:
        Figures, then `warnings`, a list of `{"kind", "share", "message"}`, and `notes`, a list of
        sentences: what is good to know and what could not be audited.

    Raises:
        UserError: nothing to train on, or interactions.parquet cannot be read or belongs to another
            split.
    """
    if not len(data.train.items):
        raise UserError(f"{data.path} has no interaction to train on")
    whole, data = data, sampled(data, MOST_AUDITED)
    log = _Log.of(data, whole)
    examples = {"val": data.eval_examples("val"), "test": data.eval_examples("test")}
    found: dict[str, Any] = {
        "folder": data.path.absolute().name,
        "split_hash": data.split_hash,
        "split": _split(data),
        **about_sample(whole, data),
        "sizes": {
            "users": log.num_users,
            "items": data.num_items,
            "interactions": len(log.items),
            **{name: int((log.parts == part).sum()) for part, name in enumerate(PARTS)},
        },
        "texts": _texts(
            data,
            examples["test"],
            PAPER["max_attr_num"] if tokenizer is None else tokenizer.config.max_attr_num,
        ),
        "repeats": _repeats(log),
        "targets": {name: _targets(data, log, name, examples[name], whole) for name in examples},
        "times": None if log.times is None else _times(log, log.times, _split(data)),
        "lengths": {
            "train_sequence": _distribution(data.train.lengths[data.train.lengths > 0]),
            "test_history": _distribution(examples["test"].histories.lengths),
        },
        "popularity": _popularity(whole, examples["test"]),
        "tokens": None if tokenizer is None else _tokens(data, examples["test"], tokenizer),
    }
    return found | {"warnings": _warnings(found), "notes": _notes(data, found)}


def audit_folder(
    folder: str | os.PathLike,
    output_dir: str | os.PathLike | None = None,
    tokenizer: RecformerTokenizer | None = None,
) -> dict[str, Any]:
    """Audit a folder and write audit.json and audit.html.

    Args:
        folder: a processed folder.
        output_dir: where to write; None: into the folder.
        tokenizer: see `audit`.

    Returns:
        What audit.json holds.

    Raises:
        FileNotFoundError, UserError: the folder cannot be read, or not be written to.
    """
    output = Path(folder if output_dir is None else output_dir)
    if output.is_dir() and not os.access(output, os.W_OK):
        raise UserError(f"no permission to write to {output}: name a folder with --output_dir")
    data = ProcessedFolder.load(folder)
    found = audit(data, tokenizer)
    write_json(output / AUDIT_FILE, found, indent=1)
    with atomic_write(output / PAGE_FILE) as handle:
        handle.write(page(found))
    return found


def _recorded(data: ProcessedFolder, key: str) -> dict[str, Any]:
    """An entry of dataset.json; nothing where another program wrote something else there."""
    value = (data.dataset or {}).get(key)
    return value if isinstance(value, dict) else {}


def _split(data: ProcessedFolder) -> dict[str, Any]:
    """Name of the split by dataset.json, else by its shape.

    Leave-one-out has one item a user in val and in test.
    """
    about = _recorded(data, "split")
    if about.get("name") in ("leave_one_out", "temporal"):
        return {**about, "recorded": True}
    one_each = max(data.val.lengths.max(), data.test.lengths.max()) <= 1
    return {"name": "leave_one_out" if one_each else "temporal", "recorded": False}


# --- figures --------------------------------------------------------------------------------------


def _texts(data: ProcessedFolder, test: EvalExamples, max_attr_num: int) -> dict[str, Any]:
    items = data.items
    words = np.fromiter((count_words(" ".join(item.values())) for item in items), np.int64)
    described = np.fromiter(map(bool, items), bool)
    sentences: dict[tuple, int] = {}
    codes = np.fromiter(
        (sentences.setdefault(tuple(item.items()), len(sentences)) for item in items), np.int64
    )
    filled: dict[str, int] = {}
    for item in items:
        for name, value in item.items():
            filled[name] = filled.get(name, 0) + bool(value.strip())
    not_read = Counter(name for item in items for name in list(item)[max_attr_num:])
    for attribute in _recorded(data, "parameters").get("attributes", []):
        filled.setdefault(attribute.partition("=")[0], 0)
    return {
        "without_metadata": _items(~described, test),
        "empty": _items(described & (words == 0), test),
        "near_empty": _items((words > 0) & (words < FEW_WORDS), test),
        "identical": _items((np.bincount(codes)[codes] > 1) & (words > 0), test),
        "attributes": {name: _figure(count, len(items)) for name, count in filled.items()},
        "not_read": {
            "max_attr_num": max_attr_num,
            "attributes": {name: _figure(count, len(items)) for name, count in not_read.items()},
        },
        "words": _distribution(words),
    }


def _items(affected: np.ndarray, test: EvalExamples) -> dict[str, Figure]:
    """Some items (bool (N,)) and the test targets among them."""
    return {
        "items": _figure(affected.sum(), len(affected)),
        "test_targets": _figure(affected[test.targets].sum(), len(test)),
    }


def _repeats(log: _Log) -> dict[str, Any]:
    consecutive = log.same_user & (log.items[1:] == log.items[:-1])
    return {
        "consecutive": _figure(consecutive.sum(), len(log.items)),
        "again": _figure(_num_repeated(log.rows, log.items), len(log.items)),
    }


def _num_repeated(groups: np.ndarray, items: np.ndarray) -> int:
    """Interactions with an item that one before them in the same group has."""
    pairs = groups * (1 + int(items.max())) + items
    pairs.sort()
    return int((pairs[1:] == pairs[:-1]).sum())


def _targets(
    data: ProcessedFolder, log: _Log, split: str, examples: EvalExamples, whole: ProcessedFolder
) -> dict[str, Any]:
    """Of the users with a target, and of the evaluated ones: those who have a history too. What
    was trained on is what everybody has."""
    part = PARTS.index(split)
    number = len(examples)
    num_users = number + examples.num_without_history
    begins = log.ends[:, part - 1] - (log.ends[:, 0] - data.train.lengths)  # items before the part
    histories, targets = examples.histories, examples.targets
    seen = np.zeros(number, dtype=bool)
    rows = histories.rows
    seen[rows[histories.items == targets[rows]]] = True
    newest = histories.items[histories.offsets[1:] - 1]
    met = [
        np.bincount(each.items, minlength=data.num_items) > 0
        for each in (whole.train, whole.val, whole.test)
    ]
    trained = met[TRAIN]
    found: dict[str, Any] = {
        "users": num_users,
        "without_history": _figure(examples.num_without_history, num_users),
        "evaluated": number,
        # Their history lies after the cut of a temporal split, like the target.
        "nothing_before_the_part": _figure((begins[examples.user_ids] == 0).sum(), number),
        "in_history": _figure(seen.sum(), number),
        "same_as_newest": _figure((newest == targets).sum(), number),
        "cold": _figure((~trained[targets]).sum(), number),
        "new_items": int((met[part] & ~np.any(met[:part], axis=0)).sum()),
    }
    if log.times is not None:
        places = log.ends[examples.user_ids, part] - 1
        found["decided_by_ties"] = _figure(log.arbitrary[places].sum(), number)
    return found


def _times(log: _Log, times: np.ndarray, split: Mapping[str, Any]) -> dict[str, Any]:
    in_tie = np.concatenate([[False], log.tied]) | np.concatenate([log.tied, [False]])
    backwards = log.same_user & (times[1:] < times[:-1])
    unit = _unit(times)
    odd = _odd(times, unit)  # with these no difference can be taken, and no picture drawn
    usual = times[~odd]
    gaps = np.diff(times)[log.same_user & ~odd[1:] & ~odd[:-1]]
    starts = times[np.concatenate([[True], ~log.same_user])]
    commonest_start, same_start = _commonest(starts)
    commonest_gap, same_gap = _commonest(gaps)
    found: dict[str, Any] = {
        "first": int(times.min()),
        "last": int(times.max()),
        "unit": unit,
        "odd": {"first": int(times[odd][0]) if odd.any() else None, **_figure(odd.sum(), len(odd))},
        # The largest number that divides all differences.
        "resolution": int(np.gcd.reduce(usual - usual.min())),
        "commonest_start": {"time": commonest_start, **_figure(same_start, len(starts))},
        "commonest_gap": {"gap": commonest_gap, **_figure(same_gap, len(gaps))},
        "tied": _figure(in_tie.sum(), len(times)),
        "duplicates": _figure(_num_repeated(log.moments, log.items), len(times)),
        "users_ordered_by_ties": _figure(_distinct(log.rows[log.arbitrary]), log.num_users),
        "users_out_of_order": _figure(_distinct(log.rows[1:][backwards]), log.num_users),
    }
    found["synthetic"] = bool(
        (same_start > 1 and same_start >= SAME_START * len(starts))
        or (commonest_gap and same_gap > 1 and same_gap >= SAME_GAP * len(gaps))
    )
    if split["name"] == "temporal":
        found["after_the_cut"] = {
            PARTS[part]: _after_the_cut(log, times, part, split.get(f"{PARTS[part]}_cut"))
            for part in (VAL, TEST)
        }
    else:
        found |= _leave_one_out_times(log, times)
    edges = np.histogram_bin_edges(usual, bins=BARS)
    found["histogram"] = {
        "edges": edges.tolist(),
        **{
            name: np.histogram(times[(log.parts == part) & ~odd], edges)[0].tolist()
            for part, name in enumerate(PARTS)
        },
    }
    return found


def _commonest(values: np.ndarray) -> tuple[int, int]:
    """The commonest value and how often it occurs; zeros where there are none."""
    if not len(values):
        return 0, 0
    distinct, counts = np.unique(values, return_counts=True)
    return int(distinct[counts.argmax()]), int(counts.max())


def _distinct(rows: np.ndarray) -> int:
    """Number of different users; rows ascend."""
    return int((np.diff(rows) != 0).sum()) + 1 if len(rows) else 0


def _unit(times: np.ndarray) -> str | None:
    """Seconds, milli- or microseconds since 1970, by their size; None: something else."""
    middle = float(np.median(times))
    for unit, day in DAY.items():
        if 1e8 < middle / day * DAY["s"] < 1e10:  # 1973 … 2286
            return unit
    return None


def _odd(times: np.ndarray, unit: str | None) -> np.ndarray:
    """Times that are no moment from 1973 to 2100, or, without a unit, too far from all others."""
    if unit is not None:
        second = DAY[unit] // DAY["s"]
        return (times < 100_000_000 * second) | (times >= 4_102_444_800 * second)
    odd = np.abs(times.astype(np.float64) - float(np.median(times))) > 2.0**61
    return times != np.sort(times)[len(times) // 2] if odd.all() else odd


def _after_the_cut(log: _Log, times: np.ndarray, part: int, cut: int | None) -> dict[str, Any]:
    """Interactions of earlier parts that are not before a part's cut.

    Args:
        cut: as recorded, itself the first time after it; None: what is later than the earliest of
            the part counts.
    """
    own, earlier = times[log.parts == part], times[log.parts < part]
    if not len(own):
        return {"cut": cut, **_figure(0, len(earlier))}
    late = earlier > own.min() if cut is None else earlier >= cut
    return {"cut": int(own.min()) if cut is None else cut, **_figure(late.sum(), len(earlier))}


def _leave_one_out_times(log: _Log, times: np.ndarray) -> dict[str, Any]:
    """Training interactions later than a test target: the user's own, and anybody's."""
    tested = np.flatnonzero(log.ends[:, TEST] > log.ends[:, VAL])
    target_times = times[log.ends[tested, TEST] - 1]
    own = np.full(len(log.ends), np.iinfo(np.int64).max)
    own[tested] = target_times
    train = log.parts == TRAIN
    trained = np.sort(times[train])
    later = len(trained) - np.searchsorted(trained, target_times, side="right")
    return {
        "train_after_own_target": _figure(
            (times[train] > own[log.rows[train]]).sum(), len(trained)
        ),
        "mean_share_of_train_after_a_target": (
            float(later.mean()) / len(trained) if len(tested) and len(trained) else 0.0
        ),
    }


def _popularity(data: ProcessedFolder, test: EvalExamples) -> dict[str, Any]:
    counts = np.bincount(data.train.items, minlength=data.num_items)
    order = np.argsort(-counts, kind="stable")
    top = order[: -(-len(counts) // 100)]
    shares = np.cumsum(counts[order]) / counts.sum()
    is_top = np.zeros(len(counts), dtype=bool)
    is_top[top] = True
    places = np.linspace(0, len(counts), 101).round().astype(np.int64)
    return {
        "gini": gini(counts),
        "top_1_percent": {
            "items": len(top),
            "train": _figure(counts[top].sum(), int(counts.sum())),
            "test_targets": _figure(is_top[test.targets].sum(), len(test)),
        },
        "items_never_in_train": _figure((counts == 0).sum(), len(counts)),
        # Share of the interactions with the most popular 0, 1, … 100 % of the items.
        "curve": np.concatenate([[0.0], shares])[places].tolist(),
    }


def _tokens(
    data: ProcessedFolder, test: EvalExamples, tokenizer: RecformerTokenizer
) -> dict[str, Any]:
    lengths: list[np.ndarray] = []
    sentences: dict[bytes, int] = {}
    codes: list[int] = []
    for start in range(0, data.num_items, TOKENIZED_AT_ONCE):
        ids, _, offsets = tokenizer.encode_items(data.items[start : start + TOKENIZED_AT_ONCE])
        lengths.append(np.diff(offsets))
        texts = (ids[begin:end].tobytes() for begin, end in pairwise(offsets.tolist()))
        codes += [sentences.setdefault(text, len(sentences)) for text in texts]
    item_lengths = np.concatenate(lengths)
    config = tokenizer.config

    # The newest items of each test history, as far as the model has positions for them.
    histories = test.histories
    most = config.max_item_embeddings - 1
    before = np.concatenate([[0], np.cumsum(item_lengths[histories.items])])
    oldest = np.maximum(histories.offsets[:-1], histories.offsets[1:] - most)
    sequence_lengths = 1 + before[histories.offsets[1:]] - before[oldest]
    return {
        "limits": {name: getattr(config, name) for name in LIMITS},
        # With what is cut off by the limits; items without tokens aside.
        "identical": _items((np.bincount(codes)[codes] > 1) & (item_lengths > 0), test),
        "item": _distribution(item_lengths),
        "test_history": _distribution(sequence_lengths),
        "cut_by_max_token_num": _figure(
            (sequence_lengths > config.max_token_num).sum(), len(sequence_lengths)
        ),
        "cut_by_max_item_embeddings": _figure((histories.lengths > most).sum(), len(histories)),
    }


def _distribution(values: np.ndarray) -> dict[str, Any] | None:
    """Percentiles, mean and a histogram in whole numbers; None of nothing.

    The histogram ends at the 99th percentile; its last bar holds what is larger too.
    """
    if not len(values):
        return None
    low, top = int(values.min()), int(np.percentile(values, 99))
    step = -(-(top - low + 1) // BARS)
    edges = np.arange(low, top + step + 1, step)
    return {
        "mean": float(values.mean()),
        "percentiles": {
            str(q): float(v) for q, v in zip(PERCENTILES, np.percentile(values, PERCENTILES))
        },
        "histogram": {
            "edges": edges.tolist(),
            "counts": np.histogram(np.minimum(values, edges[-1] - 1), edges)[0].tolist(),
        },
    }


# --- judgement ------------------------------------------------------------------------------------


# --- command line ---------------------------------------------------------------------------------
