"""The fast formulas of the CPU keep the error bounds of their docstrings, and are one loop each."""

import io
import re
from collections.abc import Callable

import mlx.core as mx
import numpy as np
import pytest

from mlxchat.cpu.kernels import EXP_UNIT, exp_of_units, masked_exp_of_units, rational_tanh, square_of_positive

Formula = Callable[..., mx.array]


@pytest.fixture(params=["eager", "compiled"])
def as_run(request: pytest.FixtureRequest) -> Callable[[Formula], Formula]:
    """Compiled code may fuse multiply-adds, so both forms are tested."""
    return mx.compile if request.param == "compiled" else lambda formula: formula


def relative_error(formula: Formula, exact: Callable[[np.ndarray], np.ndarray], x: np.ndarray) -> float:
    x = x.astype(np.float32)
    expected = exact(x.astype(np.float64))
    got = np.asarray(formula(mx.array(x)), dtype=np.float64)
    return float(np.abs(got / expected - 1).max())


# exp(16 x) × mask


def unmasked(x: mx.array) -> mx.array:
    return masked_exp_of_units(x, mx.ones_like(x))


@pytest.mark.parametrize(("largest", "bound"), [(16, 6e-6), (24, 1e-5)])
def test_masked_exp_of_units_is_within_its_stated_errors(as_run, largest, bound):
    grid = np.linspace(-largest, largest, 100_001) / EXP_UNIT
    assert relative_error(as_run(unmasked), lambda x: np.exp(EXP_UNIT * x), grid) < bound


def test_small_scores_are_within_their_stated_mean_error(as_run):
    """Most attention scores are small, and Muon amplifies errors of gradients."""
    x = (np.linspace(-8, 8, 100_001) / EXP_UNIT).astype(np.float32)
    got = np.asarray(as_run(unmasked)(mx.array(x)), dtype=np.float64)
    errors = got / np.exp(EXP_UNIT * x.astype(np.float64)) - 1
    assert np.sqrt((errors**2).mean()) < 7e-7


def test_mask_gives_exact_zeros_and_keeps_other_bits(as_run):
    """Also where the exponential would overflow or be NaN."""
    x = np.concatenate([np.linspace(-24, 24, 9_999) / EXP_UNIT, [40.0]]).astype(np.float32)
    mask = (np.arange(10_000) % 3 == 0).astype(np.float32)
    mask[-1] = 0
    got = np.asarray(as_run(masked_exp_of_units)(mx.array(x), mx.array(mask)))
    assert (got[mask == 0] == 0).all()
    np.testing.assert_array_equal(got[mask == 1], np.asarray(as_run(unmasked)(mx.array(x)))[mask == 1])


# exp(cap × tanh)


@pytest.mark.parametrize("cap", [1.0, 15.0, 16.0])
def test_exp_of_units_is_within_its_stated_error(as_run, cap):
    grid = np.linspace(-1, 1, 100_001)
    formula = as_run(lambda tanh: exp_of_units(tanh, cap))
    assert relative_error(formula, lambda tanh: np.exp(cap * tanh), grid) < 5e-6


# tanh


def test_rational_tanh_is_within_its_stated_error(as_run):
    """Where it bends, at every magnitude, and at infinity."""
    grid = np.concatenate([np.linspace(1e-3, 10, 100_001), np.logspace(-30, 38, 10_001), [np.inf]])
    assert relative_error(as_run(rational_tanh), np.tanh, np.concatenate([-grid, grid])) < 4e-7


def test_formulas_are_exact_at_zero():
    zero = mx.array(0.0)
    assert (unmasked(zero).item(), exp_of_units(zero, 15.0).item(), rational_tanh(zero).item()) == (1.0, 1.0, 0.0)


# max(x, 0)²


def test_square_of_positive_is_exact(as_run):
    x = np.random.default_rng(0).normal(size=10_000).astype(np.float32) * 100
    got = np.asarray(as_run(square_of_positive)(mx.array(x)))
    np.testing.assert_array_equal(got, np.maximum(x, 0) ** 2)


@pytest.mark.parametrize(
    ("formula", "num_inputs"),
    [(masked_exp_of_units, 2), (lambda x: exp_of_units(x, 15.0), 1), (rational_tanh, 1), (square_of_positive, 1)],
    ids=["masked_exp_of_units", "exp_of_units", "rational_tanh", "square_of_positive"],
)
def test_each_formula_is_one_kernel(formula, num_inputs):
    """A second kernel would be another pass over memory; MLX splits long chains."""
    dot = io.StringIO()
    mx.export_to_dot(dot, mx.compile(formula)(*[mx.ones(10)] * num_inputs))
    kernels = re.findall(r'label ="(\w+)"', dot.getvalue())
    # Full and Broadcast make constants; the computation is one kernel.
    assert [name.startswith("Compiled") for name in kernels if name not in ("Full", "Broadcast")] == [True]
