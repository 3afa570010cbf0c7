"""Lanes of a CPU: its cores at work on different rows of a batch.

Inside a matrix product OpenBLAS uses all cores, but between products one core does the element-wise work and the
others wait, spinning. So the rows of a batch are dealt to as many streams as there are cores, each stream runs all of
its work on one thread, and only sums of gradients cross over.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import mlx.core as mx

from mlxchat.cpu import runtime
from mlxchat.ops.blocks import CPU_MOST_LANES
from mlxchat.ops.lanes import Lanes


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
        if parts == 1 or threads is None:
            yield
            return
        runtime.set_blas_threads(1)
        try:
            yield
        finally:
            runtime.set_blas_threads(threads)


def make_lanes() -> Lanes:
    """Return the lanes of this CPU."""
    return CPULanes()
