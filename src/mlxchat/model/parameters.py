"""Parameters of a model by dotted name, such as transformer.h.0.attn.c_q.weight, and nanochat's initial values."""

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from mlxchat.errors import ConfigError
from mlxchat.model.gpt import GPT
from mlxchat.model.sizes import GPTSizes, count_parameters


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


# Initial values


def falling(count: int, first: float, last: float) -> mx.array:
    """Return numbers (count,) that change linearly from `first` to `last`."""
    return mx.array(first + (last - first) * (np.arange(count, dtype=np.float32) / max(count - 1, 1)))


def initial_value(name: str, shape: tuple[int, ...], sizes: GPTSizes, key: mx.array) -> mx.array:
    """Return nanochat's initial value of a parameter."""
    july = sizes.architecture == "jul2026"
    bound = (3 / sizes.width) ** 0.5  # uniform numbers of deviation 1 / sqrt(width)
    match name.removesuffix(".weight").split("."):
        case ["transformer", "wte"]:
            return (0.8 if july else 1.0) * mx.random.normal(shape, key=key)
        case [*_, "c_q" | "c_k" | "c_v" | "c_fc" as matrix]:
            if july:
                factor = 0.4 if matrix == "c_fc" else 1.0
                return mx.random.uniform(-factor * bound, factor * bound, shape, key=key)
            rows, columns = shape  # arXiv 2310.17813
            deviation: float = min(1.0, (rows / columns) ** 0.5) / columns**0.5
            return deviation * mx.random.normal(shape, key=key)
        case [*_, "c_proj"] | ["smear_lambda"]:
            return mx.zeros(shape)
        case ["lm_head"]:
            return 0.001 * mx.random.normal(shape, key=key) if july else mx.zeros(shape)
        case ["value_embeds", _]:
            return mx.random.uniform(-bound, bound, shape, key=key)
        case [*_, "ve_gate"] | ["smear_gate"]:
            return mx.random.uniform(0.0, 0.02, shape, key=key)
        case ["resid_lambdas"]:
            return falling(shape[0], 1.15, 1.05)
        case ["x0_lambdas"]:
            return falling(shape[0], 0.20, 0.05)
        case ["backout_lambda"]:
            return mx.full(shape, 0.2)
    example = f'case [*_, "{name.removesuffix(".weight").rpartition(".")[2]}"]: return mx.ones(shape)'
    raise ConfigError(f"init_weights: {name} {shape} has no initial value. Add to model/parameters.py: {example}")


def init_weights(model: GPT, seed: int) -> None:
    """Initialise a model, equally on every backend. A ConfigError names what is not covered here or in sizes.py.

    Each parameter's random key depends only on the seed and its name, so that new parameters do not change others.
    """
    parameters, sizes = flatten_parameters(model), model.sizes
    drawn = {name: initial_value(name, value.shape, sizes, key_of(seed, name)) for name, value in parameters.items()}
    real, counted = sum(value.size for value in drawn.values()), count_parameters(sizes)["total"]
    if real != counted:
        where = "count_parameters (mlxchat/model/sizes.py)"
        raise ConfigError(f"init_weights: the model has {real:,} parameters, but {where} counts {counted:,}")
    set_parameters(model, drawn)


def key_of(seed: int, name: str) -> mx.array:
    """Return the random key of a parameter, which depends only on the seed and its name."""
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    return mx.random.key(int.from_bytes(digest[:8], "little"))
