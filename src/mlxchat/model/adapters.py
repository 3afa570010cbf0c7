"""Adapters: small matrices beside frozen ones, which alone are trained (LoRA, arXiv 2106.09685; DoRA, 2402.09353).

With W (out, in) of the base, A (in, rank) and B (rank, out), a LoRA computes x Wᵀ + scale × (x A) B. DoRA gives every
row of W + scale × (A B)ᵀ the learnt length m, whose gradient takes the present length for a constant. Names, shapes,
scale and initial values are mlx-lm's: `lora_a`, `lora_b` and `m` lie beside the module's weight. A quantised base
(QLoRA, arXiv 2305.14314) has all matrices of the layers in 4 or 8 bits; embeddings, gates and head stay as they were.
"""

from __future__ import annotations

from collections.abc import Mapping

import mlx.core as mx

from mlxchat.model.adapter_targets import AdapterSizes as AdapterSizes

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


def adapted_matrix(
    weight: mx.array, a: mx.array, b: mx.array, scale: float, magnitudes: mx.array | None = None
) -> mx.array:
    """Return W + scale × (A B)ᵀ (out, in); with magnitudes (out,) every row has that length."""
    adapted = weight + (scale * b.T) @ a.T
    return adapted if magnitudes is None else (magnitudes / row_lengths(adapted))[:, None] * adapted


def row_lengths(matrix: mx.array) -> mx.array:
    """Return the 2-norm of each row."""
    return mx.sqrt(mx.square(matrix).sum(-1))
