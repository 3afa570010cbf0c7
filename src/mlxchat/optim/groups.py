"""Which parameter gets which rule and rate, and the update of all of them.

As in nanochat, Muon moves every matrix of the blocks and AdamW the rest, in groups with numbers of their own.
`kind: adamw` gives the matrices to AdamW as well. Any optimizer can train any architecture.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn

from mlxchat.config import OptimizerConfig
from mlxchat.errors import ConfigError
from mlxchat.model.gpt import trained_parameters
from mlxchat.ops.compiled import made_once
from mlxchat.ops.device import default_dtype
from mlxchat.optim.adamw import adamw_update
from mlxchat.optim.muon import aspect_factor, muon_update, normuon_update, variance_shape
from mlxchat.optim.schedule import Rates
from mlxchat.optimizer_config import AdamWGroupConfig, ScalingConfig

Flat = dict[str, mx.array]
Shape = tuple[int, ...]

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
        adapter: AdamWRule | None = None,
        dtype: mx.Dtype | None = None,
    ) -> None:
        """Sort the model's parameters into groups and make zero moments.

        Args:
            model: every parameter that is trained must be a matrix of a block or belong to a group of AdamW.
            config: rates and momenta.
            width: of the model; rates of tables scale with (width / reference_width)^-0.5.
            lr_frac: factor of all rates (nanochat's init_lr_frac).
            batch_lr_scale: factor, for the size of the batch, of Muon's rate and of the groups that scale with it.
            weight_decay: Muon's, of jul2026; None: the configuration's.
            adapter: of all that is trained, where that is adapters, instead of the configuration's groups.
            dtype: what Muon orthogonalises in; None: float32 on a CPU, where bfloat16's products run at a fiftieth of
                its speed, and bfloat16 on a GPU.

        Raises:
            ConfigError: a parameter belongs to no group.
        """
        self.config = config
        self._given = {
            "width": width, "lr_frac": lr_frac, "batch_lr_scale": batch_lr_scale, "weight_decay": weight_decay,
            "adapter": adapter,
        }  # fmt: skip
        self.gather_state: Callable[[], Flat] | None = None
        """Returns the state with the moments of all ranks; None: `state` has all of it."""
        self._dtype = dtype
        self.weight_decay = config.weight_decay if weight_decay is None else weight_decay
        self.muon_lr = config.matrix_lr * lr_frac * batch_lr_scale
        self.adamw_rules: dict[str, AdamWRule] = {}
        self.muon_shapes: dict[str, list[str]] = defaultdict(list)
        parameters = trained_parameters(model)
        self.shapes = {name: value.shape for name, value in parameters.items()}
        for name, value in parameters.items():
            if adapter is not None:
                rule = AdamWRule(*adapter)  # to other ranks it goes as a list
                # Lengths of rows (DoRA's m) are no weights that grow without need: they do not decay.
                self.adamw_rules[name] = rule._replace(weight_decay=0.0) if name.endswith(".m") else rule
                continue
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
        self.state |= {name: mx.zeros(shape) for name, shape in self.state_shapes(self.shapes).items()}

    @property
    def dtype(self) -> mx.Dtype:
        """In which Muon orthogonalises: as given, or that of the device which computes when it is first used."""
        if self._dtype is None:
            self._dtype = default_dtype()
        return self._dtype

    def recipe(self) -> dict[str, Any]:
        """Return as JSON data what another process needs to make the same rules for the same model."""
        return {"config": asdict(self.config), **self._given, "dtype": str(self.dtype).rpartition(".")[2]}

    @classmethod
    def of_recipe(cls, model: nn.Module, recipe: dict[str, Any]) -> Optimizer:
        """Return an optimizer of a recipe, with zero moments."""
        given = recipe["config"]
        groups = {name: AdamWGroupConfig(**group) for name, group in given["adamw_groups"].items()}
        scaling = ScalingConfig(**given["scaling"]) if given["scaling"] else None
        config = OptimizerConfig(**{**given, "adamw_groups": groups, "scaling": scaling})
        others = {name: value for name, value in recipe.items() if name not in ("config", "dtype")}
        return cls(model, config, **others, dtype=getattr(mx, recipe["dtype"]))

    def state_shapes(self, shapes: Mapping[str, Shape]) -> dict[str, Shape]:
        """Return name in `state` → shape, of parameters by name or of parts of them; without the count."""
        found: dict[str, Shape] = {}
        for name in (name for name in self.adamw_rules if name in shapes):
            found |= {f"first.{name}": shapes[name], f"second.{name}": shapes[name]}
        for name in (name for names in self.muon_shapes.values() for name in names if name in shapes):
            found[f"momentum.{name}"] = shapes[name]
            if self.config.variant == "jul2026":
                found[f"variance.{name}"] = variance_shape(*shapes[name])
        return found

    def whole_state(self) -> Flat:
        """Return `state`, with the moments of the other ranks where there are any."""
        return self.state if self.gather_state is None else self.gather_state()

    def update(self, parameters: Flat, gradients: Flat, rates: Rates[mx.array]) -> Flat:
        """Return the new parameters and advance `state`; the arguments are `move`'s."""
        new, state = self.move(parameters, gradients, self.state, rates)
        self.state.update(state)
        return new

    def move(self, parameters: Flat, gradients: Flat, state: Flat, rates: Rates[mx.array]) -> tuple[Flat, Flat]:
        """Return the new values of parameters, and of the state, for those that have a gradient.

        Matrices of one shape are moved together.

        Args:
            parameters: by name.
            gradients: of all or of some of them, of the loss averaged over the iteration's tokens.
            state: as `state` holds it, at least what `state_names` tells.
            rates: of this iteration.
        """
        new_state: Flat = {"count": state["count"] + 1}
        new: Flat = {}
        for name, rule in self.adamw_rules.items():
            if name not in gradients:
                continue
            new[name], new_state[f"first.{name}"], new_state[f"second.{name}"] = adamw_update(
                parameters[name],
                gradients[name],
                state[f"first.{name}"],
                state[f"second.{name}"],
                count=new_state["count"],
                lr=rule.lr * rates.lr_factor,
                betas=rule.betas,
                epsilon=self.config.adam_epsilon,
                weight_decay=rule.weight_decay,
            )
        move = self._move_jul2026 if self.config.variant == "jul2026" else self._move_oct2025
        for shape_names in self.muon_shapes.values():
            names = [name for name in shape_names if name in gradients]
            if names:
                new |= move(names, parameters, gradients, state, new_state, rates)
        return new, new_state

    def state_names(self, names: Iterable[str]) -> list[str]:
        """Return the names in `state` of what belongs to parameters."""
        kinds = ("first", "second", "momentum", "variance")
        return ["count", *(f"{kind}.{name}" for name in names for kind in kinds if f"{kind}.{name}" in self.state)]

    def batches(self, names: Iterable[str]) -> list[list[str]]:
        """Return names in groups that are moved together: matrices of one shape, every other parameter alone."""
        wanted = set(names)
        stacks = [[name for name in stack if name in wanted] for stack in self.muon_shapes.values()]
        return [stack for stack in stacks if stack] + [[name] for name in self.adamw_rules if name in wanted]

    def costs(self, shapes: Mapping[str, Shape]) -> dict[str, float]:
        """Return about how long it takes to move parameters, or parts of them, against each other."""
        found = {name: 1.0 * math.prod(shapes[name]) for name in self.adamw_rules if name in shapes}
        for name in (name for names in self.muon_shapes.values() for name in names if name in shapes):
            # Its products against a table's passes over memory: some 25 for each number of a short side.
            found[name] = math.prod(shapes[name]) * min(shapes[name]) / 25
        return found

    def share(self, parts: int) -> list[list[str]]:
        """Return the parameters' names in so many parts that take about equally long to move."""
        return share_evenly(self.costs(self.shapes), parts)

    def _move_oct2025(
        self, names: list[str], parameters: Flat, gradients: Flat, state: Flat, new_state: Flat, rates: Rates[mx.array]
    ) -> Flat:
        """Return matrices of one shape after Muon's step."""
        step, momenta = muon_update(
            _stack(gradients, names),
            _stack(state, names, "momentum."),
            rates.momentum,
            self.config.newton_schulz_iterations,
            self.dtype,
        )
        new_state |= {f"momentum.{name}": momenta[index] for index, name in enumerate(names)}
        lr = made_once(self.muon_lr * rates.lr_factor)
        return {name: parameters[name] - lr * step[index] for index, name in enumerate(names)}

    def _move_jul2026(
        self, names: list[str], parameters: Flat, gradients: Flat, state: Flat, new_state: Flat, rates: Rates[mx.array]
    ) -> Flat:
        """Return matrices of one shape after Muon's step; they shrink where step and weight have the same sign."""
        stacked = _stack(gradients, names)
        step, scale, momenta, variances = normuon_update(
            stacked,
            _stack(state, names, "momentum."),
            _stack(state, names, "variance."),
            rates.momentum,
            self.config.muon_beta2,
            self.config.newton_schulz_iterations,
            self.dtype,
        )
        new_state |= {f"momentum.{name}": momenta[index] for index, name in enumerate(names)}
        new_state |= {f"variance.{name}": variances[index] for index, name in enumerate(names)}
        lr = self.muon_lr * aspect_factor(stacked) * rates.lr_factor
        lr, decay = made_once(lr), made_once(lr * self.weight_decay * rates.weight_decay_factor)
        return {
            name: parameters[name]
            - lr * scale[index] * step[index]
            - decay * parameters[name] * (step[index] * parameters[name] >= 0)
            for index, name in enumerate(names)
        }


def share_evenly(costs: Mapping[str, float], parts: int) -> list[list[str]]:
    """Return names in so many parts that cost about the same: the dearest first, to whoever has least."""
    shares: list[list[str]] = [[] for _ in range(parts)]
    loads = [0.0] * parts
    for name in sorted(costs, key=lambda name: -costs[name]):
        lightest = loads.index(min(loads))
        shares[lightest].append(name)
        loads[lightest] += costs[name]
    return shares


def sum_squares(gradients: Flat) -> mx.array:
    """Return the sum of the squares of all gradients together."""
    # One axis after the other: a sum of millions of numbers at once loses digits on a CPU.
    return sum((mx.square(gradient).sum(-1).sum() for gradient in gradients.values()), mx.array(0.0))


def clip_factor(norm: mx.array, max_norm: float | None) -> mx.array | None:
    """Return what gradients of this common 2-norm are to be multiplied by (None: nothing)."""
    return None if max_norm is None else made_once(mx.minimum(1.0, max_norm / (norm + 1e-6)))


def clip_gradients(gradients: Flat, max_norm: float | None) -> tuple[Flat, mx.array]:
    """Return gradients whose common 2-norm is at most `max_norm` (None: unchanged), and the norm before clipping."""
    norm = mx.sqrt(sum_squares(gradients))
    factor = clip_factor(norm, max_norm)
    return gradients if factor is None else {name: gradient * factor for name, gradient in gradients.items()}, norm


def _stack(arrays: Flat, names: list[str], prefix: str = "") -> mx.array:
    return mx.stack([arrays[prefix + name] for name in names])


def _group_of(name: str, value: mx.array) -> str:
    if name.startswith("transformer.h.") and value.ndim == 2:
        return "matrices"
    for start, group in _GROUPS.items():
        if name.startswith(start):
            return group
    raise ConfigError(f"parameter {name} {value.shape} belongs to no group of the optimizer")
