"""How keys and values of the past are kept: as they are, or packed in 8 or 4 bits.

Packed, each 64 numbers of a head (32 where its width asks for it) share a scale and an offset in float32, so that a
number takes 9 or 5 bits instead of 32 (10 or 6). Every token sees the rounded keys and values of all, its own included,
also while a prompt is read: so what a row says does not depend on the pieces in which its prompt is read.

Shapes: B rows, K key/value heads, G query heads for each of them, S tokens, D head width.
"""

from __future__ import annotations

import mlx.core as mx

from mlxchat.engine.quantise import groups_of
from mlxchat.errors import ConfigError

Kept = tuple[mx.array, ...]
"""Numbers (B, K, S, D); or packed ones, scales and offsets (B, K, S, …)."""


class KVFormat:
    """Packs, unpacks and multiplies with what is kept."""

    def __init__(self, width: int, bits: int | None) -> None:
        """Take the width of heads; bits None keeps numbers as they are.

        Raises:
            ConfigError: such heads cannot be packed.
        """
        self.width, self.bits = width, bits
        self.group = groups_of(width) or width
        if bits is not None and groups_of(width) is None:
            raise ConfigError(f"keys and values of heads {width} wide cannot be packed; expected a multiple of 32")

    def widths(self, dtype: mx.Dtype) -> list[tuple[int, mx.Dtype]]:
        """Return last dimension and type of each array that is kept of numbers of a type."""
        if self.bits is None:
            return [(self.width, dtype)]
        groups = self.width // self.group
        return [(self.width * self.bits // 32, mx.uint32), (groups, dtype), (groups, dtype)]

    def bytes_per_token(self) -> int:
        """Return the bytes of a head's keys and values of a token, kept of float32 numbers."""
        return 2 * sum(width * 4 for width, _ in self.widths(mx.float32))

    def pack(self, numbers: mx.array) -> Kept:
        """Return (…, D) as it is kept."""
        if self.bits is None:
            return (numbers,)
        return tuple(mx.quantize(numbers, group_size=self.group, bits=self.bits))

    def unpack(self, kept: Kept) -> mx.array:
        """Return the numbers (…, D) that what is kept stands for."""
        if self.bits is None:
            return kept[0]
        packed, scales, offsets = kept
        return mx.dequantize(packed, scales, offsets, group_size=self.group, bits=self.bits)

    def scores(self, queries: mx.array, keys: Kept) -> mx.array:
        """Return the products (B, K, G, S) of queries (B, K, G, D) and keys."""
        if self.bits is None:
            return queries @ keys[0].swapaxes(-1, -2)
        return self._multiply(queries, keys, transpose=True)

    def mixed(self, weights: mx.array, values: Kept) -> mx.array:
        """Return the sums (B, K, G, D) of values by weights (B, K, G, S)."""
        if self.bits is None:
            return weights @ values[0]
        return self._multiply(weights, values, transpose=False)

    def _multiply(self, x: mx.array, kept: Kept, *, transpose: bool) -> mx.array:
        packed, scales, offsets = kept
        return mx.quantized_matmul(
            x, packed, scales, offsets, transpose=transpose, group_size=self.group, bits=self.bits
        )
