"""Causal attention for training: MLX's own kernel on a GPU, blocks with an own gradient on a CPU.

Shapes: B batch, H query heads, K key/value heads, T tokens, D head width.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import mlx.core as mx

from mlxchat.ops.compiled import compiled, differentiable
from mlxchat.ops.device import backend
from mlxchat.ops.formulas import bounded_exp

_BLOCK_TOKENS = 128


def causal_attention(q: mx.array, k: mx.array, v: mx.array, window: int | None = None) -> mx.array:
    """Return softmax(q kᵀ / sqrt(D)) v over the past and present of each token.

    Args:
        q: (B, H, T, D), normalised so that every |q·k| / sqrt(D) is below 24: on a CPU the softmax is taken
            without subtracting the maximum. RMS-normalised heads up to width 256 are within it, also scaled by 1.2.
        k: (B, K, T, D); K divides H.
        v: (B, K, T, D).
        window: earlier tokens that one sees besides itself; None: all.

    Returns:
        (B, H, T, D).
    """
    batch, heads, tokens, width = q.shape
    if window is None or window >= tokens:
        window = tokens
    if backend() != "cpu":
        mask = "causal" if window == tokens else _visible(0, tokens, 0, window)
        return mx.fast.scaled_dot_product_attention(q, k, v, scale=width**-0.5, mask=mask)
    groups = heads // k.shape[1]
    if groups > 1:  # query heads of one group share a key head: (B, K, G, T, D) against (B, K, 1, T, D)
        q = q.reshape(batch, k.shape[1], groups, tokens, width)
        k, v = k[:, :, None], v[:, :, None]
    out, _ = _windowed(window)(q * width**-0.5, k, v)
    return out.reshape(batch, heads, tokens, width)


@cache
def _windowed(window: int) -> differentiable[[mx.array, mx.array, mx.array], tuple[mx.array, mx.array]]:
    """Return the attention for one window with its gradient: scaled q, k, v → out (…, T, D), 1 / row sums."""

    @differentiable
    def attend(q: mx.array, k: mx.array, v: mx.array) -> tuple[mx.array, mx.array]:
        outs, reciprocals = [], []
        for rows, past, mask in _blocks(q, window):
            weights = _masked_exp(q[rows] @ k[past].swapaxes(-1, -2), mask)
            reciprocal = 1 / weights.sum(-1, keepdims=True)
            outs.append((weights @ v[past]) * reciprocal)
            reciprocals.append(reciprocal)
        return mx.concatenate(outs, axis=-2), mx.concatenate(reciprocals, axis=-2)

    @attend.vjp
    def gradient(
        primals: tuple[mx.array, mx.array, mx.array],
        cotangents: tuple[mx.array, mx.array],
        outputs: tuple[mx.array, mx.array],
    ) -> tuple[mx.array, mx.array, mx.array]:
        """Recompute each block's weights, so that no (T, T) matrix outlives its block."""
        q, k, v = primals
        out, reciprocal = outputs
        # The rows' factors are folded into the small matrices: the large ones see one product each.
        d_out = cotangents[0] * reciprocal
        inner = (d_out * out).sum(-1, keepdims=True)
        d_q: list[mx.array] = []
        d_keys: list[tuple[int, mx.array]] = []
        d_values: list[tuple[int, mx.array]] = []
        for rows, past, mask in _blocks(q, window):
            weights = _masked_exp(q[rows] @ k[past].swapaxes(-1, -2), mask)
            d_scores = _softmax_gradient(weights, d_out[rows] @ v[past].swapaxes(-1, -2), inner[rows])
            d_q.append(d_scores @ k[past])
            first = past[1].start
            d_keys.append((first, _sum_groups(d_scores.swapaxes(-1, -2) @ q[rows], k)))
            d_values.append((first, _sum_groups(weights.swapaxes(-1, -2) @ d_out[rows], v)))
        return mx.concatenate(d_q, axis=-2), _sum_spans(d_keys), _sum_spans(d_values)

    return attend


def _blocks(q: mx.array, window: int) -> list[tuple[Any, Any, mx.array]]:
    """Return (rows, keys, mask) of each block of queries; keys that none of them sees are never multiplied."""
    *leading, tokens, _ = q.shape
    blocks = []
    for start in range(0, tokens, _BLOCK_TOKENS):
        stop = min(start + _BLOCK_TOKENS, tokens)
        first = max(0, start - window) // _BLOCK_TOKENS * _BLOCK_TOKENS
        mask = _visible(start, stop, first, window).astype(mx.float32)
        # Written out in full: a kernel that broadcasts it takes twice as long, and one mask serves all layers.
        mask = mx.contiguous(mx.broadcast_to(mask, (*leading, stop - start, stop - first)))
        blocks.append(((..., slice(start, stop), slice(None)), (..., slice(first, stop), slice(None)), mask))
    return blocks


def _visible(start: int, stop: int, first: int, window: int) -> mx.array:
    """Return which keys first … stop − 1 the queries start … stop − 1 see."""
    query, key = mx.arange(start, stop)[:, None], mx.arange(first, stop)
    return (key <= query) & (key >= query - window)


def _sum_spans(parts: list[tuple[int, mx.array]]) -> mx.array:
    """Add gradients of which each covers the tokens from its first one to the end of its block."""
    sums: list[mx.array] = []
    for end in range(len(parts)):
        place = slice(end * _BLOCK_TOKENS, end * _BLOCK_TOKENS + _BLOCK_TOKENS)
        pieces = [
            part[..., place.start - first : place.stop - first, :]
            for first, part in parts[end:]
            if first <= place.start
        ]
        sums.append(sum(pieces[1:], pieces[0]))
    return mx.concatenate(sums, axis=-2)


def _sum_groups(gradient: mx.array, like: mx.array) -> mx.array:
    """Add up the query heads that share one key/value head."""
    return gradient if gradient.shape[:-2] == like.shape[:-2] else gradient.sum(2, keepdims=True)


@compiled
def _masked_exp(scores: mx.array, mask: mx.array) -> mx.array:
    return bounded_exp(scores) * mask


@compiled
def _softmax_gradient(weights: mx.array, d_weights: mx.array, inner: mx.array) -> mx.array:
    return weights * (d_weights - inner)
