"""The training step on lanes: each computes gradients of some rows, then sums of some gradients."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import mlx.core as mx

from mlxchat.cpu import plain_version
from mlxchat.cpu.lanes import Lanes, present, present_lanes
from mlxchat.model.lora import adapters_of
from mlxchat.optim.optimizer import Flat, Rates
from mlxchat.planning.memory import Device, Training
from mlxchat.training.batches import Batch
from mlxchat.training.step import Backward, Gradients, Rows, Sums, TrainStep

_LIMIT = 0.94  # of the predicted bytes


def apply_batch(
    step: TrainStep, batch: Batch, rates: Rates, iteration: int = 0, meanwhile: Callable[[], object] | None = None
) -> tuple[float, float]:
    """As `TrainStep.__call__`, distributed to lanes, with MLX's memory limited to the predicted peak.

    Without the limit MLX allocates memory for a hundred operations ahead: up to 40 % of a step's peak. It exceeds the
    limit by a few percent.
    """
    rows, row_tokens = batch.ids.shape
    own_rows = -(-rows // step.num_ranks)
    micro_rows = min(own_rows, step.micro_rows(row_tokens))
    with on_lanes(micro_rows) as lanes:
        training = Training(
            sizes=step.model.sizes,
            optimizer=step.optimizer.config,
            rows=rows,
            row_tokens=row_tokens,
            device=Device(num_lanes=len(lanes), compute_bytes=step.dtype.size),
            recompute=step.recompute,
            teacher=None if step.distillation is None else step.distillation.teacher.sizes,
            adapters=adapters_of(step.model),
            num_ranks=step.num_ranks,
        )
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
