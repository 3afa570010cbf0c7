"""Products with matrices, with and without an activation, against numpy on both paths.

Shapes: B batch, T tokens, F inner width, C width.
"""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from mlxchat.ops.linear import linear, squared_relu


def example() -> list[np.ndarray]:
    """Return x (B, T, F), a matrix (C, F), and a cotangent of their product (B, T, C)."""
    rng = np.random.default_rng(0)
    return [rng.normal(size=shape).astype(np.float32) for shape in ((2, 5, 40), (7, 40), (2, 5, 7))]


def reference(*inputs: np.ndarray) -> list[np.ndarray]:
    """The product and its gradients in x and weight, in float64."""
    x, weight, cotangent = (value.astype(np.float64) for value in inputs)
    squared = np.maximum(x, 0) ** 2
    return [
        squared @ weight.T,
        2 * np.maximum(x, 0) * (cotangent @ weight),
        np.einsum("btc,btf->cf", cotangent, squared),
    ]


def test_product_and_gradients_equal_numpy(path):
    x, weight, cotangent = (mx.array(value) for value in example())
    out, gradients = mx.vjp(lambda x, weight: linear(x, weight, squared_relu), [x, weight], [cotangent])
    for got, expected in zip([out[0], *gradients], reference(*example()), strict=True):
        # Sums of at most 40 products of order one.
        np.testing.assert_allclose(np.asarray(got), expected, atol=2e-5, rtol=1e-5)


def test_bfloat16_values_and_gradients_are_bfloat16(path):
    """Within some roundings of eight bits of mantissa, in norm."""
    x, weight, cotangent = (mx.array(value).astype(mx.bfloat16) for value in example())
    out, gradients = mx.vjp(lambda x, weight: linear(x, weight, squared_relu), [x, weight], [cotangent])
    expected = reference(*(np.asarray(value.astype(mx.float32)) for value in (x, weight, cotangent)))
    for got, exact in zip([out[0], *gradients], expected, strict=True):
        assert got.dtype == mx.bfloat16
        assert np.linalg.norm(np.asarray(got.astype(mx.float32)) - exact) < 1e-2 * np.linalg.norm(exact)


@pytest.mark.parametrize("activation", [nn.silu, nn.gelu_approx, mx.tanh])
def test_other_activations_equal_mlx_own_gradients(path, activation):
    x, weight, cotangent = (mx.array(value) for value in example())
    found = mx.vjp(lambda x, weight: linear(x, weight, activation), [x, weight], [cotangent])
    right = mx.vjp(lambda x, weight: activation(x) @ weight.T, [x, weight], [cotangent])
    for got, expected in zip([*found[0], *found[1]], [*right[0], *right[1]], strict=True):
        np.testing.assert_allclose(np.asarray(got), np.asarray(expected), atol=2e-5, rtol=1e-5)
