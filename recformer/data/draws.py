"""Random numbers that belong to a place, not to an order of drawing."""

from __future__ import annotations

import numpy as np


def uniform(seeds: np.ndarray, places: np.ndarray, stream: int) -> np.ndarray:
    """Uniform numbers in [0, 1), a function of seed, place and stream alone (SplitMix64's mixing).

    A generator for every sequence would give the same independence of batches and processes, at the
    price of a Python call each.

    Args:
        seeds: (n,) uint64.
        places: (n,) integers, not negative.
        stream: small integer; different streams are independent.
    """
    with np.errstate(over="ignore"):
        state = _mixed(seeds + np.uint64(stream + 1) * np.uint64(0x9E3779B97F4A7C15))
        state = _mixed(state + places.astype(np.uint64) * np.uint64(0xD1342543DE82EF95))
    return (state >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _mixed(state: np.ndarray) -> np.ndarray:
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return state ^ (state >> np.uint64(31))
