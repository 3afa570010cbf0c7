"""What queries and keys go through: rotation, norm and scale, against numpy in float64."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from mlxchat.ops.normalisation import rms_norm, rotate_and_normalise


def numpy_norm(x: np.ndarray) -> np.ndarray:
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + np.finfo(np.float32).eps)


def numpy_rotate(x: np.ndarray, theta: float) -> np.ndarray:
    """y1 = x1 cos + x2 sin, y2 = −x1 sin + x2 cos over the two halves of each head; x is (B, H, T, D)."""
    tokens, half = x.shape[2], x.shape[3] // 2
    angle = np.outer(np.arange(tokens), theta ** (-np.arange(half) / half))
    x1, x2 = x[..., :half], x[..., half:]
    return np.concatenate([x1 * np.cos(angle) + x2 * np.sin(angle), -x1 * np.sin(angle) + x2 * np.cos(angle)], axis=-1)


def heads() -> np.ndarray:
    return np.random.default_rng(0).normal(size=(1, 2, 50, 8))


@pytest.mark.parametrize(("theta", "scale"), [(10_000.0, 1.0), (100_000.0, 1.2)])
def test_heads_rotate_by_minus_theta_and_are_normalised(theta: float, scale: float) -> None:
    got = rotate_and_normalise(mx.array(heads().astype(np.float32)), offset=0, theta=theta, scale=scale)
    expected = scale * numpy_norm(numpy_rotate(heads(), theta))
    np.testing.assert_allclose(np.asarray(got), expected, atol=1e-5)  # float32 sines of angles up to 50


def test_an_offset_continues_the_rotation() -> None:
    x = mx.array(heads().astype(np.float32))
    whole = np.asarray(rotate_and_normalise(x, offset=0, theta=1e4, scale=1.0))
    rest = np.asarray(rotate_and_normalise(x[:, :, 30:], offset=30, theta=1e4, scale=1.0))
    np.testing.assert_allclose(rest, whole[:, :, 30:], atol=1e-6)


@pytest.mark.parametrize("function", ["rms_norm", "rotate_and_normalise"])
def test_gradients_equal_those_of_differences(function: str) -> None:
    """Central differences in float64 of the numpy formula, along a random direction."""
    x, direction, weights = (np.random.default_rng(seed).normal(size=(1, 2, 50, 8)) for seed in range(3))

    def numpy_value(x: np.ndarray) -> float:
        inside = x if function == "rms_norm" else numpy_rotate(x, 1e4)
        return float((numpy_norm(inside) * weights).sum()) * (1.0 if function == "rms_norm" else 1.2)

    def value(x: mx.array) -> mx.array:
        out = rms_norm(x) if function == "rms_norm" else rotate_and_normalise(x, offset=0, theta=1e4, scale=1.2)
        return (out * mx.array(weights.astype(np.float32))).sum()

    gradient = np.asarray(mx.grad(value)(mx.array(x.astype(np.float32))))
    expected = (numpy_value(x + 1e-5 * direction) - numpy_value(x - 1e-5 * direction)) / 2e-5
    assert (gradient * direction).sum() == pytest.approx(expected, rel=1e-4)
