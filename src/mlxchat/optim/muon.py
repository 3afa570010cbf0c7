"""Muon: momentum, orthogonalised by Newton-Schulz, for the transformer's matrices.

Counterpart of nanochat/muon.py of October 2025 (Keller Jordan's Muon, https://kellerjordan.github.io/posts/muon/).

Shapes: S matrices of one shape, R rows, C columns.
"""

from __future__ import annotations

import mlx.core as mx

# Quintic whose slope at zero is as steep as the iteration allows.
_COEFFICIENTS = (3.4445, -4.7750, 2.0315)


def orthogonalise(matrices: mx.array, num_iterations: int, dtype: mx.Dtype) -> mx.array:
    """Return for each matrix (S, R, C) one with the same singular vectors and singular values near 1.

    Args:
        matrices: any scale; each is divided by its Frobenius norm first.
        num_iterations: Newton-Schulz iterations, 5 in nanochat.
        dtype: what to compute in: bfloat16 on a GPU, float32 on a CPU.
    """
    a, b, c = _COEFFICIENTS
    x = matrices.astype(dtype)
    tall = x.shape[-2] > x.shape[-1]
    if tall:
        x = x.swapaxes(-1, -2)
    x = x / (mx.sqrt(mx.square(x).sum((-2, -1), keepdims=True)) + 1e-7)
    for _ in range(num_iterations):
        gram = x @ x.swapaxes(-1, -2)
        x = a * x + (b * gram + c * (gram @ gram)) @ x
    return (x.swapaxes(-1, -2) if tall else x).astype(matrices.dtype)


def muon_update(
    gradients: mx.array, momenta: mx.array, momentum: mx.array, num_iterations: int, dtype: mx.Dtype
) -> tuple[mx.array, mx.array]:
    """Return the step direction of matrices (S, R, C), to be multiplied by −lr, and their new momenta.

    Nesterov momentum, then orthogonalisation, then the factor sqrt(max(1, R/C)).
    """
    momenta = momenta + (1 - momentum) * (gradients - momenta)
    lookahead = gradients + momentum * (momenta - gradients)
    rows, columns = gradients.shape[-2:]
    return orthogonalise(lookahead, num_iterations, dtype) * max(1.0, rows / columns) ** 0.5, momenta
