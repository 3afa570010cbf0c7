"""CPU versions of operations: few passes over memory, fast exponentials, gradients that keep few activations.

A function with the name of one in `mlxchat.ops` computes the same; documentation and letters of shapes are there. All
compute in float32 and return the dtype of their input. On a CPU MLX takes 5 ns per number for exp and 20 for tanh; the
polynomials here take 0.7 and 0.5, as one vectorised loop each. `mx.compile` fuses at most eleven operations, so
polynomials use Estrin's scheme (pairs, then pairs of pairs), whose chains are short. Errors were measured against
float64.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np

from mlxchat.ops.attention import RMS_NORM_EPSILON, Positions, rotation, visible_keys
from mlxchat.ops.device import compiled, differentiable
from mlxchat.ops.dropout import dropped
from mlxchat.ops.linear import Activation, Adapter, Packed, identity, unpacked
from mlxchat.ops.loss import SOFT_CAP, TINY, Logits, Mix, split_positions, with_gradients
from mlxchat.ops.machine import CPU_ATTENTION_TOKENS as _BLOCK_TOKENS
from mlxchat.ops.machine import CPU_LEAST_LOGITS_ROWS as _LEAST_ROWS
from mlxchat.ops.machine import CPU_LOGITS as _CHUNK_FLOATS
from mlxchat.optim.muon import Quintic, gram_matrix, multiply_quintics

# Rational minimax fit of tanh on [-7.9, 7.9]: odd numerator, even denominator, lowest power first.
_TANH_OVER = (
    4.89352455891786e-03, 6.37261928875436e-04, 1.48572235717979e-05, 5.12229709037114e-08,
    -8.60467152213735e-11, 2.00018790482477e-13, -2.76076847742355e-16,
)  # fmt: skip
_TANH_UNDER = (4.89352518554385e-03, 2.26843463243900e-03, 1.18534705686654e-04, 1.19825839466702e-06)

# Minimax fits of exp in relative error on [-1.5, 1.5] and [-1, 1], lowest power first, the first two of them exact.
_EXP_WIDE = (
    4.999999210e-01, 1.666673217e-01, 4.166766205e-02, 8.331795576e-03, 1.386887426e-03, 1.994141789e-04,
    2.612832682e-05, 2.611736130e-06,
)  # fmt: skip
_EXP = (
    1.0, 1.0, 4.999999910e-01, 1.666666942e-01, 4.166679466e-02, 8.333194884e-03, 1.388421297e-03, 1.986085603e-04,
    2.542680109e-05, 2.695181888e-06,
)  # fmt: skip

EXP_UNIT = 16
"""Unit of the argument of `masked_exp_of_units`."""


def masked_exp_of_units(x: mx.array, mask: mx.array) -> mx.array:
    """Return mask × exp(16 x) for a mask of ones and zeros: a polynomial for exp(x), squared four times.

    Relative errors: 6e-6 for |16 x| <= 16, 1e-5 up to 24; root mean square 7e-7 up to 8. Squaring amplifies rounding
    errors, so the powers are summed first and added to 1 last, in one rounding.
    """
    c2, c3, c4, c5, c6, c7, c8, c9 = _EXP_WIDE
    square, first = x * x, x * mask
    fourth, third = square * square, square * first
    low = first * (1 + x * c2) + third * (c3 + x * c4)
    high = (fourth * first) * (c5 + x * c6) + (fourth * third) * (c7 + x * c8 + square * c9)
    power = mask + (low + high)
    for _ in range(4):
        power = power * power
    return power


def exp_of_units(tanh: mx.array, cap: float) -> mx.array:
    """Return exp(cap × tanh) for |tanh| <= 1 and cap <= 16, within 5e-6 relative."""
    scale = cap / 16
    power = _polynomial(tanh, tuple(scale**power * factor for power, factor in enumerate(_EXP)))
    for _ in range(4):
        power = power * power
    return power


def rational_tanh(x: mx.array) -> mx.array:
    """Return tanh(x) for any x, within 4e-7 relative."""
    x = mx.clip(x, -7.9, 7.9)
    square = x * x
    return x * _polynomial(square, _TANH_OVER) / _polynomial(square, _TANH_UNDER)


def square_of_positive(x: mx.array) -> mx.array:
    """Return max(x, 0)². The absolute value vectorises inside `mx.compile` with any compiler."""
    positive = (x + mx.abs(x)) * 0.5
    return positive * positive


def _polynomial(x: mx.array, coefficients: tuple[float, ...]) -> mx.array:
    """Return sum(c[i] × x**i) by Estrin's scheme."""
    terms: list[mx.array | float] = list(coefficients)
    while len(terms) > 1:
        pairs: list[mx.array | float] = [low + high * x for low, high in zip(terms[::2], terms[1::2], strict=False)]
        terms = pairs + ([terms[-1]] if len(terms) % 2 else [])
        x = x * x
    assert isinstance(terms[0], mx.array)
    return terms[0]


# Sums and norms


def sum_rows(x: mx.array) -> mx.array:
    """Return row sums by a product with ones: faster and more exact than MLX's sum on a CPU (8e-5 at 65,536)."""
    return x @ mx.ones(x.shape[-1], dtype=x.dtype)


def rms_norm(x: mx.array) -> mx.array:
    return _rms_norm(x.astype(mx.float32))[0].astype(x.dtype)


def rotate_and_normalise(x: mx.array, *, offset: int | Positions, theta: float, scale: float) -> mx.array:
    cos, sin = rotation(offset, x.shape[1], x.shape[3], theta)
    return _rotated_norm(x.astype(mx.float32), cos, sin, mx.array(scale))[0].astype(x.dtype)


@differentiable
def _rms_norm(x: mx.array) -> tuple[mx.array, mx.array]:
    """Return the normalised x and the reciprocal of each row's root mean square (…,)."""
    reciprocal = reciprocal_root(sum_rows(square(x)), x.shape[-1])
    return multiply_rows(x, reciprocal[..., None]), reciprocal


@_rms_norm.vjp
def _rms_norm_vjp(x: mx.array, cotangents: tuple[mx.array, mx.array], outputs: tuple[mx.array, mx.array]) -> mx.array:
    """Return r (g − y mean(g y)), computed from the output, which the next product keeps anyway; x is not kept."""
    gradient, (out, reciprocal) = cotangents[0], outputs
    along = sum_rows(_product(gradient, out)) * (1 / out.shape[-1])
    return _norm_gradient(gradient, out, along[..., None], reciprocal[..., None]).astype(x.dtype)


@differentiable
def _rotated_norm(x: mx.array, cos: mx.array, sin: mx.array, scale: mx.array) -> tuple[mx.array, mx.array]:
    """Return scale × rotated and normalised heads (B, H, T, D), and each head's factor (B, T, H).

    Rotation preserves the sum of squares, so the norm is computed first and one loop does the rest. Halves are a
    separate axis, (B, H, T, 2, D / 2), whose reversal swaps them without a copy.
    """
    batch, tokens, heads, width = x.shape
    factor = scale * reciprocal_root(sum_rows(square(x)), width)
    halves = x.reshape(batch, tokens, heads, 2, width // 2).swapaxes(1, 2)
    out = rotate_halves(halves, halves[..., ::-1, :], cos, sin, factor.swapaxes(1, 2)[..., None, None])
    return out.reshape(batch, heads, tokens, width), factor


@_rotated_norm.vjp
def _rotated_norm_vjp(
    primals: tuple[mx.array, ...], cotangents: tuple[mx.array, mx.array], outputs: tuple[mx.array, mx.array]
) -> tuple[mx.array, ...]:
    """Return f Rᵀ(g − y mean(g y) / scale²) with f = scale × r, R the rotation and y the output; x is not kept."""
    x, cos, sin, scale = primals
    batch, tokens, heads, width = x.shape
    gradient, (out, factor) = cotangents[0], outputs
    along = sum_rows(_product(gradient, out)) * (1 / (width * mx.square(scale)))
    # In the memory order of x, so that the projections' gradients need no copy.
    halves = _across(gradient, out, along[..., None]).reshape(batch, heads, tokens, 2, width // 2).swapaxes(1, 2)
    d_x = rotate_halves(halves, halves[..., ::-1, :], cos[:, None], -sin[:, None], factor[..., None, None])
    return d_x.reshape(x.shape).astype(x.dtype), mx.zeros_like(cos), mx.zeros_like(sin), mx.zeros_like(scale)


def reciprocal_root(sum_of_squares: mx.array, count: int) -> mx.array:
    return mx.rsqrt(sum_of_squares * (1 / count) + RMS_NORM_EPSILON)


@compiled
def square(x: mx.array) -> mx.array:
    return x * x


@compiled
def _product(x: mx.array, y: mx.array) -> mx.array:
    return x * y


@compiled
def multiply_rows(x: mx.array, factor: mx.array) -> mx.array:
    return x * factor


@compiled
def _norm_gradient(gradient: mx.array, out: mx.array, along: mx.array, reciprocal: mx.array) -> mx.array:
    return (gradient - out * along) * reciprocal


@compiled
def _across(gradient: mx.array, out: mx.array, along: mx.array) -> mx.array:
    return gradient - out * along


@compiled
def rotate_halves(halves: mx.array, swapped: mx.array, cos: mx.array, sin: mx.array, factor: mx.array) -> mx.array:
    return (halves * cos + swapped * sin) * factor


# Products. The gradients of matrices are computed before that of the input is used (MLX would compute them last and
# keep every layer's activations until then), activations are recomputed instead of kept, frozen matrices have no
# gradient, and packed ones are unpacked for each product, because MLX's quantised product takes 40 times as long.


def squared_relu(x: mx.array) -> mx.array:
    return _squared_relu(x)


def linear(x: mx.array, weight: mx.array, activation: Activation = identity) -> mx.array:
    return _linear(activation)(x, weight)


def scale_columns(x: mx.array, factor: mx.array) -> mx.array:
    return _scale_columns(x, factor)


@cache
def _linear(activation: Activation) -> Callable[[mx.array, mx.array], mx.array]:
    @differentiable
    def forward(x: mx.array, weight: mx.array) -> mx.array:
        return activation(x) @ weight.T

    @forward.vjp
    def gradient(
        primals: tuple[mx.array, mx.array], cotangent: mx.array, output: mx.array
    ) -> tuple[mx.array, mx.array]:
        x, weight = primals
        # Depend on the cotangent, so that mx.compile recomputes the activation instead of keeping it.
        seen = x if activation is identity else activation(mx.depends([x], [cotangent])[0])
        d_weight = cotangent.reshape(-1, cotangent.shape[-1]).T @ seen.reshape(-1, x.shape[-1])
        (d_seen,) = mx.depends([cotangent @ weight], [d_weight])
        return _activation_gradient(activation, x, d_seen), d_weight.astype(weight.dtype)

    return forward


def frozen_linear(
    x: mx.array, matrix: mx.array | Packed, activation: Activation = identity, adapter: Adapter | None = None
) -> mx.array:
    packing = matrix[3:] if isinstance(matrix, Packed) else None
    frozen = matrix[:3] if isinstance(matrix, Packed) else (matrix,)
    if adapter is None:
        return _frozen_linear(activation, packing, None, None)(x, *frozen)
    keys = () if adapter.keys is None else (adapter.keys,)
    function = _frozen_linear(activation, packing, adapter.scale, adapter.dropout if keys else None)
    return function(x, *frozen, adapter.a, adapter.b, *keys)


@cache
def _frozen_linear(
    activation: Activation, packing: tuple[int, int] | None, scale: float | None, dropout: float | None
) -> Callable[..., mx.array]:
    """Return the function of (x, W or its three packed arrays, A, B, keys); the last three are optional."""
    num_frozen = 1 if packing is None else 3

    def whole(frozen: tuple[mx.array, ...]) -> mx.array:
        if packing is None:
            return frozen[0]
        numbers, scales, offsets = frozen
        return unpacked(Packed(numbers, scales, offsets, *packing))

    def shown(x: mx.array, keys: tuple[mx.array, ...]) -> mx.array:
        return x if dropout is None else dropped(x, keys[0], dropout)

    @differentiable
    def forward(x: mx.array, *arrays: mx.array) -> mx.array:
        frozen, small, keys = arrays[:num_frozen], arrays[num_frozen : num_frozen + 2], arrays[num_frozen + 2 :]
        seen = activation(x)
        out = seen @ whole(frozen).T
        if scale is None:
            return out
        # addmm adds in the same pass as the small product.
        return mx.addmm(out, shown(seen, keys) @ small[0], small[1], alpha=scale)

    @forward.vjp
    def gradient(primals: tuple[mx.array, ...], cotangent: mx.array, output: mx.array) -> Any:
        x, *arrays = primals
        # Depend on the cotangent, so that mx.compile recomputes these instead of keeping them.
        again, *frozen = mx.depends([x, *arrays[:num_frozen]], [cotangent])
        d_seen, slopes = cotangent @ whole(tuple(frozen)), list[mx.array]()
        if scale is not None:
            (a, b), keys = arrays[num_frozen : num_frozen + 2], tuple(arrays[num_frozen + 2 :])
            seen = shown(activation(again), keys)
            d_inner = scale * (cotangent @ b.T)
            d_b = scale * ((seen @ a).reshape(-1, a.shape[1]).T @ cotangent.reshape(-1, cotangent.shape[-1]))
            d_a = seen.reshape(-1, a.shape[0]).T @ d_inner.reshape(-1, a.shape[1])
            d_seen = mx.addmm(d_seen, d_inner, a.T) if dropout is None else d_seen + shown(d_inner @ a.T, keys)
            slopes = [d_a, d_b]
            (d_seen,) = mx.depends([d_seen], slopes)
            slopes += map(mx.zeros_like, keys)
        return [_activation_gradient(activation, x, d_seen), *map(mx.zeros_like, frozen), *slopes]

    return forward


def _activation_gradient(activation: Activation, x: mx.array, cotangent: mx.array) -> mx.array:
    if activation is identity:
        return cotangent.astype(x.dtype)
    gradient: mx.array = mx.vjp(activation, [x], [cotangent])[1][0]
    return gradient.astype(x.dtype)


@differentiable
def _squared_relu(x: mx.array) -> mx.array:
    return _fused_squared_relu(x)


@_squared_relu.vjp
def _squared_relu_vjp(x: mx.array, cotangent: mx.array, output: mx.array) -> mx.array:
    return _squared_relu_gradient(x, cotangent)


_fused_squared_relu = compiled(square_of_positive)


@compiled
def _squared_relu_gradient(x: mx.array, cotangent: mx.array) -> mx.array:
    return (x + mx.abs(x)) * cotangent


@differentiable
def _scale_columns(x: mx.array, factor: mx.array) -> mx.array:
    return (x * factor).astype(x.dtype)


@_scale_columns.vjp
def _scale_columns_vjp(
    primals: tuple[mx.array, mx.array], cotangent: mx.array, output: mx.array
) -> tuple[mx.array, mx.array]:
    """Use the output, which the next operation keeps anyway, so that x is not kept. A factor of 0 has no gradient."""
    x, factor = primals
    sums = (cotangent.astype(factor.dtype) * output).reshape(-1, output.shape[-1]).sum(0)
    d_factor = mx.where(factor == 0, 0.0, sums / factor).astype(factor.dtype)
    (d_x,) = mx.depends([(cotangent * factor).astype(x.dtype)], [d_factor])
    return d_x, d_factor


# Attention


def causal_attention(q: mx.array, k: mx.array, v: mx.array, window: int | None = None) -> mx.array:
    """The softmax does not subtract the maximum, so every |q·k| / sqrt(D) must be below 24.

    RMS-normalised heads up to width 256 satisfy that, also scaled by 1.2.
    """
    batch, heads, tokens, width = q.shape
    window = tokens if window is None else min(window, tokens)
    # Query heads of one group share a key head: (B, K, G, T, D) against (B, K, 1, T, D).
    dtype, (q, k, v) = q.dtype, (x.astype(mx.float32) for x in (q, k, v))
    q = q.reshape(batch, k.shape[1], heads // k.shape[1], tokens, width) * (width**-0.5 / EXP_UNIT)
    out, _ = _windowed(window)(q, k[:, :, None], v[:, :, None])
    return out.reshape(batch, tokens, heads, width).astype(dtype)


def masked_attention(q: mx.array, k: mx.array, v: mx.array, visible: mx.array) -> mx.array:
    batch, heads, tokens, width = q.shape
    dtype, (q, k, v) = q.dtype, (x.astype(mx.float32) for x in (q, k, v))
    q = q.reshape(batch, k.shape[1], heads // k.shape[1], tokens, width) * (width**-0.5 / EXP_UNIT)
    weights = masked_exp(q @ k[:, :, None].swapaxes(-1, -2), visible[:, None, None].astype(mx.float32))
    out = multiply_rows(weights @ v[:, :, None], (1 / sum_rows(weights))[..., None])
    return out.reshape(batch, heads, tokens, width).swapaxes(1, 2).astype(dtype)


@cache
def _windowed(window: int) -> differentiable[[mx.array, mx.array, mx.array], tuple[mx.array, mx.array]]:
    """Return the attention function of one window, with its gradient.

    It takes q (B, K, G, T, D), whose products with k (B, K, 1, T, D) are scores in `EXP_UNIT`s, and v like k; it
    returns the output (B, T, K, G, D) and the reciprocals of the row sums (B, K, G, T).
    """

    @differentiable
    def attend(q: mx.array, k: mx.array, v: mx.array) -> tuple[mx.array, mx.array]:
        outs, reciprocals = [], []
        for rows, past, mask in _blocks(q.shape[-2], window):
            weights = masked_exp(q[rows] @ k[past].swapaxes(-1, -2), mask)
            reciprocal = 1 / sum_rows(weights)
            outs.append(multiply_rows(weights @ v[past], reciprocal[..., None]).transpose(0, 3, 1, 2, 4))
            reciprocals.append(reciprocal)
        return mx.concatenate(outs, axis=1), mx.concatenate(reciprocals, axis=-1)

    @attend.vjp
    def gradient(
        primals: tuple[mx.array, mx.array, mx.array],
        cotangents: tuple[mx.array, mx.array],
        outputs: tuple[mx.array, mx.array],
    ) -> tuple[mx.array, mx.array, mx.array]:
        """Recompute each block's weights, so that no (T, T) matrix outlives its block."""
        # Depend on the cotangent, so that mx.compile recomputes the weights instead of keeping them.
        q, k, v = mx.depends(list(primals), [cotangents[0]])
        out, reciprocal = (outputs[0].transpose(0, 2, 3, 1, 4), outputs[1])
        # Fold the row factors into the small matrices, so that the large ones need one product each.
        d_out = multiply_rows(cotangents[0].transpose(0, 2, 3, 1, 4), reciprocal[..., None])
        inner = sum_rows(multiply_rows(d_out, out))[..., None]
        d_q: list[mx.array] = []
        d_keys: list[tuple[int, mx.array]] = []
        d_values: list[tuple[int, mx.array]] = []
        for rows, past, mask in _blocks(q.shape[-2], window):
            weights = masked_exp(q[rows] @ k[past].swapaxes(-1, -2), mask)
            d_scores = _softmax_gradient(weights, d_out[rows] @ v[past].swapaxes(-1, -2), inner[rows])
            d_q.append(d_scores @ k[past])
            first = past[1].start
            d_keys.append((first, _sum_groups(d_scores.swapaxes(-1, -2) @ q[rows])))
            d_values.append((first, _sum_groups(weights.swapaxes(-1, -2) @ d_out[rows])))
        return mx.concatenate(d_q, axis=-2), _sum_spans(d_keys), _sum_spans(d_values)

    return attend


def _blocks(tokens: int, window: int) -> Iterator[tuple[Any, Any, mx.array]]:
    """Yield (rows, keys, mask) of each block of queries; keys that no query of the block sees are skipped."""
    for start in range(0, tokens, _BLOCK_TOKENS):
        stop = min(start + _BLOCK_TOKENS, tokens)
        first = max(0, start - window) // _BLOCK_TOKENS * _BLOCK_TOKENS
        # Relative to `first`, so that blocks with equal patterns share a mask.
        mask = _mask(start - first, stop - first, window)
        yield (..., slice(start, stop), slice(None)), (..., slice(first, stop), slice(None)), mask


@cache
def _mask(start: int, stop: int, window: int) -> mx.array:
    return mx.array(visible_keys(start, stop, window).astype(np.float32))


def _sum_spans(parts: list[tuple[int, mx.array]]) -> mx.array:
    """Add gradients; each covers the tokens from its first one to the end of its block."""
    sums: list[mx.array] = []
    for end in range(len(parts)):
        start, stop = end * _BLOCK_TOKENS, (end + 1) * _BLOCK_TOKENS
        pieces = [part[..., start - first : stop - first, :] for first, part in parts[end:] if first <= start]
        sums.append(sum(pieces[1:], pieces[0]))
    return mx.concatenate(sums, axis=-2)


def _sum_groups(gradient: mx.array) -> mx.array:
    """Sum over the query heads (axis 2) that share a key/value head."""
    return gradient if gradient.shape[2] == 1 else gradient.sum(2, keepdims=True)


@compiled
def masked_exp(scores: mx.array, mask: mx.array) -> mx.array:
    return masked_exp_of_units(scores, mask)


@compiled
def _softmax_gradient(weights: mx.array, d_weights: mx.array, inner: mx.array) -> mx.array:
    return weights * (d_weights - inner) * EXP_UNIT


# Losses


def soft_cap(logits: mx.array) -> mx.array:
    return _cap(logits.astype(mx.float32))


def chunk_rows(vocab_size: int) -> int:
    return max(_LEAST_ROWS, _CHUNK_FLOATS // vocab_size)


def tanh_of_head(x: mx.array, weight: mx.array) -> mx.array:
    return _tanh((x.astype(mx.float32) * (1 / SOFT_CAP)) @ weight.astype(mx.float32).T)


def exp_of_capped(tanh: mx.array, cap: float) -> mx.array:
    return _exp_of(cap)(tanh) if cap <= 16 else mx.exp(cap * tanh)


class _Chunk(NamedTuple):
    """A chunk's contribution to a loss.

    The gradient in x Wᵀ is slope × row_factor, except for the target's term, which is subtracted by index. So factors
    per row are applied to the thin matrices, and the wide one needs few passes.
    """

    sums: list[mx.array]
    slope: mx.array
    """(N, V)."""
    row_factor: mx.array | None
    """(N, 1); None: 1."""
    target: mx.array
    target_slope: mx.array
    """(N, 1), to be subtracted."""


def cross_entropy_sum(
    x: mx.array, weight: mx.array, targets: mx.array, row_weights: mx.array, *, frozen_head: bool = False
) -> mx.array:
    """The gradient in a logit is factor × (p − 1 at the target) × (1 − tanh²) with p = exp / sum."""

    def of_chunk(part: slice, tanh: mx.array, after: list[mx.array]) -> _Chunk:
        target, factor = targets[part], row_weights[part]
        exponentials = exp_of_capped(tanh, SOFT_CAP)
        sums = sum_rows(exponentials)
        target_tanh = mx.take_along_axis(tanh, target[:, None], axis=-1)[:, 0]
        losses = (mx.log(sums) - SOFT_CAP * target_tanh) * factor
        target_slope = (factor * (1 - mx.square(target_tanh)))[:, None]
        return _Chunk([losses.sum()], _slope(exponentials, tanh), (factor / sums)[:, None], target, target_slope)

    return _sum_over_chunks(x[None], weight, of_chunk, [1.0], frozen_head=frozen_head)[0]


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
    def of_chunk(part: slice, tanh: mx.array, after: list[mx.array]) -> _Chunk:
        target, factor = targets[:, part].reshape(-1), row_weights[:, part].reshape(-1)
        return _distilled(tanh, teacher(part, after), target, factor, mix, capped=capped)

    total, ce, kl = _sum_over_chunks(x, weight, of_chunk, mix.coefficients, frozen_head=frozen_head)
    return total, mx.stop_gradient(ce), mx.stop_gradient(kl)


def _distilled(
    tanh: mx.array, logits: mx.array, target: mx.array, factor: mx.array, mix: Mix, *, capped: bool
) -> _Chunk:
    """Return the weighted sums of cross-entropies and divergences of a chunk, with their gradient."""
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
    # Per row: the factors that make exponentials probabilities.
    student_norm, teacher_norm = 1 / sums_soft, 1 / teacher_sums
    # log p − log q is (teacher's logit − student's) / T, plus this constant per row.
    constant = mx.log(sums_soft) - mx.log(teacher_sums) - shift
    difference = _difference(teacher_exp, logits, tanh)
    mean_norm = teacher_norm / soft
    pull = factor * (mix.weight * soft)
    ce_factor = factor * ((1 - mix.weight) / sums)
    if mix.top_k is None or mix.top_k >= logits.shape[-1]:
        kl = sum_rows(difference) * mean_norm + constant
        pulls = ce_factor[:, None], (pull * student_norm)[:, None], (pull * teacher_norm)[:, None]
        slope = _distilled_slope(exp, exp_soft, teacher_exp, tanh, *pulls)
    else:
        border = mx.partition(logits, logits.shape[-1] - mix.top_k, axis=-1)[:, -mix.top_k, None]
        top = (logits >= border).astype(mx.float32)
        teacher_rest = sum_rows(teacher_exp * (1 - top)) * teacher_norm
        student_rest = sum_rows(exp_soft * (1 - top)) * student_norm
        rest = mx.log(mx.maximum(teacher_rest, TINY)) - mx.log(mx.maximum(student_rest, TINY))
        kl = sum_rows(difference * top) * mean_norm + constant * (1 - teacher_rest) + teacher_rest * rest
        ratio = teacher_rest / mx.maximum(student_rest, TINY)
        aim = top * teacher_exp * teacher_norm[:, None] + (1 - top) * exp_soft * (student_norm * ratio)[:, None]
        slope = ce_factor[:, None] * exp + pull[:, None] * (exp_soft * student_norm[:, None] - aim)
        slope = slope * (1 - mx.square(tanh))
    target_slope = ((1 - mix.weight) * factor * (1 - mx.square(target_tanh)))[:, None]
    return _Chunk([(ce * factor).sum(), (kl * factor).sum()], slope, None, target, target_slope)


def _sum_over_chunks(
    x: mx.array,
    weight: mx.array,
    of_chunk: Callable[[slice, mx.array, list[mx.array]], _Chunk],
    coefficients: Sequence[float],
    *,
    frozen_head: bool,
) -> list[mx.array]:
    """As `ops.loss.sum_over_chunks`, in float32."""

    def sums_and_gradients(x: mx.array, weight: mx.array) -> tuple[list[mx.array], list[mx.array], mx.array]:
        sums, d_x, targets, at_target, done = [], list[mx.array](), [], [], list[mx.array]()
        d_weight = mx.zeros((1, 1) if frozen_head else weight.shape)
        for part in split_positions(x, weight.shape[0]):
            # Depend on the previous chunk: otherwise MLX would compute the logits of all chunks first.
            (chunk,) = mx.depends([x[:, part].reshape(-1, x.shape[2])], done)
            found = of_chunk(part, tanh_of_head(chunk, weight), done)
            sums.append(found.sums)
            product, rows = found.slope @ weight, chunk
            if found.row_factor is not None:
                product, rows = product * found.row_factor, chunk * found.row_factor
            d_x.append(product - found.target_slope * weight[found.target])
            done = [d_x[-1], *found.sums]
            if not frozen_head:
                d_weight = mx.addmm(d_weight, found.slope.T, rows)
                targets.append(found.target)
                at_target.append(found.target_slope * chunk)
                # One number of the sum, not the sum itself: the next chunk's sum reuses its memory.
                done += [d_weight[:1, :1] * 1.0, at_target[-1]]
        if not frozen_head:
            d_weight = d_weight.at[mx.concatenate(targets)].subtract(mx.concatenate(at_target))
        return [sum(each[1:], each[0]) for each in zip(*sums, strict=True)], d_x, d_weight

    return with_gradients(sums_and_gradients, x.astype(mx.float32), weight.astype(mx.float32), coefficients)


@compiled
def _cap(logits: mx.array) -> mx.array:
    return SOFT_CAP * rational_tanh(logits * (1 / SOFT_CAP))


_tanh = compiled(rational_tanh)


# One output per kernel: a compiled loop with two outputs takes twice as long.
@cache
def _exp_of(cap: float) -> Callable[[mx.array], mx.array]:
    return compiled(partial(exp_of_units, cap=cap))


@compiled
def _slope(exponentials: mx.array, tanh: mx.array) -> mx.array:
    """Return exp × (1 − tanh²), where the second factor is the derivative of the soft cap."""
    return exponentials * (1 - tanh * tanh)


@compiled
def _distilled_slope(
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


# The optimizer

_FRESH_GRAM = 2  # quintics after which the Gram matrix is recomputed


def apply_quintics(x: mx.array, quintics: Sequence[Quintic]) -> mx.array:
    """Multiply long matrices (S, R, C) by polynomials of their Gram matrices, which needs fewer long products.

    Each quintic multiplies x by a polynomial of its Gram matrix. These polynomials commute, so their product needs only
    small matrices. Squaring loses half of the digits of small singular values, and each further quintic amplifies the
    error. So the Gram matrix is recomputed in between, and half precision uses `multiply_quintics`.
    """
    rows, columns = x.shape[-2:]
    if x.dtype != mx.float32 or max(rows, columns) < 2 * min(rows, columns):
        return multiply_quintics(x, quintics)
    for part in (quintics[:_FRESH_GRAM], quintics[_FRESH_GRAM:]):
        gram, product = gram_matrix(x), None
        identity = mx.eye(gram.shape[-1])
        for index, (a, b, c) in enumerate(part):
            inner = mx.addmm(b * gram + a * identity, gram, gram, alpha=c)
            product = inner if product is None else product @ inner
            if index < len(part) - 1:
                gram = gram @ inner @ inner
        if product is not None:
            x = x @ product if rows > columns else product @ x
    return x
