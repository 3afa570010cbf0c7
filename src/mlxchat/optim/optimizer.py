"""The optimizer and its schedule: Muon updates the matrices of the blocks, AdamW the rest, in nanochat's groups.

With `kind: adamw` AdamW updates the matrices, too. Any optimizer trains any architecture. A parameter's rate is

    lr of its group × lr_frac × init_lr_frac × (width and batch scaling) × lr_factor of the iteration
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict
from functools import partial
from itertools import zip_longest
from typing import Any, Generic, NamedTuple, TypeVar

import mlx.core as mx
import mlx.nn as nn

from mlxchat.config.schema import AdamWGroupConfig, AdapterConfig, OptimizerConfig, ScalingConfig, ScheduleConfig
from mlxchat.errors import ConfigError
from mlxchat.model.gpt import trained_parameters
from mlxchat.ops.device import Lanes, compiled, default_dtype, made_once, make_lanes
from mlxchat.optim.muon import aspect_factor, muon_update, normuon_update, variance_shape

Flat = dict[str, mx.array]
Shape = tuple[int, ...]
Number = TypeVar("Number")

# Prefix of parameter names → group of AdamW.
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


class Rates(NamedTuple, Generic[Number]):
    """Values of the schedule in an iteration; passed as arrays, so that compiled code is not retraced."""

    lr_factor: Number
    """Factor of every learning rate."""
    momentum: Number
    """Muon's momentum."""
    weight_decay_factor: Number
    """Factor of Muon's weight decay."""


class AdamWRule(NamedTuple):
    """AdamW's hyperparameters of one parameter, with all scaling applied."""

    lr: float
    betas: tuple[float, float]
    weight_decay: float


def adapter_rule(config: AdapterConfig, width: int, optimizer: OptimizerConfig) -> AdamWRule:
    """Return AdamW's rule for adapters on a model of this width."""
    lr = config.learning_rate * (optimizer.reference_width / width) ** config.width_exponent
    return AdamWRule(lr, (config.beta1, config.beta2), config.weight_decay)


class Optimizer:
    """Rules and moments of all trained parameters of a model.

    `state` holds arrays by name: count, and first, second, momentum and variance of each parameter.
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
    ) -> None:
        """Assign a rule to each parameter; all moments are zero.

        Args:
            model: every trained parameter must be a matrix of a block or belong to a group of AdamW.
            config: rates and momenta.
            width: of the model; rates of tables scale with (width / reference_width)^-0.5.
            lr_frac: factor of all rates (nanochat's init_lr_frac).
            batch_lr_scale: factor for the batch size, of Muon's rate and of groups with scale_with_batch.
            weight_decay: Muon's; None: the configuration's.
            adapter: rule of all trained parameters if these are adapters.

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
        self.weight_decay = config.weight_decay if weight_decay is None else weight_decay
        self.muon_lr = config.matrix_lr * lr_frac * batch_lr_scale
        self.adamw_rules: dict[str, AdamWRule] = {}
        self.muon_shapes: dict[Shape, list[str]] = {}
        parameters = trained_parameters(model)
        self.shapes = {name: value.shape for name, value in parameters.items()}
        for name, shape in self.shapes.items():
            if adapter is not None:
                rule = AdamWRule(*adapter)  # a list after JSON
                # DoRA's row lengths do not decay.
                self.adamw_rules[name] = rule._replace(weight_decay=0.0) if name.endswith(".m") else rule
                continue
            group = _group_of(name, shape)
            if group == "matrices" and config.kind == "muon":
                self.muon_shapes.setdefault(shape, []).append(name)
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
        self._move = mx.compile(self.move)

    def recipe(self) -> dict[str, Any]:
        """Return JSON data from which `of_recipe` creates the same rules in another process."""
        return {"config": asdict(self.config), **self._given}

    @classmethod
    def of_recipe(cls, model: nn.Module, recipe: dict[str, Any]) -> Optimizer:
        """Return an optimizer from a recipe, with zero moments."""
        given = recipe["config"]
        groups = {name: AdamWGroupConfig(**group) for name, group in given["adamw_groups"].items()}
        scaling = ScalingConfig(**given["scaling"]) if given["scaling"] else None
        config = OptimizerConfig(**{**given, "adamw_groups": groups, "scaling": scaling})
        return cls(model, **{**recipe, "config": config})

    def whole_state(self) -> Flat:
        """Return `state` with the moments of all ranks."""
        return self.state if self.gather_state is None else self.gather_state()

    # The update

    def update(
        self,
        parameters: Flat,
        gradients: Flat,
        rates: Rates[float],
        norm: mx.array | None = None,
        lanes: Lanes | None = None,
    ) -> Iterator[Flat]:
        """Yield the new parameters in batches, and advance `state`.

        Put each batch into the model before taking the next one, so that few parameters exist both old and new.

        Args:
            parameters: by name; emptied.
            gradients: of the loss averaged over the iteration's tokens, for all or some parameters; emptied.
            rates: of this iteration.
            norm: 2-norm of all gradients together, for clipping; None: computed from `gradients`.
            lanes: streams that share the work; None: those of the device.
        """
        lanes, norm = lanes or make_lanes(), mx.sqrt(sum_squares(gradients)) if norm is None else norm
        varying = Rates(*(mx.array(rate, dtype=mx.float32) for rate in rates))
        count = self.state["count"] = self.state["count"] + 1
        mx.eval(count, norm)  # otherwise lanes would wait for each other
        shares = share_evenly(self.costs({name: value.shape for name, value in gradients.items()}), len(lanes))
        for names_of_lanes in zip_longest(*map(self.batches, shares), fillvalue=()):
            calls = [
                partial(
                    self._move,
                    {name: parameters.pop(name) for name in names},
                    {name: gradients.pop(name) for name in names},
                    {name: self.state.pop(name) for name in self.state_names(names)},
                    count,
                    norm,
                    varying,
                )
                for names in names_of_lanes
            ]
            moved = lanes.run(calls)
            del calls
            for new, new_state in moved:
                self.state.update(new_state)
                yield new
            mx.eval(moved)

    def move(
        self, parameters: Flat, gradients: Flat, state: Flat, count: mx.array, norm: mx.array, rates: Rates[mx.array]
    ) -> tuple[Flat, Flat]:
        """Return the new values and moments of a batch of parameters (`batches`); `update` runs it compiled."""
        if self.config.grad_clip is not None:
            factor = clip_factor(norm, self.config.grad_clip)
            gradients = {name: gradient * factor for name, gradient in gradients.items()}
        names = list(gradients)
        if names and names[0] not in self.adamw_rules:
            return self._move_matrices(names, parameters, gradients, state, rates)
        new, new_state = Flat(), Flat()
        for name in names:
            rule = self.adamw_rules[name]
            new[name], new_state[f"first.{name}"], new_state[f"second.{name}"] = adamw_update(
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
        return new, new_state

    def _move_matrices(
        self, names: list[str], parameters: Flat, gradients: Flat, state: Flat, rates: Rates[mx.array]
    ) -> tuple[Flat, Flat]:
        """Return matrices of one shape, and their moments, after Muon's update."""

        def stack(arrays: Flat, kind: str = "") -> mx.array:
            return mx.stack([arrays[kind + name] for name in names])

        def unstack(kind: str, moments: mx.array) -> Flat:
            return {f"{kind}.{name}": moments[index] for index, name in enumerate(names)}

        config, stacked, momenta = self.config, stack(gradients), stack(state, "momentum.")
        lr = self.muon_lr * aspect_factor(stacked) * rates.lr_factor
        shrink = made_once(lr * self.weight_decay * rates.weight_decay_factor)
        new = Flat()
        if config.variant == "jul2026":
            step, scale, momenta, variances = normuon_update(
                stacked, momenta, stack(state, "variance."), rates.momentum, config.muon_beta2,
                config.newton_schulz_iterations, default_dtype(),
            )  # fmt: skip
            lr = made_once(lr)
            for index, name in enumerate(names):
                weight = parameters[name]
                # Cautious weight decay: only where it agrees with the update's sign.
                new[name] = weight - lr * scale[index] * step[index] - shrink * weight * (step[index] * weight >= 0)
            return new, unstack("momentum", momenta) | unstack("variance", variances)
        step, momenta = muon_update(stacked, momenta, rates.momentum, config.newton_schulz_iterations, default_dtype())
        lr = made_once(self.muon_lr * rates.lr_factor)  # `step` includes the aspect factor
        for index, name in enumerate(names):
            weight = parameters[name] * (1 - shrink) if self.weight_decay else parameters[name]
            new[name] = weight - lr * step[index]
        return new, unstack("momentum", momenta)

    # Parts of the parameters

    def state_shapes(self, shapes: Mapping[str, Shape]) -> dict[str, Shape]:
        """Return name in `state` → shape for parameters, or parts of them, with these shapes; without the count."""
        return {
            f"{kind}.{name}": variance_shape(*shapes[name]) if kind == "variance" else shapes[name]
            for name in self._names()
            if name in shapes
            for kind in self._moments_of(name)
        }

    def state_names(self, names: Iterable[str]) -> list[str]:
        """Return the names in `state` of the moments of parameters."""
        return [f"{kind}.{name}" for name in names for kind in self._moments_of(name)]

    def batches(self, names: Iterable[str]) -> list[list[str]]:
        """Return names in batches for `move`: matrices of one shape together, every other parameter alone."""
        wanted = set(names)
        stacks = [[name for name in stack if name in wanted] for stack in self.muon_shapes.values()]
        return [stack for stack in stacks if stack] + [[name] for name in self.adamw_rules if name in wanted]

    def costs(self, shapes: Mapping[str, Shape]) -> dict[str, float]:
        """Return the approximate relative time of updating parameters, or parts of them, with these shapes."""
        found = {name: 1.0 * math.prod(shapes[name]) for name in self._names() if name in shapes}
        # Muon's products cost about as much as AdamW's passes over memory times the short side / 25.
        return {
            name: cost if name in self.adamw_rules else cost * min(shapes[name]) / 25 for name, cost in found.items()
        }

    def share(self, parts: int) -> list[list[str]]:
        """Return the parameters' names in `parts` parts of about equal update time."""
        return share_evenly(self.costs(self.shapes), parts)

    def _names(self) -> list[str]:
        return [*self.adamw_rules, *(name for names in self.muon_shapes.values() for name in names)]

    def _moments_of(self, name: str) -> tuple[str, ...]:
        if name in self.adamw_rules:
            return "first", "second"
        return ("momentum", "variance") if self.config.variant == "jul2026" else ("momentum",)


def adamw_update(
    parameter: mx.array,
    gradient: mx.array,
    first: mx.array,
    second: mx.array,
    *,
    count: mx.array,
    lr: mx.array,
    betas: tuple[float, float],
    epsilon: float,
    weight_decay: float,
) -> tuple[mx.array, mx.array, mx.array]:
    """Return a parameter and its first and second moments after an update as in torch.optim.AdamW.

    Args:
        parameter: any shape, that of gradient and moments.
        gradient: of the loss.
        first: running mean of the gradient.
        second: running mean of its square.
        count: number of this update, from 1.
        lr: learning rate of this update.
        betas: decay of the two means.
        epsilon: added to the root of the second moment.
        weight_decay: decoupled (arXiv 1711.05101); the parameter shrinks by lr × weight_decay.
    """
    # Scalars outside the kernel, which would compute powers of beta for each element.
    step = made_once(lr / (1 - betas[0] ** count))
    correction = made_once(mx.rsqrt(1 - betas[1] ** count))
    keep = made_once(1 - lr * weight_decay)
    return _adamw(parameter, gradient, first, second, step, correction, keep, *map(mx.array, (*betas, epsilon)))


@compiled
def _adamw(
    parameter: mx.array, gradient: mx.array, first: mx.array, second: mx.array, step: mx.array, correction: mx.array,
    keep: mx.array, beta1: mx.array, beta2: mx.array, epsilon: mx.array,
) -> tuple[mx.array, mx.array, mx.array]:  # fmt: skip
    first = beta1 * first + (1 - beta1) * gradient
    second = beta2 * second + (1 - beta2) * mx.square(gradient)
    return parameter * keep - step * first / (mx.sqrt(second) * correction + epsilon), first, second


def sum_squares(gradients: Flat) -> mx.array:
    """Return the sum of the squares of all gradients together."""
    # Axis by axis: a single sum of millions of numbers loses digits on a CPU.
    return sum((mx.square(gradient).sum(-1).sum() for gradient in gradients.values()), mx.array(0.0))


def clip_factor(norm: mx.array, max_norm: float) -> mx.array:
    """Return the factor (1,) that clips gradients of this 2-norm to `max_norm`, as torch does."""
    return made_once(mx.minimum(1.0, max_norm / (norm + 1e-6)))


def share_evenly(costs: Mapping[str, float], parts: int) -> list[list[str]]:
    """Return names in `parts` parts of about equal cost: greedily, the most expensive first."""
    shares: list[list[str]] = [[] for _ in range(parts)]
    loads = [0.0] * parts
    for name in sorted(costs, key=lambda name: -costs[name]):
        lightest = loads.index(min(loads))
        shares[lightest].append(name)
        loads[lightest] += costs[name]
    return shares


def _group_of(name: str, shape: Shape) -> str:
    if name.startswith("transformer.h.") and len(shape) == 2:
        return "matrices"
    for start, group in _GROUPS.items():
        if name.startswith(start):
            return group
    raise ConfigError(f"parameter {name} {shape} has no group in the optimizer: add its name to _GROUPS")


# The schedule


def rates_at(iteration: int, num_iterations: int, schedule: ScheduleConfig, optimizer: OptimizerConfig) -> Rates[float]:
    """Return the rates of one iteration, 0 … num_iterations − 1."""
    momentum = schedule.momentum
    return Rates(
        lr_factor=lr_multiplier(
            iteration,
            num_iterations,
            warmup_frac=schedule.warmup_frac,
            warmup_iterations=schedule.warmup_iterations,
            warmdown_frac=schedule.warmdown_frac,
            final_frac=schedule.final_lr_frac,
            shape=schedule.shape,
        ),
        momentum=muon_momentum(
            iteration,
            num_iterations,
            start=momentum.start if momentum else optimizer.momentum_start,
            end=momentum.end if momentum else optimizer.momentum_end,
            warmup_iterations=momentum.warmup_iterations if momentum else optimizer.momentum_warmup_iterations,
            final=momentum.final if momentum else optimizer.momentum_final,
            warmdown_frac=schedule.warmdown_frac,
        ),
        weight_decay_factor=schedule.weight_decay_frac * cosine_decay(iteration, num_iterations),
    )


def lr_multiplier(
    iteration: float,
    num_iterations: int,
    *,
    warmup_frac: float,
    warmdown_frac: float,
    final_frac: float,
    warmup_iterations: int | None = None,
    shape: str = "linear",
) -> float:
    """Return the factor of every learning rate: linear warmup, constant, warmdown to `final_frac`; never below 0.

    Counterpart of `get_lr_multiplier` in nanochat's scripts; with warmdown_frac 1 it is chat_sft's 1 − it / N. A cosine
    warmdown starts after the warmup, so that warmdown_frac 1 is the schedule of GPT-3 (arXiv 2005.14165).

    Args:
        iteration: 0 … num_iterations − 1.
        num_iterations: iterations of the whole training.
        warmup_frac: share of iterations of the warmup, from 1/(their number) to 1.
        warmdown_frac: share of iterations of the warmdown, at the end.
        final_frac: factor that the warmdown would reach at iteration `num_iterations`.
        warmup_iterations: length of the warmup; None: `warmup_frac` of the iterations.
        shape: of the warmdown: linear, or cosine (half a period).
    """
    warmup = round(warmup_frac * num_iterations) if warmup_iterations is None else warmup_iterations
    warmdown = round(warmdown_frac * num_iterations)
    if iteration < warmup:
        return (iteration + 1) / warmup
    if shape == "cosine":
        warmdown = min(warmdown, num_iterations - warmup)
    if iteration <= num_iterations - warmdown:
        return 1.0
    progress = (num_iterations - iteration) / warmdown
    if shape == "cosine":
        progress = 0.5 * (1 - math.cos(math.pi * max(0.0, progress)))
    return max(0.0, progress + (1 - progress) * final_frac)


def muon_momentum(
    iteration: int,
    num_iterations: int,
    *,
    start: float,
    end: float,
    warmup_iterations: int,
    final: float | None,
    warmdown_frac: float,
) -> float:
    """Return Muon's momentum: linear from `start` to `end`, then during the warmdown to `final` (None: constant).

    Counterpart of `get_muon_momentum`: .85 → .95 over 300 iterations in 2025; .85 → .97 over 400, then → .90 in 2026.
    If both overlap, the rise comes first.
    """
    if iteration < warmup_iterations:
        frac = iteration / warmup_iterations
        return (1 - frac) * start + frac * end
    warmdown = round(warmdown_frac * num_iterations)
    fallen = iteration - (num_iterations - warmdown)
    if final is None or fallen <= 0:
        return end
    frac = fallen / warmdown
    return (1 - frac) * end + frac * final


def cosine_decay(iteration: int, num_iterations: int) -> float:
    """Return the factor of weight decay, from 1 to 0 along half a cosine (nanochat's `get_weight_decay`)."""
    return 0.5 * (1 + math.cos(math.pi * iteration / num_iterations))
