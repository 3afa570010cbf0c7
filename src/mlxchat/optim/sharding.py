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
from mlxchat.optim.optimizer import Flat, Optimizer, Shape, share_evenly, sum_squares

_NUMBER_BYTES = 4


class Piece(NamedTuple):
    """Rows of an array on one rank."""

    name: str
    start: int
    stop: int
    shape: Shape
    """Shape of the piece."""

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    def of(self, whole: mx.array) -> mx.array:
        """Return this piece of an array."""
        return whole if whole.shape == self.shape else whole[self.start : self.stop]

    def cut_out(self, whole: mx.array) -> mx.array:
        """Return a copy of this piece, because a slice would keep the whole array in memory."""
        return whole if whole.shape == self.shape else mx.array(np.array(self.of(whole)))


def deal_pieces(optimizer: Optimizer, size: int) -> list[list[Piece]]:
    """Return the pieces of each of `size` ranks: every row of every parameter once; a rank may have none."""
    shapes = optimizer.shapes
    matrices = {name: shapes[name] for names in optimizer.muon_shapes.values() for name in names}
    shares = share_evenly(optimizer.costs(matrices), size)
    pieces = [[Piece(name, 0, shapes[name][0], shapes[name]) for name in names] for names in shares]
    for name in optimizer.adamw_rules:
        rows = shapes[name][0] if shapes[name] else 1
        # Scalars go to the last rank, the most expensive matrix to rank 0.
        for rank, own in enumerate(pieces):
            start, stop = rows * rank // size, rows * (rank + 1) // size
            if start < stop:
                own.append(Piece(name, start, stop, (stop - start, *shapes[name][1:]) if shapes[name] else ()))
    return pieces


class Sharding:
    """The pieces of each rank and their exchange. All ranks must call the same methods in the same order."""

    def __init__(self, group: Group, optimizer: Optimizer) -> None:
        """Distribute the parameters; `optimizer` keeps only this rank's moments."""
        self.group = group
        self.pieces = deal_pieces(optimizer, group.size)
        self.own = {piece.name: piece for piece in self.pieces[group.rank]}
        self._of_state = [_state_pieces(optimizer, pieces) for pieces in self.pieces]
        own = {piece.name: piece.cut_out(optimizer.state[piece.name]) for piece in self._of_state[group.rank]}
        optimizer.state = {"count": optimizer.state["count"], **own}

    def sum(self, gradients: Flat) -> tuple[Flat, mx.array]:
        """Return this rank's pieces of the summed gradients and the 2-norm of all of them; empties `gradients`."""
        own: Flat = {}
        for names in list(buckets(gradients)):
            for name, total in self.group.sum({name: gradients.pop(name) for name in names}).items():
                if name in self.own:
                    own[name] = self.own[name].of(total)
        squares = self.group.sum({"squares": sum_squares(own)})["squares"]
        return own, mx.sqrt(squares)

    def gather(self, moved: Flat) -> Iterator[tuple[str, mx.array]]:
        """Yield every whole parameter from the pieces that the ranks updated; empties `moved`."""
        return exchange(self.group, self.pieces, moved)

    def gather_state(self, optimizer: Optimizer) -> Flat:
        """Return on rank 0 the optimizer's state with the moments of all ranks, on others an empty dict."""
        whole = {"count": optimizer.state["count"]}
        for name, array in exchange(self.group, self._of_state, dict(optimizer.state)):
            if self.group.leads:
                mx.eval(array)
                whole[name] = array
        return whole if self.group.leads else {}

    def deal_state(self, optimizer: Optimizer, state: Mapping[str, mx.array]) -> None:
        """Distribute rank 0's state to all ranks; the argument of other ranks is ignored."""
        group, shapes = self.group, {"count": (), **optimizer.state_shapes(optimizer.shapes)}
        own = {piece.name: piece for piece in self._of_state[group.rank]}
        for name, shape in shapes.items():
            whole = group.share(state[name] if group.leads else mx.zeros(shape))
            if name == "count":
                optimizer.state[name] = whole
            elif name in own:
                optimizer.state[name] = own[name].cut_out(whole)


def exchange(group: Group, pieces: Sequence[Sequence[Piece]], own: Flat) -> Iterator[tuple[str, mx.array]]:
    """Yield (name, float32 array) assembled from all ranks' pieces, as arrays become complete; empties `own`."""
    missing: dict[str, int] = defaultdict(int)
    for piece in (piece for of_rank in pieces for piece in of_rank):
        missing[piece.name] += 1
    parts: dict[str, list[tuple[int, mx.array]]] = defaultdict(list)
    for of_ranks in zip_longest(*map(_loads, pieces), fillvalue=()):
        length = max(sum(piece.size for piece in load) for load in of_ranks)
        mine = [own.pop(piece.name).reshape(-1) for piece in of_ranks[group.rank]]
        assert all(part.dtype == mx.float32 for part in mine), "trained parameters are float32"
        padding = length - sum(part.size for part in mine)
        mine += [mx.zeros(padding)] if padding else []
        found = group.gather(mx.concatenate(mine)).reshape(group.size, length)
        for rank, load in enumerate(of_ranks):
            start = 0
            for piece in load:
                part = found[rank, start : start + piece.size].reshape(piece.shape)
                start += piece.size
                parts[piece.name].append((piece.start, part))
                if len(parts[piece.name]) == missing[piece.name]:
                    arrays = [array for _, array in sorted(parts.pop(piece.name), key=lambda each: each[0])]
                    yield piece.name, arrays[0] if len(arrays) == 1 else mx.concatenate(arrays)


def _loads(pieces: Sequence[Piece]) -> Iterator[Sequence[Piece]]:
    """Yield a rank's pieces in loads of at most BUCKET_BYTES."""
    load: list[Piece] = []
    for piece in pieces:
        if load and _NUMBER_BYTES * sum(each.size for each in [*load, piece]) > BUCKET_BYTES:
            yield load
            load = []
        load.append(piece)
    if load:
        yield load


def _state_pieces(optimizer: Optimizer, pieces: Sequence[Piece]) -> list[Piece]:
    """Return a rank's pieces of the optimizer's state."""
    rows = {piece.name: (piece.start, piece.stop) for piece in pieces}
    shapes = optimizer.state_shapes({piece.name: piece.shape for piece in pieces})
    return [Piece(name, *rows[name.partition(".")[2]], shape) for name, shape in shapes.items()]
