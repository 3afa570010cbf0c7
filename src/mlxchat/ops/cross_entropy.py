"""Soft-capped cross-entropy over the vocabulary, in chunks of rows, with an own gradient on a CPU.

Soft cap: logits = 15 tanh(x Wᵀ / 15), in float32 (nanochat's `GPT.forward`). Within ±15 the exponentials need no
maximum subtracted.

Shapes: N rows (tokens), C width, V vocabulary.
"""

from __future__ import annotations

import mlx.core as mx

from mlxchat.ops.compiled import compiled, differentiable, sum_rows
from mlxchat.ops.device import backend
from mlxchat.ops.formulas import exp_of_capped, rational_tanh

SOFT_CAP = 15.0
# Few rows keep a chunk's logits in the cache; many spare BLAS from rearranging the head for each chunk.
_CHUNK_FLOATS = 1 << 22
_LEAST_ROWS = 256


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
    if backend() == "cpu":
        x, weight = x.astype(mx.float32), weight.astype(mx.float32)
    for rows in _chunks(x.shape[0], weight.shape[0]):
        target = mx.maximum(targets[rows], 0)
        if backend() == "cpu":
            tanh, exponentials = _tanh_and_exp(x[rows], weight)
            losses = _losses(sum_rows(exponentials), mx.take_along_axis(tanh, target[:, None], axis=-1)[:, 0])
        else:
            losses = _losses_of_head(x[rows], weight, target)
        parts.append(mx.where(targets[rows] >= 0, losses, 0.0))
    return mx.concatenate(parts)


def token_scores(x: mx.array, weight: mx.array, targets: mx.array) -> tuple[mx.array, mx.array]:
    """Return each token's cross-entropy and the entropy of what was predicted (N,), in nats. Not meant for gradients.

    Both are 0 where the target is negative. Arguments as those of `token_losses`.
    """
    losses, entropies = [], []
    if backend() == "cpu":
        x, weight = x.astype(mx.float32), weight.astype(mx.float32)
    for rows in _chunks(x.shape[0], weight.shape[0]):
        target, counted = mx.maximum(targets[rows], 0), targets[rows] >= 0
        # The capped logits as multiples of the cap, and exp of them.
        if backend() == "cpu":
            tanh, exponentials = _tanh_and_exp(x[rows], weight)
        else:
            tanh = soft_cap(x[rows] @ weight.T) / SOFT_CAP
            exponentials = mx.exp(SOFT_CAP * tanh)
        sums = exponentials.sum(-1)
        chosen = mx.take_along_axis(tanh, target[:, None], axis=-1)[:, 0]
        losses.append(mx.where(counted, _losses(sums, chosen), 0.0))
        entropies.append(mx.where(counted, mx.log(sums) - SOFT_CAP * (exponentials * tanh).sum(-1) / sums, 0.0))
    return mx.concatenate(losses), mx.concatenate(entropies)


def cross_entropy_sum(
    x: mx.array, weight: mx.array, targets: mx.array, row_weights: mx.array, *, frozen_head: bool = False
) -> mx.array:
    """Return the weighted sum of the tokens' cross-entropy (scalar, nats), differentiable in x and weight.

    Args:
        x: (N, C) final hidden states.
        weight: (V, C) the output head.
        targets: (N,) token ids, not negative.
        row_weights: (N,) factor of each token's loss; 0 leaves it out. Rewards' advantages may be negative.
        frozen_head: whether no gradient of weight is made, which takes a quarter of the time.
    """
    if backend() == "cpu":
        arrays = x.astype(mx.float32), weight.astype(mx.float32), targets, row_weights
        return _with_frozen_head(*arrays)[0] if frozen_head else _cross_entropy_cpu(*arrays)[0]
    total = mx.array(0.0)
    for rows in _chunks(x.shape[0], weight.shape[0]):
        losses = mx.checkpoint(_losses_of_head)(x[rows], weight, targets[rows])
        total = total + (losses * row_weights[rows]).sum()
    return total


@differentiable
def _cross_entropy_cpu(
    x: mx.array, weight: mx.array, targets: mx.array, row_weights: mx.array
) -> tuple[mx.array, mx.array, mx.array]:
    """Return the loss and, computed while each chunk's logits are at hand, its gradients in x and weight.

    The gradient in a logit is factor × (p − 1 at the target) × (1 − tanh²), p = exp / sum. Everything that is one
    number per row goes to the thin matrices (x and the product with the head) and the target's term is added by
    index, so that the wide matrix is passed over four times in all: tanh, exp, sum, slope.
    """
    loss, d_x, d_weight = _losses_and_slopes(x, weight, targets, row_weights, frozen_head=False)
    assert d_weight is not None
    return loss, d_x, d_weight


@differentiable
def _with_frozen_head(
    x: mx.array, weight: mx.array, targets: mx.array, row_weights: mx.array
) -> tuple[mx.array, mx.array]:
    """Return the loss and its gradient in x alone."""
    loss, d_x, _ = _losses_and_slopes(x, weight, targets, row_weights, frozen_head=True)
    return loss, d_x


def _losses_and_slopes(
    x: mx.array, weight: mx.array, targets: mx.array, row_weights: mx.array, *, frozen_head: bool
) -> tuple[mx.array, mx.array, mx.array | None]:
    """Return what `_cross_entropy_cpu` returns; of a frozen head no gradient."""
    losses, d_x, d_weight, at_target = [], [], None if frozen_head else mx.zeros_like(weight), []
    done: list[mx.array] = []
    for rows in _chunks(x.shape[0], weight.shape[0]):
        # One chunk after the other: by itself MLX would begin with the logits of them all.
        (chunk,) = mx.depends([x[rows]], done)
        target, factor = targets[rows], row_weights[rows]
        tanh, exponentials = _tanh_and_exp(chunk, weight)
        sums = sum_rows(exponentials)
        target_tanh = mx.take_along_axis(tanh, target[:, None], axis=-1)[:, 0]
        losses.append((_losses(sums, target_tanh) * factor).sum())
        slope = _slope(exponentials, tanh)
        row_factor, target_slope = (factor / sums)[:, None], (factor * (1 - mx.square(target_tanh)))[:, None]
        d_x.append((slope @ weight) * row_factor - target_slope * weight[target])
        if d_weight is None:
            done = [d_x[-1], losses[-1]]
            continue
        d_weight = mx.addmm(d_weight, slope.T, chunk * row_factor)
        at_target.append(target_slope * chunk)
        # A number of the sum instead of the sum, whose memory the next chunk's sum takes over.
        done = [d_weight[:1, :1] * 1.0, d_x[-1], losses[-1], at_target[-1]]
    if d_weight is not None:
        d_weight = d_weight.at[targets].subtract(mx.concatenate(at_target))
    return sum(losses[1:], losses[0]), mx.concatenate(d_x), d_weight


@_cross_entropy_cpu.vjp
def _cross_entropy_cpu_vjp(
    primals: tuple[mx.array, ...], cotangents: tuple[mx.array, ...], outputs: tuple[mx.array, ...]
) -> tuple[mx.array, ...]:
    """Scale the gradients that the forward pass has already made."""
    _, _, targets, row_weights = primals
    d_x, d_weight = (gradient * cotangents[0] for gradient in outputs[1:])
    return d_x, d_weight, mx.zeros_like(targets), mx.zeros_like(row_weights)


@_with_frozen_head.vjp
def _with_frozen_head_vjp(
    primals: tuple[mx.array, ...], cotangents: tuple[mx.array, ...], outputs: tuple[mx.array, ...]
) -> tuple[mx.array, ...]:
    """Scale the gradient that the forward pass has already made."""
    return outputs[1] * cotangents[0], *map(mx.zeros_like, primals[1:])


def chunk_rows(vocab_size: int) -> int:
    """Return how many rows' logits are worked on at a time."""
    return max(_LEAST_ROWS, _CHUNK_FLOATS // vocab_size)


def _chunks(rows: int, vocab_size: int) -> list[slice]:
    """Return slices of rows whose logits are worked on at a time."""
    size = chunk_rows(vocab_size)
    return [slice(start, min(start + size, rows)) for start in range(0, rows, size)]


def _tanh_and_exp(x: mx.array, weight: mx.array) -> tuple[mx.array, mx.array]:
    """Return tanh(x Wᵀ / 15) and exp of the capped logits (N, V)."""
    tanh = _tanh((x * (1 / SOFT_CAP)) @ weight.T)
    return tanh, _exp(tanh)


def _losses(sums: mx.array, target_tanh: mx.array) -> mx.array:
    """Return log(sums) − the capped target logit."""
    return mx.log(sums) - SOFT_CAP * target_tanh


def _losses_of_head(x: mx.array, weight: mx.array, targets: mx.array) -> mx.array:
    """Return logsumexp(logits) − logits[target] per row, by MLX's own operations."""
    logits = soft_cap(x @ weight.T)
    # mx.checkpoint differentiates all arguments of what it wraps, and indices have no gradient.
    chosen = mx.take_along_axis(logits, mx.stop_gradient(targets)[:, None], axis=-1)[:, 0]
    return mx.log(mx.exp(logits).sum(-1)) - chosen


@compiled
def _cap(logits: mx.array) -> mx.array:
    return SOFT_CAP * rational_tanh(logits * (1 / SOFT_CAP))


_tanh = compiled(rational_tanh)


# Kernels of one output each: a compiled loop with two outputs took as long again.
@compiled
def _exp(tanh: mx.array) -> mx.array:
    return exp_of_capped(tanh, SOFT_CAP)


@compiled
def _slope(exponentials: mx.array, tanh: mx.array) -> mx.array:
    """Return exp × (1 − tanh²), the last being the soft cap's derivative."""
    return exponentials * (1 - tanh * tanh)
