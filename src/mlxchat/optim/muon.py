"""Muon: orthogonalised momentum for the transformer's matrices, as in nanochat of 2025 and of 2026.

Counterpart of nanochat/muon.py of October 2025 and of `muon_step_fused` in nanochat/optim.py of July 2026 (Keller
Jordan's Muon, https://kellerjordan.github.io/posts/muon/).

Shapes: S matrices of one shape, R rows, C columns.
"""

from collections.abc import Sequence

import mlx.core as mx

Quintic = tuple[float, float, float]

# Coefficients with the steepest slope at zero.
_NEWTON_SCHULZ: Quintic = (3.4445, -4.7750, 2.0315)
# Polar Express for five iterations, safety factor 2e-2, cushion 2 (arXiv 2505.16932).
POLAR_EXPRESS: tuple[Quintic, ...] = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)
_EPSILON = 1e-6


def orthogonalise(matrices: mx.array, num_iterations: int, dtype: mx.Dtype) -> mx.array:
    """Return for each matrix (S, R, C) of any scale one with the same singular vectors and singular values near 1.

    Newton-Schulz iterations, 5 in nanochat, in `dtype`: bfloat16 on a GPU, float32 on a CPU.
    """
    x = matrices.astype(dtype)
    x = x / (_norm(x, (-2, -1)).astype(dtype) + 1e-7)
    return apply_quintics(x, [_NEWTON_SCHULZ] * num_iterations).astype(matrices.dtype)


def polar_express(matrices: mx.array, num_iterations: int, dtype: mx.Dtype) -> mx.array:
    """Return for each matrix (S, R, C) of any scale the nearest one whose singular values are 1.

    At most 5 iterations of Polar Express in `dtype`, on rows scaled to their mean norm (MuonEq, arXiv 2603.28254).
    """
    x = matrices.astype(dtype)
    row_norms = _norm(x, (-1,))
    target = mx.sqrt(mx.square(row_norms).sum(-2, keepdims=True) / x.shape[-2])
    balance = target / mx.maximum(row_norms, _EPSILON)
    # The norm of the balanced matrix, without another pass over it.
    norm = mx.sqrt(mx.square(row_norms * balance).sum(-2, keepdims=True))
    x = x * (balance / (norm * 1.01 + _EPSILON)).astype(dtype)
    return apply_quintics(x, POLAR_EXPRESS[:num_iterations]).astype(matrices.dtype)


def nesterov(gradients: mx.array, momenta: mx.array, momentum: mx.array) -> tuple[mx.array, mx.array]:
    """Return gradients (S, R, C) after Nesterov momentum, and the new momenta."""
    momenta = momenta + (1 - momentum) * (gradients - momenta)
    return gradients + momentum * (momenta - gradients), momenta


def muon_update(
    gradients: mx.array, momenta: mx.array, momentum: mx.array, num_iterations: int, dtype: mx.Dtype
) -> tuple[mx.array, mx.array]:
    """Return oct2025's update of matrices (S, R, C), to be multiplied by −lr × `aspect_factor`, and the new momenta."""
    ahead, momenta = nesterov(gradients, momenta, momentum)
    return orthogonalise(ahead, num_iterations, dtype), momenta


def normuon_update(
    gradients: mx.array, momenta: mx.array, variances: mx.array, momentum: mx.array, beta2: float,
    num_iterations: int, dtype: mx.Dtype,
) -> tuple[mx.array, mx.array, mx.array, mx.array]:  # fmt: skip
    """Return jul2026's update of matrices (S, R, C) as two factors, and the new momenta and variances.

    Nesterov momentum, Polar Express, a Frobenius norm of sqrt(min(R, C)) (Muon+, arXiv 2602.21545), then normalisation
    by a running mean of squares (decay beta2) of each row or column, at the same norm (NorMuon, arXiv 2510.05491). The
    factors are directions (S, R, C) and their scales, shaped like variances, (S, R, 1) or (S, 1, C) for wide matrices,
    to be multiplied by −lr × `aspect_factor`.
    """
    ahead, momenta = nesterov(gradients, momenta, momentum)
    direction = polar_express(ahead, num_iterations, dtype)
    rows, columns = direction.shape[-2:]
    axis, size = (-1, columns) if rows >= columns else (-2, rows)
    means = mx.square(direction).mean(axis, keepdims=True)
    norm = mx.maximum(mx.sqrt(means.sum((-2, -1), keepdims=True) * size), _EPSILON)
    scale = min(rows, columns) ** 0.5 / norm
    means = means * mx.square(scale)
    variances = variances + (1 - beta2) * (means - variances)
    evened = mx.rsqrt(mx.maximum(variances, 1e-10))
    before = mx.sqrt(means.sum((-2, -1), keepdims=True) * size)
    after = mx.sqrt((means * mx.square(evened)).sum((-2, -1), keepdims=True) * size)
    return direction, scale * evened * (before / mx.maximum(after, 1e-10)), momenta, variances


def aspect_factor(matrices: mx.array) -> float:
    """Return sqrt(max(1, R/C)), the factor of updates of tall matrices."""
    rows, columns = matrices.shape[-2:]
    return float(max(1.0, rows / columns) ** 0.5)


def _norm(x: mx.array, axes: tuple[int, ...]) -> mx.array:
    squares = mx.square(x.astype(mx.float32))
    # Axis by axis: a single sum of a million numbers is off by 1e-4 on a CPU.
    for axis in sorted(axes, reverse=True):
        squares = squares.sum(axis, keepdims=True)
    return mx.sqrt(squares)


def apply_quintics(x: mx.array, quintics: Sequence[Quintic]) -> mx.array:
    """Apply odd quintics in turn to the singular values of matrices (S, R, C)."""
    tall = x.shape[-2] > x.shape[-1]
    for a, b, c in quintics:
        gram = gram_matrix(x)
        inner = mx.addmm(gram, gram, gram, alpha=c, beta=b)
        x = mx.addmm(x, x, inner, beta=a) if tall else mx.addmm(x, inner, x, beta=a)
    return x


def gram_matrix(x: mx.array) -> mx.array:
    """Return the Gram matrices of the rows of matrices (S, R, C), or of the columns if there are fewer."""
    transposed = x.swapaxes(-1, -2)
    return transposed @ x if x.shape[-2] > x.shape[-1] else x @ transposed
