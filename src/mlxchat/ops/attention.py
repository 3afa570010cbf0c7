"""Causal attention for training: MLX's own kernel on a GPU, blocks with an own gradient on a CPU.

Shapes: B batch, H query heads, K key/value heads, G = H / K, T tokens, D head width.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

import mlx.core as mx
import numpy as np

from mlxchat.ops.compiled import compiled, differentiable, sum_rows
from mlxchat.ops.device import backend
from mlxchat.ops.formulas import EXP_UNIT, masked_exp_of_units

_BLOCK_TOKENS = 128


def causal_attention(q: mx.array, k: mx.array, v: mx.array, window: int | None = None) -> mx.array:
    """Return softmax(q kᵀ / sqrt(D)) v over the past and present of each token.

    Args:
        q: (B, H, T, D), normalised so that every |q·k| / sqrt(D) is below 24: on a CPU the softmax is taken
            without subtracting the maximum. RMS-normalised heads up to width 256 are within it, also scaled by 1.2.
        k: (B, K, T, D); K divides H.
        v: (B, K, T, D).
        window: earlier tokens that one sees besides itself (flash-attention's left window); None: all.

    Returns:
        (B, T, H, D), of the dtype of q; computed in float32 on a CPU.
    """
    batch, heads, tokens, width = q.shape
    if window is None or window >= tokens:
        window = tokens
    if backend() != "cpu":
        mask = "causal" if window == tokens else mx.array(_visible(0, tokens, 0, window))
        return mx.fast.scaled_dot_product_attention(q, k, v, scale=width**-0.5, mask=mask).swapaxes(1, 2)
    # Query heads of one group share a key head: (B, K, G, T, D) against (B, K, 1, T, D).
    dtype, (q, k, v) = q.dtype, (x.astype(mx.float32) for x in (q, k, v))
    q = q.reshape(batch, k.shape[1], heads // k.shape[1], tokens, width) * (width**-0.5 / EXP_UNIT)
    out, _ = _windowed(window)(q, k[:, :, None], v[:, :, None])
    return out.reshape(batch, tokens, heads, width).astype(dtype)


def masked_attention(q: mx.array, k: mx.array, v: mx.array, visible: mx.array) -> mx.array:
    """Return softmax(q kᵀ / sqrt(D)) v over what each query may see. Not meant for gradients.

    Args:
        q: (B, H, T, D), normalised as for `causal_attention`.
        k: (B, K, S, D).
        v: (B, K, S, D).
        visible: (B, T, S), bool; every query sees something.

    Returns:
        (B, T, H, D).
    """
    batch, heads, tokens, width = q.shape
    if backend() != "cpu":
        out = mx.fast.scaled_dot_product_attention(q, k, v, scale=width**-0.5, mask=visible[:, None])
        return out.swapaxes(1, 2)
    dtype, (q, k, v) = q.dtype, (x.astype(mx.float32) for x in (q, k, v))
    q = q.reshape(batch, k.shape[1], heads // k.shape[1], tokens, width) * (width**-0.5 / EXP_UNIT)
    weights = _masked_exp(q @ k[:, :, None].swapaxes(-1, -2), visible[:, None, None].astype(mx.float32))
    out = _multiply(weights @ v[:, :, None], (1 / sum_rows(weights))[..., None])
    return out.reshape(batch, heads, tokens, width).swapaxes(1, 2).astype(dtype)


@cache
def _windowed(window: int) -> differentiable[[mx.array, mx.array, mx.array], tuple[mx.array, mx.array]]:
    """Return the attention for one window with its gradient.

    It takes q (B, K, G, T, D), whose products with k (B, K, 1, T, D) are scores in `EXP_UNIT`s, and v like k; it
    returns the output (B, T, K, G, D) and the reciprocals of the rows' sums (B, K, G, T).
    """

    @differentiable
    def attend(q: mx.array, k: mx.array, v: mx.array) -> tuple[mx.array, mx.array]:
        outs, reciprocals = [], []
        for rows, past, mask in _blocks(q.shape[-2], window):
            weights = _masked_exp(q[rows] @ k[past].swapaxes(-1, -2), mask)
            reciprocal = 1 / sum_rows(weights)
            outs.append(_multiply(weights @ v[past], reciprocal[..., None]).transpose(0, 3, 1, 2, 4))
            reciprocals.append(reciprocal)
        return mx.concatenate(outs, axis=1), mx.concatenate(reciprocals, axis=-1)

    @attend.vjp
    def gradient(
        primals: tuple[mx.array, mx.array, mx.array],
        cotangents: tuple[mx.array, mx.array],
        outputs: tuple[mx.array, mx.array],
    ) -> tuple[mx.array, mx.array, mx.array]:
        """Recompute each block's weights, so that no (T, T) matrix outlives its block."""
        # Only once the cotangent is there: else compilation would keep the weights of the forward pass.
        q, k, v = mx.depends(list(primals), [cotangents[0]])
        out, reciprocal = (outputs[0].transpose(0, 2, 3, 1, 4), outputs[1])
        # The rows' factors are folded into the small matrices: the large ones see one product each.
        d_out = _multiply(cotangents[0].transpose(0, 2, 3, 1, 4), reciprocal[..., None])
        inner = sum_rows(_multiply(d_out, out))[..., None]
        d_q: list[mx.array] = []
        d_keys: list[tuple[int, mx.array]] = []
        d_values: list[tuple[int, mx.array]] = []
        for rows, past, mask in _blocks(q.shape[-2], window):
            weights = _masked_exp(q[rows] @ k[past].swapaxes(-1, -2), mask)
            d_scores = _softmax_gradient(weights, d_out[rows] @ v[past].swapaxes(-1, -2), inner[rows])
            d_q.append(d_scores @ k[past])
            first = past[1].start
            d_keys.append((first, _sum_groups(d_scores.swapaxes(-1, -2) @ q[rows])))
            d_values.append((first, _sum_groups(weights.swapaxes(-1, -2) @ d_out[rows])))
        return mx.concatenate(d_q, axis=-2), _sum_spans(d_keys), _sum_spans(d_values)

    return attend


def _blocks(tokens: int, window: int) -> Iterator[tuple[Any, Any, mx.array]]:
    """Yield (rows, keys, mask) of each block of queries; keys that none of them sees are never multiplied."""
    for start in range(0, tokens, _BLOCK_TOKENS):
        stop = min(start + _BLOCK_TOKENS, tokens)
        first = max(0, start - window) // _BLOCK_TOKENS * _BLOCK_TOKENS
        # Counted from `first`, so that blocks which see alike share one mask.
        mask = _mask(start - first, stop - first, window)
        yield (..., slice(start, stop), slice(None)), (..., slice(first, stop), slice(None)), mask


@cache
def _mask(start: int, stop: int, window: int) -> mx.array:
    return mx.array(_visible(start, stop, 0, window).astype(np.float32))


def _visible(start: int, stop: int, first: int, window: int) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """Return which keys first … stop − 1 the queries start … stop − 1 see."""
    query, key = np.arange(start, stop)[:, None], np.arange(first, stop)
    return (key <= query) & (key >= query - window)


def _sum_spans(parts: list[tuple[int, mx.array]]) -> mx.array:
    """Add gradients of which each covers the tokens from its first one to the end of its block."""
    sums: list[mx.array] = []
    for end in range(len(parts)):
        start, stop = end * _BLOCK_TOKENS, (end + 1) * _BLOCK_TOKENS
        pieces = [part[..., start - first : stop - first, :] for first, part in parts[end:] if first <= start]
        sums.append(sum(pieces[1:], pieces[0]))
    return mx.concatenate(sums, axis=-2)


def _sum_groups(gradient: mx.array) -> mx.array:
    """Add up the query heads (axis 2) that share one key/value head."""
    return gradient if gradient.shape[2] == 1 else gradient.sum(2, keepdims=True)


@compiled
def _multiply(x: mx.array, y: mx.array) -> mx.array:
    return x * y


@compiled
def _masked_exp(scores: mx.array, mask: mx.array) -> mx.array:
    return masked_exp_of_units(scores, mask)


@compiled
def _softmax_gradient(weights: mx.array, d_weights: mx.array, inner: mx.array) -> mx.array:
    return weights * (d_weights - inner) * EXP_UNIT
