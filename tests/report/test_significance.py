"""Welch's interval against scipy's and published quantiles; how many seeds would decide."""

import math

import pytest

from mlxchat.report.significance import (
    compare_means,
    group_seeds,
    standard_error,
    student_quantile,
    table_of_seeds,
    why_no_best,
)


def test_quantiles_are_those_of_the_tables():
    """Two-sided 95 % and 99 % of Student's t (printed tables have three digits); one degree is Cauchy's."""
    table = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 10: 2.228, 30: 2.042, 120: 1.980}
    assert {freedom: student_quantile(0.975, freedom) for freedom in table} == pytest.approx(table, abs=6e-4)
    assert student_quantile(0.995, 5) == pytest.approx(4.032, abs=6e-4)
    assert student_quantile(0.9, 1) == pytest.approx(math.tan(math.pi * 0.4), rel=1e-6)


@pytest.mark.parametrize(
    ("old", "new", "low", "high"),
    [
        ([1.752, 1.749, 1.757], [1.731, 1.735, 1.729], -0.0293649, -0.0126351),
        ([1.0, 1.4], [1.1, 1.3], -1.3837046, 1.3837046),
        ([2.0, 2.1, 2.2, 2.05, 2.3], [2.4, 2.2, 2.9], -0.4568447, 1.1968447),
    ],
)
def test_interval_is_scipys(old, new, low, high):
    """Expected: scipy 1.17.1, ttest_ind(new, old, equal_var=False).confidence_interval(0.95)."""
    found = compare_means(old, new)
    assert (found.low, found.high) == pytest.approx((low, high), rel=1e-4)
    assert found.is_decided == (low > 0 or high < 0)


def test_more_seeds_are_the_fewest_that_decide():
    """Means 1 apart with unit variance: t(2n − 2) × sqrt(2 / n) < 1 first holds for nine values each."""
    found = compare_means([-1.0, 0.0, 1.0], [0.0, 1.0, 2.0])
    assert (found.mean, found.is_decided, found.more_seeds) == (1.0, False, 6)
    assert compare_means([0.0, 0.1, 0.2], [5.0, 5.1, 5.2]).more_seeds == 0
    assert compare_means([-1.0, 0.0, 1.0], [-1.0, 0.0, 1.01]).more_seeds is None
    assert compare_means([1.0], [0.0, 0.1]) is None, "the scatter of one value is not known"
    assert compare_means([1.0, 1.0], [1.0, 1.0]).is_decided is False
    assert standard_error([1.0, 2.0, 3.0]) == pytest.approx(1 / math.sqrt(3))
    assert standard_error([1.0]) is None


def test_sweep_has_a_best_only_where_seeds_show_it():
    jobs = [
        {"settings": {"stage": "pretrain", "lr": lr, "seed": seed}, "metrics": {"one.score": lr + noise}}
        for lr in (0.1, 0.5)
        for seed, noise in enumerate((0.0, 0.01, -0.01))
    ]
    groups = group_seeds(jobs, "one.score", less_is_better=True)
    assert [group.title for group in groups] == ["lr=0.1", "lr=0.5"]
    assert why_no_best(groups) == ""
    assert table_of_seeds(groups, "one.score").rows[1] == [
        "lr=0.5",
        "3",
        "0.5000 ± 0.0058",
        "+0.4000 [+0.3773, +0.4227]",
    ]
    assert [group.title for group in group_seeds(jobs, "one.score", less_is_better=False)] == ["lr=0.5", "lr=0.1"]
    close = [
        job | {"metrics": {"one.score": job["metrics"]["one.score"] / 100 + number % 3}}
        for number, job in enumerate(jobs)
    ]
    assert "may be chance" in why_no_best(group_seeds(close, "one.score", less_is_better=True))
    assert "seeds only" in why_no_best(group_seeds(jobs[:3], "one.score", less_is_better=True))
    assert group_seeds(jobs[::3], "one.score", less_is_better=True) == [], "no seeds"
