"""Uncertainty of figures that are means over users: bootstrap intervals and paired tests.

Users are the unit that is drawn anew. Where a metric takes few different values over many users, a
bootstrap sample is a multinomial draw of how often each value occurs; otherwise the users
themselves are drawn. Memory does not grow with users times samples.

Shapes: U users, V different values, R resamples.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

LEVEL = 0.95
RESAMPLES = 10_000
DRAWS_AT_ONCE = 1 << 22  # values, or users, x resamples in memory
COUNT_COST = 16  # drawing how often one value occurs takes as long as drawing so many users


def _chunks(num_values: int, resamples: int) -> list[int]:
    """Resamples of each chunk."""
    step = max(1, DRAWS_AT_ONCE // max(1, num_values))
    return [min(step, resamples - start) for start in range(0, resamples, step)]


def bootstrap_interval(
    values: NDArray[np.float64], seed: int = 0, resamples: int = RESAMPLES, level: float = LEVEL
) -> tuple[float, float]:
    """Percentile bootstrap interval of a mean over users.

    Args:
        values: (U,) of each user, or paired differences; not empty.
        seed: of the draws.
        level: probability that the interval holds.

    Returns:
        Lower and upper end.

    Examples:
        >>> import numpy as np
        >>> bootstrap_interval(np.full(50, 0.25))  # nothing varies
        (0.25, 0.25)
        >>> low, high = bootstrap_interval(np.repeat([0.0, 1.0], 50))  # a coin, 100 times
        >>> 0.39 < low < 0.41 and 0.59 < high < 0.61
        True
    """
    distinct, counts = np.unique(values, return_counts=True)
    generator = np.random.default_rng(seed)
    users = len(values)
    if COUNT_COST * len(distinct) < users:
        means = [
            generator.multinomial(users, counts / users, size=size) @ distinct / users
            for size in _chunks(len(distinct), resamples)
        ]
    else:
        by_value = np.sort(values)  # so that the order of users does not matter
        means = [
            by_value[generator.integers(users, size=(size, users), dtype=np.int32)].mean(axis=1)
            for size in _chunks(users, resamples)
        ]
    return percentiles(np.concatenate(means), level)


def resampled_means(
    sums: NDArray[np.float64], counts: NDArray[np.float64], seed: int, resamples: int
) -> NDArray[np.float64]:
    """Means over members of groups that are drawn anew as wholes (cluster bootstrap), (R,).

    Members of one group, such as the targets of a session, are not independent of each other.

    Args:
        sums: (G,) of each group's values.
        counts: (G,) members of each group.
        seed: of the draws.
    """
    generator = np.random.default_rng(seed)
    means = []
    for size in _chunks(len(sums), resamples):
        drawn = generator.integers(len(sums), size=(size, len(sums)), dtype=np.int32)
        means.append(sums[drawn].sum(axis=1) / counts[drawn].sum(axis=1))
    return np.concatenate(means)


def percentiles(draws: NDArray[np.float64], level: float = LEVEL) -> tuple[float, float]:
    """Lower and upper end of the interval that holds the middle `level` of draws."""
    low, high = np.quantile(draws, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def permutation_p(
    differences: NDArray[np.float64], seed: int = 0, resamples: int = RESAMPLES
) -> float:
    """Two-sided p-value of the paired sign-flip permutation test that the mean difference is 0.

    Under the hypothesis the two runs are exchangeable user by user, so the sign of each difference
    is a coin. p = (1 + flips at least as extreme) / (1 + resamples), never 0.

    Args:
        differences: (U,) of each user.

    Examples:
        >>> import numpy as np
        >>> permutation_p(np.array([0.5, 0.25, 0.25])) > 0.2  # two of eight signs are as extreme
        True
        >>> permutation_p(np.full(40, 0.1), resamples=999)
        0.001
    """
    sizes, counts = np.unique(np.abs(differences), return_counts=True)
    observed = abs(float(differences.sum()))
    generator = np.random.default_rng(seed)
    extreme = 0
    for size in _chunks(len(sizes), resamples):
        heads = generator.binomial(counts, 0.5, size=(size, len(counts)))
        sums = np.abs((2 * heads - counts) @ sizes)
        extreme += int((sums >= observed - 1e-9 * max(1.0, observed)).sum())
    return (1 + extreme) / (1 + resamples)


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values corrected for the number of comparisons (Holm 1979), in the order given.

    Examples:
        >>> holm([0.01, 0.2, 0.02])
        [0.03, 0.2, 0.04]
    """
    order = np.argsort(p_values, kind="stable")
    corrected = np.empty(len(p_values))
    worst = 0.0
    for place, index in enumerate(order):
        worst = max(worst, min(1.0, (len(p_values) - place) * p_values[index]))
        corrected[index] = worst
    return corrected.tolist()
