"""Causal attention equals softmax attention in float64, in values and gradients.

Shapes: B batch, H query heads, K key/value heads, T tokens, D head width.
"""

import mlx.core as mx
import numpy as np
import pytest

from mlxchat.ops.attention import causal_attention

# One token, part of a block of 128, around its end, and several blocks with a rest.
LENGTHS = [1, 127, 128, 129, 300]
# The exponential is within 6e-6, float32 sums of a few hundred products within about as much again.
TOLERANCE = 2e-5


def normalised(rng: np.random.Generator, *shape: int) -> np.ndarray:
    """Return random heads with a root mean square of 1, as in the model."""
    x = rng.normal(size=shape)
    return (x / np.sqrt((x**2).mean(-1, keepdims=True))).astype(np.float32)


def example(tokens: int, *, heads: int = 4, kv_heads: int = 2, width: int = 16) -> tuple[np.ndarray, ...]:
    rng = np.random.default_rng(tokens)
    q = normalised(rng, 2, heads, tokens, width)
    k = normalised(rng, 2, kv_heads, tokens, width)
    v, d_out = rng.normal(size=k.shape).astype(np.float32), rng.normal(size=q.shape).astype(np.float32)
    return q, k, v, d_out


def softmax_weights(q: np.ndarray, k: np.ndarray, window: int | None = None) -> np.ndarray:
    """Row i sees the keys i − window … i."""
    tokens, width = q.shape[-2:]
    scores = q @ k.swapaxes(-1, -2) / np.sqrt(width)
    seen = np.tril(np.ones((tokens, tokens), dtype=bool))
    if window is not None:
        seen &= ~np.tril(seen, -window - 1)
    scores = np.where(seen, scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


def reference(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, d_out: np.ndarray, window: int | None = None
) -> tuple[np.ndarray, tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Softmax attention (B, T, H, D) and its gradients, in float64 with the whole (T, T) matrix.

    `d_out` is (B, H, T, D), as the inputs are.
    """
    q, k, v, d_out = (x.astype(np.float64) for x in (q, k, v, d_out))
    groups, kv_shape = q.shape[1] // k.shape[1], k.shape
    k, v = k.repeat(groups, axis=1), v.repeat(groups, axis=1)
    weights = softmax_weights(q, k, window)
    d_weights = d_out @ v.swapaxes(-1, -2)
    d_scores = weights * (d_weights - (d_weights * weights).sum(-1, keepdims=True)) / np.sqrt(q.shape[-1])
    d_k, d_v = d_scores.swapaxes(-1, -2) @ q, weights.swapaxes(-1, -2) @ d_out

    def add_group(x: np.ndarray) -> np.ndarray:
        return x.reshape(kv_shape[0], kv_shape[1], groups, *kv_shape[2:]).sum(2)

    return (weights @ v).swapaxes(1, 2), (d_scores @ k, add_group(d_k), add_group(d_v))


def relative_norm(got: mx.array, expected: np.ndarray) -> float:
    return float(np.linalg.norm(np.asarray(got) - expected) / np.linalg.norm(expected))


# Windows: only the token itself, few, around and over the border of a block, as long as the row and longer.
WINDOWS = [0, 1, 127, 128, 129, 299, 1000]
VALUES = [
    *((tokens, 4, 2, None) for tokens in LENGTHS),
    *((140, heads, kv_heads, None) for heads, kv_heads in ((4, 4), (4, 1), (1, 1))),
    *((300, 4, 2, window) for window in WINDOWS),
    (100, 4, 4, 70),
    (300, 4, 1, 70),
]


@pytest.mark.parametrize(("tokens", "heads", "kv_heads", "window"), VALUES)
def test_values_equal_softmax_attention(path, tokens, heads, kv_heads, window):
    q, k, v, d_out = example(tokens, heads=heads, kv_heads=kv_heads)
    got = causal_attention(mx.array(q), mx.array(k), mx.array(v), window)
    np.testing.assert_allclose(np.asarray(got), reference(q, k, v, d_out, window)[0], atol=TOLERANCE)


def test_widest_heads_are_exact(path):
    """Width 256 with q = ±k gives scores of ±16, within the exponential's range of ±24."""
    q, k, v, d_out = example(130, heads=2, kv_heads=2, width=256)
    k[:, :, ::2], k[:, :, 1::2] = q[:, :, ::2], -q[:, :, 1::2]
    got = causal_attention(mx.array(q), mx.array(k), mx.array(v))
    np.testing.assert_allclose(np.asarray(got), reference(q, k, v, d_out)[0], atol=TOLERANCE)


@pytest.mark.parametrize("changed", [1, 128])
def test_future_tokens_do_not_affect_earlier_ones(path, changed):
    q, k, v, _ = example(200)
    before = np.asarray(causal_attention(mx.array(q), mx.array(k), mx.array(v)))
    for x in (q, k, v):
        x[:, :, changed:] = x[:, :, changed:][:, :, ::-1] * 0.5
    after = np.asarray(causal_attention(mx.array(q), mx.array(k), mx.array(v)))
    np.testing.assert_array_equal(after[:, :changed], before[:, :changed])
    assert np.abs(after[:, changed:] - before[:, changed:]).max() > 0.1


@pytest.mark.parametrize(
    ("tokens", "window", "kv_heads"),
    [
        (5, None, 2), (128, None, 4), (129, None, 1), (300, None, 2),
        (5, 2, 2), (129, 128, 4), (300, 0, 2), (300, 70, 1), (300, 150, 4), (300, 299, 2),
    ],
)  # fmt: skip
def test_gradients_equal_softmax_attention(path, tokens, window, kv_heads):
    q, k, v, d_out = example(tokens, kv_heads=kv_heads)
    _, gradients = mx.vjp(
        lambda q, k, v: causal_attention(q, k, v, window),
        [mx.array(q), mx.array(k), mx.array(v)],
        [mx.array(d_out).swapaxes(1, 2)],
    )
    for got, expected in zip(gradients, reference(q, k, v, d_out, window)[1], strict=True):
        # If each token sees only itself, q and k have zero gradients.
        np.testing.assert_allclose(np.asarray(got), expected, atol=TOLERANCE * max(1.0, np.abs(expected).max()))
        assert window is not None or relative_norm(got, expected) < TOLERANCE


@pytest.mark.parametrize("window", [None, 70])
def test_bfloat16_values_and_gradients_are_bfloat16(path, window):
    """Within eight bits of mantissa of the exact result for the rounded inputs."""
    inputs = [mx.array(x).astype(mx.bfloat16) for x in example(140)]
    out, gradients = mx.vjp(lambda q, k, v: causal_attention(q, k, v, window), inputs[:3], [inputs[3].swapaxes(1, 2)])
    expected = reference(*(np.asarray(x.astype(mx.float32)) for x in inputs), window)
    for got, exact in zip([out[0], *gradients], [expected[0], *expected[1]], strict=True):
        assert got.dtype == mx.bfloat16
        assert relative_norm(got.astype(mx.float32), exact) < 1e-2
