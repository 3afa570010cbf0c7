"""Products with frozen matrices, whole or in few bits, and with the two small ones of an adapter beside them.

On a CPU one function with an own gradient does all of a product: the small matrices' gradients come before that of the
input is used, no gradient of the frozen matrix is made, and where the input was squared after a ReLU it is squared
again instead of being kept. A frozen matrix in few bits is unpacked for each product: MLX's product with packed numbers
takes 40 times as long there. On a GPU the same is said with MLX's own operations.

Shapes: x (…, F), W (C, F), A (F, R), B (R, C).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlxchat.ops import formulas
from mlxchat.ops.compiled import compiled, differentiable
from mlxchat.ops.device import backend
from mlxchat.ops.dropout import dropped

Frozen = tuple[mx.array, ...]
"""W; or its packed numbers, scales and offsets."""


@dataclass(frozen=True)
class Shape:
    """What is fixed of a product."""

    scale: float = 1.0
    """Factor of what A and B give."""
    squared_relu: bool = False
    """Whether it is of max(x, 0)² instead of x."""
    bits: int | None = None
    """Of W's numbers; None: they are whole."""
    group_size: int = 64
    """Numbers of a row of W that share a scale."""
    dropout: float = 0.0
    """Share of the numbers that A does not see."""


def adapted_product(
    x: mx.array,
    frozen: Frozen,
    small: tuple[mx.array, mx.array] | None,
    shape: Shape,
    keys: mx.array | None = None,
) -> mx.array:
    """Return x Wᵀ + scale × (x A) B, differentiable in x, A and B.

    Args:
        x: (B, …, F).
        frozen: W.
        small: A and B; None: there is no adapter.
        shape: of the product.
        keys: (B, 2), of dropout; None: nothing is left out.
    """
    drops = keys is not None and shape.dropout > 0 and small is not None
    if backend() == "cpu":
        arrays = [x, *frozen, *(small or ()), *([keys] if drops else [])]
        return _adapted(shape, len(frozen), small is not None, drops)(*arrays)
    seen = mx.square(nn.relu(x)) if shape.squared_relu else x
    whole = _whole_product(seen, frozen, shape)
    if small is None:
        return whole
    a, b = small
    seen = dropped(seen, keys, shape.dropout) if keys is not None and drops else seen
    return whole + (shape.scale * ((seen @ a) @ b)).astype(whole.dtype)


def unpacked(frozen: Frozen, shape: Shape) -> mx.array:
    """Return W (C, F) with the numbers that it stands for."""
    if shape.bits is None:
        return frozen[0]
    packed, scales, offsets = frozen
    return mx.dequantize(packed, scales, offsets, group_size=shape.group_size, bits=shape.bits)


def row_scaled(x: mx.array, factor: mx.array) -> mx.array:
    """Return x (…, C) times factor (C,), in x's numbers; the factor's gradient comes before that of x is used.

    It is made of the product, which what follows keeps anyway, so that x is not kept. Where the factor is 0, so is it.
    The factor stays float32, also where x is not: in bfloat16 1.011 would be 1.008, and the sum of its gradient coarse.
    """
    return _row_scaled(x, factor)


@cache
def _adapted(shape: Shape, num_frozen: int, has_small: bool, drops: bool) -> Callable[..., mx.array]:
    """Return the function of (x, *frozen, A, B, keys), as far as there are these."""

    def parts(arrays: tuple[mx.array, ...]) -> tuple[mx.array, Frozen, tuple[mx.array, ...], mx.array | None]:
        x, *rest = arrays
        small = tuple(rest[num_frozen : num_frozen + 2 * has_small])
        return x, tuple(rest[:num_frozen]), small, rest[-1] if drops else None

    def chosen(x: mx.array, keys: mx.array | None) -> mx.array:
        return x if keys is None else dropped(x, keys, shape.dropout)

    @differentiable
    def forward(*arrays: mx.array) -> mx.array:
        x, frozen, small, keys = parts(arrays)
        seen = _squared_relu(x) if shape.squared_relu else x
        whole = seen @ unpacked(frozen, shape).T
        if not small:
            return whole
        # One operation adds where the small product is made.
        return mx.addmm(whole, chosen(seen, keys) @ small[0], small[1], alpha=shape.scale)

    @forward.vjp
    def gradient(primals: tuple[mx.array, ...], cotangent: mx.array, output: mx.array) -> Any:
        x, frozen, small, keys = parts(primals)
        # Only once the cotangent is there: else compilation would keep what the forward pass computed.
        again, *frozen_again = mx.depends([x, *frozen], [cotangent])
        d_seen = cotangent @ unpacked(tuple(frozen_again), shape)
        slopes: list[mx.array] = []
        if small:
            a, b = small
            seen = chosen(_squared_relu(again) if shape.squared_relu else again, keys)
            flat = cotangent.reshape(-1, cotangent.shape[-1])
            d_inner = shape.scale * (cotangent @ b.T)
            d_b = shape.scale * ((seen @ a).reshape(-1, a.shape[1]).T @ flat)
            d_a = seen.reshape(-1, a.shape[0]).T @ d_inner.reshape(-1, a.shape[1])
            if keys is None:
                d_seen = mx.addmm(d_seen, d_inner, a.T)
            else:
                d_seen = d_seen + dropped(d_inner @ a.T, keys, shape.dropout)
            slopes = [d_a, d_b]
            (d_seen,) = mx.depends([d_seen], slopes)
        d_x = _squared_relu_gradient(x, d_seen) if shape.squared_relu else d_seen
        return [d_x, *map(mx.zeros_like, frozen), *slopes, *([] if keys is None else [mx.zeros_like(keys)])]

    return forward


def _whole_product(x: mx.array, frozen: Frozen, shape: Shape) -> mx.array:
    if shape.bits is None:
        return x @ frozen[0].T
    packed, scales, offsets = frozen
    return mx.quantized_matmul(
        x, packed, scales, offsets, transpose=True, group_size=shape.group_size, bits=shape.bits
    )  # fmt: skip


_squared_relu = compiled(formulas.squared_relu)


@compiled
def _squared_relu_gradient(x: mx.array, cotangent: mx.array) -> mx.array:
    return (x + mx.abs(x)) * cotangent


@differentiable
def _row_scaled(x: mx.array, factor: mx.array) -> mx.array:
    return (x * factor).astype(x.dtype)


@_row_scaled.vjp
def _row_scaled_vjp(
    primals: tuple[mx.array, mx.array], cotangent: mx.array, output: mx.array
) -> tuple[mx.array, mx.array]:
    x, factor = primals
    sums = (cotangent.astype(factor.dtype) * output).reshape(-1, output.shape[-1]).sum(0)
    d_factor = mx.where(factor == 0, 0.0, sums / factor).astype(factor.dtype)
    (d_x,) = mx.depends([(cotangent * factor).astype(x.dtype)], [d_factor])
    return d_x, d_factor
