"""An optimizer on several ranks: each moves its part of the parameters and alone has its moments.

Muon's matrices are whole, since orthogonalising needs all of one; everything of AdamW is cut along its first axis, as
it moves every number by itself. So the work and the moments are about equal on all ranks, whatever their number.
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
    """Rows of an array, on one rank."""

    name: str
    start: int
    stop: int
    shape: Shape
    """Of the piece."""

    @property
    def size(self) -> int:
        """How many numbers it has."""
        return math.prod(self.shape)

    def of(self, whole: mx.array) -> mx.array:
        """Return this piece of an array."""
        return whole if whole.shape == self.shape else whole[self.start : self.stop]

    def cut_out(self, whole: mx.array) -> mx.array:
        """Return this piece with memory of its own: what is only a part keeps the whole array in memory."""
        return whole if whole.shape == self.shape else mx.array(np.array(self.of(whole)))


def deal_pieces(optimizer: Optimizer, size: int) -> list[list[Piece]]:
    """Return for each of `size` ranks what it moves: every row of every parameter once; some may have nothing."""
    shapes = optimizer.shapes
    matrices = {name: shapes[name] for names in optimizer.muon_shapes.values() for name in names}
    shares = share_evenly(optimizer.costs(matrices), size)
    pieces = [[Piece(name, 0, shapes[name][0], shapes[name]) for name in names] for names in shares]
    for name in optimizer.adamw_rules:
        rows = shapes[name][0] if shapes[name] else 1
        # The last ranks get what cannot be cut, the first ones the dearest matrix.
        for rank, own in enumerate(pieces):
            start, stop = rows * rank // size, rows * (rank + 1) // size
            if start < stop:
                own.append(Piece(name, start, stop, (stop - start, *shapes[name][1:]) if shapes[name] else ()))
    return pieces


class Sharding:
    """Which rank moves what, and how results come together. All ranks call the same methods in the same order."""

    def __init__(self, group: Group, optimizer: Optimizer) -> None:
        """Deal; `optimizer` keeps of its moments those of this rank alone from now on."""
        self.group = group
        self.pieces = deal_pieces(optimizer, group.size)
        self.own = {piece.name: piece for piece in self.pieces[group.rank]}
        self._of_state = [_state_pieces(optimizer, pieces) for pieces in self.pieces]
        own = {piece.name: piece.cut_out(optimizer.state[piece.name]) for piece in self._of_state[group.rank]}
        optimizer.state = {"count": optimizer.state["count"], **own}

    def share(self, optimizer: Optimizer, parts: int) -> list[list[str]]:
        """Return the names of what this rank moves, in so many parts that take about equally long."""
        return share_evenly(optimizer.costs({name: piece.shape for name, piece in self.own.items()}), parts)

    def sum(self, gradients: Flat) -> tuple[Flat, mx.array]:
        """Return of gradients, summed over the ranks, what this rank moves, and the common 2-norm of all of them.

        Args:
            gradients: of all parameters, this rank's part of the sums; emptied.
        """
        own: Flat = {}
        for names in list(buckets(gradients)):
            for name, total in self.group.sum({name: gradients.pop(name) for name in names}).items():
                if name in self.own:
                    own[name] = self.own[name].of(total)
        squares = self.group.sum({"squares": sum_squares(own)})["squares"]
        return own, mx.sqrt(squares)

    def gather(self, moved: Flat) -> Iterator[tuple[str, mx.array]]:
        """Yield every parameter whole, from what each rank has moved; this rank's part is emptied."""
        return exchange(self.group, self.pieces, moved)

    def gather_state(self, optimizer: Optimizer) -> Flat:
        """Return on rank 0 the optimizer's state with the moments of all ranks, on the others nothing."""
        whole = {"count": optimizer.state["count"]}
        for name, array in exchange(self.group, self._of_state, dict(optimizer.state)):
            if self.group.leads:
                mx.eval(array)
                whole[name] = array
        return whole if self.group.leads else {}

    def deal_state(self, optimizer: Optimizer, state: Mapping[str, mx.array]) -> None:
        """Give every rank its part of a state that rank 0 has; what the others give is not looked at."""
        group, shapes = self.group, {"count": (), **optimizer.state_shapes(optimizer.shapes)}
        own = {piece.name: piece for piece in self._of_state[group.rank]}
        for name, shape in shapes.items():
            whole = group.share(state[name] if group.leads else mx.zeros(shape))
            if name == "count":
                optimizer.state[name] = whole
            elif name in own:
                optimizer.state[name] = own[name].cut_out(whole)


def exchange(group: Group, pieces: Sequence[Sequence[Piece]], own: Flat) -> Iterator[tuple[str, mx.array]]:
    """Yield by name the arrays (float32) that consist of all ranks' pieces, as they become complete.

    Args:
        group: of the ranks.
        pieces: of each rank; the same on all of them.
        own: this rank's; they are taken out.
    """
    missing: dict[str, int] = defaultdict(int)
    for piece in (piece for of_rank in pieces for piece in of_rank):
        missing[piece.name] += 1
    parts: dict[str, list[tuple[int, mx.array]]] = defaultdict(list)
    for of_ranks in zip_longest(*map(_loads, pieces), fillvalue=()):
        length = max(sum(piece.size for piece in load) for load in of_ranks)
        mine = [own.pop(piece.name).reshape(-1) for piece in of_ranks[group.rank]]
        assert all(part.dtype == mx.float32 for part in mine), "what is trained is float32"
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
    """Yield a rank's pieces by those that travel together."""
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
