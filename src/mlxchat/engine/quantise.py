"""Quantisation of weights and of the KV cache to 8 or 4 bits: groups of numbers share a scale and an offset.

Including scale and offset, a number of the KV cache takes 9 or 5 bits instead of 32; 10 or 6 if the heads' width
requires groups of 32. Every token attends to quantised keys and values, including its own and while a prompt is read,
so that results do not depend on the chunks in which prompts are read.

Shapes: B rows, K key/value heads, G query heads for each of them, S tokens, D head width.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx

from mlxchat.errors import ConfigError
from mlxchat.model.gpt import GPT, flatten_parameters, set_parameters
from mlxchat.model.lora import FrozenLinear
from mlxchat.model.sizes import AdapterSizes
from mlxchat.ops.loss import soft_cap

Kept = tuple[mx.array, ...]
"""Numbers (B, K, S, D); or packed numbers, scales and offsets (B, K, S, …)."""

_GROUP_NUMBERS = (64, 32)
_MATRICES = ("attn.c_q", "attn.c_k", "attn.c_v", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")


def groups_of(inner: int) -> int | None:
    """Return the group size for rows of this length; None: they are not quantised."""
    return next((group for group in _GROUP_NUMBERS if inner % group == 0), None)


def weight_bytes(weights: Any) -> int:
    """Return the bytes of all arrays in a nested structure."""
    if isinstance(weights, mx.array):
        return int(weights.nbytes)
    parts = weights.values() if isinstance(weights, dict) else weights
    return sum(weight_bytes(part) for part in parts if part is not None)


class PackedGPT(GPT):
    """A model whose matrices, including the head, are packed."""

    def logits(self, hidden: mx.array) -> mx.array:
        """See `GPT.logits`."""
        return soft_cap(self.lm_head(hidden))

    @property
    def head_weight(self) -> mx.array:
        """The rounded head (V, C), unpacked."""
        matrix: mx.array = self.lm_head.matrix
        return matrix


def packed_copy(model: GPT, bits: int) -> PackedGPT:
    """Return a model with all matrices except embeddings and gates in 8 or 4 bits; other parameters are shared."""
    copy = PackedGPT(model.sizes)
    own = flatten_parameters(copy)
    set_parameters(copy, {name: value for name, value in flatten_parameters(model).items() if name in own})
    dtype = model.transformer["wte"].weight.dtype

    def packed(matrix: mx.array) -> FrozenLinear:
        group = groups_of(matrix.shape[1])
        sizes = AdapterSizes("lora", 1, 1.0, (), None if group is None else bits, group or 64)
        return FrozenLinear(matrix, sizes, dtype)

    for layer, (block, given) in enumerate(zip(copy.transformer["h"], model.transformer["h"], strict=True)):
        for name in _MATRICES:
            part, _, last = name.partition(".")
            set_parameters(copy, {f"transformer.h.{layer}.{name}": packed(given[part][last].matrix)})
        mx.eval(flatten_parameters(block))
    set_parameters(copy, {"lm_head": packed(model.head_weight)})
    mx.eval(flatten_parameters(copy))
    return copy


class KVFormat:
    """The storage format of keys and values: packing, unpacking and products."""

    def __init__(self, width: int, bits: int | None) -> None:
        """`width` is that of a head; bits None: not quantised.

        Raises:
            ConfigError: heads of this width cannot be quantised.
        """
        self.width, self.bits = width, bits
        self.group = groups_of(width) or width
        if bits is not None and groups_of(width) is None:
            raise ConfigError(
                f"keys and values with head width {width} cannot be quantised: expected a multiple of 32. Omit kv_bits"
            )

    def widths(self, dtype: mx.Dtype) -> list[tuple[int, mx.Dtype]]:
        """Return last dimension and type of each stored array, for numbers of a type."""
        if self.bits is None:
            return [(self.width, dtype)]
        groups = self.width // self.group
        return [(self.width * self.bits // 32, mx.uint32), (groups, dtype), (groups, dtype)]

    def bytes_per_token(self) -> int:
        """Return the stored bytes of a head's key and value of one token, for float32 numbers."""
        return 2 * sum(width * 4 for width, _ in self.widths(mx.float32))

    def pack(self, numbers: mx.array) -> Kept:
        """Return numbers (…, D) in the storage format."""
        if self.bits is None:
            return (numbers,)
        return tuple(mx.quantize(numbers, group_size=self.group, bits=self.bits))

    def unpack(self, kept: Kept) -> mx.array:
        """Return the numbers (…, D) of stored arrays."""
        if self.bits is None:
            return kept[0]
        packed, scales, offsets = kept
        return mx.dequantize(packed, scales, offsets, group_size=self.group, bits=self.bits)

    def scores(self, queries: mx.array, keys: Kept) -> mx.array:
        """Return the products (B, K, G, S) of queries (B, K, G, D) and stored keys."""
        if self.bits is None:
            return queries @ keys[0].swapaxes(-1, -2)
        return self._multiply(queries, keys, transpose=True)

    def mixed(self, weights: mx.array, values: Kept) -> mx.array:
        """Return the weighted sums (B, K, G, D) of stored values with weights (B, K, G, S)."""
        if self.bits is None:
            return weights @ values[0]
        return self._multiply(weights, values, transpose=False)

    def _multiply(self, x: mx.array, kept: Kept, *, transpose: bool) -> mx.array:
        packed, scales, offsets = kept
        return mx.quantized_matmul(
            x, packed, scales, offsets, transpose=transpose, group_size=self.group, bits=self.bits
        )
