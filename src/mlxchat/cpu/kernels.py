"""CPU versions of operations: few passes over memory, fast exponentials, gradients that keep few activations.

A function with the name of one in `mlxchat.ops` computes the same; documentation and letters of shapes are there. All
compute in float32 and return the dtype of their input. On a CPU MLX takes 5 ns per number for exp and 20 for tanh; the
polynomials here take 0.7 and 0.5, as one vectorised loop each. `mx.compile` fuses at most eleven operations, so
polynomials use Estrin's scheme (pairs, then pairs of pairs), whose chains are short. Errors were measured against
float64.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import cache, wraps
from typing import Any, cast

import mlx.core as mx
import numpy as np

from mlxchat.cpu import plain_version
from mlxchat.engine.sample import MOST_DRAW
from mlxchat.model import gpt, lora
from mlxchat.model.gpt import RMS_NORM_EPSILON, Mask
from mlxchat.model.lora import FrozenLinear
from mlxchat.ops.device import differentiable
from mlxchat.ops.loss import SOFT_CAP, Found, ScoreKind, split_positions, with_gradients
from mlxchat.ops.machine import CPU_LEAST_LOGITS_ROWS as _LEAST_ROWS
from mlxchat.ops.machine import CPU_LOGITS as _CHUNK_FLOATS
from mlxchat.optim import muon
from mlxchat.optim.muon import Quintic, gram_matrix

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

_TABLE_TOKENS = 1024
_BLOCK_TOKENS = 128  # queries per block of attention
EXP_UNIT = 16  # unit of the argument of `masked_exp_of_units`


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


@mx.compile
def exp_of_capped(tanh: mx.array) -> mx.array:
    """Return exp(15 tanh) for |tanh| <= 1, within 5e-6 relative: a polynomial for exp(15/16 tanh), to the power 16."""
    power = _polynomial(tanh, tuple((SOFT_CAP / 16) ** power * factor for power, factor in enumerate(_EXP)))
    for _ in range(4):
        power = power * power
    return power


def rational_tanh(x: mx.array) -> mx.array:
    """Return tanh(x) for any x, within 4e-7 relative."""
    x = mx.clip(x, -7.9, 7.9)
    square = x * x
    return x * _polynomial(square, _TANH_OVER) / _polynomial(square, _TANH_UNDER)


def _polynomial(x: mx.array, coefficients: tuple[float, ...]) -> mx.array:
    """Return sum(c[i] × x**i) by Estrin's scheme."""
    terms: list[mx.array | float] = list(coefficients)
    while len(terms) > 1:
        pairs: list[mx.array | float] = [low + high * x for low, high in zip(terms[::2], terms[1::2], strict=False)]
        terms = pairs + ([terms[-1]] if len(terms) % 2 else [])
        x = x * x
    assert isinstance(terms[0], mx.array)
    return terms[0]


# Loops that MLX fuses

square = mx.compile(lambda x: x * x)
multiply_rows = mx.compile(lambda x, factor: x * factor)
rotate_halves = mx.compile(lambda halves, swapped, cos, sin, factor: (halves * cos + swapped * sin) * factor)
# max(x, 0)² and its gradient; the absolute value vectorises with any compiler.
square_of_positive = mx.compile(lambda x: mx.square((x + mx.abs(x)) * 0.5))
_squared_relu_gradient = mx.compile(lambda x, cotangent: (x + mx.abs(x)) * cotangent)
_norm_gradient = mx.compile(lambda gradient, out, along, reciprocal: (gradient - out * along) * reciprocal)
_across = mx.compile(lambda gradient, out, along: gradient - out * along)
_softmax_gradient = mx.compile(lambda weights, d_weights, inner: weights * (d_weights - inner) * EXP_UNIT)
# exp × the derivative of the soft cap
_slope = mx.compile(lambda exponentials, tanh: exponentials * (1 - tanh * tanh))


# Sums and norms


def sum_rows(x: mx.array) -> mx.array:
    """Return row sums by a product with ones: faster and more exact than MLX's sum on a CPU (8e-5 at 65,536)."""
    return x @ mx.ones(x.shape[-1], dtype=x.dtype)


def for_many_tokens(version: Callable[..., mx.array]) -> Callable[..., mx.array]:
    """Use MLX's own operations for one token of each row (axis 1): those here take longer to set up."""

    @wraps(version)
    def chosen(x: mx.array, *args: Any, **kwargs: Any) -> mx.array:
        function = plain_version(getattr(gpt, version.__name__)) if x.shape[1] == 1 else version
        found: mx.array = function(x, *args, **kwargs)
        return found

    return chosen


@for_many_tokens
def rms_norm(x: mx.array) -> mx.array:
    return _rms_norm(x.astype(mx.float32))[0].astype(x.dtype)


@for_many_tokens
def rotate_and_normalise(x: mx.array, *, offset: int | mx.array, theta: float) -> mx.array:
    cos, sin = rotation(offset, x.shape[1], x.shape[3], theta)
    return _rotated_norm(x.astype(mx.float32), cos, sin, mx.array(1.0))[0].astype(x.dtype)


def rotation(offset: int | mx.array, tokens: int, width: int, theta: float) -> tuple[mx.array, mx.array]:
    """Return the factors of halves and of swapped halves, (T, 2, D / 2), or (B, 1, T, 2, D / 2) for rows."""
    if isinstance(offset, int):
        blocks = -(-(offset + tokens) // _TABLE_TOKENS)
        cos, sin = (table[offset : offset + tokens] for table in _tables(blocks, width, theta))
        return cos, sin
    blocks = -(-(cast(int, offset.max().item()) + tokens) // _TABLE_TOKENS)
    places = offset[:, None] + mx.arange(tokens)
    cos, sin = (table[places][:, None] for table in _tables(blocks, width, theta))
    return cos, sin


@cache
def _tables(blocks: int, width: int, theta: float) -> tuple[mx.array, mx.array]:
    """Return tables of cosines and sines (T, 2, D / 2)."""
    frequencies = 1 / np.float32(theta) ** (np.arange(0, width, 2, dtype=np.float32) / np.float32(width))
    turned = np.arange(blocks * _TABLE_TOKENS, dtype=np.float32)[:, None] * frequencies
    cos, sin = np.cos(turned), np.sin(turned)
    return mx.array(np.stack([cos, cos], axis=1)), mx.array(np.stack([sin, -sin], axis=1))


@differentiable
def _rms_norm(x: mx.array) -> tuple[mx.array, mx.array]:
    """Return the normalised x and the reciprocal of each row's root mean square (…,)."""
    reciprocal = reciprocal_root(sum_rows(square(x)), x.shape[-1])
    return multiply_rows(x, reciprocal[..., None]), reciprocal


@_rms_norm.vjp
def _rms_norm_vjp(x: mx.array, cotangents: tuple[mx.array, mx.array], outputs: tuple[mx.array, mx.array]) -> mx.array:
    """Return r (g − y mean(g y)), computed from the output, which the next product keeps anyway; x is not kept."""
    gradient, (out, reciprocal) = cotangents[0], outputs
    along = sum_rows(multiply_rows(gradient, out)) * (1 / out.shape[-1])
    slope = _norm_gradient(gradient, out, along[..., None], reciprocal[..., None])
    return cast(mx.array, slope.astype(x.dtype))


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
    along = sum_rows(multiply_rows(gradient, out)) * (1 / (width * mx.square(scale)))
    # In the memory order of x, so that the projections' gradients need no copy.
    halves = _across(gradient, out, along[..., None]).reshape(batch, heads, tokens, 2, width // 2).swapaxes(1, 2)
    d_x = rotate_halves(halves, halves[..., ::-1, :], cos[:, None], -sin[:, None], factor[..., None, None])
    return d_x.reshape(x.shape).astype(x.dtype), mx.zeros_like(cos), mx.zeros_like(sin), mx.zeros_like(scale)


def reciprocal_root(sum_of_squares: mx.array, count: int) -> mx.array:
    return mx.rsqrt(sum_of_squares * (1 / count) + RMS_NORM_EPSILON)


# Products. The gradients of matrices are computed before that of the input is used (MLX would compute them last and
# keep every layer's activations until then), activations are recomputed instead of kept, frozen matrices have no
# gradient, and packed ones are unpacked for each product, because MLX's quantised product takes 40 times as long.


@for_many_tokens
def squared_relu(x: mx.array) -> mx.array:
    return _squared_relu(x)


@for_many_tokens
def linear(x: mx.array, weight: mx.array) -> mx.array:
    return _linear(x, weight)


@differentiable
def _linear(x: mx.array, weight: mx.array) -> mx.array:
    return x @ weight.T


@_linear.vjp
def _linear_vjp(primals: tuple[mx.array, mx.array], cotangent: mx.array, output: mx.array) -> tuple[mx.array, mx.array]:
    x, weight = primals
    d_weight = cotangent.reshape(-1, cotangent.shape[-1]).T @ x.reshape(-1, x.shape[-1])
    (d_x,) = mx.depends([cotangent @ weight], [d_weight])
    return d_x.astype(x.dtype), d_weight.astype(weight.dtype)


def frozen_linear(x: mx.array, layer: FrozenLinear) -> mx.array:
    # MLX's quantised product takes as long for each row as unpacking the matrix.
    if x.size > x.shape[-1]:
        return x @ mx.stop_gradient(layer.base).T
    found: mx.array = plain_version(lora.frozen_linear)(x, layer)
    return found


@differentiable
def _squared_relu(x: mx.array) -> mx.array:
    return square_of_positive(x)


@_squared_relu.vjp
def _squared_relu_vjp(x: mx.array, cotangent: mx.array, output: mx.array) -> mx.array:
    return cast(mx.array, _squared_relu_gradient(x, cotangent))


# Attention


def window_mask(tokens: int, window: int | None, dtype: mx.Dtype) -> int:
    """Return the window, for `attention`'s blocks."""
    return tokens if window is None else min(window, tokens)


def attention(q: mx.array, k: mx.array, v: mx.array, mask: Mask | int, scale: float) -> mx.array:
    """The softmax does not subtract the maximum, so every scale × |q·k| must be below 24.

    RMS-normalised heads up to width 256 satisfy that, also scaled by 1.2.
    """
    batch, heads, tokens, width = q.shape
    # Query heads of one group share a key head: (B, K, G, T, D) against (B, K, 1, T, D).
    dtype, (q, k, v) = q.dtype, (x.astype(mx.float32) for x in (q, k, v))
    q = q.reshape(batch, k.shape[1], heads // k.shape[1], tokens, width) * (scale / EXP_UNIT)
    if isinstance(mask, int):
        out, _ = _windowed(mask)(q, k[:, :, None], v[:, :, None])
        return out.reshape(batch, tokens, heads, width).astype(dtype)
    visible = _visible(mask, tokens, k.shape[2])
    weights = masked_exp(q @ k[:, :, None].swapaxes(-1, -2), visible.astype(mx.float32))
    out = multiply_rows(weights @ v[:, :, None], (1 / sum_rows(weights))[..., None])
    return cast(mx.array, out.reshape(batch, heads, tokens, width).swapaxes(1, 2).astype(dtype))


def _visible(mask: Mask, tokens: int, keys: int) -> mx.array:
    """Return which keys each query sees, broadcast to (B, K, G, T, S)."""
    if mask is None:
        return mx.ones(1)
    if isinstance(mask, str):
        return mx.arange(keys) <= mx.arange(keys - tokens, keys)[:, None]
    visible = mask if mask.dtype == mx.bool_ else mask == 0
    return visible[:, :, None] if visible.ndim == 4 else visible


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
        primals: tuple[mx.array, mx.array, mx.array], cotangents: list[mx.array], outputs: list[mx.array]
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
    query, key = np.arange(start, stop)[:, None], np.arange(stop)
    return mx.array(((key <= query) & (key >= query - window)).astype(np.float32))


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


masked_exp = mx.compile(masked_exp_of_units)


# Sampling, by NumPy: MLX's argmax takes 7 ns per number on a CPU, its partition 40 and its running sum 30


def most_likely(logits: mx.array) -> mx.array:
    return mx.array(np.asarray(logits).argmax(axis=-1).astype(np.uint32))


def likeliest(scores: mx.array, count: int) -> mx.array:
    values = np.asarray(scores)
    some = np.argpartition(values, -count, axis=-1)[:, -count:]
    order = np.argsort(-np.take_along_axis(values, some, axis=-1), axis=-1)
    return mx.array(np.take_along_axis(some, order, axis=-1).astype(np.uint32))


def draw_places(probabilities: mx.array, draws: Sequence[float]) -> mx.array:
    sums = np.cumsum(np.asarray(probabilities), axis=-1)
    aims = np.minimum(draws, MOST_DRAW).astype(np.float32) * sums[:, -1]
    places = [np.searchsorted(row, aim, side="right") for row, aim in zip(sums, aims, strict=True)]
    return mx.array(np.minimum(places, sums.shape[1] - 1).astype(np.int32)[:, None])


# Losses


def soft_cap(logits: mx.array) -> mx.array:
    return _cap(logits.astype(mx.float32))


def chunk_rows(vocab_size: int) -> int:
    return max(_LEAST_ROWS, _CHUNK_FLOATS // vocab_size)


def tanh_of_head(x: mx.array, weight: mx.array) -> mx.array:
    return _tanh((x.astype(mx.float32) * (1 / SOFT_CAP)) @ weight.astype(mx.float32).T)


def capped_logits(x: mx.array, weight: mx.array) -> mx.array:
    return SOFT_CAP * tanh_of_head(x, weight)


def token_scores(x: mx.array, weight: mx.array, targets: mx.array, kinds: Sequence[ScoreKind]) -> list[mx.array]:
    chunks: list[list[mx.array]] = []
    for rows in split_positions(x[None], chunk_rows(len(weight))):
        tanh, target = tanh_of_head(x[rows], weight), mx.maximum(targets[rows], 0)
        logits = SOFT_CAP * mx.take_along_axis(tanh, target[:, None], axis=-1)[:, 0]
        exponentials = exp_of_capped(tanh)
        sums = sum_rows(exponentials)
        found: dict[ScoreKind, mx.array] = {
            "losses": mx.log(sums) - logits,
            "entropies": mx.log(sums) - SOFT_CAP * sum_rows(exponentials * tanh) / sums,
            "logits": logits,
            "likeliest": tanh.argmax(-1),
        }
        chunks.append([mx.where(targets[rows] >= 0, found[kind], 0) for kind in kinds])
    return [mx.concatenate(list(parts)) for parts in zip(*chunks, strict=True)]


def cross_entropy_sum(
    x: mx.array, weight: mx.array, targets: mx.array, row_weights: mx.array, *, frozen_head: bool = False
) -> mx.array:
    """The gradient in a logit is factor × (p − 1 at the target) × (1 − tanh²) with p = exp / sum.

    The target's term is subtracted by index, factors of rows are applied to thin matrices: few passes over wide ones.
    """

    def loss_and_gradients(x: mx.array, weight: mx.array) -> Found:
        losses, d_x, at_targets, done = list[mx.array](), list[mx.array](), list[mx.array](), list[mx.array]()
        d_weight = None if frozen_head else mx.zeros(weight.shape)
        for part in split_positions(x, chunk_rows(len(weight))):
            # Depend on the previous chunk: otherwise MLX would compute the logits of all chunks first.
            (rows,) = mx.depends([x[0, part]], done)
            tanh, target, factor = tanh_of_head(rows, weight), targets[part], row_weights[part]
            exponentials = exp_of_capped(tanh)
            sums = sum_rows(exponentials)
            target_tanh = mx.take_along_axis(tanh, target[:, None], axis=-1)[:, 0]
            losses.append(((mx.log(sums) - SOFT_CAP * target_tanh) * factor).sum())
            slope, row_factor = _slope(exponentials, tanh), (factor / sums)[:, None]
            target_slope = (factor * (1 - mx.square(target_tanh)))[:, None]
            d_x.append((slope @ weight) * row_factor - target_slope * weight[target])
            done = [d_x[-1], losses[-1]]
            if d_weight is not None:
                d_weight = mx.addmm(d_weight, slope.T, rows * row_factor)
                at_targets.append(target_slope * rows)
                # One number of the sum, not the sum itself: the next chunk's sum reuses its memory.
                done += [d_weight[:1, :1] * 1.0, at_targets[-1]]
        if d_weight is not None:
            d_weight = d_weight.at[targets].subtract(mx.concatenate(at_targets))
        return [sum(losses[1:], losses[0])], d_x, d_weight

    x, weight = x[None].astype(mx.float32), weight.astype(mx.float32)
    return with_gradients(loss_and_gradients, x, weight, frozen_head=frozen_head)[0]


_cap = mx.compile(lambda logits: SOFT_CAP * rational_tanh(logits * (1 / SOFT_CAP)))
_tanh = mx.compile(rational_tanh)


# The optimizer

_FRESH_GRAM = 2  # quintics after which the Gram matrix is recomputed


def apply_quintics(x: mx.array, quintics: Sequence[Quintic]) -> mx.array:
    """Multiply long matrices (S, R, C) by polynomials of their Gram matrices, which needs fewer long products.

    Each quintic multiplies x by a polynomial of its Gram matrix. These polynomials commute, so their product needs only
    small matrices. Squaring loses half of the digits of small singular values, and each further quintic amplifies the
    error. So the Gram matrix is recomputed in between, and half precision takes the plain way.
    """
    rows, columns = x.shape[-2:]
    if x.dtype != mx.float32 or max(rows, columns) < 2 * min(rows, columns):
        found: mx.array = plain_version(muon.apply_quintics)(x, quintics)
        return found
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
