"""Row sums are exact, scalars are computed once, and custom gradients are used."""

import io
import re

import mlx.core as mx
import numpy as np
import pytest

from mlxchat.ops.device import differentiable, made_once
from mlxchat.ops.loss import sum_rows


@pytest.mark.parametrize("count", [1, 7, 4096, 65_536])
@pytest.mark.parametrize("spread", [0.0, 1.0])
def test_sums_of_rows_are_within_a_millionth(count, spread):
    """Of positive numbers, such as exponentials and squares; against float64."""
    x = (1 + spread * np.random.default_rng(0).random((2, 3, count))).astype(np.float32)
    got = np.asarray(sum_rows(mx.array(x)))
    assert got.shape == (2, 3)
    np.testing.assert_allclose(got, x.astype(np.float64).sum(-1), rtol=1e-6)


def test_gradient_of_row_sums_is_one():
    gradient = mx.grad(lambda x: (sum_rows(x) * mx.array([1.0, 2.0])).sum())(mx.zeros((2, 5)))
    np.testing.assert_array_equal(np.asarray(gradient), [[1.0] * 5, [2.0] * 5])


def kernels(result: mx.array) -> list[str]:
    """Return the names of the kernels that compute an array."""
    dot = io.StringIO()
    mx.export_to_dot(dot, result)
    return re.findall(r'label ="(\w+)"', dot.getvalue())


def test_scalar_is_computed_once():
    """Otherwise the root would be fused into the loop over the array."""
    x, scalar = mx.ones(1000), mx.array(2.0)
    again = kernels(mx.compile(lambda x, scalar: x * mx.sqrt(scalar))(x, scalar))
    once = kernels(mx.compile(lambda x, scalar: x * made_once(mx.sqrt(scalar)))(x, scalar))
    assert any("Sqrt" in name and "Multiply" in name for name in again)
    assert any("Sqrt" in name for name in once)
    assert not any("Sqrt" in name and "Multiply" in name for name in once)


def test_differentiable_uses_the_given_gradient():
    @differentiable
    def double(x: mx.array) -> mx.array:
        return 2 * x

    @double.vjp
    def wrong(x: mx.array, cotangent: mx.array, output: mx.array) -> mx.array:
        return 7 * cotangent

    assert double(mx.array(1.5)).item() == 3.0
    assert mx.grad(double)(mx.array(1.5)).item() == 7.0
