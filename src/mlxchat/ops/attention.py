"""Causal attention for training: MLX's own kernel on a GPU, blocks with an own gradient on a CPU.

Shapes: B batch, H query heads, K key/value heads, T tokens, D head width.
"""

from __future__ import annotations

import mlx.core as mx

from mlxchat.ops.compiled import compiled, differentiable
from mlxchat.ops.device import backend
from mlxchat.ops.formulas import bounded_exp

_BLOCK_TOKENS = 128


def causal_attention(q: mx.array, k: mx.array, v: mx.array) -> mx.array:
    """Return softmax(q kᵀ / sqrt(D)) v over the past and present of each token.

    Args:
        q: (B, H, T, D), normalised so that every |q·k| / sqrt(D) is below 20: on a CPU the softmax is taken
            without subtracting the maximum. RMS-normalised heads up to width 256 are within it.
        k: (B, K, T, D); K divides H.
        v: (B, K, T, D).

    Returns:
        (B, H, T, D).
    """
    if backend() != "cpu":
        return mx.fast.scaled_dot_product_attention(q, k, v, scale=q.shape[-1] ** -0.5, mask="causal")
    batch, heads, tokens, width = q.shape
    groups = heads // k.shape[1]
    if groups > 1:  # query heads of one group share a key head: (B, K, G, T, D) against (B, K, 1, T, D)
        q = q.reshape(batch, k.shape[1], groups, tokens, width)
        k, v = k[:, :, None], v[:, :, None]
    out, _ = _blocked_attention(q, k, v)
    return out.reshape(batch, heads, tokens, width)


@differentiable
def _blocked_attention(q: mx.array, k: mx.array, v: mx.array) -> tuple[mx.array, mx.array]:
    """Return the attention (…, T, D) and the reciprocal of each row's sum (…, T, 1), block by block of queries."""
    outs, reciprocals = [], []
    for start, stop, mask in _blocks(q):
        # Keys after the block's last query are never multiplied: about half of all work for long rows.
        scores = q[..., start:stop, :] @ k[..., :stop, :].swapaxes(-1, -2)
        weights = _masked_exp(scores, mask, q.shape[-1] ** -0.5)
        reciprocal = 1 / weights.sum(-1, keepdims=True)
        outs.append((weights @ v[..., :stop, :]) * reciprocal)
        reciprocals.append(reciprocal)
    return mx.concatenate(outs, axis=-2), mx.concatenate(reciprocals, axis=-2)


@_blocked_attention.vjp
def _blocked_attention_vjp(
    primals: tuple[mx.array, mx.array, mx.array],
    cotangents: tuple[mx.array, mx.array],
    outputs: tuple[mx.array, mx.array],
) -> tuple[mx.array, mx.array, mx.array]:
    """Gradient by recomputing each block's weights, so that no (T, T) matrix outlives its block."""
    q, k, v = primals
    d_out, (out, reciprocal) = cotangents[0], outputs
    scale = q.shape[-1] ** -0.5
    inner = (d_out * out).sum(-1, keepdims=True)
    d_q, d_keys, d_values = [], [], []
    for start, stop, mask in _blocks(q):
        rows = (..., slice(start, stop), slice(None))
        past = (..., slice(0, stop), slice(None))
        weights = _masked_exp(q[rows] @ k[past].swapaxes(-1, -2), mask, scale)
        d_weights = d_out[rows] @ v[past].swapaxes(-1, -2)
        probabilities, d_scores = _softmax_gradient(weights, reciprocal[rows], d_weights, inner[rows], scale)
        d_q.append(d_scores @ k[past])
        d_keys.append(_sum_groups(d_scores.swapaxes(-1, -2) @ q[rows], k))
        d_values.append(_sum_groups(probabilities.swapaxes(-1, -2) @ d_out[rows], v))
    d_k, d_v = _sum_prefixes(d_keys), _sum_prefixes(d_values)
    return mx.concatenate(d_q, axis=-2).astype(q.dtype), d_k.astype(k.dtype), d_v.astype(v.dtype)


def _blocks(q: mx.array) -> list[tuple[int, int, mx.array]]:
    """Return (start, stop, mask) of each block of queries; the mask is 1 where a query sees a key before `stop`."""
    *leading, tokens, _ = q.shape
    blocks = []
    for start in range(0, tokens, _BLOCK_TOKENS):
        stop = min(start + _BLOCK_TOKENS, tokens)
        visible = (mx.arange(start, stop)[:, None] >= mx.arange(stop)).astype(mx.float32)
        # Written out in full: a kernel that broadcasts it takes twice as long, and one mask serves all layers.
        blocks.append((start, stop, mx.contiguous(mx.broadcast_to(visible, (*leading, stop - start, stop)))))
    return blocks


def _sum_groups(gradient: mx.array, like: mx.array) -> mx.array:
    """Add up the query heads that share one key/value head."""
    return gradient if gradient.shape[:-2] == like.shape[:-2] else gradient.sum(2, keepdims=True)


def _sum_prefixes(parts: list[mx.array]) -> mx.array:
    """Add gradients that cover ever longer prefixes of the tokens."""
    total = parts[-1]
    for part in parts[-2::-1]:
        covered = part.shape[-2]
        total = mx.concatenate([total[..., :covered, :] + part, total[..., covered:, :]], axis=-2)
    return total


@compiled
def _masked_exp(scores: mx.array, mask: mx.array, scale: float) -> mx.array:
    return bounded_exp(scores * scale) * mask


@compiled
def _softmax_gradient(
    weights: mx.array, reciprocal: mx.array, d_weights: mx.array, inner: mx.array, scale: float
) -> tuple[mx.array, mx.array]:
    probabilities = weights * reciprocal
    return probabilities, probabilities * (d_weights - inner) * scale
