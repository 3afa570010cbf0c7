"""Lanes: the cores of a CPU at work on different rows of a batch.

Inside a matrix product OpenBLAS uses all cores, but between products one core does the element-wise work and the
others wait, spinning. So on a CPU the rows of a batch are dealt to as many streams as there are cores, each stream
runs all of its work on one thread, and only sums of gradients cross over. On a GPU, or with one core, there is one
lane: MLX's default stream.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import TypeVar

import mlx.core as mx

from mlxchat.ops import blas
from mlxchat.ops.device import backend

R = TypeVar("R")
# More lanes would leave each of them too few rows.
_MOST_LANES = 16


class _Made(threading.local):
    """Streams belong to the thread that made them, and MLX never ends theirs: so each thread makes them once."""

    def __init__(self) -> None:
        self.streams: dict[str, list[mx.Stream]] = {}


_made = _Made()


def _streams(count: int) -> list[mx.Stream]:
    device = mx.default_device()
    made = _made.streams.setdefault(str(device), [])
    made += [mx.new_stream(device) for _ in range(count - len(made))]
    return made[:count]


class Lanes:
    """Streams that run side by side. `len` is their number."""

    def __init__(self) -> None:
        """Make as many as matrix products may use cores now (`ops.blas.set_blas_threads`)."""
        cores = (blas.blas_threads() or 1) if backend() == "cpu" else 1
        self.streams = [mx.default_stream(mx.default_device())]
        self.streams += _streams(min(cores, _MOST_LANES) - 1)

    def __len__(self) -> int:
        """Return their number."""
        return len(self.streams)

    def deal(self, count: int) -> list[slice]:
        """Return parts of `count` rows, as equal as can be and none empty, at most one for each lane."""
        parts = min(len(self), count)
        borders = [count * part // parts for part in range(parts + 1)]
        return [slice(start, stop) for start, stop in pairwise(borders)]

    def run(self, calls: Sequence[Callable[[], R]]) -> list[R]:
        """Return the results of calls, the i-th built on lane i. MLX computes them, side by side, when asked to."""
        results = []
        for stream, call in zip(self.streams, calls, strict=False):
            with mx.stream(stream):
                results.append(call())
        return results

    @contextmanager
    def sharing(self, parts: int) -> Iterator[None]:
        """Evaluate with one thread for each product while `parts` lanes are at work; with one part it has all."""
        threads = blas.blas_threads()
        if parts == 1 or threads is None:
            yield
            return
        blas.set_blas_threads(1)
        try:
            yield
        finally:
            blas.set_blas_threads(threads)
