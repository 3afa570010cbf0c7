"""An optimizer on several ranks: each updates a part of the parameters and holds only their moments.

Muon's matrices stay whole, because orthogonalisation needs the whole matrix; AdamW's parameters are cut along their
first axis. So work and moments are about equal on all ranks.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from itertools import zip_longest
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from mlxchat.distributed.group import Group, buckets
from mlxchat.ops.machine import BUCKET_BYTES
from mlxchat.optim.optimizer import Flat, Optimizer, Rates, Shape, sum_squares


class Piece(NamedTuple):
    """Rows of an array on one rank, and their shape."""

    name: str
    start: int
    stop: int
    shape: Shape

    def of(self, whole: mx.array) -> mx.array:
        """Return this piece of an array."""
        return whole if whole.shape == self.shape else whole[self.start : self.stop]

    def cut_out(self, whole: mx.array) -> mx.array:
        """Return a copy of this piece: a slice would keep the whole array in memory."""
        return whole if whole.shape == self.shape else mx.array(np.array(self.of(whole)))


def deal_pieces(optimizer: Optimizer, size: int) -> list[list[Piece]]:
    """Return the pieces of each of `size` ranks: every row of every parameter once; a rank may have none."""
    pieces: list[list[Piece]] = [[] for _ in range(size)]
    # A rank's matrices are consecutive, so that its moments are rows of the stacks.
    matrices = {name: optimizer.shapes[name] for names in optimizer.stacks.values() for name in names}
    costs = [math.prod(shape) * min(shape) for shape in matrices.values()]
    done = 0
    for (name, shape), cost in zip(matrices.items(), costs, strict=True):
        pieces[size * (2 * done + cost) // (2 * sum(costs))].append(Piece(name, 0, shape[0], shape))
        done += cost
    for name in optimizer.adamw_rules:
        rows, *others = optimizer.shapes[name] or (1,)
        for rank, own in enumerate(pieces):
            start, stop = rows * rank // size, rows * (rank + 1) // size
            if start < stop:
                own.append(Piece(name, start, stop, (stop - start, *others) if optimizer.shapes[name] else ()))
    return pieces


def pieces_of_state(optimizer: Optimizer, pieces: Sequence[Piece]) -> list[Piece]:
    """Return a rank's pieces of the optimizer's state."""
    rows = {piece.name: (piece.start, piece.stop) for piece in pieces}
    for stack, names in optimizer.stacks.items():
        if own := [place for place, name in enumerate(names) if name in rows]:
            rows[stack] = own[0], own[-1] + 1
    found = []
    for name, shape in optimizer.state_shapes().items():
        if of := rows.get(name.partition(".")[2]):
            found.append(Piece(name, *of, (of[1] - of[0], *shape[1:]) if shape else ()))
    return found


class Sharding:
    """The pieces of each rank and their exchange. All ranks must call the same methods in the same order."""

    def __init__(self, group: Group, optimizer: Optimizer) -> None:
        """Distribute the parameters; `optimizer` keeps only this rank's moments."""
        self.group, self._optimizer = group, optimizer
        self.pieces = deal_pieces(optimizer, group.size)
        self.own = {piece.name: piece for piece in self.pieces[group.rank]}
        self._of_state = [pieces_of_state(optimizer, pieces) for pieces in self.pieces]
        own = {piece.name: piece.cut_out(optimizer.state[piece.name]) for piece in self._of_state[group.rank]}
        optimizer.state = {"count": optimizer.state["count"], **own}

    def sum(self, loss: mx.array, gradients: Flat) -> tuple[mx.array, Flat, mx.array]:
        """Return the summed loss, this rank's pieces of the summed gradients, stacked, and the 2-norm of all gradients.

        Empties `gradients`. Loss and norm are rank 0's: not every backend sums to the same bits everywhere, and all
        ranks must decide alike.
        """
        own: Flat = {}
        for names in list(buckets(gradients)):
            bucket = {name: gradients.pop(name).astype(mx.float32) for name in names}
            totals = self.group.sum(bucket)
            own |= {name: self.own[name].of(total) for name, total in totals.items() if name in self.own}
        own = self._optimizer.stack(own)
        sums = self.group.sum({"loss": loss, "squares": sum_squares(own)})
        numbers = self.group.share(mx.concatenate([sums["loss"].reshape(-1), mx.sqrt(sums["squares"]).reshape(1)]))
        return numbers[:-1].reshape(loss.shape), own, numbers[-1]

    def update(self, parameters: Flat, gradients: Flat, rates: Rates, norm: mx.array, ok: mx.array) -> Iterator[Flat]:
        """Update this rank's pieces and yield every whole parameter; arguments as those of `Optimizer.update`."""
        own = {name: piece.of(parameters[name]) for name, piece in self.own.items()}
        parameters.clear()
        moved = Flat()
        for new in self._optimizer.update(own, gradients, rates, norm, ok):
            moved |= new
        for name, whole in _exchange(self.group, self.pieces, moved):
            mx.eval(whole)
            yield {name: whole}

    def gather_state(self) -> Flat:
        """Return on rank 0 the optimizer's state with the moments of all ranks, on others an empty dict."""
        whole = {"count": self._optimizer.state["count"]}
        for name, array in _exchange(self.group, self._of_state, dict(self._optimizer.state)):
            if self.group.leads:
                mx.eval(array)
                whole[name] = array
        return whole if self.group.leads else {}

    def deal_state(self, state: Mapping[str, mx.array]) -> None:
        """Distribute rank 0's state to all ranks; the argument of other ranks is ignored."""
        own = {piece.name: piece.cut_out for piece in self._of_state[self.group.rank]}
        for name, shape in {"count": (), **self._optimizer.state_shapes()}.items():
            whole = self.group.share(state[name] if self.group.leads else mx.zeros(shape))
            if name in self._optimizer.state:
                self._optimizer.state[name] = own[name](whole) if name in own else whole


def _exchange(group: Group, pieces: Sequence[Sequence[Piece]], own: Flat) -> Iterator[tuple[str, mx.array]]:
    """Yield (name, float32 array) assembled from all ranks' pieces, as arrays become complete; empties `own`."""
    missing: dict[str, int] = defaultdict(int)
    for piece in (piece for of_rank in pieces for piece in of_rank):
        missing[piece.name] += 1
    parts: dict[str, list[tuple[int, mx.array]]] = defaultdict(list)
    for loads in zip_longest(*map(_loads, pieces), fillvalue=()):
        length = max(sum(math.prod(piece.shape) for piece in load) for load in loads)
        mine = [own.pop(piece.name).reshape(-1) for piece in loads[group.rank]]
        assert all(part.dtype == mx.float32 for part in mine), "trained parameters are float32"
        padding = mx.zeros(length - sum(part.size for part in mine))
        found = group.gather(mx.concatenate([*mine, padding])).reshape(group.size, length)
        for rank, load in enumerate(loads):
            start = 0
            for name, first, _, shape in load:
                size = math.prod(shape)
                parts[name].append((first, found[rank, start : start + size].reshape(shape)))
                start += size
                if len(parts[name]) == missing[name]:
                    arrays = [array for _, array in sorted(parts.pop(name), key=lambda each: each[0])]
                    yield name, arrays[0] if len(arrays) == 1 else mx.concatenate(arrays)


def _loads(pieces: Sequence[Piece]) -> Iterator[Sequence[Piece]]:
    """Yield a rank's pieces in loads of at most BUCKET_BYTES of float32."""
    load: list[Piece] = []
    for piece in pieces:
        if load and 4 * sum(math.prod(each.shape) for each in [*load, piece]) > BUCKET_BYTES:
            yield load
            load = []
        load.append(piece)
    if load:
        yield load
