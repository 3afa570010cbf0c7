"""Soft-capped cross-entropy over the vocabulary, in chunks of rows, with an own gradient on a CPU.

Soft cap: logits = 15 tanh(x Wᵀ / 15), in float32 (nanochat's `GPT.forward`). Within ±15 the exponentials need no
maximum subtracted.

Shapes: N rows (tokens), C width, V vocabulary.
"""

from __future__ import annotations

import mlx.core as mx

from mlxchat.ops.compiled import compiled, differentiable
from mlxchat.ops.device import backend
from mlxchat.ops.formulas import bounded_exp, rational_tanh

SOFT_CAP = 15.0
# A chunk's logits should stay in the second-level cache: 4 MB of float32.
_CHUNK_FLOATS = 1 << 20


def soft_cap(logits: mx.array) -> mx.array:
    """Return 15 tanh(logits / 15) in float32, nanochat's bound on logits."""
    logits = logits.astype(mx.float32)
    return _cap(logits) if backend() == "cpu" else SOFT_CAP * mx.tanh(logits / SOFT_CAP)


def token_losses(x: mx.array, weight: mx.array, targets: mx.array) -> mx.array:
    """Return each token's cross-entropy in nats (N,), 0 where the target is negative. Not meant for gradients.

    Args:
        x: (N, C) final hidden states.
        weight: (V, C) the output head.
        targets: (N,) token ids; negative ones are ignored.
    """
    parts = []
    for rows in _chunks(x.shape[0], weight.shape[0]):
        losses = _losses_of_capped(soft_cap(x[rows] @ weight.T), mx.maximum(targets[rows], 0))
        parts.append(mx.where(targets[rows] >= 0, losses, 0.0))
    return mx.concatenate(parts)


def cross_entropy_sum(x: mx.array, weight: mx.array, targets: mx.array, row_weights: mx.array) -> mx.array:
    """Return the weighted sum of the tokens' cross-entropy (scalar, nats), differentiable in x and weight.

    Args:
        x: (N, C) final hidden states.
        weight: (V, C) the output head.
        targets: (N,) token ids, not negative.
        row_weights: (N,) factor of each token's loss; 0 leaves it out. Rewards' advantages may be negative.
    """
    if backend() == "cpu":
        total, _, _ = _cross_entropy_cpu(x, weight, targets, row_weights)
        return total
    total = mx.array(0.0)
    for rows in _chunks(x.shape[0], weight.shape[0]):
        losses = mx.checkpoint(_losses_of_head)(x[rows], weight, targets[rows])
        total = total + (losses * row_weights[rows]).sum()
    return total


@differentiable
def _cross_entropy_cpu(
    x: mx.array, weight: mx.array, targets: mx.array, row_weights: mx.array
) -> tuple[mx.array, mx.array, mx.array]:
    """Return the loss and, computed while each chunk's logits are at hand, its gradients in x and weight."""
    total, d_x, d_weight = mx.array(0.0), [], mx.zeros_like(weight)
    for rows in _chunks(x.shape[0], weight.shape[0]):
        chunk, target, factor = x[rows], targets[rows][:, None], row_weights[rows][:, None]
        tanh = _tanh_of_cap(chunk @ weight.T)
        exponentials = _exp_of_capped(tanh)
        sums = exponentials.sum(-1, keepdims=True)
        target_exponential = mx.take_along_axis(exponentials, target, axis=-1)
        total = total + ((mx.log(sums) - mx.log(target_exponential)) * factor).sum()
        d_logits = _probability_gradient(exponentials, tanh, factor / sums)
        target_slope = 1 - mx.square(mx.take_along_axis(tanh, target, axis=-1))
        at_target = mx.take_along_axis(d_logits, target, axis=-1) - factor * target_slope
        d_logits = mx.put_along_axis(d_logits, target, at_target, axis=-1)
        d_x.append(d_logits @ weight)
        d_weight = d_weight + d_logits.T @ chunk
    return total, mx.concatenate(d_x), d_weight


@_cross_entropy_cpu.vjp
def _cross_entropy_cpu_vjp(
    primals: tuple[mx.array, ...], cotangents: tuple[mx.array, ...], outputs: tuple[mx.array, ...]
) -> tuple[mx.array, ...]:
    """Scale the gradients that the forward pass has already made."""
    x, weight, targets, row_weights = primals
    d_x, d_weight = (gradient * cotangents[0] for gradient in outputs[1:])
    return d_x.astype(x.dtype), d_weight.astype(weight.dtype), mx.zeros_like(targets), mx.zeros_like(row_weights)


def _chunks(rows: int, vocab_size: int) -> list[slice]:
    """Return slices of rows whose logits fit the cache, at least 64 rows each."""
    size = max(64, _CHUNK_FLOATS // vocab_size)
    return [slice(start, min(start + size, rows)) for start in range(0, rows, size)]


def _losses_of_head(x: mx.array, weight: mx.array, targets: mx.array) -> mx.array:
    return _losses_of_capped(soft_cap(x @ weight.T), targets)


def _losses_of_capped(logits: mx.array, targets: mx.array) -> mx.array:
    """Return logsumexp(logits) − logits[target] per row, for logits within ±15."""
    exponentials = _exp(logits) if backend() == "cpu" else mx.exp(logits)
    # mx.checkpoint differentiates all arguments of what it wraps, and indices have no gradient.
    chosen = mx.take_along_axis(logits, mx.stop_gradient(targets)[:, None], axis=-1)[:, 0]
    return mx.log(exponentials.sum(-1)) - chosen


@compiled
def _cap(logits: mx.array) -> mx.array:
    return SOFT_CAP * rational_tanh(logits * (1 / SOFT_CAP))


_exp = compiled(bounded_exp)


# Several kernels of one output each: a compiled loop with two outputs took as long again.
@compiled
def _tanh_of_cap(logits: mx.array) -> mx.array:
    return rational_tanh(logits * (1 / SOFT_CAP))


@compiled
def _exp_of_capped(tanh: mx.array) -> mx.array:
    return bounded_exp(SOFT_CAP * tanh)


@compiled
def _probability_gradient(exponentials: mx.array, tanh: mx.array, factor: mx.array) -> mx.array:
    """Return factor × exp × (1 − tanh²), the last being the soft cap's derivative."""
    return exponentials * factor * (1 - tanh * tanh)
