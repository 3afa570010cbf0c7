"""The loss of learning from a teacher's distributions: cross-entropy and divergence, by a few positions at a time.

loss = Σ weight × [(1 − mix) × cross-entropy + mix × T² × KL(teacher ‖ student)], both distributions softened by T in
the divergence, whose gradient the factor T² keeps as large as at T = 1 (Hinton et al. 2015). With `top_k` the
divergence is that of the teacher's k likeliest tokens and one bucket for all others: never more than the whole one, and
zero only where these probabilities agree.

The gradient is made in the forward pass, while a chunk's logits are at hand, as in `cross_entropy.py`, on every device:
neither the student's nor the teacher's logits of all positions ever exist.

Shapes: B rows, T positions, C width, V vocabulary, N = B × positions of a chunk.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import mlx.core as mx

from mlxchat.ops.compiled import compiled, differentiable, sum_rows
from mlxchat.ops.cross_entropy import SOFT_CAP, chunk_rows, exp_of_capped, tanh_of_head

_TINY = 1e-30

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
