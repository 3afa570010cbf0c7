"""Attention over the past and present of each token.

Shapes: B batch, H query heads, K key/value heads, G = H / K, T tokens, S cached tokens, D head width.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np

from mlxchat.ops.device import accelerated


@accelerated
def causal_attention(q: mx.array, k: mx.array, v: mx.array, window: int | None = None) -> mx.array:
    """Return softmax(q kᵀ / sqrt(D)) v over the past and present of each token.

    Args:
        q: (B, H, T, D), RMS-normalised and scaled by at most 1.2.
        k: (B, K, T, D), normalised in the same way; K divides H.
        v: (B, K, T, D).
        window: earlier tokens that one sees besides itself (flash-attention's left window); None: all.

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
        visible: (B, T, S), bool; every query sees something.

    Returns:
        (B, T, H, D), as `causal_attention`.
    """
    scale = q.shape[-1] ** -0.5
    return mx.fast.scaled_dot_product_attention(q, k, v, scale=scale, mask=visible[:, None]).swapaxes(1, 2)


def visible_keys(start: int, stop: int, window: int) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """Return which keys 0 … stop − 1 the queries start … stop − 1 see."""
    query, key = np.arange(start, stop)[:, None], np.arange(stop)
    return (key <= query) & (key >= query - window)
