"""AdamW with bias correction, as torch.optim.AdamW computes it (Loshchilov and Hutter, arXiv 1711.05101)."""

from __future__ import annotations

import mlx.core as mx

from mlxchat.ops.compiled import compiled, made_once


def adamw_update(
    parameter: mx.array,
    gradient: mx.array,
    first: mx.array,
    second: mx.array,
    *,
    count: mx.array,
    lr: mx.array,
    betas: tuple[float, float],
    epsilon: float,
    weight_decay: float,
) -> tuple[mx.array, mx.array, mx.array]:
    """Return the new parameter and its new first and second moments.

    Args:
        parameter: any shape; gradient and moments have the same.
        gradient: of the loss.
        first: running mean of the gradient.
        second: running mean of its square.
        count: number of this update, from 1, as an array so that compiled code is not retraced.
        lr: learning rate of this update.
        betas: decay of the two means.
        epsilon: added to the root of the second moment.
        weight_decay: decoupled; the parameter shrinks by lr × weight_decay.
    """
    # The arrays are passed over once, by one kernel, and powers of beta are not taken for each of their elements.
    step = made_once(lr / (1 - betas[0] ** count))
    correction = made_once(mx.rsqrt(1 - betas[1] ** count))
    keep = made_once(1 - lr * weight_decay)
    return _move(parameter, gradient, first, second, step, correction, keep, *map(mx.array, (*betas, epsilon)))


@compiled
def _move(
    parameter: mx.array,
    gradient: mx.array,
    first: mx.array,
    second: mx.array,
    step: mx.array,
    correction: mx.array,
    keep: mx.array,
    beta1: mx.array,
    beta2: mx.array,
    epsilon: mx.array,
) -> tuple[mx.array, mx.array, mx.array]:
    first = beta1 * first + (1 - beta1) * gradient
    second = beta2 * second + (1 - beta2) * mx.square(gradient)
    return parameter * keep - step * first / (mx.sqrt(second) * correction + epsilon), first, second
