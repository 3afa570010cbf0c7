"""What training changes in a forward pass: dropout, recomputed layers, embeddings that were looked up before.

Dropout masks depend on seed, iteration, row and place only, however rows are divided. Every row of an iteration has a
key of `mx.random` (`draw_keys`), which a training step sets around its forward pass (`dropping`). Each dropout layer
has a number, its place, which changes the key.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple, cast

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_unflatten

from mlxchat.model import gpt
from mlxchat.model.parameters import flatten_parameters, trained_parameters


class Dropping(NamedTuple):
    """Dropout of a forward pass."""

    rate: float  # of the model's own dropout layers; adapters have their own rates
    keys: mx.array  # (B, 2), from `draw_keys`


present_dropping: ContextVar[Dropping | None] = ContextVar("dropping", default=None)


def draw_keys(seed: int, iteration: int, *, rows: int) -> np.ndarray[Any, np.dtype[np.uint32]]:
    """Return the keys (rows, 2) of an iteration, by Philox, which needs no state of earlier iterations."""
    return np.random.Philox(key=[seed, iteration]).random_raw(rows).view(np.uint32).reshape(rows, 2)


@contextmanager
def dropping(present: Dropping | None) -> Iterator[None]:
    """Enable `dropout` while the body runs; None disables it."""
    token = present_dropping.set(present)
    try:
        yield
    finally:
        present_dropping.reset(token)


def dropout(x: mx.array, place: int) -> mx.array:
    """Return x (B, …) after dropout at a place; outside of `dropping`, x itself."""
    present = present_dropping.get()
    return x if present is None or present.rate == 0 else dropped(x, fold(present.keys, place), present.rate)


def fold(keys: mx.array, place: int) -> mx.array:
    """Return the keys (B, 2) of rows at a place."""
    return keys ^ mx.array([0, place], dtype=mx.uint32)


def dropped(x: mx.array, keys: mx.array, rate: float) -> mx.array:
    """Return x (B, …) with about `rate` of its numbers 0, others rescaled; equal keys (B, 2) give equal masks."""
    kept = mx.vmap(lambda key: mx.random.bernoulli(1 - rate, x.shape[1:], key))(keys)
    return mx.where(kept, x.astype(mx.float32) * (1 / (1 - rate)), 0.0).astype(x.dtype)


# gpt.py is exported without it.
gpt.dropout = dropout


class LookedUp(nn.Module):
    """Replaces an embedding by the rows (B, T, …) of the current tokens, so that gradients are of these rows."""

    def __init__(self, rows: mx.array) -> None:
        super().__init__()
        self.rows = rows

    def __call__(self, ids: mx.array) -> mx.array:
        """Return the rows."""
        return self.rows


def recomputed(layer: nn.Module, *inputs: Any) -> mx.array:
    """Return `layer(*inputs)`; its gradient keeps only `inputs` and recomputes the layer (arXiv 1604.06174).

    Results and gradients, also of the layer's parameters, are bit-identical to the plain call's. Inputs of floats have
    a gradient, except the mask; frozen parameters have none. `mx.checkpoint` delays the weights' gradients, and with
    them everything recomputed, until the end: with 6 layers it saved a fifth of the memory, this two thirds.
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
