"""A stored matrix and its product with few rows: in blocks on a CPU, or in 8 or 4 bits.

OpenBLAS copies both operands of a product before it multiplies, which for few rows costs more than the product itself;
only what has at most a million multiplications it takes as it lies. So on a CPU a matrix is stored as blocks of columns
so narrow that each product is of that kind. Then a row's sums do not depend on how many rows there are, either.

Quantised, groups of numbers of a row share a scale and an offset (MLX's affine mode). On a CPU a product with packed
numbers takes as long for each row as for one, 5 times as long as the product itself for one row and 40 times for 32. So
what has many rows and more memory than time may have the rounded numbers unpacked there.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx

from mlxchat.ops.device import backend

Weight = Any
"""What `stored` returns."""

_GROUP_NUMBERS = (64, 32)
# Beyond so many multiplications OpenBLAS copies; so many rows are multiplied at a time.
_MOST_MULTIPLICATIONS, _ROWS = 1_000_000, 16
_WIDEST_BLOCK, _NARROWEST_BLOCK = 64, 8


def stored(matrix: mx.array, bits: int | None = None, *, packed: bool = True) -> Weight:
    """Return a matrix (out, in) as `multiply` takes it.

    Blocks (N, in, out / N) on a CPU, (in, out) elsewhere; if `bits` is given and rows have whole groups, the packed
    numbers, scales and offsets of (out, in), or, not `packed`, blocks of the rounded numbers.
    """
    outer, inner = matrix.shape
    if bits is not None and groups_of(inner) is not None:
        if packed:
            return tuple(mx.quantize(matrix, group_size=groups_of(inner), bits=bits))
        matrix = rounded(matrix, bits)
    if backend() != "cpu":
        return mx.contiguous(matrix.T)
    width = _WIDEST_BLOCK
    while width > _NARROWEST_BLOCK and (width * inner * _ROWS > _MOST_MULTIPLICATIONS or outer % width):
        width //= 2
    if outer % width:
        return mx.contiguous(matrix.T)[None]
    return mx.contiguous(matrix.reshape(-1, width, inner).swapaxes(1, 2))


def rounded(matrix: mx.array, bits: int) -> mx.array:
    """Return a matrix (out, in) with the numbers that its quantised form stands for."""
    group = groups_of(matrix.shape[1])
    if group is None:
        return matrix
    return mx.dequantize(*mx.quantize(matrix, group_size=group, bits=bits), group_size=group, bits=bits)


def groups_of(inner: int) -> int | None:
    """Return how many numbers of a row share a scale; None: rows of this length are not quantised."""
    return next((group for group in _GROUP_NUMBERS if inner % group == 0), None)


def multiply(x: mx.array, weight: Weight) -> mx.array:
    """Return the product (B, out) of x (B, in) and a stored weight."""
    if isinstance(weight, mx.array):
        if weight.ndim == 2:
            return x @ weight
        rows = next(size for size in range(_ROWS, 0, -1) if len(x) % size == 0)
        if rows == len(x):
            return (x @ weight).swapaxes(0, 1).reshape(rows, -1)
        # A block meets all rows before the next one comes, so that memory is read once.
        found = x.reshape(1, -1, rows, x.shape[1]) @ weight[:, None]
        return found.transpose(1, 2, 0, 3).reshape(len(x), -1)
    packed, scales, offsets = weight
    inner = x.shape[-1]
    product: mx.array = mx.quantized_matmul(
        x, packed, scales, offsets, transpose=True,
        group_size=inner // scales.shape[-1], bits=32 * packed.shape[-1] // inner,
    )  # fmt: skip
    return product


def weight_bytes(weights: Any) -> int:
    """Return the bytes of all arrays in a nested structure."""
    if isinstance(weights, mx.array):
        return int(weights.nbytes)
    parts = weights.values() if isinstance(weights, dict) else weights
    return sum(weight_bytes(part) for part in parts if part is not None)
