"""Lanes of a CPU: its cores compute different rows of a batch.

Inside a matrix product OpenBLAS uses all cores, but between products one core does the element-wise work while the
others spin. So the rows of a batch are distributed to one stream per core, each stream runs on one thread, and only
sums of gradients are exchanged.
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
    """Streams of each thread, created once: they belong to a thread, and MLX never ends their own threads."""

    def __init__(self) -> None:
        self.made: list[mx.Stream] = []


_streams = _Streams()


class CPULanes(Lanes):
    """One lane for each core that matrix products use (`runtime.set_blas_threads`)."""

    def __init__(self) -> None:
        """Create a stream for each core in use now."""
        more = min(runtime.blas_threads() or 1, CPU_MOST_LANES) - 1
        made = _streams.made
        made += [mx.new_stream(mx.default_device()) for _ in range(more - len(made))]
        super().__init__([mx.default_stream(mx.default_device()), *made[:more]])

    @contextmanager
    def sharing(self, parts: int) -> Iterator[None]:
        """Use one BLAS thread per product while `parts` > 1 lanes compute; with one part, all threads."""
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
    """Distribute the rows of a training step to lanes, and limit MLX's memory to the predicted peak.

    Without the limit MLX allocates memory for a hundred operations ahead: up to 40 % of a step's peak.
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
