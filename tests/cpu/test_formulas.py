"""The fast formulas of the CPU keep the error bounds of their docstrings, against NumPy in float64."""

from collections.abc import Callable

import mlx.core as mx
import numpy as np
import pytest

from mlxchat.cpu.kernels import EXP_UNIT, exp_of_capped, masked_exp_of_units, rational_tanh

Formula = Callable[..., mx.array]
ONE = np.linspace(-1, 1, 100_001)
# Where tanh bends, at every magnitude, and at infinity.
TANH = np.concatenate([np.linspace(1e-3, 10, 100_001), np.logspace(-30, 38, 10_001), [np.inf]])


@pytest.fixture(params=["eager", "compiled"])
def as_run(request: pytest.FixtureRequest) -> Callable[[Formula], Formula]:
    """Compiled code may fuse multiply-adds, so both forms are tested."""
    return mx.compile if request.param == "compiled" else lambda formula: formula


def unmasked(x: mx.array) -> mx.array:
    return masked_exp_of_units(x, mx.ones_like(x))


def exact_exp(x: np.ndarray) -> np.ndarray:
    return np.exp(EXP_UNIT * x)


@pytest.mark.parametrize(
    ("formula", "exact", "grid", "bound"),
    [
        (unmasked, exact_exp, ONE, 6e-6),
        (unmasked, exact_exp, 1.5 * ONE, 1e-5),
        (exp_of_capped, lambda x: np.exp(15 * x), ONE, 5e-6),
        (rational_tanh, np.tanh, np.concatenate([-TANH, TANH]), 4e-7),
    ],
)
def test_formulas_are_within_their_stated_errors(as_run, formula, exact, grid, bound):
    x = grid.astype(np.float32)
    errors = np.asarray(as_run(formula)(mx.array(x)), dtype=np.float64) / exact(x.astype(np.float64)) - 1
    assert np.abs(errors).max() < bound
    assert formula(mx.array(0.0)).item() == exact(0.0)
    if formula is unmasked:  # most attention scores are small, and Muon amplifies errors of gradients
        assert np.sqrt((errors[np.abs(x) < 0.5] ** 2).mean()) < 7e-7


def test_mask_gives_exact_zeros_and_keeps_other_bits(as_run):
    """Also where the exponential would overflow or be NaN."""
    x = np.concatenate([1.5 * ONE[::10], [40.0]]).astype(np.float32)
    mask = (np.arange(len(x)) % 3 == 0).astype(np.float32)
    mask[-1] = 0
    got = np.asarray(as_run(masked_exp_of_units)(mx.array(x), mx.array(mask)))
    assert (got[mask == 0] == 0).all()
    np.testing.assert_array_equal(got[mask == 1], np.asarray(as_run(unmasked)(mx.array(x)))[mask == 1])
