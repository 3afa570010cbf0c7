"""Losses over the vocabulary in chunks of positions: soft-capped cross-entropy, and divergence from a teacher.

Soft cap: logits = 15 tanh(x Wᵀ / 15), in float32 (nanochat's `GPT.forward`). Products with the head are computed in the
dtype of x; losses, softmax and the sums of the head's gradient in float32. Gradients are computed in the forward pass
while a chunk's logits exist, so the logits of all positions are never in memory.

Shapes: B rows, T positions, N tokens (of a chunk, or of all rows), C width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import mlx.core as mx

from mlxchat.ops.device import accelerated, compiled, differentiable
from mlxchat.ops.machine import LOGITS

SOFT_CAP = 15.0
TINY = 1e-30
"""Lower bound of probabilities before a logarithm."""

Sums = list[mx.array]
OfChunk = Callable[[slice, mx.array, list[mx.array]], tuple[Sums, mx.array]]
"""(positions of a chunk, tanh (N, V) of its logits, arrays to depend on) → its sums (scalars), and the gradient of
their weighted sum in x Wᵀ (N, V)."""
Logits = Callable[[slice, list[mx.array]], mx.array]
"""(positions, from left to right, arrays to depend on) → the teacher's logits (N, V), float32."""


@accelerated
def sum_rows(x: mx.array) -> mx.array:
    """Return the sums over the last axis (…,)."""
    return x.sum(-1)


@accelerated
def soft_cap(logits: mx.array) -> mx.array:
    """Return 15 tanh(logits / 15) in float32, nanochat's soft cap."""
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
    """Return the number of rows of a chunk of logits."""
    return max(1, LOGITS // vocab_size)


def split_positions(x: mx.array, vocab_size: int) -> list[slice]:
    """Return slices of the positions of x (B, T, C), one per chunk of logits."""
    size = max(1, chunk_rows(vocab_size) // x.shape[0])
    return [slice(start, min(start + size, x.shape[1])) for start in range(0, x.shape[1], size)]


def token_losses(x: mx.array, weight: mx.array, targets: mx.array) -> mx.array:
    """Return each token's cross-entropy in nats (N,), 0 where the target is negative. Not meant for gradients.

    Args:
        x: (N, C) final hidden states.
        weight: (V, C) the output head.
        targets: (N,) token ids; negative ones are ignored.
    """
    losses = []
    for tanh, target, counted in _logits_of_targets(x, weight, targets):
        found = _losses(sum_rows(exp_of_capped(tanh, SOFT_CAP)), tanh, target)
        losses.append(mx.where(counted, found, 0.0))
    return mx.concatenate(losses)


def token_scores(x: mx.array, weight: mx.array, targets: mx.array) -> tuple[mx.array, mx.array]:
    """Return each token's cross-entropy and the entropy of the prediction (N,), in nats. Not meant for gradients.

    Both are 0 where the target is negative. Arguments as those of `token_losses`.
    """
    losses, entropies = [], []
    for tanh, target, counted in _logits_of_targets(x, weight, targets):
        exponentials = exp_of_capped(tanh, SOFT_CAP)
        sums = exponentials.sum(-1)
        losses.append(mx.where(counted, _losses(sums, tanh, target), 0.0))
        entropies.append(mx.where(counted, mx.log(sums) - SOFT_CAP * (exponentials * tanh).sum(-1) / sums, 0.0))
    return mx.concatenate(losses), mx.concatenate(entropies)


def _logits_of_targets(
    x: mx.array, weight: mx.array, targets: mx.array
) -> Iterator[tuple[mx.array, mx.array, mx.array]]:
    """Yield for each chunk tanh (N, V), targets (N,), and whether each target counts (N,)."""
    for rows in split_positions(x[None], weight.shape[0]):
        yield tanh_of_head(x[rows], weight), mx.maximum(targets[rows], 0), targets[rows] >= 0


def _losses(sums: mx.array, tanh: mx.array, targets: mx.array) -> mx.array:
    """Return log(sums) − the capped logit of each target."""
    return mx.log(sums) - SOFT_CAP * mx.take_along_axis(tanh, targets[:, None], axis=-1)[:, 0]


# Losses with gradients


@accelerated
def cross_entropy_sum(
    x: mx.array, weight: mx.array, targets: mx.array, row_weights: mx.array, *, frozen_head: bool = False
) -> mx.array:
    """Return the weighted sum of the tokens' cross-entropy (scalar, nats), differentiable in x and weight.

    Args:
        x: (N, C) final hidden states.
        weight: (V, C) the output head.
        targets: (N,) token ids, not negative.
        row_weights: (N,) factor of each token's loss; 0 ignores it, and it may be negative, as advantages of RL.
        frozen_head: skip the gradient of weight, which takes a quarter of the time.
    """

    def of_chunk(part: slice, tanh: mx.array, after: list[mx.array]) -> tuple[Sums, mx.array]:
        target, factor = targets[part, None], row_weights[part, None]
        log_sums = mx.logsumexp(SOFT_CAP * tanh, axis=-1, keepdims=True)
        losses = log_sums - SOFT_CAP * mx.take_along_axis(tanh, target, axis=-1)
        return [(factor * losses).sum()], _slope(tanh, log_sums, mx.arange(tanh.shape[1]) == target, factor)

    return sum_over_chunks(x[None], weight, of_chunk, [1.0], frozen_head=frozen_head)[0]


@compiled
def _slope(tanh: mx.array, log_sums: mx.array, is_target: mx.array, factor: mx.array) -> mx.array:
    """Return factor × (p − 1 at the target) × (1 − tanh²), where 1 − tanh² is the derivative of the soft cap."""
    return factor * (mx.exp(SOFT_CAP * tanh - log_sums) - is_target) * (1 - tanh * tanh)


@dataclass(frozen=True, kw_only=True)
class Mix:
    """Weights of the cross-entropy and the divergence from a teacher."""

    weight: float
    """Share of the divergence, 0 to 1."""
    temperature: float = 1.0
    top_k: int | None = None
    """Match the teacher's probabilities of this many top tokens individually and the rest as one; None: all."""

    @property
    def coefficients(self) -> tuple[float, float]:
        """Factors of cross-entropy and divergence in the loss."""
        return 1 - self.weight, self.weight * self.temperature**2


@accelerated
def distillation_sum(
    x: mx.array,
    weight: mx.array,
    targets: mx.array,
    row_weights: mx.array,
    teacher: Logits,
    mix: Mix,
    *,
    capped: bool,
    frozen_head: bool = False,
) -> tuple[mx.array, mx.array, mx.array]:
    """Return the loss, differentiable in x and weight, and the weighted sums of cross-entropy and divergence.

    Args:
        x: (B, T, C) the student's final hidden states.
        weight: (V, C) the student's output head.
        targets: (B, T) token ids, not negative.
        row_weights: (B, T) factor of each token's loss; 0 ignores it.
        teacher: returns the teacher's logits.
        mix: weights of the two losses.
        capped: whether the teacher's logits are within ±15, so that no maximum must be subtracted.
        frozen_head: skip the gradient of weight.
    """

    def of_chunk(part: slice, tanh: mx.array, after: list[mx.array]) -> tuple[Sums, mx.array]:
        target, factor = targets[:, part].reshape(-1, 1), row_weights[:, part].reshape(-1, 1)
        logits, soft = teacher(part, after), mix.temperature
        log_p, log_q = _log_softmax(logits / soft), _log_softmax(SOFT_CAP / soft * tanh)
        p, q = mx.exp(log_p), mx.exp(log_q)
        divergences = p * (log_p - log_q)
        if mix.top_k is None or mix.top_k >= logits.shape[-1]:
            kl, aim = divergences.sum(-1, keepdims=True), p
        else:  # the other tokens count as one, whose gradient scales all of them by the same ratio
            is_top = logits >= mx.partition(logits, logits.shape[-1] - mix.top_k, axis=-1)[:, -mix.top_k, None]
            rest_p, rest_q = (mx.where(is_top, 0.0, each).sum(-1, keepdims=True) for each in (p, q))
            kl = mx.where(is_top, divergences, 0.0).sum(-1, keepdims=True)
            kl = kl + rest_p * (mx.log(mx.maximum(rest_p, TINY)) - mx.log(mx.maximum(rest_q, TINY)))
            aim = mx.where(is_top, p, q * (rest_p / mx.maximum(rest_q, TINY)))
        log_sums = mx.logsumexp(SOFT_CAP * tanh, axis=-1, keepdims=True)
        ce = log_sums - SOFT_CAP * mx.take_along_axis(tanh, target, axis=-1)
        slope = _slope(tanh, log_sums, mx.arange(tanh.shape[1]) == target, (1 - mix.weight) * factor)
        slope = slope + (mix.weight * soft) * factor * (q - aim) * (1 - tanh * tanh)
        return [(ce * factor).sum(), (kl * factor).sum()], slope

    total, ce, kl = sum_over_chunks(x, weight, of_chunk, mix.coefficients, frozen_head=frozen_head)
    return total, mx.stop_gradient(ce), mx.stop_gradient(kl)


def _log_softmax(logits: mx.array) -> mx.array:
    return logits - mx.logsumexp(logits, axis=-1, keepdims=True)


def sum_over_chunks(
    x: mx.array, weight: mx.array, of_chunk: OfChunk, coefficients: Sequence[float], *, frozen_head: bool
) -> Sums:
    """Return the weighted sum of the sums of `of_chunk`, differentiable in x (B, T, C) and weight, then the sums."""

    def sums_and_gradients(x: mx.array, weight: mx.array) -> tuple[Sums, list[mx.array], mx.array]:
        sums, d_x, done = [mx.array(0.0)] * len(coefficients), list[mx.array](), list[mx.array]()
        d_weight = mx.zeros((1, 1) if frozen_head else weight.shape)
        for part in split_positions(x, weight.shape[0]):
            # Depend on the previous chunk: otherwise MLX would compute the logits of all chunks first.
            (chunk,) = mx.depends([x[:, part].reshape(-1, x.shape[2])], done)
            found, slope = of_chunk(part, tanh_of_head(chunk, weight), done)
            sums = [total + more for total, more in zip(sums, found, strict=True)]
            slope = slope.astype(x.dtype)
            d_x.append(slope @ weight)
            if not frozen_head:
                d_weight = d_weight + (slope.T @ chunk).astype(mx.float32)
            done = [d_x[-1] if frozen_head else d_weight, *sums]
        return sums, d_x, d_weight

    return with_gradients(sums_and_gradients, x, weight, coefficients)


def with_gradients(
    function: Callable[[mx.array, mx.array], tuple[Sums, list[mx.array], mx.array]],
    x: mx.array,
    weight: mx.array,
    coefficients: Sequence[float],
) -> Sums:
    """Return the weighted sum of a function's sums, differentiable by the function's own gradients, then the sums.

    Args:
        function: (x, weight) → sums, gradients of the weighted sum in x (N, C) per chunk, and in weight; the latter
            (1, 1) for a frozen head.
        x: (B, T, C).
        weight: (V, C).
        coefficients: of the sums.
    """

    @differentiable
    def both(x: mx.array, weight: mx.array) -> list[mx.array]:
        sums, d_x, d_weight = function(x, weight)
        first, *others = (factor * each for factor, each in zip(coefficients, sums, strict=True))
        whole = mx.concatenate([chunk.reshape(x.shape[0], -1, x.shape[2]) for chunk in d_x], axis=1)
        return [sum(others, first), *sums, whole, d_weight]

    @both.vjp
    def gradients(
        primals: tuple[mx.array, mx.array], cotangents: list[mx.array], outputs: list[mx.array]
    ) -> tuple[mx.array, mx.array]:
        x, weight = primals
        d_x, d_weight = (each * cotangents[0] for each in outputs[-2:])
        is_frozen = d_weight.shape != weight.shape
        return d_x.astype(x.dtype), mx.zeros_like(weight) if is_frozen else d_weight.astype(weight.dtype)

    return both(x, weight)[: 1 + len(coefficients)]
