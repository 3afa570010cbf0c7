"""Which parameter gets which rule and rate, and the update of all of them.

As in nanochat, Muon moves every matrix of the blocks and AdamW the rest, in groups with numbers of their own.
`kind: adamw` gives the matrices to AdamW as well. Any optimizer can train any architecture.
"""

from __future__ import annotations

from collections import defaultdict
from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn

from mlxchat.config import OptimizerConfig
from mlxchat.errors import ConfigError
from mlxchat.model.weights import flatten_parameters
from mlxchat.ops.device import backend
from mlxchat.optim.adamw import adamw_update
from mlxchat.optim.muon import aspect_factor, muon_update, normuon_update, variance_shape
from mlxchat.optim.schedule import Rates

Flat = dict[str, mx.array]

# Groups of AdamW by the beginnings of their parameters' names.
_GROUPS = {
    "transformer.wte.": "embedding",
    "lm_head.": "head",
    "value_embeds.": "value_embeddings",
    "resid_lambdas": "residual_scalars",
    "x0_lambdas": "input_scalars",
    "smear_gate.": "smear",
    "smear_lambda": "smear",
    "backout_lambda": "smear",
}


class AdamWRule(NamedTuple):
    """AdamW's numbers for one parameter, every scaling done."""

    lr: float
    betas: tuple[float, float]
    weight_decay: float


class Optimizer:
    """Rules and state for all parameters of a model.

    `state` holds arrays only, by name, so that it is saved and restored as it stands. `update` is pure and can be
    compiled: everything that changes from one iteration to the next comes in as an array.
    """

    def __init__(
        self,
        model: nn.Module,
        config: OptimizerConfig,
        *,
        width: int,
        lr_frac: float = 1.0,
        batch_lr_scale: float = 1.0,
        weight_decay: float | None = None,
        dtype: mx.Dtype | None = None,
    ) -> None:
        """Sort the model's parameters into groups and make zero moments.

        Args:
            model: every parameter must be a matrix of a block or belong to a group of AdamW.
            config: rates and momenta.
            width: of the model; rates of tables scale with (width / reference_width)^-0.5.
            lr_frac: factor of all rates (nanochat's init_lr_frac).
            batch_lr_scale: factor, for the size of the batch, of Muon's rate and of the groups that scale with it.
            weight_decay: Muon's, of jul2026; None: the configuration's.
            dtype: what Muon orthogonalises in; None: float32 on a CPU, where bfloat16's products run at a fiftieth of
                its speed, and bfloat16 on a GPU.

        Raises:
            ConfigError: a parameter belongs to no group.
        """
        self.config = config
        self.dtype = dtype or (mx.float32 if backend() == "cpu" else mx.bfloat16)
        self.weight_decay = config.weight_decay if weight_decay is None else weight_decay
        self.muon_lr = config.matrix_lr * lr_frac * batch_lr_scale
        self.adamw_rules: dict[str, AdamWRule] = {}
        self.muon_shapes: dict[str, list[str]] = defaultdict(list)
        parameters = flatten_parameters(model)
        for name, value in parameters.items():
            group = _group_of(name, value)
            if group == "matrices" and config.kind == "muon":
                self.muon_shapes["x".join(map(str, value.shape))].append(name)
                continue
            numbers = config.adamw_groups[group]
            lr = numbers.lr * numbers.lr_frac * lr_frac
            if numbers.scale_with_width:
                lr *= (width / config.reference_width) ** -0.5
            if numbers.scale_with_batch:
                lr *= batch_lr_scale
            self.adamw_rules[name] = AdamWRule(lr, (numbers.beta1, numbers.beta2), numbers.weight_decay)
        self.state: Flat = {"count": mx.array(0.0)}
        for name in self.adamw_rules:
            self.state[f"first.{name}"] = mx.zeros(parameters[name].shape)
            self.state[f"second.{name}"] = mx.zeros(parameters[name].shape)
        for shape, names in self.muon_shapes.items():
            rows, columns = parameters[names[0]].shape
            self.state[f"momentum.{shape}"] = mx.zeros((len(names), rows, columns))
            if config.variant == "jul2026":
                self.state[f"variance.{shape}"] = mx.zeros((len(names), *variance_shape(rows, columns)))

    def update(self, parameters: Flat, gradients: Flat, rates: Rates[mx.array]) -> Flat:
        """Return the new parameters and advance `state`.

        Args:
            parameters: by name.
            gradients: by name, of the loss averaged over the iteration's tokens.
            rates: of this iteration.
        """
        state = self.state
        state["count"] = count = state["count"] + 1
        new: Flat = {}
        for name, rule in self.adamw_rules.items():
            new[name], state[f"first.{name}"], state[f"second.{name}"] = adamw_update(
                parameters[name],
                gradients[name],
                state[f"first.{name}"],
                state[f"second.{name}"],
                count=count,
                lr=rule.lr * rates.lr_factor,
                betas=rule.betas,
                epsilon=self.config.adam_epsilon,
                weight_decay=rule.weight_decay,
            )
        move = self._move_jul2026 if self.config.variant == "jul2026" else self._move_oct2025
        for shape, names in self.muon_shapes.items():
            stacked = mx.stack([gradients[name] for name in names])
            new |= dict(zip(names, move(shape, [parameters[name] for name in names], stacked, rates), strict=True))
        return new

    def _move_oct2025(
        self, shape: str, matrices: list[mx.array], gradients: mx.array, rates: Rates[mx.array]
    ) -> list[mx.array]:
        """Return matrices of one shape after Muon's step."""
        step, self.state[f"momentum.{shape}"] = muon_update(
            gradients,
            self.state[f"momentum.{shape}"],
            rates.momentum,
            self.config.newton_schulz_iterations,
            self.dtype,
        )
        lr = self.muon_lr * rates.lr_factor
        return [matrix - lr * step[index] for index, matrix in enumerate(matrices)]

    def _move_jul2026(
        self, shape: str, matrices: list[mx.array], gradients: mx.array, rates: Rates[mx.array]
    ) -> list[mx.array]:
        """Return matrices of one shape after Muon's step; they shrink where step and weight have the same sign."""
        step, scale, self.state[f"momentum.{shape}"], self.state[f"variance.{shape}"] = normuon_update(
            gradients,
            self.state[f"momentum.{shape}"],
            self.state[f"variance.{shape}"],
            rates.momentum,
            self.config.muon_beta2,
            self.config.newton_schulz_iterations,
            self.dtype,
        )
        lr = self.muon_lr * aspect_factor(gradients) * rates.lr_factor
        decay = lr * self.weight_decay * rates.weight_decay_factor
        return [
            matrix - lr * scale[index] * step[index] - decay * matrix * (step[index] * matrix >= 0)
            for index, matrix in enumerate(matrices)
        ]


def clip_gradients(gradients: Flat, max_norm: float | None) -> tuple[Flat, mx.array]:
    """Return gradients whose common 2-norm is at most `max_norm` (None: unchanged), and the norm before clipping."""
    # One axis after the other: a sum of millions of numbers at once loses digits on a CPU.
    squares = (mx.square(gradient).sum(-1).sum() for gradient in gradients.values())
    norm = mx.sqrt(sum(squares, mx.array(0.0)))
    if max_norm is None:
        return gradients, norm
    factor = mx.minimum(1.0, max_norm / (norm + 1e-6))
    return {name: gradient * factor for name, gradient in gradients.items()}, norm


def _group_of(name: str, value: mx.array) -> str:
    if name.startswith("transformer.h.") and value.ndim == 2:
        return "matrices"
    for start, group in _GROUPS.items():
        if name.startswith(start):
            return group
    raise ConfigError(f"parameter {name} {value.shape} belongs to no group of the optimizer")
