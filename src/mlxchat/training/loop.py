"""The loop: batches in, an updated model out; validation, metrics, resumable state and signals in between."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import mlx.core as mx

from mlxchat.config import MachineConfig, ScheduleConfig
from mlxchat.errors import Interrupted, StepFailed
from mlxchat.model.gpt import GPT
from mlxchat.model.lora import adapters_of
from mlxchat.model.sizes import flops_per_token
from mlxchat.ops.cores import available_cores
from mlxchat.ops.device import backend, select_device, set_cpu_threads
from mlxchat.optim.groups import Optimizer
from mlxchat.optim.schedule import rates_at
from mlxchat.planning.budget import MOST_TOKENS
from mlxchat.planning.peak import peak_flops, raise_peak
from mlxchat.runner.context import Context
from mlxchat.runner.crash import crash_point
from mlxchat.training.best import Best
from mlxchat.training.meter import Meter
from mlxchat.training.resume import load_finished, load_state, save_finished, save_state
from mlxchat.training.step import Batch
from mlxchat.training.teacher import Distillation
from mlxchat.training.team_step import TeamStep, make_step
from mlxchat.training.watch import Watch, is_finite, name_documents


class BatchSource(Protocol):
    """Where batches come from, one per iteration."""

    waited_seconds: float
    """How long the loop has waited for data so far."""

    def next_batch(self, iteration: int) -> Batch:
        """Return the batch of an iteration."""

    def documents(self) -> list[str]:
        """Return what people call the documents of the last batch."""

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
    also_every: int | None = None
    """Iterations between further calls."""
    at_start: bool = False
    """Whether to call it before the first iteration too."""
    title: str = ""
    """What it is called on the progress line while it runs; empty: it is short."""

    def is_due(self, done: int, total: int, *, starting: bool) -> bool:
        """Tell whether to call it after `done` of `total` iterations, or before the first one."""
        cadences = [every for every in (self.every, self.also_every) if every]
        if starting:
            return self.at_start and done == 0
        return done == total or any(done % every == 0 for every in cadences)


def fit(
    ctx: Context,
    model: GPT,
    optimizer: Optimizer,
    batches: BatchSource,
    *,
    num_iterations: int,
    schedule: ScheduleConfig,
    hooks: list[Hook],
    micro_tokens: int | None = None,
    extends: Path | None = None,
    keep_state: bool = False,
    best: Best | None = None,
    dropout: float = 0.0,
    distillation: Distillation | None = None,
) -> None:
    """Train for `num_iterations`, continuing where an earlier attempt of this step stopped.

    On a CPU the result is the same bit for bit however often it was interrupted: weights, optimizer, position in
    the data and the iteration are restored, and nothing else enters the computation.

    With `extends` it begins where that finished training ended, say at iteration 6 of 10: with its weights, moments
    and position in the data. Rates are those of a training of 10 iterations from its seventh on; what the first six
    were trained with, the end of the shorter schedule included, stays as it was. So it equals a straight training of
    10 where both schedules agree on the first six (a constant rate), and not where the shorter one had begun to fall.

    Args:
        ctx: of the step; its metrics get final loss and tokens per second.
        model: float32 weights, trained in place.
        optimizer: of the model's parameters.
        batches: one batch per iteration.
        num_iterations: of the whole training, what it extends included.
        schedule: learning rates over the iterations.
        hooks: called at their cadence and after the last iteration.
        micro_tokens: tokens per micro-batch; None: `machine.device_batch_tokens`, or no more than help.
        extends: folder of a finished training with its state.
        keep_state: leave in the artifact what an extension needs.
        best: weights that hooks may offer; the model ends with those that were kept. An extension begins with the last.
        dropout: share of the stream's numbers that are left out.
        distillation: a teacher whose distributions are learnt besides the targets.

    Raises:
        Interrupted: a signal arrived; the state was saved.
        StepFailed: loss or gradients became NaN or Inf, and on_nan says to stop; the state before that was saved.
        DataError: what is to be extended does not fit.
    """
    machine = ctx.config.machine
    dtype = prepare_machine(machine)
    # nanochat's FLOPs per token are those of a training of all weights.
    peak = peak_flops(dtype) if adapters_of(model) is None else None
    mx.reset_peak_memory()
    micro_tokens = micro_tokens or machine.device_batch_tokens or MOST_TOKENS[backend()]
    step = make_step(
        ctx.team,
        model,
        optimizer,
        micro_tokens=micro_tokens,
        dtype=dtype,
        recompute=machine.grad_checkpointing,
        dropout=dropout,
        dropout_seed=ctx.seed("dropout"),
        distillation=distillation,
    )
    num_ranks = ctx.team.size if ctx.team is not None else 1
    meter = Meter(
        flops_per_token=flops_per_token(model.sizes),
        peak_flops=peak and num_ranks * peak,
        raise_peak=lambda rate: num_ranks * raise_peak(dtype, rate / num_ranks),
    )
    watch = Watch(ctx.config.training)
    state = load_state(ctx.work, model, optimizer, best)
    if state is not None:
        ctx.rewind_records(state["iteration"])
        ctx.metrics |= state.get("metrics", {})
    elif extends is not None:
        state = load_finished(extends, model, optimizer, best)
        ctx.take_records(extends)
    else:
        ctx.rewind_records(0)
    done = 0
    if state is not None:
        done = state["iteration"]
        batches.restore(state["batches"])
        meter.restore(state["meter"])
        watch.restore(state["watch"])
    saved_at = time.monotonic()

    def progress_so_far() -> dict[str, Any]:
        metrics = {name: value for name, value in ctx.metrics.items() if math.isfinite(value)}
        return {"batches": batches.state(), "meter": meter.state(), "watch": watch.state(), "metrics": metrics}

    def save(**more: int) -> None:
        save_state(ctx.work, done, model, optimizer, {**progress_so_far(), **more}, best)

    with ctx.progress(num_iterations, "iterations", start=done) as progress:

        def run_hooks(first: int = 0, *, starting: bool = False) -> None:
            for number, hook in enumerate(hooks[first:], first):
                if not hook.is_due(done, num_iterations, starting=starting):
                    continue
                if hook.title:
                    progress.update(done, now=hook.title)
                try:
                    numbers = hook.run(done)
                except Interrupted:  # the iteration is done, and what is looked at after it is not
                    save(pending_hook=number)
                    raise
                if numbers:
                    ctx.log({"iteration": done, **numbers})
                    ctx.metrics.update(numbers)

        if done and state is not None and "pending_hook" in state:
            run_hooks(state["pending_hook"])
        else:
            run_hooks(starting=True)
        while done < num_iterations:
            before = progress_so_far()
            began, waited = time.perf_counter(), batches.waited_seconds
            try:
                batch = batches.next_batch(done)
            except Interrupted:  # while text was encoded, which the loop waited for
                save()
                raise
            except StepFailed as error:  # a reward, say, that the user's code should have given
                save()
                raise StepFailed(
                    f"{error}\nWhat was trained until iteration {done} of {num_iterations} is saved."
                ) from error
            waited = batches.waited_seconds - waited
            rates = rates_at(done, num_iterations, schedule, optimizer.config)
            traffic = ctx.team.group.traffic.seconds if ctx.team is not None else 0.0
            loss, norm = step(batch, rates, done)
            seconds = time.perf_counter() - began
            record: dict[str, Any] = {}
            of_ranks = {}
            if isinstance(step, TeamStep):
                of_ranks["communication_frac"] = (step.team.group.traffic.seconds - traffic) / seconds
            good = is_finite(loss, norm)
            if good:
                ctx.metrics |= step.loss_parts
                warning = watch.warn(done + 1, norm)
            else:
                warning = f"loss {loss} and gradient norm {norm}, batch of {name_documents(batches.documents())}"
                if watch.must_stop():
                    save_state(ctx.work, done, model, optimizer, before, best)
                    raise StepFailed(_explain_stop(ctx, done + 1, num_iterations, warning))
                warning += "; the update was left out"
                record["skipped_iterations"] = watch.num_skipped
            done += 1
            crash_point("train.iteration")
            meter.add(loss if good else None, batch.ids.size, seconds, waited)
            if warning is not None:
                progress.note(f"iteration {done}: {warning}")
                record["warning"] = warning
            if done % machine.log_every == 0 or done == num_iterations or record:
                record |= {"lr_multiplier": rates.lr_factor, **({"grad_norm": norm, **step.loss_parts} if good else {})}
                ctx.log({"iteration": done, **meter.record(loss if good else None), **of_ranks, **record})
            shown = {**meter.show(), **(best.show() if best is not None else {}), **watch.show(done)}
            progress.update(done, **shown)
            run_hooks()
            if ctx.should_stop() and done < num_iterations:
                save()
                raise ctx.stop(f"iteration {done:,} of {num_iterations:,}", saved=True)
            if time.monotonic() - saved_at >= machine.checkpoint_seconds:
                save()
                saved_at = time.monotonic()
        if best is not None and best.iteration is not None:
            progress.note(
                f"kept the weights of iteration {best.iteration}: {best.METRIC} {best.numbers[best.METRIC]:.5f}"
            )
    crash_point("train.finished")
    if isinstance(step, TeamStep):
        step.end()
    if keep_state:
        save_finished(ctx.out, done, optimizer, progress_so_far(), model, best)
    if best is not None and best.iteration is not None:
        best.put_back(model)
        last = {f"last_{name}": value for name, value in ctx.metrics.items() if name in best.numbers}
        ctx.metrics |= {**best.numbers, "best_iteration": best.iteration, **last}
    if watch.num_skipped or ctx.config.training.on_nan == "skip":
        ctx.metrics["skipped_iterations"] = watch.num_skipped
    ctx.metrics["loss"] = meter.loss
    ctx.metrics["tokens_per_second"] = meter.tokens / max(meter.seconds, 1e-9)
    ctx.metrics["data_wait_frac"] = meter.waited / max(meter.seconds, 1e-9)


def prepare_machine(machine: MachineConfig) -> mx.Dtype:
    """Apply device, memory limits and BLAS threads; return the dtype to compute in."""
    dtype = select_device(machine.device, machine.compute_dtype)
    if machine.memory_limit_bytes is not None:
        mx.set_memory_limit(machine.memory_limit_bytes)
    if machine.cache_limit_bytes is not None:
        mx.set_cache_limit(machine.cache_limit_bytes)
    if machine.wired_limit_bytes is not None and backend() == "metal":  # elsewhere memory is not wired
        mx.set_wired_limit(machine.wired_limit_bytes)
    set_cpu_threads(machine.blas_threads or available_cores())
    return dtype


def _explain_stop(ctx: Context, iteration: int, num_iterations: int, what: str) -> str:
    """Return what is told when NaN or Inf ends a training."""
    return (
        f"{ctx.step} stopped: iteration {iteration} of {num_iterations} gave {what}. Its update was left out.\n"
        f"The state before it, after iteration {iteration - 1}, lies in {ctx.work}. The same command continues there; "
        "with training.on_nan=skip it leaves such updates out and goes on."
    )
