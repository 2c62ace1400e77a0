"""Which runs differ in their seed alone, what they are called, and their mean."""

from __future__ import annotations

import pytest

from recformer.evaluation.seeds import common_name, differ_in_seed_alone, mean_and_deviation


def test_what_is_a_difference():
    one = {"seed": 1, "weights": "a", "lr": 0.1}
    assert differ_in_seed_alone(one, {"seed": 2, "weights": "b", "lr": 0.1})
    assert differ_in_seed_alone(one, {"seed": 2, "lr": 0.1, "flag_of_today": 3})
    assert not differ_in_seed_alone(one, {"seed": 2, "lr": 0.2})
    assert not differ_in_seed_alone(one, one)
    assert not differ_in_seed_alone({}, {})
    assert not differ_in_seed_alone(one, {})


@pytest.mark.parametrize(
    ("names", "name"),
    [
        (["head_s1", "head_s2"], "head"),
        (["sasrec/seed_1", "sasrec/seed_12"], "sasrec"),
        (["head-seed-1", "head-seed-2"], "head"),
        (["sales1", "sales2"], "sales"),
        (["a", "b"], "a"),
    ],
)
def test_common_names(names, name):
    assert common_name(names) == name


def test_mean_and_deviation_by_hand():
    assert mean_and_deviation([1.0, 2.0, 6.0]) == (3.0, pytest.approx(7**0.5))
    assert mean_and_deviation([1.0]) == (1.0, 0.0)
