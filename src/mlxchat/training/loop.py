"""The training loop: iterations with observations, intermediate models, saves and signals between them."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlxchat.config.schema import TrainingStageConfig
from mlxchat.data.packing import BatchSource
from mlxchat.model.parameters import computing_in
from mlxchat.optim.optimizer import rates_at
from mlxchat.runner.context import Context
from mlxchat.store.files import crash_point
from mlxchat.training.monitor import Monitor, Observation
from mlxchat.training.state import Checkpointer
from mlxchat.training.step import TrainStep

# Derived numbers that are proportional to the iterations.
_COUNTED = ("num_iterations", "num_updates", "total_tokens", "total_flops")


def fit(
    ctx: Context,
    config: TrainingStageConfig,
    step: TrainStep,
    batches: BatchSource,
    *,
    num_iterations: int,
    observations: Sequence[Observation],
    save: Callable[[Path], None],
    save_every: int | None = None,
    max_seconds: float | None = None,
    is_enough: Callable[[int, dict[str, float]], bool] = lambda done, numbers: False,
) -> int:
    """Train, continuing where an earlier attempt of this step stopped; return the iterations done.

    On a CPU the result is bit-identical however often it was interrupted. The training that the step extends is its
    input `extends`: weights, moments and data position are those of its end, so the result equals a straight training
    where both schedules agree on the first iterations (a constant rate).

    Observations are called when due, in this order. `save` writes the stage's outputs into a folder; every `save_every`
    iterations the present ones are published as an intermediate model. The training ends early after `max_seconds` of
    iterations, with the whole schedule, or where `is_enough`, which takes the iterations done and what was observed.
    The step's metrics get the loss and tokens per second.
    """
    mx.reset_peak_memory()
    monitor = Monitor(ctx, step, batches, num_iterations, max_seconds)
    checkpointer = Checkpointer(ctx, step, batches, monitor)
    first, is_observed = checkpointer.restore(ctx.inputs.get("extends"))
    done = first

    def write(folder: Path) -> None:
        save(folder)
        if config.save_training_state:
            checkpointer.save_finished(done, folder)

    with ctx.progress(num_iterations, "iterations", start=done) as progress:
        while True:
            expected = monitor.expect_iterations(done)
            ends = done == expected
            if not is_observed:
                numbers: dict[str, float] = {}
                with checkpointer.saving_on_stop(done, is_observed=False):
                    for each in observations:
                        if each.is_due(done, ends=ends):
                            if each.title:
                                progress.update(done, now=each.title)
                            with computing_in(step.model, step.dtype):
                                numbers |= each.run(done)
                            ends = ends or is_enough(done, numbers)
                if numbers:
                    ctx.log({"iteration": done, **numbers})
                    ctx.metrics |= numbers
                # Before the state is saved, so that a training killed in between publishes again.
                if save_every and done and done % save_every == 0 and not ends:
                    name = ctx.publish(done, write, derived_after(done, num_iterations, ctx.derived))
                    progress.note(f"published {name}")
            if ends:
                break
            with checkpointer.saving_on_stop(done):
                if done > first:
                    if ctx.should_stop():
                        raise ctx.stop(f"iteration {done:,} of {progress.total:,}", saved=True)
                    checkpointer.save_if_due(done)
                monitor.begin_iteration()
                batch = batches.next_batch(done)
                rates = rates_at(done, expected, config.schedule, step.optimizer.config)
                loss, norm = step(batch, rates, done, batches.prepare if done + 1 < num_iterations else None)
                monitor.end_iteration(done + 1, batch, loss + batch.offset, norm, rates, progress)
            done += 1
            is_observed = False
            crash_point("train.iteration")
        crash_point("train.finished")
        if config.save_training_state:
            checkpointer.save_finished(done, ctx.out)
    monitor.finish()
    return done


def derived_after(done: int, total: int, derived: Mapping[str, Any]) -> dict[str, Any]:
    """Return `derived` of a training of `total` iterations, with the counts of its first `done`."""
    return {**derived, **{name: derived[name] * done // total for name in _COUNTED if name in derived}}
