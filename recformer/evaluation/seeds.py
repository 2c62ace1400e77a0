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


def differ_in_seed_alone(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether the settings of two runs (their `run.json`) agree in all but the seed.

    A setting that one of them lacks is none they differ in: its version did not have the flag yet.
    """
    if None in (one.get("seed"), other.get("seed")) or one["seed"] == other["seed"]:
        return False
    return all(one[name] == other[name] for name in one.keys() & other.keys() - DRAWN)


def common_name(names: Sequence[str]) -> str:
    """The common part of the names of one model's runs: `head` of `head_s1` and `head_s2`."""
    folders = {name.rpartition("/")[0] for name in names}
    if len(folders) == 1 and "" not in folders:  # NAME/seed_1, NAME/seed_2
        return folders.pop()
    prefix = "".join(x[0] for x in takewhile(lambda x: len(set(x)) == 1, zip(*names, strict=False)))
    return re.sub(r"([\W_]+(seed|s)?)?[\W_]*$", "", prefix) or names[0]


def mean_and_deviation(values: Sequence[float]) -> tuple[float, float]:
    """Mean over seeds and standard deviation of a seed (S - 1 in the denominator; 0 for one)."""
    deviation = float(np.std(values, ddof=1)) if len(values) > 1 else 0.0
    return float(np.mean(values)), deviation
