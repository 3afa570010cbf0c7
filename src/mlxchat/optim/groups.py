"""Which parameter gets which rule and rate, and the update of all of them.

nanochat (October 2025): AdamW for the embedding and the head, with rates scaled by sqrt(768 / width), and Muon for
every matrix of the blocks. `kind: adamw` gives the matrices to AdamW as well.
"""

from __future__ import annotations

from collections import defaultdict

import mlx.core as mx
import mlx.nn as nn

from mlxchat.config import OptimizerConfig
from mlxchat.errors import ConfigError
from mlxchat.model.gpt import flatten_parameters
from mlxchat.ops.device import backend
from mlxchat.optim.adamw import adamw_update
from mlxchat.optim.muon import muon_update

Flat = dict[str, mx.array]


class Optimizer:
    """Rules and state for all parameters of a model.

    `state` holds arrays only, by name, so that it is saved and restored as it stands. `update` is pure and can be
    compiled: everything that changes from one iteration to the next comes in as an array.
    """

    def __init__(self, model: nn.Module, config: OptimizerConfig, *, width: int, lr_frac: float = 1.0) -> None:
        """Sort the model's parameters into groups and make zero moments.

        Args:
            model: every parameter must be a matrix of a block, the embedding `wte` or the `lm_head`.
            config: rates and momenta.
            width: of the model; AdamW's embedding rates scale with (width / reference_width)^-0.5.
            lr_frac: factor of all rates (nanochat's init_lr_frac).

        Raises:
            ConfigError: a parameter belongs to no group.
        """
        self.config = config
        parameters = flatten_parameters(model)
        scale = (width / config.reference_width) ** -0.5 * lr_frac
        self.adamw_lrs: dict[str, float] = {}
        self.muon_shapes: dict[str, list[str]] = defaultdict(list)
        self.muon_lr = config.matrix_lr * lr_frac
        for name, value in parameters.items():
            if name == "transformer.wte.weight":
                self.adamw_lrs[name] = config.embedding_lr * scale
            elif name == "lm_head.weight":
                self.adamw_lrs[name] = config.unembedding_lr * scale
            elif name.startswith("transformer.h.") and value.ndim == 2:
                if config.kind == "muon":
                    self.muon_shapes["x".join(map(str, value.shape))].append(name)
                else:
                    self.adamw_lrs[name] = self.muon_lr
            else:
                raise ConfigError(f"parameter {name} {value.shape} belongs to no group of the optimizer")
        self.state: Flat = {"count": mx.array(0.0)}
        for name in self.adamw_lrs:
            self.state[f"first.{name}"] = mx.zeros_like(parameters[name])
            self.state[f"second.{name}"] = mx.zeros_like(parameters[name])
        for shape, names in self.muon_shapes.items():
            self.state[f"momentum.{shape}"] = mx.zeros((len(names), *parameters[names[0]].shape))

    def update(self, parameters: Flat, gradients: Flat, lr_factor: mx.array, momentum: mx.array) -> Flat:
        """Return the new parameters and advance `state`.

        Args:
            parameters: by name.
            gradients: by name, of the loss averaged over the iteration's tokens.
            lr_factor: scalar factor of all rates in this iteration.
            momentum: scalar, Muon's momentum in this iteration.
        """
        config, state = self.config, self.state
        count = state["count"] + 1
        state["count"] = count
        new: Flat = {}
        for name, lr in self.adamw_lrs.items():
            new[name], state[f"first.{name}"], state[f"second.{name}"] = adamw_update(
                parameters[name],
                gradients[name],
                state[f"first.{name}"],
                state[f"second.{name}"],
                count=count,
                lr=lr * lr_factor,
                betas=(config.adam_beta1, config.adam_beta2),
                epsilon=config.adam_epsilon,
                weight_decay=config.weight_decay,
            )
        # Newton-Schulz tolerates bfloat16, but on a CPU its products run at a fiftieth of float32's speed.
        dtype = mx.float32 if backend() == "cpu" else mx.bfloat16
        for shape, names in self.muon_shapes.items():
            direction, state[f"momentum.{shape}"] = muon_update(
                mx.stack([gradients[name] for name in names]),
                state[f"momentum.{shape}"],
                momentum,
                config.newton_schulz_iterations,
                dtype,
            )
            for index, name in enumerate(names):
                new[name] = parameters[name] - self.muon_lr * lr_factor * direction[index]
        return new


def clip_gradients(gradients: Flat, max_norm: float | None) -> tuple[Flat, mx.array]:
    """Return gradients whose common 2-norm is at most `max_norm` (None: unchanged), and the norm before clipping."""
    norm = mx.sqrt(sum((mx.square(gradient).sum() for gradient in gradients.values()), mx.array(0.0)))
    if max_norm is None:
        return gradients, norm
    factor = mx.minimum(1.0, max_norm / (norm + 1e-6))
    return {name: gradient * factor for name, gradient in gradients.items()}, norm
