"""Gradient checkpointing: a layer's activations are recomputed for its gradient instead of kept (arXiv 1604.06174).

`mx.checkpoint` delays the weights' gradients, and with them everything recomputed, until the end: with 6 layers it
saved a fifth of the memory, this two thirds.
"""

from __future__ import annotations

from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

from mlxchat.ops.dropout import Dropping, dropping, present_dropping


def recomputed(layer: nn.Module, *inputs: mx.array | None) -> mx.array:
    """Return `layer(*inputs)`; its gradient keeps only `inputs` and recomputes the layer.

    Results and gradients, also of the layer's parameters, are bit-identical to the plain call's. Inputs must be floats;
    frozen parameters have no gradient.
    """
    trained, everything = _flatten(layer.trainable_parameters()), _flatten(layer.parameters())
    frozen = {name: value for name, value in everything.items() if name not in trained}
    present = [value is not None for value in inputs]
    floats = [*trained.values(), *(value for value in inputs if value is not None)]
    left_out = present_dropping()
    others = [*frozen.values(), *([] if left_out is None else [left_out.keys])]

    def run(*arrays: mx.array) -> mx.array:
        given = iter(arrays[len(trained) : len(floats)])
        weights = [*arrays[: len(trained)], *arrays[len(floats) : len(floats) + len(frozen)]]
        layer.update(tree_unflatten(list(zip([*trained, *frozen], weights, strict=True))))
        with dropping(None if left_out is None else Dropping(left_out.rate, arrays[-1])):
            out = cast(mx.array, layer(*(next(given) if there else None for there in present)))
        layer.update(tree_unflatten(list(everything.items())))
        return out

    function = mx.custom_function(run)

    @function.vjp
    def gradient(primals: list[mx.array], cotangent: mx.array, output: mx.array) -> Any:
        # Depends on the cotangent, so that mx.compile recomputes the layer instead of keeping it.
        arrays = mx.depends(list(primals), [cotangent])
        moving, fixed = arrays[: len(floats)], arrays[len(floats) :]
        _, gradients = mx.vjp(lambda *moving: run(*moving, *fixed), moving, [cotangent])
        gradients = [slope.astype(array.dtype) for slope, array in zip(gradients, moving, strict=True)]
        # The weights' gradients first, so that their inputs are freed before the next layer.
        gradients[len(trained) :] = mx.depends(gradients[len(trained) :], gradients[: len(trained)])
        return [*gradients, *map(mx.zeros_like, fixed)]

    return cast(mx.array, function(*floats, *others))


def _flatten(parameters: Any) -> dict[str, mx.array]:
    return cast(dict[str, mx.array], tree_flatten(parameters, destination={}))
