"""Lanes of a CPU: its cores at work on different rows of a batch.

Inside a matrix product OpenBLAS uses all cores, but between products one core does the element-wise work and the
others wait, spinning. So the rows of a batch are dealt to as many streams as there are cores, each stream runs all of
its work on one thread, and only sums of gradients cross over.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import mlx.core as mx

from mlxchat.cpu import runtime
from mlxchat.model.lora import adapters_of
from mlxchat.ops.device import Lanes
from mlxchat.ops.machine import CPU_MOST_LANES
from mlxchat.planning.memory import Device, Training, predict_peak

if TYPE_CHECKING:
    from mlxchat.training.batches import Batch
    from mlxchat.training.step import TrainStep


class _Streams(threading.local):
    """Streams belong to the thread that made them, and MLX never ends theirs: so each thread makes them once."""

    def __init__(self) -> None:
        self.made: list[mx.Stream] = []


_streams = _Streams()


class CPULanes(Lanes):
    """One lane for each core that matrix products use (`runtime.set_blas_threads`)."""

    def __init__(self) -> None:
        """Make as many as there are cores now."""
        more = min(runtime.blas_threads() or 1, CPU_MOST_LANES) - 1
        made = _streams.made
        made += [mx.new_stream(mx.default_device()) for _ in range(more - len(made))]
        super().__init__([mx.default_stream(mx.default_device()), *made[:more]])

    @contextmanager
    def sharing(self, parts: int) -> Iterator[None]:
        """Evaluate with one thread for each product while `parts` lanes are at work; with one part it has all."""
        threads = runtime.blas_threads()
        if parts > 1 and threads is not None:
            runtime.set_blas_threads(1)
        try:
            yield
        finally:
            if threads is not None:
                runtime.set_blas_threads(threads)


def make_lanes() -> Lanes:
    """Return the lanes of this CPU."""
    return CPULanes()


@contextmanager
def step_context(step: TrainStep, batch: Batch) -> Iterator[None]:
    """Share the rows of a training step among lanes, and let MLX wait while more memory than predicted is in use.

    Left alone, MLX reserves memory for a hundred operations ahead of those that are computed: up to 40 % of a step's
    peak.
    """
    rows = len(range(len(batch.ids))[step.group.part(len(batch.ids))]) or 1
    micro_rows = min(rows, step.micro_rows(batch))
    training = Training(
        sizes=step.model.sizes,
        optimizer=step.optimizer.config,
        rows=rows * step.group.size,
        row_tokens=batch.ids.shape[1],
        device=Device(num_lanes=len(step.lanes), compute_bytes=step.dtype.size),
        recompute=step.recompute,
        teacher=None if step.distillation is None else step.distillation.size,
        adapters=adapters_of(step.model),
        num_ranks=step.group.size,
    )
    peak = predict_peak(training, micro_rows)
    wanted = mx.get_active_memory() + peak.total - peak.weights - peak.moments - peak.kept
    limit = mx.set_memory_limit(wanted)
    mx.set_memory_limit(min(limit, wanted))
    try:
        with step.lanes.sharing(len(step.lanes.deal(micro_rows))):
            yield
    finally:
        mx.set_memory_limit(limit)
