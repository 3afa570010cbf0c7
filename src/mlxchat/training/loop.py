"""The loop: batches in, an updated model out; validation, metrics, resumable state and signals in between."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import mlx.core as mx

from mlxchat.config import MachineConfig, ScheduleConfig
from mlxchat.model.gpt import GPT
from mlxchat.ops import blas
from mlxchat.ops.device import select_device
from mlxchat.optim.groups import Optimizer
from mlxchat.optim.schedule import rates_at
from mlxchat.runner.context import Context
from mlxchat.runner.progress import format_bytes, format_count
from mlxchat.training.resume import load_state, save_state
from mlxchat.training.step import Batch, TrainStep

_EMA_DECAY = 0.9


class BatchSource(Protocol):
    """Where batches come from, one per iteration."""

    def next_batch(self, iteration: int) -> Batch:
        """Return the batch of an iteration."""

    def state(self) -> dict[str, Any]:
        """Return the position, as JSON data."""

    def restore(self, state: dict[str, Any]) -> None:
        """Return to a position."""


@dataclass(frozen=True, kw_only=True)
class Hook:
    """Something to do between iterations: validate, sample."""

    run: Callable[[int], dict[str, float]]
    """Takes the number of iterations done; what it returns is logged."""
    every: int | None
    """Iterations between calls; None: only at the end."""
    at_start: bool = False
    """Whether to call it before the first iteration too."""


def fit(
    ctx: Context,
    model: GPT,
    optimizer: Optimizer,
    batches: BatchSource,
    *,
    num_iterations: int,
    schedule: ScheduleConfig,
    hooks: list[Hook],
) -> None:
    """Train for `num_iterations`, continuing where an earlier attempt of this step stopped.

    On a CPU the result is the same bit for bit however often it was interrupted: weights, optimizer, position in
    the data and the iteration are restored, and nothing else enters the computation.

    Args:
        ctx: of the step; its metrics get final loss and tokens per second.
        model: float32 weights, trained in place.
        optimizer: of the model's parameters.
        batches: one batch per iteration.
        num_iterations: of the whole training.
        schedule: learning rates over the iterations.
        hooks: called at their cadence and after the last iteration.

    Raises:
        Interrupted: a signal arrived; the state was saved.
    """
    machine = ctx.config.machine
    dtype = prepare_machine(machine)
    step = TrainStep(model, optimizer, micro_tokens=machine.device_batch_tokens, dtype=dtype)
    meter = Meter()
    state = load_state(ctx.work, model, optimizer)
    done = state["iteration"] if state else 0
    if state:
        batches.restore(state["batches"])
        meter.restore(state["meter"])
    ctx.rewind_records(done)
    saved_at = time.monotonic()

    def save() -> None:
        save_state(ctx.work, done, model, optimizer, {"batches": batches.state(), "meter": meter.state()})

    with ctx.progress(num_iterations, "iterations", start=done) as progress:
        _run_hooks(ctx, hooks, done, num_iterations, starting=True)
        while done < num_iterations:
            began = time.perf_counter()
            batch = batches.next_batch(done)
            rates = rates_at(done, num_iterations, schedule, optimizer.config)
            loss, norm = step(batch, rates)
            done += 1
            meter.add(loss, batch.ids.size, time.perf_counter() - began)
            if done % machine.log_every == 0 or done == num_iterations:
                ctx.log({"iteration": done, **meter.record(loss), "lr_multiplier": rates.lr_factor, "grad_norm": norm})
            progress.update(done, **meter.show())
            _run_hooks(ctx, hooks, done, num_iterations, starting=False)
            if ctx.should_stop() and done < num_iterations:
                save()
                raise ctx.stop(f"iteration {done} of {num_iterations}")
            if time.monotonic() - saved_at >= machine.checkpoint_seconds:
                save()
                saved_at = time.monotonic()
    ctx.metrics["loss"] = meter.loss
    ctx.metrics["tokens_per_second"] = meter.tokens / max(meter.seconds, 1e-9)


def prepare_machine(machine: MachineConfig) -> mx.Dtype:
    """Apply device, memory limits and BLAS threads; return the dtype to compute in."""
    dtype = select_device(machine.device, machine.compute_dtype)
    if machine.memory_limit_bytes is not None:
        mx.set_memory_limit(machine.memory_limit_bytes)
    if machine.cache_limit_bytes is not None:
        mx.set_cache_limit(machine.cache_limit_bytes)
    blas.set_blas_threads(machine.blas_threads or blas.available_cores())
    return dtype


class Meter:
    """Smoothed loss, speed and memory of a training."""

    def __init__(self) -> None:
        """Begin at nothing."""
        self._ema, self._weight = 0.0, 0.0
        self.tokens, self.seconds = 0, 0.0
        self._recent: list[tuple[int, float]] = []

    @property
    def loss(self) -> float:
        """Debiased exponential mean of the loss (decay 0.9, as nanochat prints it)."""
        return self._ema / self._weight if self._weight else 0.0

    def add(self, loss: float, tokens: int, seconds: float) -> None:
        """Count one iteration."""
        self._ema = _EMA_DECAY * self._ema + (1 - _EMA_DECAY) * loss
        self._weight = _EMA_DECAY * self._weight + (1 - _EMA_DECAY)
        self.tokens += tokens
        self.seconds += seconds
        self._recent = [*self._recent[-9:], (tokens, seconds)]

    def tokens_per_second(self) -> float:
        """Return the speed of the last ten iterations."""
        return sum(tokens for tokens, _ in self._recent) / max(1e-9, sum(seconds for _, seconds in self._recent))

    def record(self, loss: float) -> dict[str, float]:
        """Return the numbers for metrics.jsonl."""
        return {
            "loss": loss,
            "smooth_loss": self.loss,
            "tokens_per_second": self.tokens_per_second(),
            "elapsed_seconds": self.seconds,
            "peak_memory_bytes": mx.get_peak_memory(),
        }

    def show(self) -> dict[str, str]:
        """Return the numbers for the progress line."""
        return {
            "loss": f"{self.loss:.3f}",
            "speed": f"{format_count(self.tokens_per_second())} tok/s",
            "memory": format_bytes(mx.get_peak_memory()),
        }

    def state(self) -> dict[str, Any]:
        """Return what a resumed training continues with."""
        return {"ema": self._ema, "weight": self._weight, "tokens": self.tokens, "seconds": self.seconds}

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from a saved state."""
        self._ema, self._weight = state["ema"], state["weight"]
        self.tokens, self.seconds = state["tokens"], state["seconds"]


def _run_hooks(ctx: Context, hooks: list[Hook], done: int, total: int, *, starting: bool) -> None:
    for hook in hooks:
        due = hook.at_start and done == 0 if starting else done == total or (hook.every and done % hook.every == 0)
        if due:
            numbers = hook.run(done)
            if numbers:
                ctx.log({"iteration": done, **numbers})
                ctx.metrics.update(numbers)
