"""Quantisation of weights to 8 or 4 bits: groups of numbers share a scale and an offset."""

from __future__ import annotations

import mlx.core as mx

from mlxchat.model.gpt import GPT
from mlxchat.model.lora import FrozenLinear
from mlxchat.model.parameters import flatten_parameters, set_parameters
from mlxchat.model.sizes import AdapterSizes

_MATRICES = ("attn.c_q", "attn.c_k", "attn.c_v", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")


def packed_copy(model: GPT, bits: int) -> GPT:
    """Return a model with all matrices except embeddings and gates in 8 or 4 bits; other parameters are shared."""
    copy = GPT(model.sizes)
    own = flatten_parameters(copy)
    set_parameters(copy, {name: value for name, value in flatten_parameters(model).items() if name in own})
    dtype = model.transformer["wte"].weight.dtype

    def packed(matrix: mx.array) -> FrozenLinear:
        group = next((group for group in (64, 32) if matrix.shape[1] % group == 0), None)
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
