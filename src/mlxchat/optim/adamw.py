"""AdamW with bias correction, as torch.optim.AdamW computes it (Loshchilov and Hutter, arXiv 1711.05101)."""

from __future__ import annotations

import mlx.core as mx


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
    first = betas[0] * first + (1 - betas[0]) * gradient
    second = betas[1] * second + (1 - betas[1]) * mx.square(gradient)
    step = lr / (1 - betas[0] ** count)
    denominator = mx.sqrt(second) * mx.rsqrt(1 - betas[1] ** count) + epsilon
    if weight_decay:
        parameter = parameter * (1 - lr * weight_decay)
    return parameter - step * first / denominator, first, second
