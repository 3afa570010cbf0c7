"""Causal attention, rotation and soft cap equal their formulas in float64; attention's gradients, too.

Shapes: B batch, H query heads, K key/value heads, T tokens, D head width.
"""

from functools import partial

import mlx.core as mx
import numpy as np
import pytest

from kit.numpy_gpt import norm, rotate
from mlxchat.model import gpt, parameters  # noqa: F401  (puts the CPU's kernels in place)

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


def reference(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, d_out: np.ndarray, window: int | None = None
) -> tuple[np.ndarray, tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Softmax attention (B, T, H, D) and its gradients, in float64 with the whole (T, T) matrix.

    `d_out` is (B, H, T, D), as the inputs are; row i sees the keys i − window … i.
    """
    q, k, v, d_out = (x.astype(np.float64) for x in (q, k, v, d_out))
    (B, H, T, D), kv_heads = q.shape, k.shape[1]
    k, v = k.repeat(H // kv_heads, axis=1), v.repeat(H // kv_heads, axis=1)
    distance = np.arange(T)[:, None] - np.arange(T)
    seen = (distance >= 0) & (distance <= (T if window is None else window))
    scores = np.where(seen, q @ k.swapaxes(-1, -2) / np.sqrt(D), -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    d_weights = d_out @ v.swapaxes(-1, -2)
    d_scores = weights * (d_weights - (d_weights * weights).sum(-1, keepdims=True)) / np.sqrt(D)
    per_head = (d_scores.swapaxes(-1, -2) @ q, weights.swapaxes(-1, -2) @ d_out)
    d_k, d_v = (x.reshape(B, kv_heads, -1, T, D).sum(2) for x in per_head)
    return (weights @ v).swapaxes(1, 2), (d_scores @ k, d_k, d_v)


# Tokens, key/value heads and window: part of a block of 128, around its end, several blocks with a rest. Windows: only
# the token itself, few, around the border of a block, as long as the row and longer.
CASES = [
    *((tokens, 2, None) for tokens in (1, 127, 128, 129, 300)),
    *((140, kv_heads, None) for kv_heads in (4, 1)),
    *((300, kv_heads, window) for kv_heads, window in ((2, 0), (1, 1), (4, 127), (2, 128), (2, 129), (2, 1000))),
]


@pytest.mark.parametrize(("tokens", "kv_heads", "window"), CASES)
def test_values_and_gradients_equal_softmax_attention(path, tokens, kv_heads, window):
    inputs = example(tokens, kv_heads=kv_heads)
    q, k, v, d_out = map(mx.array, inputs)
    mask = gpt.window_mask(tokens, window, mx.float32)
    attend = partial(gpt.attention, mask=mask, scale=q.shape[3] ** -0.5)
    (out,), gradients = mx.vjp(attend, [q, k, v], [d_out.swapaxes(1, 2)])
    expected, expected_gradients = reference(*inputs, window)
    np.testing.assert_allclose(np.asarray(out), expected, atol=TOLERANCE)
    for got, exact in zip(gradients, expected_gradients, strict=True):
        np.testing.assert_allclose(np.asarray(got), exact, atol=TOLERANCE * max(1.0, np.abs(exact).max()))


PAST = np.tril(np.ones((140, 140), dtype=bool))[-3:]
ROWS = np.stack([PAST, PAST & (np.arange(140) != 7)])[:, None]
MASKS = {
    "causal": ("causal", PAST),
    "none": (None, np.ones_like(PAST)),
    "booleans": (mx.array(PAST & (np.arange(140) > 20)), PAST & (np.arange(140) > 20)),
    "additive": (mx.array(np.where(ROWS, 0, -np.inf).astype(np.float32)), ROWS),
}


@pytest.mark.parametrize("kind", MASKS)
def test_cached_keys_are_seen_by_the_mask(path, kind):
    """Three new tokens after 137 cached ones; with one mask for all rows, or one per row."""
    q, k, v, _ = example(140)
    mask, visible = MASKS[kind]
    out = gpt.attention(mx.array(q[:, :, -3:]), mx.array(k), mx.array(v), mask, 0.25)
    k, v = (x.astype(np.float64).repeat(2, axis=1) for x in (k, v))
    weights = np.exp(np.where(visible, 0.25 * q[:, :, -3:] @ k.swapaxes(-1, -2), -np.inf))
    wanted = (weights / weights.sum(-1, keepdims=True) @ v).swapaxes(1, 2)
    np.testing.assert_allclose(np.asarray(out), wanted, atol=TOLERANCE)


@pytest.mark.parametrize(
    ("first", "tokens", "theta"), [(0, 1, 1e4), (30, 50, 1e5), (0, 1024, 1e4), (1020, 1030, 1e4), (0, 2100, 1e4)]
)
def test_rows_of_any_length_rotate_from_any_offset(path, first, tokens, theta):
    """Also across the borders of the CPU's tables, which grow by 1,024 tokens."""
    x = np.random.default_rng(0).normal(size=(2, tokens, 3, 8))
    expected = norm(rotate(x, theta))[:, first:].swapaxes(1, 2)
    for offset in (first, mx.array([first, first])):
        got = gpt.rotate_and_normalise(mx.array(x[:, first:].astype(np.float32)), offset=offset, theta=theta)
        # Angles up to 2,100 are known to 1e-4 in float32.
        np.testing.assert_allclose(np.asarray(got), expected, atol=1e-5 if tokens <= 50 else 1e-3)


def test_soft_cap_bounds_logits_at_fifteen(path):
    logits = np.array([-1e30, -20.0, -0.1, 0.0, 2.0, 1e30], np.float32)
    np.testing.assert_allclose(np.asarray(gpt.soft_cap(mx.array(logits))), 15 * np.tanh(logits / 15.0), rtol=1e-6)
