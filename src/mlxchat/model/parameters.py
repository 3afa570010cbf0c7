"""Parameters of a model by dotted name, such as transformer.h.0.attn.c_q.weight."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mlxchat.model import gpt
from mlxchat.ops.dropout import dropout


def flatten_parameters(model: nn.Module) -> dict[str, mx.array]:
    """Return a model's parameters by dotted name."""
    return cast(dict[str, mx.array], tree_flatten(cast(Any, model.parameters()), destination={}))


def trained_parameters(model: nn.Module) -> dict[str, mx.array]:
    """Return the trained parameters by dotted name: all, or only the adapters if the model has some."""
    return cast(dict[str, mx.array], tree_flatten(cast(Any, model.trainable_parameters()), destination={}))


def cast_parameters(parameters: Mapping[str, mx.array], dtype: mx.Dtype) -> dict[str, mx.array]:
    """Return parameters in a dtype, except packed numbers and vectors (scalars of layers, DoRA's magnitudes)."""
    return {
        name: value if value.dtype in (mx.uint32, dtype) or value.ndim < 2 else value.astype(dtype)
        for name, value in parameters.items()
    }


@contextmanager
def computing_in(model: nn.Module, dtype: mx.Dtype) -> Iterator[None]:
    """Compute in a dtype within the body; afterwards the model has its original parameters."""
    own = flatten_parameters(model)
    cast = cast_parameters(own, dtype)
    set_parameters(model, cast)
    mx.eval(cast)
    try:
        yield
    finally:
        set_parameters(model, own)


def set_parameters(model: nn.Module, parameters: Mapping[str, mx.array | nn.Module]) -> None:
    """Replace parameters or modules by dotted name, others stay; a KeyError names one that the model lacks."""
    for name, value in parameters.items():
        parent, _, last = name.rpartition(".")
        place = module_at(model, parent)
        if isinstance(place, list):
            place[int(last)] = value
        elif last in place:
            place[last] = value
        else:
            raise KeyError(name)


def module_at(model: nn.Module, name: str) -> Any:
    """Return the module with a dotted name; the empty name is the model's."""
    place: Any = model
    for key in name.split(".") if name else ():
        place = place[int(key)] if isinstance(place, list) else place[key]
    return place


class LookedUp(nn.Module):
    """Replaces an embedding by the rows (B, T, …) of the current tokens, so that gradients are of these rows."""

    def __init__(self, rows: mx.array) -> None:
        super().__init__()
        self.rows = rows

    def __call__(self, ids: mx.array) -> mx.array:
        """Return the rows."""
        return self.rows


# gpt.py is exported without the package's dropout.
gpt.dropout = dropout
