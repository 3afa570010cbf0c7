"""Sums of losses and gradients over micro-batches and over the lanes that share them (`ops.device.Lanes`)."""

from __future__ import annotations

from functools import partial
from itertools import zip_longest
from typing import NamedTuple

import mlx.core as mx

from mlxchat.ops.device import Lanes, compiled
from mlxchat.optim.optimizer import Flat, sum_squares


class Gradients(NamedTuple):
    """Loss and gradients of a micro-batch, by name; of embeddings those of the rows that were read."""

    loss: mx.array
    whole: Flat
    rows: dict[str, tuple[mx.array, mx.array]]
    """By name of an embedding: token ids (N,) and the gradients of their rows (N, …)."""


class GradientSums:
    """Sums of micro-batches. Each lane keeps its own sums; `total` adds them, each lane a share of the parameters."""

    def __init__(self, lanes: Lanes, shares: list[list[str]], shapes: dict[str, tuple[int, ...]]) -> None:
        """Start empty; `shares` names each lane's parameters, `shapes` holds the shapes of all."""
        self._lanes, self._shares, self._shapes = lanes, shares, shapes
        self._sums: list[tuple[mx.array, Flat]] = []
        self._tables: list[Flat] = [{} for _ in shares]

    def add(self, parts: list[Gradients]) -> None:
        """Add a micro-batch, of which each lane computed a part; `parts` is emptied."""
        # Evaluated before summing: otherwise MLX would run the lanes one after the other.
        mx.eval(parts)
        rows = [part.rows for part in parts]
        more = [(part.loss, part.whole) for part in parts]
        parts.clear()
        if self._sums:
            more = self._lanes.run([partial(_add, *pair) for pair in zip_longest(self._sums, more)])
        self._sums = more
        starts = [
            {name: table.get(name, mx.zeros(self._shapes[name])) for name in names if name in rows[0]}
            for names, table in zip(self._shares, self._tables, strict=True)
        ]
        self._tables = self._lanes.run([partial(_add_rows, start, rows) for start in starts])
        del rows, more, starts
        mx.eval(self._sums, self._tables)  # now, so that one micro-batch at a time is in memory

    def total(self) -> tuple[mx.array, Flat, mx.array]:
        """Return the loss, the gradients and their common 2-norm; the sums are empty afterwards."""
        losses, found = [loss for loss, _ in self._sums], [gradients for _, gradients in self._sums]
        calls = [
            partial(_sum, [{name: each[name] for name in names if name in each} for each in found], table)
            for names, table in zip(self._shares, self._tables, strict=True)
        ]
        totals = self._lanes.run(calls)
        del calls, found
        self._sums, self._tables = [], []
        loss = sum(losses[1:], losses[0])
        norm = mx.sqrt(sum((squares for _, squares in totals[1:]), totals[0][1]))
        gradients = {name: value for lane, _ in totals for name, value in lane.items()}
        del totals
        mx.eval(loss, gradients, norm)
        return loss, gradients, norm


def _add(total: tuple[mx.array, Flat], more: tuple[mx.array, Flat] | None) -> tuple[mx.array, Flat]:
    """Return the sum of two micro-batches; the last one may have fewer lanes."""
    if more is None:
        return total
    return total[0] + more[0], {name: value + more[1][name] for name, value in total[1].items()}


def _add_rows(totals: Flat, more: list[dict[str, tuple[mx.array, mx.array]]]) -> Flat:
    """Return tables with the rows of all lanes added, always in the same order."""
    added = {}
    for name, total in totals.items():
        ids, rows = (mx.concatenate(list(parts)) for parts in zip(*(part[name] for part in more), strict=True))
        added[name] = total.at[ids].add(rows)
    return added


@compiled
def _sum(parts: list[Flat], tables: Flat) -> tuple[Flat, mx.array]:
    """Return the sum of the lanes' gradients, with those of embeddings, and the sum of its squares."""
    total = {name: sum((part[name] for part in parts[1:]), value) for name, value in parts[0].items()} | tables
    return total, sum_squares(total)
