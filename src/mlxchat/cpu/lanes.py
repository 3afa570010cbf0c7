"""Lanes of a CPU: its cores compute different rows of a batch, and different matrices of a stack.

Inside a matrix product OpenBLAS uses all cores, but between products one core does the element-wise work while the
others spin. So rows and matrices are distributed to one stream per core, each stream runs on one thread, and only sums
of gradients are exchanged.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import pairwise
from typing import Any, TypeVar

import mlx.core as mx
import numpy as np

from mlxchat.cpu import plain_version, runtime
from mlxchat.engine.decode import LastEmbedding, Reading
from mlxchat.model.gpt import GPT
from mlxchat.model.scoring import ScoredRow, arrays_of
from mlxchat.ops.machine import CPU_MOST_LANES
from mlxchat.optim import muon

# Prompts with fewer tokens are read by one lane.
_SHARED_TOKENS = 64
R = TypeVar("R")


class Present(threading.local):
    """What belongs to a thread."""

    def __init__(self) -> None:
        self.made: list[mx.Stream] = []
        """Streams, created once, because MLX never ends their own threads."""
        self.lanes: Lanes | None = None
        """Of the training step that runs now."""


present = Present()


class Lanes:
    """One stream for each core that matrix products use; they share the rows of a batch."""

    def __init__(self) -> None:
        """Create a stream for each core in use now."""
        more = min(runtime.blas_threads() or 1, CPU_MOST_LANES) - 1
        made = present.made
        made += [mx.new_stream(mx.default_device()) for _ in range(more - len(made))]
        self.streams = [mx.default_stream(mx.default_device()), *made[:more]]

    def __len__(self) -> int:
        return len(self.streams)

    def deal(self, count: int) -> list[slice]:
        """Return at most one slice of `count` rows per lane, none empty; sizes differ by at most 1."""
        parts = min(len(self), count)
        return [slice(*borders) for borders in pairwise(count * part // parts for part in range(parts + 1))]

    def run(self, calls: Sequence[Callable[[], R]]) -> list[R]:
        """Return the results of calls, the i-th built on lane i; `mx.eval` of the results runs them in parallel."""
        results = []
        for stream, call in zip(self.streams, calls, strict=False):
            with mx.stream(stream):
                results.append(call())
        return results

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


def score_batch(forward: Callable[..., list[mx.array]], rows: list[ScoredRow], width: int, most: int) -> list[mx.array]:
    """As `model.scoring.score_batch`, each lane with a part of the rows."""
    lanes = Lanes()
    deals = lanes.deal(len(rows))
    arrays = [arrays_of(rows[part], (part.stop - part.start, width), padded=False) for part in deals]
    with lanes.sharing(len(deals)):
        found = lanes.run([partial(forward, *each) for each in arrays])
        values = [mx.concatenate(list(each)) for each in zip(*found, strict=True)]
        mx.eval(values)
    return values


def extend_caches(model: GPT, ids: np.ndarray[Any, Any], cache: list[Any]) -> None:
    """As `engine.decode.extend_caches`, each lane with a part of the rows, or of a single row's tokens.

    A layer of a later part of a row depends only on the same layer's keys and values of the part before.
    """
    (rows, tokens), layers = ids.shape, cache[:-1]
    lanes = Lanes()
    if rows == 1:
        parts = lanes.deal(tokens) if tokens >= _SHARED_TOKENS else [slice(tokens)]
        caches: list[list[Any]] = [cache] * len(parts)
        arrays = [mx.array(ids[:, part]) for part in parts]
    else:
        parts = lanes.deal(rows)
        caches = [[*(Reading(None, 0) for _ in layers), LastEmbedding([None])] for _ in parts]
        arrays = [mx.array(ids[part]) for part in parts]
    with lanes.sharing(len(parts)):
        lanes.run([partial(model.hidden, *pair) for pair in zip(arrays, caches, strict=True)])
        mx.eval([[layer.past for layer in own[:-1]] for own in caches])
    if rows > 1:
        for index, layer in enumerate(layers):
            pairs = zip(*(own[index].past for own in caches), strict=True)
            layer.past = tuple(mx.concatenate(list(each)) for each in pairs)
        mx.eval([layer.past for layer in layers])


def sum_arrays(arrays: list[mx.array]) -> None:
    """As `bench.generate.sum_arrays`, each lane with some of the arrays."""
    lanes = Lanes()
    sums = [partial(_sums, arrays[part]) for part in lanes.deal(len(arrays))]
    mx.eval(lanes.run(sums))


def _sums(arrays: list[mx.array]) -> list[mx.array]:
    return [mx.sum(array, axis=0) for array in arrays]


def muon_update(gradients: mx.array, momenta: mx.array, *rates: Any) -> Any:
    """As `optim.muon.muon_update`, each lane with some of the matrices."""
    return _over_matrices(muon.muon_update, [gradients, momenta], rates)


def normuon_update(gradients: mx.array, momenta: mx.array, variances: mx.array, *rates: Any) -> Any:
    """As `optim.muon.normuon_update`, each lane with some of the matrices."""
    return _over_matrices(muon.normuon_update, [gradients, momenta, variances], rates)


def _over_matrices(update: Callable[..., Any], stacks: list[mx.array], rates: tuple[Any, ...]) -> Any:
    lanes = present_lanes()
    dealt = lanes.deal(len(stacks[0]))
    parts = lanes.run([partial(plain_version(update), *(stack[part] for stack in stacks), *rates) for part in dealt])
    return tuple(mx.concatenate(list(each)) for each in zip(*parts, strict=True))


def present_lanes() -> Lanes:
    """Return the training step's lanes, which were made before it took all BLAS threads but one."""
    return Lanes() if present.lanes is None else present.lanes
