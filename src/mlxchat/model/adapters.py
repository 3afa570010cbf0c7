"""Adapters: small matrices beside frozen ones, which alone are trained (LoRA, arXiv 2106.09685; DoRA, 2402.09353).

With W (out, in) of the base, A (in, rank) and B (rank, out), a LoRA computes x Wᵀ + scale × (x A) B. DoRA gives every
row of W + scale × (A B)ᵀ the learnt length m, whose gradient takes the present length for a constant. Names, shapes,
scale and initial values are mlx-lm's: `lora_a`, `lora_b` and `m` lie beside the module's weight. A quantised base
(QLoRA, arXiv 2305.14314) has all matrices of the layers in 4 or 8 bits; embeddings, gates and head stay as they were.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from typing import Any

import mlx.core as mx

from mlxchat.model.gpt import GPT, flatten_parameters, set_parameters
from mlxchat.model.linear import LinearAdapter, adapted_matrix, row_lengths
from mlxchat.model.sizes import AdapterSizes as AdapterSizes
from mlxchat.model.sizes import matrices_of
from mlxchat.ops.adapted import Shape
from mlxchat.ops.dropout import Dropout

Flat = dict[str, mx.array]

ADAPTER_NAMES = ("lora_a", "lora_b", "m")
"""What the parameters of an adapter are called below their module's name."""


def fuse(weights: Mapping[str, mx.array], adapters: Mapping[str, mx.array], sizes: AdapterSizes) -> Flat:
    """Return the weights of the one model that base and adapters are together, all in float32.

    With a quantised base these are its rounded numbers with the adapters on them: the model that was trained.

    Args:
        weights: of the base, by name, as a checkpoint has them.
        adapters: `<module>.lora_a`, `.lora_b` and, with DoRA, `.m`.
        sizes: of the adapters.

    Raises:
        KeyError: a weight or adapter of a target is missing.
    """
    fused = {name: value.astype(mx.float32) for name, value in weights.items()}
    if sizes.bits is not None:
        for name in filter(is_quantised, fused):
            packed = mx.quantize(fused[name], group_size=sizes.group_size, bits=sizes.bits)
            fused[name] = mx.dequantize(*packed, group_size=sizes.group_size, bits=sizes.bits)
    for module in sizes.targets:
        a, b = (adapters[f"{module}.{name}"].astype(mx.float32) for name in ADAPTER_NAMES[:2])
        magnitudes = adapters[f"{module}.m"].astype(mx.float32) if sizes.kind == "dora" else None
        fused[f"{module}.weight"] = adapted_matrix(fused[f"{module}.weight"], a, b, sizes.scale, magnitudes)
    return fused


def is_quantised(name: str) -> bool:
    """Tell whether a parameter is one of those that a quantised base has in few bits."""
    return name.startswith("transformer.h.") and name.endswith(".weight") and "gate" not in name


def attach_adapters(
    model: GPT, sizes: AdapterSizes, *, seed: int = 0, dtype: mx.Dtype = mx.float32, dropout: float = 0.0
) -> None:
    """Freeze a model, give it new adapters, and quantise its base where `sizes` says so.

    Until they are trained they change nothing: B is zero, A uniform within ±1 / sqrt(in), and m the rows' lengths, as
    mlx-lm and PEFT begin.

    Args:
        model: its parameters are those of the base, in float32.
        sizes: of the adapters.
        seed: of A.
        dtype: what is computed in; the frozen weights are kept in it, the adapters in float32.
        dropout: share of their input that adapters do not see while they are trained.
    """
    quantise = partial(mx.quantize, group_size=sizes.group_size, bits=sizes.bits)
    names = matrices_of(model.sizes)
    keys = dict(zip(names, mx.random.split(mx.random.key(seed), len(names)), strict=True))
    model.freeze()
    model.adapters, model.adapter_dropout = sizes, dropout
    frozen: Flat = {}
    for name, value in flatten_parameters(model).items():
        if sizes.bits is None or not is_quantised(name):
            frozen[name] = value.astype(dtype)
    set_parameters(model, frozen)
    for name, module in linear_layers(model).items():
        # A row's length is that of the base as it computes: rounded, where it is.
        weight = module.weight.astype(mx.float32)
        if sizes.bits is not None:
            packed, scales, offsets = quantise(weight)
            module.weight, module.scales, module.biases = packed, scales.astype(dtype), offsets.astype(dtype)
            weight = mx.dequantize(packed, scales, offsets, group_size=sizes.group_size, bits=sizes.bits)
            module.freeze()
        adapted = name in sizes.targets
        shape = Shape(scale=sizes.scale, bits=sizes.bits, group_size=sizes.group_size)
        module.adapter = LinearAdapter(sizes.kind if adapted else None, shape)
        if adapted:
            outer, inner = weight.shape
            bound = 1 / math.sqrt(inner)
            module.lora_a = mx.random.uniform(-bound, bound, (inner, sizes.rank), key=keys[name])
            module.lora_b = mx.zeros((sizes.rank, outer))
            if sizes.kind == "dora":
                module.m = row_lengths(weight)
    mx.eval(flatten_parameters(model))


def adapters_of(model: GPT) -> AdapterSizes | None:
    """Return the sizes of a model's adapters; None: it has none, all of it is trained."""
    return getattr(model, "adapters", None)


def adapter_dropout_of(model: GPT) -> float:
    """Return the share of their input that a model's adapters do not see in training; 0: nothing is left out."""
    return getattr(model, "adapter_dropout", 0.0)


def count_places(model: GPT) -> int:
    """Return how many places of a row dropout has keys for: the stream's, and where there is such dropout adapters'."""
    return model.dropout_places + (model.adapter_places if adapter_dropout_of(model) else 0)


def unseen_by_adapters(model: GPT, keys: mx.array | None) -> Dropout | None:
    """Return what adapters do not see, of keys (B, `count_places`, 2); None: they see all."""
    rate = adapter_dropout_of(model)
    return None if keys is None or rate == 0 else Dropout(rate, keys[:, model.dropout_places :])


def linear_layers(model: GPT) -> dict[str, Any]:
    """Return the modules that may have adapters, by name."""
    found: dict[str, Any] = {}
    for name in matrices_of(model.sizes):
        place: Any = model
        for key in name.split("."):
            place = place[int(key)] if isinstance(place, list) else place[key]
        found[name] = place
    return found
