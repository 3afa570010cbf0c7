"""Rotation, norm, activation and products of the model, against numpy in float64.

Shapes: B batch, T tokens, H heads, D head width.
"""

from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlxchat.model import gpt, parameters  # noqa: F401  (puts the CPU's kernels in place)


def numpy_norm(x: np.ndarray) -> np.ndarray:
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + np.finfo(np.float32).eps)


def numpy_rotate(x: np.ndarray, theta: float) -> np.ndarray:
    """y1 = x1 cos + x2 sin, y2 = −x1 sin + x2 cos over the two halves of each head; (B, T, H, D) → (B, H, T, D)."""
    x = x.swapaxes(1, 2)
    tokens, half = x.shape[2], x.shape[3] // 2
    angle = np.outer(np.arange(tokens), theta ** (-np.arange(half) / half))
    x1, x2 = x[..., :half], x[..., half:]
    return np.concatenate([x1 * np.cos(angle) + x2 * np.sin(angle), -x1 * np.sin(angle) + x2 * np.cos(angle)], axis=-1)


def heads(*, tokens: int = 50, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(2, tokens, 3, 8))


def normalise(function: str, x: mx.array, **options: Any) -> mx.array:
    if function == "rms_norm":
        return gpt.rms_norm(x)
    return gpt.rotate_and_normalise(x, **{"offset": 0, "theta": 1e4} | options)


@pytest.mark.parametrize(
    ("first", "tokens", "theta"),
    [(0, 1, 1e4), (0, 50, 1e5), (30, 50, 1e4), (0, 1024, 1e4), (1020, 1030, 1e4), (0, 2100, 1e4)],
)
def test_rows_of_any_length_rotate_from_any_offset(path, first, tokens, theta):
    """Also across the borders of the CPU's tables, which grow by 1,024 tokens."""
    x = heads(tokens=tokens)
    # Angles up to 2,100 are known to 1e-4 in float32.
    tolerance = 1e-5 if tokens <= 50 else 1e-3
    for offset in (first, mx.array([first, first])):
        got = normalise("rotated", mx.array(x[:, first:].astype(np.float32)), offset=offset, theta=theta)
        np.testing.assert_allclose(np.asarray(got), numpy_norm(numpy_rotate(x, theta))[:, :, first:], atol=tolerance)


@pytest.mark.parametrize("magnitude", [0.0, 1e-3, 1e3])
def test_norm_divides_by_the_root_mean_square(path, magnitude):
    """Also of small numbers, where the epsilon matters, and of zeros."""
    x = magnitude * heads()
    np.testing.assert_allclose(np.asarray(gpt.rms_norm(mx.array(x.astype(np.float32)))), numpy_norm(x), rtol=1e-5)


@pytest.mark.parametrize("function", ["rms_norm", "rotated"])
def test_gradients_equal_central_differences(path, function):
    """Central differences in float64 of the numpy formula, along a random direction; bfloat16 is near."""
    x, direction, weights = (heads(seed=seed) for seed in range(3))
    if function == "rotated":
        weights = weights.swapaxes(1, 2)

    def numpy_value(x: np.ndarray) -> float:
        return float((numpy_norm(x if function == "rms_norm" else numpy_rotate(x, 1e4)) * weights).sum())

    def run(dtype: mx.Dtype) -> list[mx.array]:
        cotangent = mx.array(weights).astype(dtype)
        out, gradients = mx.vjp(lambda x: normalise(function, x), [mx.array(x).astype(dtype)], [cotangent])
        return [*out, *gradients]

    exact, coarse = run(mx.float32), run(mx.bfloat16)
    expected = (numpy_value(x + 1e-5 * direction) - numpy_value(x - 1e-5 * direction)) / 2e-5
    assert (np.asarray(exact[1]) * direction).sum() == pytest.approx(expected, rel=1e-4)
    for near, value in zip(coarse, exact, strict=True):
        assert near.dtype == mx.bfloat16
        assert mx.linalg.norm(near.astype(mx.float32) - value) < 2e-2 * mx.linalg.norm(value)


def test_product_after_the_activation_equals_numpy(path):
    """Of x (B, T, F) and a matrix (C, F), with its gradients; bfloat16 is near."""
    rng = np.random.default_rng(0)
    x, weight, cotangent = (rng.normal(size=shape) for shape in ((2, 5, 40), (7, 40), (2, 5, 7)))
    squared = np.maximum(x, 0) ** 2
    expected = [
        squared @ weight.T,
        2 * np.maximum(x, 0) * (cotangent @ weight),
        np.einsum("btc,btf->cf", cotangent, squared),
    ]
    for dtype, tolerance in ((mx.float32, 1e-6), (mx.bfloat16, 2e-2)):
        given = [mx.array(value).astype(dtype) for value in (x, weight, cotangent)]
        out, gradients = mx.vjp(lambda x, weight: gpt.linear(gpt.squared_relu(x), weight), given[:2], given[2:])
        for got, exact in zip([*out, *gradients], expected, strict=True):
            assert got.dtype == dtype
            assert np.linalg.norm(np.asarray(got.astype(mx.float32)) - exact) < tolerance * np.linalg.norm(exact)
