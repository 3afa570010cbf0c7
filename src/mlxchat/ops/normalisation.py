"""RMS norm without weights, and what queries and keys go through: rotation, norm, scale.

On a CPU both have gradients of their own in few passes; on a GPU they are MLX's fused operations. Both compute in
float32 and return what they are given: float32 or bfloat16.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import mlx.core as mx
import numpy as np

from mlxchat.ops.compiled import compiled, differentiable, sum_rows
from mlxchat.ops.device import backend

# float32's machine epsilon: what torch's F.rms_norm(eps=None) uses, so what nanochat's weights were trained with.
RMS_NORM_EPSILON = 1.1920929e-07
_TABLE_TOKENS = 1024


@dataclass(frozen=True)
class Positions:
    """Where each token stands, for rows in which several continuations follow one beginning."""

    of: mx.array
    """(B, T), from 0."""
    end: int
    """Above all of them."""


def rms_norm(x: mx.array) -> mx.array:
    """Return x divided by the root of its mean square over the last axis."""
    if backend() == "cpu":
        return _rms_norm(x.astype(mx.float32))[0].astype(x.dtype)
    return mx.fast.rms_norm(x, None, RMS_NORM_EPSILON)


def rotate_and_normalise(x: mx.array, *, offset: int | Positions, theta: float, scale: float) -> mx.array:
    """Return heads (B, H, T, D) rotated by minus their position's angles, RMS-normalised and scaled.

    nanochat rotates by −θ: halves x1, x2 → x1 cos + x2 sin, x2 cos − x1 sin.

    Args:
        x: (B, T, H, D) queries or keys as they come from their projection.
        offset: position of the first token, or of each one.
        theta: base of the wavelengths.
        scale: factor after the norm.
    """
    if isinstance(offset, Positions):
        tables = _rotation(-(-offset.end // _TABLE_TOKENS), x.shape[3], theta)
        cos, sin = (table[offset.of][:, None] for table in tables)
        return _rotated_norm(x.astype(mx.float32), cos, sin, mx.array(scale))[0].astype(x.dtype)
    if backend() == "cpu":
        end = offset + x.shape[1]
        cos, sin = (table[offset:end] for table in _rotation(-(-end // _TABLE_TOKENS), x.shape[3], theta))
        return _rotated_norm(x.astype(mx.float32), cos, sin, mx.array(scale))[0].astype(x.dtype)
    x = x.swapaxes(1, 2)
    # A scale of −1 on the positions turns MLX's rotation by θ into nanochat's.
    rotated = mx.fast.rope(x, x.shape[-1], traditional=False, base=theta, scale=-1.0, offset=offset)
    normalised = mx.fast.rms_norm(rotated, None, RMS_NORM_EPSILON)
    return normalised if scale == 1.0 else normalised * scale


@differentiable
def _rms_norm(x: mx.array) -> tuple[mx.array, mx.array]:
    """Return the normalised x and the reciprocal of each row's root mean square (…,)."""
    reciprocal = _reciprocal_root(sum_rows(_square(x)), x.shape[-1])
    return _multiply(x, reciprocal[..., None]), reciprocal


@_rms_norm.vjp
def _rms_norm_vjp(x: mx.array, cotangents: tuple[mx.array, mx.array], outputs: tuple[mx.array, mx.array]) -> mx.array:
    """Return r (g − y mean(g y)): from the output, which the next product keeps anyway, so that x need not be kept."""
    gradient, (out, reciprocal) = cotangents[0], outputs
    along = sum_rows(_product(gradient, out)) * (1 / out.shape[-1])
    return _norm_gradient(gradient, out, along[..., None], reciprocal[..., None]).astype(x.dtype)


@differentiable
def _rotated_norm(x: mx.array, cos: mx.array, sin: mx.array, scale: mx.array) -> tuple[mx.array, mx.array]:
    """Return scale × rotated and normalised heads (B, H, T, D), and each head's factor (B, T, H).

    A rotation keeps the sum of squares, so the norm is taken before it and one loop does the rest. Halves are an axis
    of their own: (B, H, T, 2, D / 2), whose reversal swaps them without a copy.
    """
    batch, tokens, heads, width = x.shape
    factor = scale * _reciprocal_root(sum_rows(_square(x)), width)
    halves = x.reshape(batch, tokens, heads, 2, width // 2).swapaxes(1, 2)
    out = _rotate(halves, halves[..., ::-1, :], cos, sin, factor.swapaxes(1, 2)[..., None, None])
    return out.reshape(batch, heads, tokens, width), factor


@_rotated_norm.vjp
def _rotated_norm_vjp(
    primals: tuple[mx.array, ...], cotangents: tuple[mx.array, mx.array], outputs: tuple[mx.array, mx.array]
) -> tuple[mx.array, ...]:
    """Return f Rᵀ(g − y mean(g y) / scale²) with f = scale × r, R the rotation and y the output; x need not be kept."""
    x, cos, sin, scale = primals
    batch, tokens, heads, width = x.shape
    gradient, (out, factor) = cotangents[0], outputs
    along = sum_rows(_product(gradient, out)) * (1 / (width * mx.square(scale)))
    # Written in the order of x, so that the projections' gradients take it without a copy.
    halves = _across(gradient, out, along[..., None]).reshape(batch, heads, tokens, 2, width // 2).swapaxes(1, 2)
    d_x = _rotate(halves, halves[..., ::-1, :], cos[:, None], -sin[:, None], factor[..., None, None])
    return d_x.reshape(x.shape).astype(x.dtype), mx.zeros_like(cos), mx.zeros_like(sin), mx.zeros_like(scale)


@cache
def _rotation(blocks: int, width: int, theta: float) -> tuple[mx.array, mx.array]:
    """Return tables (T, 2, D / 2) by which halves, and halves swapped, are multiplied, for so many blocks of tokens."""
    frequencies = 1 / np.float32(theta) ** (np.arange(0, width, 2, dtype=np.float32) / np.float32(width))
    angles = np.arange(blocks * _TABLE_TOKENS, dtype=np.float32)[:, None] * frequencies
    cos, sin = np.cos(angles), np.sin(angles)
    return mx.array(np.stack([cos, cos], axis=1)), mx.array(np.stack([sin, -sin], axis=1))


def _reciprocal_root(sum_of_squares: mx.array, count: int) -> mx.array:
    return mx.rsqrt(sum_of_squares * (1 / count) + RMS_NORM_EPSILON)


@compiled
def _square(x: mx.array) -> mx.array:
    return x * x


@compiled
def _product(x: mx.array, y: mx.array) -> mx.array:
    return x * y


@compiled
def _multiply(x: mx.array, factor: mx.array) -> mx.array:
    return x * factor


@compiled
def _norm_gradient(gradient: mx.array, out: mx.array, along: mx.array, reciprocal: mx.array) -> mx.array:
    return (gradient - out * along) * reciprocal


@compiled
def _across(gradient: mx.array, out: mx.array, along: mx.array) -> mx.array:
    return gradient - out * along


@compiled
def _rotate(halves: mx.array, swapped: mx.array, cos: mx.array, sin: mx.array, factor: mx.array) -> mx.array:
    return (halves * cos + swapped * sin) * factor
