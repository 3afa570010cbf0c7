"""Streams that share the rows of a batch: one, MLX's default, unless `mlxchat.cpu` makes one for each core of a CPU."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import pairwise
from typing import TypeVar

import mlx.core as mx

from mlxchat.ops.device import accelerated

R = TypeVar("R")


class Lanes:
    """Streams that run side by side. `len` is their number."""

    def __init__(self, streams: Sequence[mx.Stream]) -> None:
        """Take the streams."""
        self.streams = list(streams)

    def __len__(self) -> int:
        """Return their number."""
        return len(self.streams)

    def deal(self, count: int) -> list[slice]:
        """Return parts of `count` rows, as equal as can be and none empty, at most one for each lane."""
        parts = min(len(self), count)
        borders = [count * part // parts for part in range(parts + 1)]
        return [slice(start, stop) for start, stop in pairwise(borders)]

    def run(self, calls: Sequence[Callable[[], R]]) -> list[R]:
        """Return the results of calls, the i-th built on lane i. `mx.eval` of the results runs them side by side."""
        results = []
        for stream, call in zip(self.streams, calls, strict=False):
            with mx.stream(stream):
                results.append(call())
        return results

    def sharing(self, parts: int) -> AbstractContextManager[None]:
        """Return the context in which `parts` lanes are evaluated."""
        return nullcontext()


@accelerated
def make_lanes() -> Lanes:
    """Return the lanes of the default device."""
    return Lanes([mx.default_stream(mx.default_device())])
