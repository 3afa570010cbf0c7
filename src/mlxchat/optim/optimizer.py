"""The optimizer and its schedule: Muon updates the matrices of the blocks, AdamW the rest, in nanochat's groups.

With `kind: adamw` AdamW updates the matrices, too. Any optimizer trains any architecture. A parameter's rate is

    lr of its group × lr_frac × init_lr_frac × (width and batch scaling) × lr_factor of the iteration

Muon's matrices of one shape are updated as one stack (S, R, C), whose name is RxC: their gradients are stacked once per
update, and their momenta are stored as a stack.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn

from mlxchat.config.schema import AdapterConfig, MomentumConfig, OptimizerConfig, ScheduleConfig
from mlxchat.errors import ConfigError
from mlxchat.model.parameters import set_parameters, trained_parameters
from mlxchat.ops.device import compiled_method, default_dtype
from mlxchat.optim.muon import aspect_factor, muon_update, normuon_update

Flat = dict[str, mx.array]

# Prefix of parameter names → group of AdamW.
_GROUPS = {
    "transformer.wte.": "embedding", "lm_head.": "head", "value_embeds.": "value_embeddings",
    "resid_lambdas": "residual_scalars", "x0_lambdas": "input_scalars", "smear_": "smear", "backout_lambda": "smear",
}  # fmt: skip
# Constants of nanochat.
_TABLES = ("embedding", "head", "value_embeddings")  # groups whose rates scale with (width / 768)^-0.5
_REFERENCE_WIDTH = 768
_LR_SHARES = {"value_embeddings": 0.5, "residual_scalars": 0.01}  # share of its rate that a group takes
EPSILON = 1e-10  # of AdamW
VARIANCE_DECAY = 0.9  # NorMuon's beta2
ORTHOGONALISATIONS = 5  # iterations of Newton-Schulz; Polar Express has coefficients for five
_TOGETHER = 1 << 22  # numbers of small parameters that are updated together: 16 MB of each moment
_ROW = 1024


class Rates(NamedTuple):
    """Factor of every learning rate, Muon's momentum, and the factor of Muon's weight decay in an iteration."""

    lr_factor: float
    momentum: float
    weight_decay_factor: float


class AdamWRule(NamedTuple):
    """AdamW's hyperparameters of one parameter, with all scaling applied."""

    lr: float
    betas: tuple[float, float]
    weight_decay: float


def adapter_rule(config: AdapterConfig, width: int) -> AdamWRule:
    """Return AdamW's rule for adapters on a model of this width, without weight decay."""
    return AdamWRule(config.learning_rate * (_REFERENCE_WIDTH / width) ** 0.78, (0.9, 0.999), 0.0)


class Optimizer:
    """Rules and moments of all trained parameters of a model.

    `state` has count, first.<parameter> and second.<parameter> of AdamW, momentum.<stack> and variance.<stack> of Muon.
    """

    def __init__(
        self, model: nn.Module, config: OptimizerConfig, *, width: int, lr_frac: float = 1.0,
        batch_lr_scale: float = 1.0, weight_decay: float | None = None, adapter: AdamWRule | None = None,
    ) -> None:  # fmt: skip
        """Assign a rule to each trained parameter: a matrix of a block, or one of AdamW's groups; all moments are zero.

        Rates of tables scale with (width / 768)^-0.5, all with `lr_frac` (nanochat's init_lr_frac), all but the smear's
        with `batch_lr_scale`. `weight_decay` is Muon's, None: the configuration's; `adapter` is the rule of adapters.
        """
        self.config = config
        self.weight_decay = config.weight_decay if weight_decay is None else weight_decay
        self.muon_lr = config.matrix_lr * lr_frac * batch_lr_scale
        self.adamw_rules: dict[str, AdamWRule] = {}
        self.stacks: dict[str, list[str]] = {}  # name of a stack → names of its matrices
        shapes = {name: value.shape for name, value in trained_parameters(model).items()}
        for name, shape in sorted(shapes.items()):
            if adapter is not None:
                self.adamw_rules[name] = adapter
                continue
            group = next((group for start, group in _GROUPS.items() if name.startswith(start)), "matrices")
            if group == "matrices" and not (name.startswith("transformer.h.") and len(shape) == 2):
                raise ConfigError(f"parameter {name} {shape} has no group in the optimizer: add its name to _GROUPS")
            if group == "matrices" and config.kind == "muon":
                self.stacks.setdefault("x".join(map(str, shape)), []).append(name)
                continue
            numbers = config.adamw_groups[group]
            lr = numbers.lr * _LR_SHARES.get(group, 1.0) * lr_frac
            if group in _TABLES:
                lr *= (width / _REFERENCE_WIDTH) ** -0.5
            if group != "smear":
                lr *= batch_lr_scale
            self.adamw_rules[name] = AdamWRule(lr, (numbers.beta1, numbers.beta2), numbers.weight_decay)
        self.state: Flat = {"count": mx.array(0.0)}
        for name in self.adamw_rules:
            self.state |= {f"first.{name}": mx.zeros(shapes[name]), f"second.{name}": mx.zeros(shapes[name])}
        for stack, names in self.stacks.items():
            rows, columns = shapes[names[0]]
            self.state[f"momentum.{stack}"] = mx.zeros((len(names), rows, columns))
            if config.variant == "jul2026":
                one = (rows, 1) if rows >= columns else (1, columns)
                self.state[f"variance.{stack}"] = mx.zeros((len(names), *one))
        self._move = compiled_method(self.move)

    def update(self, model: nn.Module, gradients: Flat, rates: Rates, loss: mx.array | float = 0.0) -> mx.array:
        """Update a model's parameters and `state`, queued and not awaited; return the 2-norm of all gradients.

        `gradients`, by name, are those of the loss averaged over the iteration's tokens; they are emptied. If their
        norm or the loss is not finite, nothing changes.
        """
        stacked = {stack: mx.stack([gradients.pop(name) for name in names]) for stack, names in self.stacks.items()}
        stacked |= gradients
        gradients.clear()
        norm = mx.sqrt(sum_squares(stacked))
        ok = mx.isfinite(loss + norm)
        count = self.state["count"] = self.state["count"] + ok
        parameters = trained_parameters(model)
        varying = [mx.array(rate, dtype=mx.float32) for rate in rates]  # so that compiled code is not retraced
        for together in list(_together(stacked)):
            names = [name for each in together for name in self.stacks.get(each, [each])]
            moments = sorted(name for name in self.state if name.partition(".")[2] in together)
            new, state = self._move(
                {name: parameters.pop(name) for name in names},
                {name: stacked.pop(name) for name in together},
                {name: self.state.pop(name) for name in moments},
                [count, norm, ok],
                varying,
            )
            # In parts, so that new values take the memory of the old ones.
            self.state |= state
            set_parameters(model, new)
            mx.async_eval(new, state)
        return norm

    def move(
        self, parameters: Flat, gradients: Flat, state: Flat, scalars: list[mx.array], rates: list[mx.array]
    ) -> tuple[Flat, Flat]:
        """Return the new values and moments of some parameters or stacks; `update` runs it compiled."""
        count, norm, ok = scalars
        new, moments = Flat(), Flat()
        for name, gradient in gradients.items():
            gradient = gradient.astype(mx.float32)
            if self.config.grad_clip is not None:
                gradient = gradient * mx.minimum(1.0, self.config.grad_clip / (norm + 1e-6))[None]  # as torch does
            if name in self.stacks:
                moved, changed = self._move_stack(name, parameters, gradient, state, rates)
                new |= {each: mx.where(ok[None], value, parameters[each]) for each, value in moved.items()}
                moments |= {each: mx.where(ok[None], value, state[each]) for each, value in changed.items()}
            else:
                first, second = f"first.{name}", f"second.{name}"
                given = parameters[name], gradient, state[first], state[second], self.adamw_rules[name]
                new[name], moments[first], moments[second] = adamw_update(
                    *given, count=count, lr_factor=rates[0], epsilon=EPSILON, ok=ok
                )
        return new, moments

    def _move_stack(
        self, stack: str, parameters: Flat, gradients: mx.array, state: Flat, rates: list[mx.array]
    ) -> tuple[Flat, Flat]:
        lr_factor, momentum, weight_decay_factor = rates
        lr = self.muon_lr * aspect_factor(gradients) * lr_factor
        shrink, lr = (lr * self.weight_decay * weight_decay_factor)[None], lr[None]
        weights = {name: parameters[name] for name in self.stacks[stack]}
        momenta, options = state[f"momentum.{stack}"], (ORTHOGONALISATIONS, default_dtype())
        if self.config.variant == "oct2025":
            steps, momenta = muon_update(gradients, momenta, momentum, *options)
            found = zip(weights.items(), _unstack(steps), strict=True)
            new = {name: weight * (1 - shrink) - lr * step for (name, weight), step in found}
            return new, {f"momentum.{stack}": momenta}
        variances = state[f"variance.{stack}"]
        steps, scales, momenta, variances = normuon_update(
            gradients, momenta, variances, momentum, VARIANCE_DECAY, *options
        )
        new = {
            # Cautious weight decay: only where it agrees with the update's sign.
            name: weight - lr * scale * step - shrink * weight * (step * weight >= 0)
            for (name, weight), step, scale in zip(weights.items(), _unstack(steps), _unstack(scales), strict=True)
        }
        return new, {f"momentum.{stack}": momenta, f"variance.{stack}": variances}


def _unstack(stack: mx.array) -> list[mx.array]:
    return [matrix.squeeze(0) for matrix in mx.split(stack, len(stack))]


def _together(arrays: Flat) -> Iterator[list[str]]:
    """Yield the names of all arrays: of large ones alone, of small ones together."""
    small: list[str] = []
    size = 0
    for name, array in arrays.items():
        if array.size > _TOGETHER:
            yield [name]
            continue
        if size + array.size > _TOGETHER:
            yield small
            small, size = [], 0
        small.append(name)
        size += array.size
    if small:
        yield small


def adamw_update(
    parameter: mx.array, gradient: mx.array, first: mx.array, second: mx.array, rule: AdamWRule, *,
    count: mx.array, lr_factor: mx.array, epsilon: float, ok: mx.array,
) -> tuple[mx.array, mx.array, mx.array]:  # fmt: skip
    """Return a parameter of any shape and its moments after an update as in torch.optim.AdamW (arXiv 1711.05101).

    `count` is the number of this update, from 1; `lr_factor` multiplies the rate; if `ok` is False, nothing changes.
    """
    # Scalars outside the kernel, which would compute powers of beta for each element.
    (beta1, beta2), lr = rule.betas, rule.lr * lr_factor
    step = mx.where(ok, lr / (1 - beta1**count), 0.0)[None]
    correction = mx.where(ok, mx.rsqrt(1 - beta2**count), 1.0)[None]
    keep = mx.where(ok, 1 - lr * rule.weight_decay, 1.0)[None]
    pairs = ((beta1, 1.0), (1 - beta1, 0.0), (beta2, 1.0), (1 - beta2, 0.0))
    keep1, add1, keep2, add2 = (mx.where(ok, *pair)[None] for pair in pairs)
    gradient = mx.where(ok[None], gradient, 0.0)  # NaN × 0 would be NaN
    first = keep1 * first + add1 * gradient
    second = keep2 * second + add2 * mx.square(gradient)
    return parameter * keep - step * first / (mx.sqrt(second) * correction + epsilon), first, second


@mx.compile
def sum_squares(arrays: Flat) -> mx.array:
    """Return the sum of the squares of all numbers together, in float32."""
    total = mx.array(0.0)
    for names in _together(arrays):
        if len(names) == 1:
            rows = arrays[names[0]]
        else:
            flat = [arrays[name].reshape(-1) for name in names]
            padding = mx.zeros(-sum(each.size for each in flat) % _ROW, flat[0].dtype)
            rows = mx.concatenate([*flat, padding]).reshape(-1, _ROW)
        # Axis by axis: a single sum of millions of numbers loses digits on a CPU.
        total = total + mx.square(rows.astype(mx.float32)).sum(-1).sum()
    return total


# The schedule


def rates_at(iteration: int, num_iterations: float, schedule: ScheduleConfig, optimizer: OptimizerConfig) -> Rates:
    """Return the rates of one iteration, from 0, of the number that is planned or, at a fixed time, expected."""
    momentum = schedule.momentum or optimizer.momentum
    return Rates(
        lr_multiplier(iteration, num_iterations, schedule),
        muon_momentum(iteration, num_iterations, momentum, schedule.warmdown_frac),
        # nanochat's get_weight_decay: from 1 to 0 along half a cosine
        schedule.weight_decay_frac * 0.5 * (1 + math.cos(math.pi * iteration / num_iterations)),
    )


def lr_multiplier(iteration: float, num_iterations: float, schedule: ScheduleConfig) -> float:
    """Return the factor of every learning rate: linear warmup, constant, warmdown to final_lr_frac; never below 0.

    Counterpart of `get_lr_multiplier` in nanochat's scripts; with warmdown_frac 1 it is chat_sft's 1 − it / N. A cosine
    (half a period) starts after the warmup, so that with warmdown_frac 1 it is that of GPT-3 (arXiv 2005.14165).
    """
    warmup = schedule.warmup_iterations
    if warmup is None:
        warmup = round(schedule.warmup_frac * num_iterations)
    warmdown: float = round(schedule.warmdown_frac * num_iterations)
    if iteration < warmup:
        return (iteration + 1) / warmup
    if schedule.shape == "cosine":
        warmdown = min(warmdown, num_iterations - warmup)
    if iteration <= num_iterations - warmdown:
        return 1.0
    progress = (num_iterations - iteration) / warmdown
    if schedule.shape == "cosine":
        progress = 0.5 * (1 - math.cos(math.pi * max(0.0, progress)))
    return max(0.0, progress + (1 - progress) * schedule.final_lr_frac)


def muon_momentum(iteration: int, num_iterations: float, momentum: MomentumConfig, warmdown_frac: float) -> float:
    """Return Muon's momentum: linear from `start` to `end`, then during the warmdown to `final` (None: constant).

    Counterpart of `get_muon_momentum`: .85 → .95 over 300 iterations in 2025; .85 → .97 over 400, then → .90 in 2026.
    If both overlap, the rise comes first.
    """
    start, end, final = momentum.start, momentum.end, momentum.final
    if iteration < momentum.warmup_iterations:
        return start + (end - start) * iteration / momentum.warmup_iterations
    warmdown = round(warmdown_frac * num_iterations)
    fallen = iteration - (num_iterations - warmdown)
    return end if final is None or fallen <= 0 else end + (final - end) * fallen / warmdown
