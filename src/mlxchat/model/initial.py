"""Initial weights: nanochat's, equal on every backend."""

from __future__ import annotations

import hashlib

import mlx.core as mx
import numpy as np

from mlxchat.errors import ConfigError
from mlxchat.model.gpt import GPT
from mlxchat.model.parameters import flatten_parameters, set_parameters
from mlxchat.model.sizes import GPTSizes, count_parameters


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
    raise ConfigError(f"init_weights: {name} {shape} has no initial value. Add to mlxchat/model/initial.py: {example}")


def init_weights(model: GPT, seed: int) -> None:
    """Initialise a model, equally on every backend. A ConfigError names what initial.py or sizes.py does not cover.

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
