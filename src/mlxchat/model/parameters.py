"""A module's parameters by dotted name: all of them, and those that training moves."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten


def flatten_parameters(model: nn.Module) -> dict[str, mx.array]:
    """Return a model's parameters by dotted name."""
    parameters: Any = model.parameters()  # type: ignore[no-untyped-call]
    return cast(dict[str, mx.array], tree_flatten(parameters, destination={}))


def trained_parameters(model: nn.Module) -> dict[str, mx.array]:
    """Return by dotted name the parameters that training moves: all, or where a model has adapters these alone."""
    parameters: Any = model.trainable_parameters()  # type: ignore[no-untyped-call]
    return cast(dict[str, mx.array], tree_flatten(parameters, destination={}))


def cast_parameters(parameters: Mapping[str, mx.array], dtype: mx.Dtype) -> dict[str, mx.array]:
    """Return parameters in what is computed in; packed numbers and the lengths of DoRA's rows stay as they are."""
    return {
        name: value if value.dtype == mx.uint32 or name.endswith(".m") else value.astype(dtype)
        for name, value in parameters.items()
    }


def set_parameters(model: nn.Module, parameters: Mapping[str, mx.array]) -> None:
    """Replace a model's parameters by dotted name; what is not named stays.

    Raises:
        KeyError: the model has no such parameter.
    """
    for name, value in parameters.items():
        *path, last = name.split(".")
        place: Any = model
        for key in path:
            place = place[int(key)] if isinstance(place, list) else place[key]
        if last not in place:
            raise KeyError(name)
        place[last] = value
