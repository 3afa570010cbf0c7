"""Soft-capped cross-entropy over the vocabulary, in chunks of rows.

Soft cap: logits = 15 tanh(x Wᵀ / 15), in float32 (nanochat's `GPT.forward`). Within ±15 the exponentials need no
maximum subtracted. Losses, softmax and the sums of the head's gradient are float32, also where x and W are bfloat16.

Shapes: N rows (tokens), C width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import mlx.core as mx

from mlxchat.ops.compiled import compiled, differentiable, sum_rows
from mlxchat.ops.device import accelerated
from mlxchat.ops.machine import LOGITS as _CHUNK_FLOATS

SOFT_CAP = 15.0


@accelerated
def soft_cap(logits: mx.array) -> mx.array:
    """Return 15 tanh(logits / 15) in float32, nanochat's bound on logits."""
    return SOFT_CAP * mx.tanh(logits.astype(mx.float32) / SOFT_CAP)


@accelerated
def tanh_of_head(x: mx.array, weight: mx.array) -> mx.array:
    """Return tanh(x Wᵀ / 15) (N, V) in float32: the capped logits as multiples of the cap."""
    return mx.tanh((x @ weight.T).astype(mx.float32) / SOFT_CAP)


@accelerated
def exp_of_capped(tanh: mx.array, cap: float) -> mx.array:
    """Return exp(cap × tanh)."""
    return mx.exp(cap * tanh)


@accelerated
def chunk_rows(vocab_size: int) -> int:
    """Return how many rows' logits are computed at a time."""
    return max(1, _CHUNK_FLOATS // vocab_size)


def split_rows(rows: int, vocab_size: int) -> list[slice]:
    """Return slices of rows whose logits are computed at a time."""
    size = chunk_rows(vocab_size)
    return [slice(start, min(start + size, rows)) for start in range(0, rows, size)]


def token_losses(x: mx.array, weight: mx.array, targets: mx.array) -> mx.array:
    """Return each token's cross-entropy in nats (N,), 0 where the target is negative. Not meant for gradients.

    Args:
        x: (N, C) final hidden states.
        weight: (V, C) the output head.
        targets: (N,) token ids; negative ones are ignored.
    """
    parts = []
    for rows in split_rows(x.shape[0], weight.shape[0]):
        tanh = tanh_of_head(x[rows], weight)
        losses = _losses(sum_rows(exp_of_capped(tanh, SOFT_CAP)), tanh, mx.maximum(targets[rows], 0))
        parts.append(mx.where(targets[rows] >= 0, losses, 0.0))
    return mx.concatenate(parts)


def token_scores(x: mx.array, weight: mx.array, targets: mx.array) -> tuple[mx.array, mx.array]:
    """Return each token's cross-entropy and the entropy of the prediction (N,), in nats. Not meant for gradients.

    Both are 0 where the target is negative. Arguments as those of `token_losses`.
    """
    losses, entropies = [], []
    for rows in split_rows(x.shape[0], weight.shape[0]):
        target, counted = mx.maximum(targets[rows], 0), targets[rows] >= 0
        tanh = tanh_of_head(x[rows], weight)
        exponentials = exp_of_capped(tanh, SOFT_CAP)
        sums = exponentials.sum(-1)
        losses.append(mx.where(counted, _losses(sums, tanh, target), 0.0))
        entropies.append(mx.where(counted, mx.log(sums) - SOFT_CAP * (exponentials * tanh).sum(-1) / sums, 0.0))
    return mx.concatenate(losses), mx.concatenate(entropies)


@accelerated
def cross_entropy_sum(
    x: mx.array, weight: mx.array, targets: mx.array, row_weights: mx.array, *, frozen_head: bool = False
) -> mx.array:
    """Return the weighted sum of the tokens' cross-entropy (scalar, nats), differentiable in x and weight.

    Args:
        x: (N, C) final hidden states.
        weight: (V, C) the output head.
        targets: (N,) token ids, not negative.
        row_weights: (N,) factor of each token's loss; 0 leaves it out. Rewards' advantages may be negative.
        frozen_head: whether no gradient of weight is computed, which takes a quarter of the time.
    """
    return _loss_and_gradients(frozen_head)(x, weight, targets, row_weights)[0]


@cache
def _loss_and_gradients(frozen_head: bool) -> Callable[..., tuple[mx.array, mx.array, mx.array]]:
    """Return the loss as a function that computes its gradients at once, while the logits of a chunk exist."""

    @differentiable
    def loss_and_gradients(
        x: mx.array, weight: mx.array, targets: mx.array, row_weights: mx.array
    ) -> tuple[mx.array, mx.array, mx.array]:
        loss, d_x, done = mx.array(0.0), [], [x[:0]]
        d_weight = mx.zeros((1, 1) if frozen_head else weight.shape)
        for rows in split_rows(x.shape[0], weight.shape[0]):
            # One chunk after the other: by itself MLX would begin with the logits of all.
            (chunk,) = mx.depends([x[rows]], done)
            target, factor = targets[rows, None], row_weights[rows, None]
            tanh = tanh_of_head(chunk, weight)
            log_sums = mx.logsumexp(SOFT_CAP * tanh, axis=-1, keepdims=True)
            loss = loss + (factor * (log_sums - SOFT_CAP * mx.take_along_axis(tanh, target, axis=-1))).sum()
            d_logits = _gradient_of_logits(tanh, log_sums, mx.arange(tanh.shape[1]) == target, factor).astype(x.dtype)
            d_x.append(d_logits @ weight)
            done = [d_x[-1]]
            if not frozen_head:
                d_weight = d_weight + (d_logits.T @ chunk).astype(mx.float32)
                done = [d_weight]
        return loss, mx.concatenate(d_x), d_weight

    @loss_and_gradients.vjp
    def gradients(
        primals: tuple[mx.array, ...], cotangents: tuple[mx.array, ...], outputs: tuple[mx.array, ...]
    ) -> tuple[mx.array, ...]:
        x, weight, targets, row_weights = primals
        d_weight = mx.zeros_like(weight) if frozen_head else (outputs[2] * cotangents[0]).astype(weight.dtype)
        d_x = (outputs[1] * cotangents[0]).astype(x.dtype)
        return d_x, d_weight, mx.zeros_like(targets), mx.zeros_like(row_weights)

    return loss_and_gradients


@compiled
def _gradient_of_logits(tanh: mx.array, log_sums: mx.array, is_target: mx.array, factor: mx.array) -> mx.array:
    """Return factor × (p − 1 at the target) × (1 − tanh²), the last being the soft cap's derivative."""
    return factor * (mx.exp(SOFT_CAP * tanh - log_sums) - is_target) * (1 - tanh * tanh)


def _losses(sums: mx.array, tanh: mx.array, targets: mx.array) -> mx.array:
    """Return log(sums) − the capped logit of each target."""
    return mx.log(sums) - SOFT_CAP * mx.take_along_axis(tanh, targets[:, None], axis=-1)[:, 0]
