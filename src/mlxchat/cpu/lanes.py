"""Lanes of a CPU: its cores compute different rows of a batch, and different matrices of a stack.

Inside a matrix product OpenBLAS uses all cores, but between products one core does the element-wise work while the
others spin. So rows and matrices are distributed to one stream per core, each stream runs on one thread, and only sums
of gradients are exchanged: in a training step each lane computes gradients of some rows, then sums of some gradients.
"""

import threading
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import pairwise
from typing import Any, TypeVar

import mlx.core as mx
import numpy as np

from mlxchat.cpu import plain_version, runtime
from mlxchat.data.packing import Batch
from mlxchat.engine.decode import LastEmbedding, Reading
from mlxchat.model.gpt import GPT
from mlxchat.model.lora import adapters_of
from mlxchat.model.scoring import ScoredRow, arrays_of
from mlxchat.ops.machine import CPU_MOST_LANES
from mlxchat.optim import muon
from mlxchat.optim.optimizer import Flat, Rates
from mlxchat.planning.memory import Device, Training
from mlxchat.training.step import Backward, Gradients, Rows, Sums, TrainStep

# Prompts with fewer tokens are read by one lane.
_SHARED_TOKENS = 64
R = TypeVar("R")


class Present(threading.local):
    """What belongs to a thread."""

    def __init__(self) -> None:
        self.made: list[mx.Stream] = []  # streams, created once, because MLX never ends their own threads
        self.lanes: Lanes | None = None  # of the training step that runs now


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


_LIMIT = 0.94  # of the predicted bytes


def apply_batch(
    step: TrainStep, batch: Batch, rates: Rates, iteration: int = 0, meanwhile: Callable[[], object] | None = None
) -> tuple[float, float]:
    """As `TrainStep.__call__`, distributed to lanes, with MLX's memory limited to the predicted peak.

    Without the limit, which it exceeds by a few percent, MLX allocates for a hundred operations ahead: up to 40 % more.
    """
    rows, row_tokens = batch.ids.shape
    own_rows = -(-rows // step.num_ranks)
    micro_rows = min(own_rows, step.micro_rows(row_tokens))
    with on_lanes(micro_rows) as lanes:
        training = Training(
            sizes=step.model.sizes, optimizer=step.optimizer.config, rows=rows, row_tokens=row_tokens,
            device=Device(num_lanes=len(lanes), compute_bytes=step.dtype.size), recompute=step.recompute,
            teacher=None if step.distillation is None else step.distillation.teacher.sizes,
            adapters=adapters_of(step.model), num_ranks=step.num_ranks,
        )  # fmt: skip
        wanted = mx.get_active_memory() + round(_LIMIT * training.step_bytes(micro_rows))
        limit = mx.set_memory_limit(wanted)
        mx.set_memory_limit(min(limit, wanted))
        try:
            result: tuple[float, float] = plain_version(TrainStep.__call__)(step, batch, rates, iteration, meanwhile)
            return result
        finally:
            mx.set_memory_limit(limit)


def sum_gradients(backward: Backward, rows: Rows) -> Sums:
    """As `Backward.sum_gradients`, distributed to lanes."""
    count, row_tokens = rows["ids"].shape
    with on_lanes(min(count, backward.micro_rows(row_tokens))):
        sums: Sums = plain_version(Backward.sum_gradients)(backward, rows)
        return sums


@contextmanager
def on_lanes(rows: int) -> Iterator[Lanes]:
    """Distribute the body's computation of so many rows to lanes; within such a body use its lanes."""
    if present.lanes is not None:
        yield present.lanes
        return
    lanes = present.lanes = Lanes()
    try:
        with lanes.sharing(len(lanes.deal(rows))):
            yield lanes
    finally:
        present.lanes = None


def add_micro_batch(backward: Backward, sums: Sums, rows: Rows, parameters: Flat) -> Sums:
    """As `Backward.add_micro_batch`, each lane with a part of the rows, then with a part of the sums."""
    lanes = present_lanes()
    dealt = lanes.deal(len(rows["ids"]))
    of_lanes = [{name: array[part] for name, array in rows.items()} for part in dealt]
    parts = lanes.run([partial(backward.gradients_of, own, parameters) for own in of_lanes])
    # Evaluated before adding: otherwise MLX would run the lanes one after the other.
    mx.eval(parts)
    sizes = {name: array.size for part in parts for name, array in part.whole.items()}
    sizes |= {name: sums.gradients[name].size for name in parts[0].read}
    found = lanes.run([partial(_add, sums, parts, names) for names in _share_evenly(sizes, len(lanes))])
    del sums, parts
    mx.eval(found)
    loss, gradients = found[0]
    for _, more in found[1:]:
        gradients |= more
    return Sums(loss, gradients)


def _add(sums: Sums, parts: Sequence[Gradients], names: Collection[str]) -> Sums:
    """Return sums to which parts of a batch are added, with the gradients of some parameters alone."""
    gradients: Flat = {}
    for name in parts[0].whole:
        if name in names:
            found = [part.whole[name] for part in parts]
            if name in sums.gradients:
                found.append(sums.gradients[name])
            gradients[name] = _sum(found) if len(found) > 1 else found[0]
    for name in parts[0].read:
        if name in names:
            ids = mx.concatenate([part.read[name][0] for part in parts])
            rows = mx.concatenate([part.read[name][1] for part in parts])
            gradients[name] = sums.gradients[name].at[ids].add(rows.astype(mx.float32))
    return Sums(sum((part.loss for part in parts), sums.loss), gradients)


@mx.compile
def _sum(arrays: list[mx.array]) -> mx.array:
    """Return the sum of arrays in float32."""
    first, *others = (array.astype(mx.float32) for array in arrays)
    return sum(others, first)


def _share_evenly(sizes: dict[str, int], parts: int) -> list[list[str]]:
    """Return names in `parts` parts of about equal size: greedily, the largest first."""
    shares: list[list[str]] = [[] for _ in range(parts)]
    loads = [0] * parts
    for name in sorted(sizes, key=lambda name: -sizes[name]):
        lightest = loads.index(min(loads))
        shares[lightest].append(name)
        loads[lightest] += sizes[name]
    return shares
