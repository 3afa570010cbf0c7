"""Lanes of a CPU: its cores at work on different rows of a batch.

Inside a matrix product OpenBLAS uses all cores, but between products one core does the element-wise work and the
others wait, spinning. So the rows of a batch are dealt to as many streams as there are cores, each stream runs all of
its work on one thread, and only sums of gradients cross over.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import mlx.core as mx

from mlxchat.cpu import runtime
from mlxchat.ops.lanes import Lanes
from mlxchat.ops.machine import CPU_MOST_LANES


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
    def sharing(self, parts: int, need_bytes: Callable[[], int] | None = None) -> Iterator[None]:
        """Evaluate with one thread for each product while `parts` lanes are at work; with one part it has all.

        With `need_bytes` MLX waits while more memory than that is in use. Left alone it reserves memory for a hundred
        operations ahead of those that are computed: up to 40 % of a training step's peak.
        """
        threads, limit = runtime.blas_threads(), None
        if need_bytes is not None:
            wanted = mx.get_active_memory() + need_bytes()
            limit = mx.set_memory_limit(wanted)
            mx.set_memory_limit(min(limit, wanted))
        if parts > 1 and threads is not None:
            runtime.set_blas_threads(1)
        try:
            yield
        finally:
            if threads is not None:
                runtime.set_blas_threads(threads)
            if limit is not None:
                mx.set_memory_limit(limit)


def make_lanes() -> Lanes:
    """Return the lanes of this CPU."""
    return CPULanes()
