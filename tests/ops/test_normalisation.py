"""Rotation, norm and scale of queries and keys, against numpy in float64.

Shapes: B batch, T tokens, H heads, D head width.
"""

import mlx.core as mx
import numpy as np
import pytest

from mlxchat.ops.attention import rms_norm, rotate_and_normalise


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


@pytest.mark.parametrize(("theta", "scale"), [(10_000.0, 1.0), (100_000.0, 1.2)])
def test_heads_are_rotated_and_normalised(path, theta, scale):
    got = rotate_and_normalise(mx.array(heads().astype(np.float32)), offset=0, theta=theta, scale=scale)
    expected = scale * numpy_norm(numpy_rotate(heads(), theta))
    np.testing.assert_allclose(np.asarray(got), expected, atol=1e-5)  # float32 sines of angles up to 50


@pytest.mark.parametrize("tokens", [1, 1023, 1024, 1025, 2100])
def test_rows_of_any_length_rotate(path, tokens):
    """Also across the borders of the tables, which grow by 1,024 tokens."""
    got = rotate_and_normalise(mx.array(heads(tokens=tokens).astype(np.float32)), offset=0, theta=1e4, scale=1.0)
    # Angles up to 2,100 are known to 1e-4 in float32.
    np.testing.assert_allclose(np.asarray(got), numpy_norm(numpy_rotate(heads(tokens=tokens), 1e4)), atol=1e-3)


@pytest.mark.parametrize(("first", "tokens"), [(30, 50), (49, 50), (1020, 1030), (1024, 1030)])
def test_offset_continues_the_rotation(path, first, tokens):
    x = mx.array(heads(tokens=tokens).astype(np.float32))
    whole = np.asarray(rotate_and_normalise(x, offset=0, theta=1e4, scale=1.0))
    rest = np.asarray(rotate_and_normalise(x[:, first:], offset=first, theta=1e4, scale=1.0))
    np.testing.assert_allclose(rest, whole[:, :, first:], atol=1e-6)


@pytest.mark.parametrize("magnitude", [1e-3, 1.0, 1e3])
def test_norm_divides_by_the_root_mean_square(path, magnitude):
    """Also of small numbers, where the epsilon matters."""
    x = magnitude * heads()
    np.testing.assert_allclose(np.asarray(rms_norm(mx.array(x.astype(np.float32)))), numpy_norm(x), rtol=1e-5)


def test_zero_rows_stay_zero(path):
    zeros = mx.zeros((1, 2, 3, 8))
    assert not mx.any(rms_norm(zeros) != 0).item()
    assert not mx.any(rotate_and_normalise(zeros, offset=0, theta=1e4, scale=1.2) != 0).item()


@pytest.mark.parametrize("function", ["rms_norm", "rotate_and_normalise"])
def test_gradients_equal_central_differences(path, function):
    """Central differences in float64 of the numpy formula, along a random direction."""
    x, direction, weights = (heads(seed=seed) for seed in range(3))
    if function == "rotate_and_normalise":
        weights = weights.swapaxes(1, 2)

    def numpy_value(x: np.ndarray) -> float:
        inside = x if function == "rms_norm" else numpy_rotate(x, 1e4)
        return float((numpy_norm(inside) * weights).sum()) * (1.0 if function == "rms_norm" else 1.2)

    def value(x: mx.array) -> mx.array:
        out = rms_norm(x) if function == "rms_norm" else rotate_and_normalise(x, offset=0, theta=1e4, scale=1.2)
        return (out * mx.array(weights.astype(np.float32))).sum()

    gradient = np.asarray(mx.grad(value)(mx.array(x.astype(np.float32))))
    expected = (numpy_value(x + 1e-5 * direction) - numpy_value(x - 1e-5 * direction)) / 2e-5
    assert (gradient * direction).sum() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("function", ["rms_norm", "rotate_and_normalise"])
def test_bfloat16_values_and_gradients_are_bfloat16(path, function):
    """Within eight bits of mantissa of what float32 gives for the rounded numbers."""
    x = mx.array(heads()).astype(mx.bfloat16)

    def run(x: mx.array) -> tuple[mx.array, mx.array]:
        def normalise(x: mx.array) -> mx.array:
            return rms_norm(x) if function == "rms_norm" else rotate_and_normalise(x, offset=3, theta=1e4, scale=1.2)

        out = normalise(x)
        cotangent = mx.array(np.random.default_rng(1).normal(size=out.shape)).astype(mx.bfloat16).astype(x.dtype)
        return out, mx.vjp(normalise, [x], [cotangent])[1][0]

    for coarse, fine in zip(run(x), run(x.astype(mx.float32)), strict=True):
        assert coarse.dtype == mx.bfloat16
        difference = np.asarray(coarse.astype(mx.float32)) - np.asarray(fine)
        assert np.linalg.norm(difference) < 2e-2 * np.linalg.norm(np.asarray(fine))
