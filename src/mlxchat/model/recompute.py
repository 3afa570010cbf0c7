"""Gradient checkpointing: a layer's activations are recomputed for its gradient instead of kept (arXiv 1604.06174).

`mx.checkpoint` delays the weights' gradients, and with them everything recomputed, until the end: with 6 layers it
saved a fifth of the memory, this two thirds.
"""

from __future__ import annotations

from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten

from mlxchat.model.parameters import flatten_parameters, trained_parameters
from mlxchat.ops.dropout import Dropping, dropping, present_dropping


def recomputed(layer: nn.Module, *inputs: Any) -> mx.array:
    """Return `layer(*inputs)`; its gradient keeps only `inputs` and recomputes the layer.

    Results and gradients, also of the layer's parameters, are bit-identical to the plain call's. Inputs of floats have
    a gradient, except the mask; frozen parameters have none.
    """
    trained, everything = trained_parameters(layer), flatten_parameters(layer)
    frozen = {name: value for name, value in everything.items() if name not in trained}
    x, value_embedding, *others = inputs
    streams = [x] if value_embedding is None else [x, value_embedding]
    floats = [*trained.values(), *streams]
    dropped = present_dropping.get()
    arrays = [each for each in others if isinstance(each, mx.array)]
    fixed = [*frozen.values(), *arrays, *([] if dropped is None else [dropped.keys])]

    def run(*given: mx.array) -> mx.array:
        weights = dict(zip([*trained, *frozen], [*given[: len(trained)], *given[len(floats) :]], strict=False))
        moving = [*given[len(trained) : len(floats)], None][:2]
        rest = iter(given[len(floats) + len(frozen) :])
        layer.update(tree_unflatten(list(weights.items())))
        with dropping(None if dropped is None else Dropping(dropped.rate, given[-1])):
            out = layer(*moving, *(next(rest) if isinstance(each, mx.array) else each for each in others))
        layer.update(tree_unflatten(list(everything.items())))
        return cast(mx.array, out)

    function = mx.custom_function(run)

    @function.vjp
    def gradient(primals: list[mx.array], cotangent: mx.array, output: mx.array) -> Any:
        # Depends on the cotangent, so that mx.compile recomputes the layer instead of keeping it.
        arrays = mx.depends(list(primals), [cotangent])
        moving, still = arrays[: len(floats)], arrays[len(floats) :]
        _, gradients = mx.vjp(lambda *moving: run(*moving, *still), moving, [cotangent])
        gradients = [slope.astype(array.dtype) for slope, array in zip(gradients, moving, strict=True)]
        # The weights' gradients first, so that their inputs are freed before the next layer.
        gradients[len(trained) :] = mx.depends(gradients[len(trained) :], gradients[: len(trained)])
        return [*gradients, *map(mx.zeros_like, still)]

    return cast(mx.array, function(*floats, *fixed))
