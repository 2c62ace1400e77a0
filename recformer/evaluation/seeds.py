"""Runs that differ in their seed alone, as one: their mean, its deviation, tests on user means.

Shapes: U users, S seeds.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from itertools import takewhile
from typing import Any

import numpy as np

# Besides the seed itself: the hash of start weights, of which some are drawn by the seed, and of an
# item table that was encoded with them.
DRAWN = frozenset({"seed", "weights", "item_table"})

# What may stand between the name of a model and its seed; signs that close something end a name.
_SEPARATOR = r"[-_\s.,:;=/|#@~([{<]"


def differ_in_seed_alone(
    one: Mapping[str, Any], other: Mapping[str, Any], defaults: Mapping[str, Any] | None = None
) -> bool:
    """Whether the settings of two runs (their `run.json`) agree in all but the seed.

    Args:
        one, other: the settings.
        defaults: of flags. Where one run lacks a flag, which its version did not have yet, the
            other must have the flag's default; what is no flag may be lacking.
    """
    if None in (one.get("seed"), other.get("seed")) or one["seed"] == other["seed"]:
        return False
    left, right = {**(defaults or {}), **one}, {**(defaults or {}), **other}
    return all(left[name] == right[name] for name in left.keys() & right.keys() - DRAWN)


def common_name(names: Sequence[str]) -> str:
    """The common part of the names of one model's runs: `head` of `head_s1` and `head_s2`."""
    folders = {re.sub(r"/seed_\d+$", "", name) for name in names}
    if len(folders) == 1 and folders.isdisjoint(names):  # NAME/seed_1, NAME/seed_2
        return folders.pop()
    names_of_all = [re.sub(r"\d+$", "", name) for name in names]  # of 1 and 10, "1" is no name
    letters = takewhile(lambda x: len(set(x)) == 1, zip(*names_of_all, strict=False))
    prefix = "".join(letter[0] for letter in letters)
    return re.sub(rf"({_SEPARATOR}+(seed|s)?)?{_SEPARATOR}*$", "", prefix) or names[0]


def mean_and_deviation(values: Sequence[float]) -> tuple[float, float]:
    """Mean over seeds and standard deviation of a seed (S - 1 in the denominator; 0 for one)."""
    deviation = float(np.std(values, ddof=1)) if len(values) > 1 else 0.0
    return float(np.mean(values)), deviation
