"""RMS norm, rotation and attention over the past and present of each token.

All compute in float32 and return the dtype of their input.

Shapes: B batch, H query heads, K key/value heads, T tokens, S cached tokens, D head width.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import mlx.core as mx
import numpy as np

from mlxchat.ops.device import accelerated

# float32's machine epsilon: what torch's F.rms_norm(eps=None) uses, so what nanochat's weights were trained with.
RMS_NORM_EPSILON = 1.1920929e-07
_TABLE_TOKENS = 1024


@dataclass(frozen=True)
class Positions:
    """Position of each token, for rows in which several continuations share a prefix."""

    of: mx.array
    """(B, T), from 0."""
    end: int
    """Greater than all of them."""


@accelerated
def rms_norm(x: mx.array) -> mx.array:
    """Return x divided by the root of its mean square over the last axis."""
    return mx.fast.rms_norm(x, None, RMS_NORM_EPSILON)


@accelerated
def rotate_and_normalise(x: mx.array, *, offset: int | Positions, theta: float, scale: float) -> mx.array:
    """Return heads (B, H, T, D) rotated by minus their position's angles, RMS-normalised and scaled.

    nanochat rotates by −θ: halves x1, x2 → x1 cos + x2 sin, x2 cos − x1 sin.

    Args:
        x: (B, T, H, D) projected queries or keys.
        offset: position of the first token, or of each one.
        theta: base of the wavelengths.
        scale: factor after the norm.
    """
    x = x.swapaxes(1, 2)
    if isinstance(offset, Positions):
        cos, sin = rotation(offset, x.shape[2], x.shape[3], theta)
        halves = x.astype(mx.float32).reshape(*x.shape[:3], 2, -1)
        rotated = (halves * cos + halves[..., ::-1, :] * sin).reshape(x.shape).astype(x.dtype)
    else:
        # A scale of −1 on the positions turns MLX's rotation by θ into nanochat's.
        rotated = mx.fast.rope(x, x.shape[-1], traditional=False, base=theta, scale=-1.0, offset=offset)
    normalised = rms_norm(rotated)
    return normalised if scale == 1.0 else normalised * scale


def rotation(offset: int | Positions, tokens: int, width: int, theta: float) -> tuple[mx.array, mx.array]:
    """Return the factors of halves and of swapped halves, (T, 2, D / 2) or (B, 1, T, 2, D / 2)."""
    if isinstance(offset, Positions):
        cos, sin = (table[offset.of][:, None] for table in _tables(-(-offset.end // _TABLE_TOKENS), width, theta))
    else:
        end = offset + tokens
        cos, sin = (table[offset:end] for table in _tables(-(-end // _TABLE_TOKENS), width, theta))
    return cos, sin


@cache
def _tables(blocks: int, width: int, theta: float) -> tuple[mx.array, mx.array]:
    """Return both tables (T, 2, D / 2) for a number of blocks of 1,024 tokens."""
    frequencies = 1 / np.float32(theta) ** (np.arange(0, width, 2, dtype=np.float32) / np.float32(width))
    angles = np.arange(blocks * _TABLE_TOKENS, dtype=np.float32)[:, None] * frequencies
    cos, sin = np.cos(angles), np.sin(angles)
    return mx.array(np.stack([cos, cos], axis=1)), mx.array(np.stack([sin, -sin], axis=1))


@accelerated
def causal_attention(q: mx.array, k: mx.array, v: mx.array, window: int | None = None) -> mx.array:
    """Return softmax(q kᵀ / sqrt(D)) v over the past and present of each token.

    Args:
        q: (B, H, T, D), RMS-normalised and scaled by at most 1.2.
        k: (B, K, T, D), normalised like q; K divides H.
        v: (B, K, T, D).
        window: number of earlier tokens that a token sees (flash-attention's left window); None: all.

    Returns:
        (B, T, H, D), of the dtype of q; the softmax is computed in float32.
    """
    tokens, width = q.shape[2:]
    mask = "causal" if window is None or window >= tokens else mx.array(visible_keys(0, tokens, window))
    return mx.fast.scaled_dot_product_attention(q, k, v, scale=width**-0.5, mask=mask).swapaxes(1, 2)


@accelerated
def masked_attention(q: mx.array, k: mx.array, v: mx.array, visible: mx.array) -> mx.array:
    """Return softmax(q kᵀ / sqrt(D)) v over the keys that each query may see. Not meant for gradients.

    Args:
        q: (B, H, T, D), normalised as for `causal_attention`.
        k: (B, K, S, D).
        v: (B, K, S, D).
        visible: (B, T, S), bool; every query sees at least one key.

    Returns:
        (B, T, H, D), as `causal_attention`.
    """
    scale = q.shape[-1] ** -0.5
    return mx.fast.scaled_dot_product_attention(q, k, v, scale=scale, mask=visible[:, None]).swapaxes(1, 2)


def visible_keys(start: int, stop: int, window: int) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """Return which keys 0 … stop − 1 the queries start … stop − 1 see."""
    query, key = np.arange(start, stop)[:, None], np.arange(stop)
    return (key <= query) & (key >= query - window)
