"""Sums of losses and gradients: of micro-batches, of lanes, and of the rows of tables that tokens have read."""

from __future__ import annotations

import mlx.core as mx

from mlxchat.optim.groups import Flat, sum_squares

LossAndGradients = tuple[mx.array, Flat]
# Of a table's gradient the rows that tokens have read, with the tokens: (N,) and (N, …).
TableRows = dict[str, tuple[mx.array, mx.array]]


def sum_gradients(parts: list[Flat], tables: Flat) -> tuple[Flat, mx.array]:
    """Return the sum of gradients, with the tables' ones, and the sum of its squares."""
    total = {name: sum((part[name] for part in parts[1:]), value) for name, value in parts[0].items()} | tables
    return total, sum_squares(total)


def add_rows(totals: Flat, more: list[TableRows]) -> Flat:
    """Return tables to which the rows of all lanes are added, always in the same order."""
    added = {}
    for name, total in totals.items():
        ids, rows = (mx.concatenate(list(parts)) for parts in zip(*(part[name] for part in more), strict=True))
        added[name] = total.at[ids].add(rows)
    return added


def add_sums(total: LossAndGradients, more: LossAndGradients | None) -> LossAndGradients:
    """Return the sum of two micro-batches; the last one may have fewer lanes."""
    if more is None:
        return total
    return total[0] + more[0], {name: value + more[1][name] for name, value in total[1].items()}
