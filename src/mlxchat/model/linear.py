"""What a linear layer of a block computes: its product, with an adapter's and from few bits where it has these."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlxchat.ops.activation import product, squared_relu_product
from mlxchat.ops.adapted import Frozen, Shape, adapted_product, row_scaled, unpacked

NUM_MATRICES = 6
"""Matrices of a block that may have adapters: c_q, c_k, c_v and c_proj of attention, c_fc and c_proj of the MLP."""


@dataclass(frozen=True)
class LinearAdapter:
    """What a linear layer of a model with adapters knows besides its arrays."""

    kind: str | None
    """lora or dora; None: the layer is frozen and has no adapter."""
    shape: Shape


@dataclass(frozen=True)
class AdapterDropout:
    """What the adapters of a layer do not see."""

    rate: float
    keys: mx.array
    """(B, 6, 2), for each matrix of the layer."""


def project(
    layer: nn.Linear, x: mx.array, unseen: AdapterDropout | None = None, place: int = 0, *, squared_relu: bool = False
) -> mx.array:
    """Return the layer's product (…, C) with x (…, F), or with max(x, 0)².

    Args:
        layer: without a bias.
        x: (B, …, F).
        unseen: what adapters do not see.
        place: of the layer among its block's matrices, NUM_MATRICES in all.
        squared_relu: whether x is to be squared after a ReLU.
    """
    own: LinearAdapter | None = getattr(layer, "adapter", None)
    if own is None:
        return squared_relu_product(x, layer.weight) if squared_relu else product(x, layer.weight)
    shape, keys = replace(own.shape, squared_relu=squared_relu), None
    if unseen is not None and own.kind is not None:
        shape, keys = replace(shape, dropout=unseen.rate), unseen.keys[:, place]
    small = None if own.kind is None else (layer.lora_a, layer.lora_b)
    out = adapted_product(x, _frozen(layer), small, shape, keys)
    if own.kind != "dora":
        return out
    # In float32: it is the quotient of two lengths that are nearly equal.
    lengths = row_lengths(_present_matrix(layer, own).astype(mx.float32))
    return row_scaled(out, _row_factors(layer.m.astype(mx.float32), mx.stop_gradient(lengths)))


def effective_weight(layer: nn.Linear) -> mx.array:
    """Return the one matrix (out, in) that a linear layer multiplies with, adapter and all."""
    own: LinearAdapter | None = getattr(layer, "adapter", None)
    if own is None:
        weight: mx.array = layer.weight
        return weight
    if own.kind is None:
        return unpacked(_frozen(layer), own.shape)
    magnitudes = layer.m if own.kind == "dora" else None
    return adapted_matrix(unpacked(_frozen(layer), own.shape), layer.lora_a, layer.lora_b, own.shape.scale, magnitudes)


def adapted_matrix(
    weight: mx.array, a: mx.array, b: mx.array, scale: float, magnitudes: mx.array | None = None
) -> mx.array:
    """Return W + scale × (A B)ᵀ (out, in); with magnitudes (out,) every row has that length, unless it is zero."""
    adapted = weight + (scale * b.T) @ a.T
    return adapted if magnitudes is None else _row_factors(magnitudes, row_lengths(adapted))[:, None] * adapted


def row_lengths(matrix: mx.array) -> mx.array:
    """Return the 2-norm of each row."""
    return mx.sqrt(mx.square(matrix).sum(-1))


def _row_factors(magnitudes: mx.array, lengths: mx.array) -> mx.array:
    """Return what brings rows to their magnitudes; a row of zeros has no direction, and stays what it is."""
    return magnitudes / mx.where(lengths == 0, 1, lengths)


def _frozen(layer: nn.Linear) -> Frozen:
    return (layer.weight, layer.scales, layer.biases) if "scales" in layer else (layer.weight,)


def _present_matrix(layer: Any, own: LinearAdapter) -> mx.array:
    """Return the matrix of a DoRA before its rows get their lengths, of which no gradient is taken."""
    a, b = mx.stop_gradient(layer.lora_a), mx.stop_gradient(layer.lora_b)
    return adapted_matrix(unpacked(_frozen(layer), own.shape), a, b, own.shape.scale)
