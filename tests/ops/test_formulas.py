"""The cheap formulas of a CPU keep the error bounds that their docstrings state."""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx
import numpy as np
import pytest

from mlxchat.ops.formulas import bounded_exp, rational_tanh, squared_relu

Formula = Callable[[mx.array], mx.array]


@pytest.fixture(params=["eager", "compiled"])
def as_run(request: pytest.FixtureRequest) -> Callable[[Formula], Formula]:
    """Compiled code may contract products and sums, so both forms are held to the bounds."""
    return mx.compile if request.param == "compiled" else lambda formula: formula


def relative_error(formula: Formula, exact: Callable[[np.ndarray], np.ndarray], x: np.ndarray) -> float:
    x = x.astype(np.float32)
    expected = exact(x.astype(np.float64))
    got = np.asarray(formula(mx.array(x)), dtype=np.float64)
    return float(np.abs(got / expected - 1).max())


def test_bounded_exp_is_within_its_stated_error_up_to_twenty(as_run: Callable[[Formula], Formula]) -> None:
    grid = np.linspace(-20, 20, 400_001)
    assert relative_error(as_run(bounded_exp), np.exp, grid) < 8e-6


def test_bounded_exp_of_zero_is_one() -> None:
    assert bounded_exp(mx.array(0.0)).item() == 1.0


def test_rational_tanh_is_within_its_stated_error_where_it_bends(as_run: Callable[[Formula], Formula]) -> None:
    grid = np.linspace(1e-3, 10, 400_001)
    both = np.concatenate([-grid, grid])
    assert relative_error(as_run(rational_tanh), np.tanh, both) < 4e-7


def test_rational_tanh_is_within_its_stated_error_at_every_magnitude(as_run: Callable[[Formula], Formula]) -> None:
    grid = np.logspace(-30, 38, 10_001)
    assert relative_error(as_run(rational_tanh), np.tanh, np.concatenate([-grid, grid])) < 4e-7


def test_rational_tanh_of_infinity_is_one_within_its_error() -> None:
    got = np.asarray(rational_tanh(mx.array([np.inf, -np.inf])))
    np.testing.assert_allclose(got, [1.0, -1.0], rtol=4e-7)


def test_rational_tanh_of_zero_is_zero() -> None:
    assert rational_tanh(mx.array(0.0)).item() == 0.0


def test_squared_relu_is_exactly_the_square_of_the_positive_part(as_run: Callable[[Formula], Formula]) -> None:
    x = np.random.default_rng(0).normal(size=10_000).astype(np.float32) * 100
    got = np.asarray(as_run(squared_relu)(mx.array(x)))
    np.testing.assert_array_equal(got, np.maximum(x, 0) ** 2)
