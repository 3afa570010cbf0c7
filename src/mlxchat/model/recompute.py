"""Gradient checkpointing: a layer whose activations are computed again for its gradient instead of being kept.

Chen et al., arXiv 1604.06174. `mx.checkpoint` does the same, but lets the gradients of the weights wait until the end,
and with them everything that was computed again for them: measured with 6 layers it saved a fifth, this two thirds.
"""

from __future__ import annotations

from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten


def recomputed(layer: nn.Module, *inputs: mx.array) -> mx.array:
    """Return `layer(*inputs)`; a gradient keeps `inputs` alone and computes the layer once more.

    Results and gradients, of the layer's parameters too, are those of `layer(*inputs)` bit for bit.
    """
    parameters: Any = layer.parameters()  # type: ignore[no-untyped-call]
    names, values = zip(*tree_flatten(parameters), strict=True)
    num_parameters = len(values)

    def run(*arrays: mx.array) -> mx.array:
        layer.update(tree_unflatten(list(zip(names, arrays[:num_parameters], strict=True))))
        out: mx.array = layer(*arrays[num_parameters:])
        return out

    function = mx.custom_function(run)

    @function.vjp
    def gradient(primals: list[mx.array], cotangent: mx.array, output: mx.array) -> Any:
        # Only once the cotangent is there: else compilation would take it for what was computed before.
        arrays = mx.depends(list(primals), [cotangent])
        _, gradients = mx.vjp(run, arrays, [cotangent])
        gradients = [slope.astype(array.dtype) for slope, array in zip(gradients, arrays, strict=True)]
        # The weights' gradients first, so that what they need is freed before the next layer's turn.
        return gradients[:num_parameters] + mx.depends(gradients[num_parameters:], gradients[:num_parameters])

    return cast(mx.array, function(*values, *inputs))
