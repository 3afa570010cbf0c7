"""The training loop: iterations with validation, logging, saving and signals between them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlxchat.config.schema import ScheduleConfig
from mlxchat.model.gpt import GPT
from mlxchat.ops.device import prepare_machine
from mlxchat.optim.optimizer import Optimizer, rates_at
from mlxchat.runner.context import Context
from mlxchat.store.crash import crash_point
from mlxchat.training.batches import BatchSource
from mlxchat.training.best import Best
from mlxchat.training.monitor import Monitor
from mlxchat.training.state import Checkpointer
from mlxchat.training.teacher import Distillation
from mlxchat.training.team_step import make_step

# Derived numbers that are proportional to the iterations.
_COUNTED = ("num_iterations", "num_updates", "total_tokens", "total_flops")


@dataclass(frozen=True, kw_only=True)
class Hook:
    """An observation between iterations, such as validation or sampling."""

    run: Callable[[int], dict[str, float]]
    """Takes the number of iterations done; returns numbers to log."""
    every: int | None
    """Iterations between calls; None: only at the end."""
    also_every: tuple[int | None, ...] = ()
    """Iterations between further calls."""
    at_start: bool = False
    """Whether to call it before the first iteration too."""
    title: str = ""
    """Its name on the progress line while it runs; empty: the line stays."""

    def is_due(self, done: int, total: int) -> bool:
        """Return whether to call it after `done` of `total` iterations."""
        if done == 0:
            return self.at_start
        return done == total or any(every and done % every == 0 for every in (self.every, *self.also_every))


@dataclass(frozen=True, kw_only=True)
class Target:
    """A held-out number at which a training ends before its horizon; compared every `every` iterations."""

    metric: str
    value: float
    every: int
    choose: Callable[[float, float], float] = min
    """min or max, whichever returns the better of two numbers."""

    def is_reached(self, numbers: Mapping[str, float]) -> bool:
        """Return whether the metric is among some numbers, and as good as the target or better."""
        found = numbers.get(self.metric, math.nan)
        return math.isfinite(found) and self.choose(found, self.value) == found

    def record(self, done: int, numbers: Mapping[str, float], metrics: dict[str, float]) -> None:
        """Set reached_target in the metrics, which saves contain, if the numbers after `done` iterations reach it."""
        if done % self.every == 0 and self.is_reached(numbers):
            metrics["reached_target"] = 1.0


def fit(
    ctx: Context,
    model: GPT,
    optimizer: Optimizer,
    batches: BatchSource,
    *,
    num_iterations: int,
    schedule: ScheduleConfig,
    hooks: list[Hook],
    micro_tokens: int,
    extends: Path | None = None,
    keep_state: bool = False,
    best: Best | None = None,
    target: Target | None = None,
    save: Callable[[Path], None] | None = None,
    save_every: int | None = None,
    dropout: float = 0.0,
    distillation: Distillation | None = None,
) -> None:
    """Train for `num_iterations`, resuming where an earlier attempt of this step stopped.

    On a CPU the result is bit-identical however often it was interrupted.

    Args:
        ctx: of the step; its metrics get the final loss and tokens per second.
        model: float32 weights, trained in place.
        optimizer: of the model's parameters.
        batches: one batch per iteration.
        num_iterations: of the whole training, including what it extends.
        schedule: learning rates over the iterations.
        hooks: called at their cadence and after the last iteration, in this order.
        micro_tokens: tokens per micro-batch.
        extends: folder of a finished training, from whose weights, moments and data position this one starts. It equals
            a straight training where both schedules agree on the first iterations (a constant rate).
        keep_state: whether to save in the artifact what an extension needs.
        best: keeps the best weights, with which the model ends; an extension starts with the last ones.
        target: ends the training when it is reached; a hook measures it at its cadence. The metrics get reached_target
            (1 or 0), iterations and seconds_to_target.
        save: writes the stage's outputs into a folder.
        save_every: iterations between intermediate models, which are published as artifacts; with `keep_state` each
            can be extended.
        dropout: share of the residual stream that is zeroed.
        distillation: a teacher whose distributions are learnt in addition to the targets.

    Raises:
        Interrupted: a signal arrived; the state was saved.
        StepFailed: loss or gradients became NaN or Inf and on_nan is stop; the state before that was saved.
        DataError: the training in `extends` does not fit.
    """
    dtype = prepare_machine(ctx.config.machine)
    mx.reset_peak_memory()
    monitor = Monitor(ctx, model, batches, dtype, num_iterations, best)
    checkpointer = Checkpointer(ctx, model, optimizer, batches, monitor, best)
    done, first_hook = checkpointer.restore(extends)
    step = make_step(
        ctx.team, model, optimizer, micro_tokens=micro_tokens, dtype=dtype, dropout=dropout,
        dropout_seed=ctx.seed("dropout"), recompute=ctx.config.machine.grad_checkpointing, distillation=distillation,
    )  # fmt: skip

    def ended() -> bool:
        return done >= num_iterations or (target is not None and "reached_target" in ctx.metrics)

    def run_hooks(first: int = 0) -> None:
        for number, hook in enumerate(hooks[first:], first):
            if hook.is_due(done, done if ended() else num_iterations):
                with checkpointer.saving_on_stop(done, pending_hook=number):
                    numbers = monitor.observe(done, hook.title, hook.run)
                    if target is not None:
                        target.record(done, numbers, ctx.metrics)

    def write(folder: Path) -> None:
        assert save is not None
        save(folder)
        if keep_state:
            checkpointer.save_finished(done, folder, intermediate=True)

    def publish() -> None:
        if save_every and done and done % save_every == 0 and not ended():
            name = ctx.publish(done, write, derived_after(done, num_iterations, ctx.derived))
            monitor.progress.note(f"published {name}")

    with ctx.progress(num_iterations, "iterations", start=done) as monitor.progress:
        if first_hook is not None:
            run_hooks(first_hook)
            publish()
        while not ended():
            with checkpointer.saving_on_stop(done):
                monitor.begin_iteration()
                batch = batches.next_batch(done)
                rates = rates_at(done, num_iterations, schedule, optimizer.config)
                loss, norm = step(batch, rates, done)
                monitor.end_iteration(done + 1, batch, loss + batch.offset, norm, step.loss_parts, rates)
            done += 1
            crash_point("train.iteration")
            run_hooks()
            publish()  # before the state is saved, so that a killed training publishes again
            if ctx.should_stop() and not ended():
                checkpointer.save(done)
                raise ctx.stop(f"iteration {done:,} of {num_iterations:,}", saved=True)
            checkpointer.save_if_due(done)
        crash_point("train.finished")
        if keep_state:
            checkpointer.save_finished(done, ctx.out)
        monitor.finish()
        if target is not None:
            reached = target.is_reached(ctx.metrics)
            ctx.metrics |= {
                "reached_target": float(reached), "iterations": done, "seconds_to_target": monitor.meter.seconds,
            }  # fmt: skip
            verb, found = "reached" if reached else "not reached", ctx.metrics[target.metric]
            monitor.progress.note(
                f"{target.metric} {target.value} {verb}: {found:.4f} after {done:,} of {num_iterations:,} iterations"
            )


def derived_after(done: int, total: int, derived: Mapping[str, Any]) -> dict[str, Any]:
    """Return `derived` of a training of `total` iterations, with the counts of its first `done`."""
    counts = {name: derived[name] * done // total for name in _COUNTED if name in derived}
    return {**derived, **counts}
