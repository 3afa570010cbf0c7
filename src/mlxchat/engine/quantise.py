"""Matrices in 8 or 4 bits: groups of numbers of a row share a scale and an offset (MLX's affine mode)."""

from __future__ import annotations

from typing import Any

import mlx.core as mx

from mlxchat.model.gpt import GPT, flatten_parameters, set_parameters
from mlxchat.model.lora import FrozenLinear
from mlxchat.model.sizes import AdapterSizes
from mlxchat.ops.cross_entropy import soft_cap

_GROUP_NUMBERS = (64, 32)
_MATRICES = ("attn.c_q", "attn.c_k", "attn.c_v", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")


def rounded(matrix: mx.array, bits: int) -> mx.array:
    """Return a matrix (out, in) with the numbers that its quantised form stands for."""
    group = groups_of(matrix.shape[1])
    if group is None:
        return matrix
    return mx.dequantize(*mx.quantize(matrix, group_size=group, bits=bits), group_size=group, bits=bits)


def groups_of(inner: int) -> int | None:
    """Return how many numbers of a row share a scale; None: rows of this length are not quantised."""
    return next((group for group in _GROUP_NUMBERS if inner % group == 0), None)


def weight_bytes(weights: Any) -> int:
    """Return the bytes of all arrays in a nested structure."""
    if isinstance(weights, mx.array):
        return int(weights.nbytes)
    parts = weights.values() if isinstance(weights, dict) else weights
    return sum(weight_bytes(part) for part in parts if part is not None)


class PackedGPT(GPT):
    """A model whose head is packed, too."""

    def logits(self, hidden: mx.array) -> mx.array:
        """See `GPT.logits`."""
        return soft_cap(self.lm_head(hidden))


def packed_copy(model: GPT, bits: int) -> PackedGPT:
    """Return a model with all matrices but embeddings and gates in few bits; everything else is shared."""
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
