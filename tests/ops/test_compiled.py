"""Sums by products keep their digits, scalars are computed once, and gradients are the given ones."""

from __future__ import annotations

import io
import re

import mlx.core as mx
import numpy as np
import pytest

from mlxchat.ops.device import compiled, differentiable, made_once
from mlxchat.ops.loss import sum_rows


@pytest.mark.parametrize("count", [1, 7, 4096, 65_536])
@pytest.mark.parametrize("spread", [0.0, 1.0])
def test_sums_of_rows_are_within_a_millionth(count: int, spread: float) -> None:
    """Of positive numbers, as exponentials and squares are; against float64."""
    x = (1 + spread * np.random.default_rng(0).random((2, 3, count))).astype(np.float32)
    got = np.asarray(sum_rows(mx.array(x)))
    assert got.shape == (2, 3)
    np.testing.assert_allclose(got, x.astype(np.float64).sum(-1), rtol=1e-6)


def test_the_gradient_of_a_sum_of_rows_is_one_everywhere() -> None:
    gradient = mx.grad(lambda x: (sum_rows(x) * mx.array([1.0, 2.0])).sum())(mx.zeros((2, 5)))
    np.testing.assert_array_equal(np.asarray(gradient), [[1.0] * 5, [2.0] * 5])


def kernels(result: mx.array) -> list[str]:
    """Names of what is going to be computed."""
    dot = io.StringIO()
    mx.export_to_dot(dot, result)
    return re.findall(r'label ="(\w+)"', dot.getvalue())


def test_a_scalar_is_made_once_and_not_for_every_element_of_what_it_is_multiplied_with() -> None:
    """Without it the root is fused into the loop over the array."""
    x, scalar = mx.ones(1000), mx.array(2.0)
    again = kernels(mx.compile(lambda x, scalar: x * mx.sqrt(scalar))(x, scalar))
    once = kernels(mx.compile(lambda x, scalar: x * made_once(mx.sqrt(scalar)))(x, scalar))
    assert any("Sqrt" in name and "Multiply" in name for name in again)
    assert any("Sqrt" in name for name in once)
    assert not any("Sqrt" in name and "Multiply" in name for name in once)


def test_a_scalar_made_once_keeps_its_value_and_the_others_shape() -> None:
    made = made_once(mx.array(3.0))
    assert (made.shape, made.item()) == ((1,), 3.0)
    assert (mx.ones((4, 5)) * made).shape == (4, 5)


def test_a_differentiable_function_has_the_gradient_it_is_given() -> None:
    @differentiable
    def double(x: mx.array) -> mx.array:
        return 2 * x

    @double.vjp
    def wrong(x: mx.array, cotangent: mx.array, output: mx.array) -> mx.array:
        return 7 * cotangent

    assert double(mx.array(1.5)).item() == 3.0
    assert mx.grad(double)(mx.array(1.5)).item() == 7.0


def test_compiled_computes_what_the_function_does() -> None:
    assert compiled(lambda x: x * x + 1)(mx.array(3.0)).item() == 10.0
