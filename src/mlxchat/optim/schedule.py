"""What varies over a training: factors of the rates and of the weight decay, and Muon's momentum."""

from __future__ import annotations

import math
from typing import Generic, NamedTuple, TypeVar

from mlxchat.optimizer_config import OptimizerConfig, ScheduleConfig

Number = TypeVar("Number")


class Rates(NamedTuple, Generic[Number]):
    """What an iteration multiplies with: plain numbers, or arrays so that compiled code is not retraced."""

    lr_factor: Number
    """Factor of every learning rate."""
    momentum: Number
    """Muon's momentum."""
    weight_decay_factor: Number
    """Factor of Muon's weight decay."""


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
    """Return the factor of every learning rate: linear up, constant, then down to `final_frac`, never below 0.

    Counterpart of `get_lr_multiplier` in nanochat's scripts; with warmdown_frac 1 it is chat_sft's 1 − it / N. Along a
    cosine the fall begins no sooner than the rise has ended, so that warmdown_frac 1 is the schedule of GPT-3 (arXiv
    2005.14165, appendix B).

    Args:
        iteration: 0 … num_iterations − 1.
        num_iterations: iterations of the whole training.
        warmup_frac: share of iterations that rise from 1/(their number) to 1.
        warmdown_frac: share of iterations, at the end, that fall.
        final_frac: what the fall would reach at iteration `num_iterations`.
        warmup_iterations: how many iterations rise; None: `warmup_frac` of them.
        shape: of the fall: linear, or cosine for half a period of one.
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
    """Return Muon's momentum: linear from `start` to `end`, and to `final` while the rates fall.

    Counterpart of `get_muon_momentum`: .85 → .95 over 300 iterations in 2025; .85 → .97 over 400, then → .90 in 2026.
    The rise comes first where both overlap.

    Args:
        iteration: 0 … num_iterations − 1.
        num_iterations: iterations of the whole training.
        start: at iteration 0.
        end: after the rise.
        warmup_iterations: length of the rise.
        final: what the fall would reach at iteration `num_iterations`; None: there is none.
        warmdown_frac: share of iterations, at the end, that fall.
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
    """Return the factor of the weight decay, from 1 to 0 along half a cosine (nanochat's `get_weight_decay`)."""
    return 0.5 * (1 + math.cos(math.pi * iteration / num_iterations))
