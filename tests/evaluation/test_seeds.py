"""Which runs differ in their seed alone, what they are called, and their mean."""

from __future__ import annotations

import pytest

from recformer.evaluation.runs import judged
from recformer.evaluation.seeds import common_name, differ_in_seed_alone, mean_and_deviation


def test_who_was_ranked_in_words():
    assert judged(1234) == "1,234 test users"
    assert judged(500, 1000, "targets") == "500 of 1,000 targets"


def test_what_is_a_difference():
    one = {"seed": 1, "weights": "a", "lr": 0.1}
    assert differ_in_seed_alone(one, {"seed": 2, "weights": "b", "lr": 0.1})
    # A flag that a run lacks counts as its default, whichever of the two it is.
    later = {"seed": 2, "lr": 0.1, "flag_of_today": 3}
    assert differ_in_seed_alone(one, later, {"flag_of_today": 3, "lr": 0.5})
    assert differ_in_seed_alone(later, one, {"flag_of_today": 3, "lr": 0.5})
    assert not differ_in_seed_alone(one, later, {"flag_of_today": None})
    assert not differ_in_seed_alone(later, one, {"flag_of_today": None})
    assert differ_in_seed_alone(one, later)  # of what is no flag nothing is known
    assert not differ_in_seed_alone(one, {"seed": 2, "lr": 0.2})
    assert not differ_in_seed_alone(one, one)
    assert not differ_in_seed_alone({}, {})
    assert not differ_in_seed_alone(one, {})


@pytest.mark.parametrize(
    ("names", "name"),
    [
        (["head_s1", "head_s2"], "head"),
        (["sasrec/seed_1", "sasrec/seed_12"], "sasrec"),
        (["beauty/head_s1", "beauty/head_s2"], "beauty/head"),
        (["beauty/sasrec/seed_1", "beauty/sasrec/seed_2"], "beauty/sasrec"),
        (["head-seed-1", "head-seed-2"], "head"),
        (["sales1", "sales2"], "sales"),
        (["a", "b"], "a"),
        (["pop_ular%[x]_s1", "pop_ular%[x]_s2"], "pop_ular%[x]"),
        (["a (b) seed 1", "a (b) seed 2"], "a (b)"),
        (["x[1]", "x[2]"], "x"),
        (["head_s1", "head_s10", "head_s11"], "head"),
        (["1", "2"], "1"),
    ],
)
def test_common_names(names, name):
    assert common_name(names) == name


def test_mean_and_deviation_by_hand():
    assert mean_and_deviation([1.0, 2.0, 6.0]) == (3.0, pytest.approx(7**0.5))
    assert mean_and_deviation([1.0]) == (1.0, 0.0)
