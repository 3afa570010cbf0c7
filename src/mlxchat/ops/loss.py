"""Losses over the vocabulary in chunks of rows: soft-capped cross-entropy, and divergence from a teacher.

Soft cap: logits = 15 tanh(x Wᵀ / 15), in float32 (nanochat's `GPT.forward`). Within ±15 exponentials need no maximum
subtracted. Losses, softmax and the sums of the head's gradient are float32, also where x and W are bfloat16. Gradients
are computed in the forward pass, while a chunk's logits exist: the logits of all rows never do.

Shapes: B rows, T positions, N rows of a chunk (tokens), C width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import mlx.core as mx

from mlxchat.ops.device import accelerated, compiled, differentiable
from mlxchat.ops.machine import LOGITS

SOFT_CAP = 15.0


@accelerated
def sum_rows(x: mx.array) -> mx.array:
    """Return the sums over the last axis (…,)."""
    return x.sum(-1)


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
    return max(1, LOGITS // vocab_size)


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


# Learning from a teacher

_TINY = 1e-30  # probabilities are at least this much where their logarithm is taken

Logits = Callable[[slice, list[mx.array]], mx.array]
"""Takes positions, from left to right, and arrays to wait for; returns the teacher's logits there (N, V), float32."""


@dataclass(frozen=True, kw_only=True)
class Mix:
    """How much of what is learnt from a teacher."""

    weight: float
    """Share of the divergence, 0 to 1."""
    temperature: float = 1.0
    top_k: int | None = None
    """Tokens of which the teacher's probabilities are matched one by one; None: all."""


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
    """Return the loss, differentiable in x and weight, and of it the weighted sums of cross-entropy and divergence.

    Args:
        x: (B, T, C) the student's final hidden states.
        weight: (V, C) the student's output head.
        targets: (B, T) token ids, not negative.
        row_weights: (B, T) factor of each token's loss; 0 leaves it out.
        teacher: gives the teacher's logits.
        mix: of the two losses.
        capped: whether these are within ±15, so that no maximum has to be subtracted.
        frozen_head: whether the gradient of weight is not made.
    """

    @differentiable
    def losses(
        x: mx.array, weight: mx.array, targets: mx.array, row_weights: mx.array
    ) -> tuple[mx.array, mx.array, mx.array, mx.array, mx.array]:
        num_rows, length, width = x.shape
        size = max(1, chunk_rows(weight.shape[0]) // num_rows)
        ce, kl, d_x, at_target = [], [], [], []
        d_weight = mx.zeros((1, 1) if frozen_head else weight.shape)
        done: list[mx.array] = []
        for start in range(0, length, size):
            part = slice(start, min(start + size, length))
            # One chunk after the other: by itself MLX would begin with the logits of them all.
            (chunk,) = mx.depends([x[:, part].reshape(-1, width)], done)
            target, factor = targets[:, part].reshape(-1), row_weights[:, part].reshape(-1)
            tanh = tanh_of_head(chunk, weight)
            kl_rows, ce_rows, target_tanh, slope = _chunk(tanh, teacher(part, done), target, factor, mix, capped)
            ce.append((ce_rows * factor).sum())
            kl.append((kl_rows * factor).sum())
            target_slope = ((1 - mix.weight) * factor * (1 - mx.square(target_tanh)))[:, None]
            d_x.append((slope @ weight - target_slope * weight[target]).reshape(num_rows, -1, width))
            if frozen_head:
                done = [d_x[-1], ce[-1], kl[-1]]
                continue
            d_weight = mx.addmm(d_weight, slope.T, chunk)
            at_target.append((target, target_slope * chunk))
            done = [d_weight[:1, :1] * 1.0, d_x[-1], ce[-1], kl[-1], at_target[-1][1]]
        if not frozen_head:
            ids, rows = (mx.concatenate(list(each)) for each in zip(*at_target, strict=True))
            d_weight = d_weight.at[ids].subtract(rows)
        ce_sum, kl_sum = sum(ce[1:], ce[0]), sum(kl[1:], kl[0])
        total = (1 - mix.weight) * ce_sum + mix.weight * mix.temperature**2 * kl_sum
        return total, mx.concatenate(d_x, axis=1), d_weight, ce_sum, kl_sum

    @losses.vjp
    def gradient(
        primals: tuple[mx.array, ...], cotangents: tuple[mx.array, ...], outputs: tuple[mx.array, ...]
    ) -> tuple[mx.array, ...]:
        d_x, d_weight = (each * cotangents[0] for each in outputs[1:3])
        d_weight = mx.zeros_like(primals[1]) if frozen_head else d_weight
        return d_x, d_weight, mx.zeros_like(primals[2]), mx.zeros_like(primals[3])

    total, _, _, ce, kl = losses(x.astype(mx.float32), weight.astype(mx.float32), targets, row_weights)
    return total, mx.stop_gradient(ce), mx.stop_gradient(kl)


def _chunk(
    tanh: mx.array, logits: mx.array, target: mx.array, factor: mx.array, mix: Mix, capped: bool
) -> tuple[mx.array, mx.array, mx.array, mx.array]:
    """Return divergences and cross-entropies (N,), tanh at the targets, and the slopes in x Wᵀ (N, V) of a chunk.

    The slopes lack the target's term of the cross-entropy, which is added by index.
    """
    soft = mix.temperature
    exp = exp_of_capped(tanh, SOFT_CAP)
    exp_soft = exp if soft == 1 else exp_of_capped(tanh, SOFT_CAP / soft)
    sums = sum_rows(exp)
    sums_soft = sums if soft == 1 else sum_rows(exp_soft)
    target_tanh = mx.take_along_axis(tanh, target[:, None], axis=-1)[:, 0]
    ce = mx.log(sums) - SOFT_CAP * target_tanh
    if capped:
        teacher_exp = exp_of_capped(logits * (1 / SOFT_CAP), SOFT_CAP / soft)
        shift = mx.zeros(len(logits))
    else:
        shift = logits.max(-1) / soft
        teacher_exp = mx.exp(logits / soft - shift[:, None])
    teacher_sums = sum_rows(teacher_exp)
    # Of each row: what exponentials are multiplied with to be probabilities.
    student_norm, teacher_norm = 1 / sums_soft, 1 / teacher_sums
    # log p − log q is (teacher's logit − student's) / T, and what follows of each row.
    constant = mx.log(sums_soft) - mx.log(teacher_sums) - shift
    difference = _difference(teacher_exp, logits, tanh)
    mean_norm = teacher_norm / soft
    pull = factor * (mix.weight * soft)
    ce_factor = factor * ((1 - mix.weight) / sums)
    if mix.top_k is None or mix.top_k >= logits.shape[-1]:
        kl = sum_rows(difference) * mean_norm + constant
        slope = _slope(exp, exp_soft, teacher_exp, tanh, ce_factor[:, None], (pull * student_norm)[:, None],
                       (pull * teacher_norm)[:, None])  # fmt: skip
        return kl, ce, target_tanh, slope
    border = mx.partition(logits, logits.shape[-1] - mix.top_k, axis=-1)[:, -mix.top_k, None]
    top = (logits >= border).astype(mx.float32)
    teacher_rest = sum_rows(teacher_exp * (1 - top)) * teacher_norm
    student_rest = sum_rows(exp_soft * (1 - top)) * student_norm
    rest = mx.log(mx.maximum(teacher_rest, _TINY)) - mx.log(mx.maximum(student_rest, _TINY))
    kl = sum_rows(difference * top) * mean_norm + constant * (1 - teacher_rest) + teacher_rest * rest
    # The bucket pulls all of its tokens by the same ratio.
    ratio = teacher_rest / mx.maximum(student_rest, _TINY)
    aim = top * teacher_exp * teacher_norm[:, None] + (1 - top) * exp_soft * (student_norm * ratio)[:, None]
    slope = ce_factor[:, None] * exp + pull[:, None] * (exp_soft * student_norm[:, None] - aim)
    return kl, ce, target_tanh, slope * (1 - mx.square(tanh))


@compiled
def _slope(
    exp: mx.array,
    exp_soft: mx.array,
    teacher_exp: mx.array,
    tanh: mx.array,
    ce: mx.array,
    pull: mx.array,
    push: mx.array,
) -> mx.array:
    return (exp * ce + exp_soft * pull - teacher_exp * push) * (1 - tanh * tanh)


@compiled
def _difference(teacher_exp: mx.array, logits: mx.array, tanh: mx.array) -> mx.array:
    """Return the teacher's exponential × (its logit − the student's)."""
    return teacher_exp * (logits - SOFT_CAP * tanh)
