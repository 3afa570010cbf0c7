"""Dropout whose masks depend on seed, iteration, row and place only, however rows are divided.

Every row of an iteration has a key of `mx.random` (`draw_keys`), which a training step sets around its forward pass
(`dropping`). Each dropout layer has a number, its place, which changes the key.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np


class Dropping(NamedTuple):
    """Dropout of a forward pass."""

    rate: float  # of the model's own dropout layers; adapters have their own rates
    keys: mx.array  # (B, 2), from `draw_keys`


present_dropping: ContextVar[Dropping | None] = ContextVar("dropping", default=None)


def draw_keys(seed: int, iteration: int, *, rows: int) -> np.ndarray[Any, np.dtype[np.uint32]]:
    """Return the keys (rows, 2) of an iteration, by Philox, which needs no state of earlier iterations."""
    return np.random.Philox(key=[seed, iteration]).random_raw(rows).view(np.uint32).reshape(rows, 2)


@contextmanager
def dropping(present: Dropping | None) -> Iterator[None]:
    """Enable `dropout` while the body runs; None disables it."""
    token = present_dropping.set(present)
    try:
        yield
    finally:
        present_dropping.reset(token)


def dropout(x: mx.array, place: int) -> mx.array:
    """Return x (B, …) after dropout at a place; outside of `dropping`, x itself."""
    present = present_dropping.get()
    return x if present is None or present.rate == 0 else dropped(x, fold(present.keys, place), present.rate)


def fold(keys: mx.array, place: int) -> mx.array:
    """Return the keys (B, 2) of rows at a place."""
    return keys ^ mx.array([0, place], dtype=mx.uint32)


def dropped(x: mx.array, keys: mx.array, rate: float) -> mx.array:
    """Return x (B, …) with about `rate` of its numbers 0, others rescaled; equal keys (B, 2) give equal masks."""
    kept = mx.vmap(lambda key: mx.random.bernoulli(1 - rate, x.shape[1:], key))(keys)
    return mx.where(kept, x.astype(mx.float32) * (1 / (1 - rate)), 0.0).astype(x.dtype)
