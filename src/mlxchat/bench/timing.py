"""Timing of repeated work, and deterministic random weights and rows."""

from __future__ import annotations

import time
from collections.abc import Callable

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlxchat.data.packing import Row
from mlxchat.model.parameters import flatten_parameters, set_parameters
from mlxchat.runner.progress import Progress


class Stopwatch:
    """Times repeated work and shows progress."""

    def __init__(self, progress: Progress) -> None:
        """`progress` counts all repetitions, also untimed ones."""
        self._progress, self._done = progress, 0

    def seconds(self, what: str, work: Callable[[int], object], *, steps: int, warmup_steps: int) -> list[float]:
        """Return the seconds of each timed repetition.

        `work` takes the number of the repetition, warm-up included, and has computed everything when it returns.
        `what` is shown as progress.
        """
        found = []
        for index in range(warmup_steps + steps):
            began = time.perf_counter()
            work(index)
            found.append(time.perf_counter() - began)
            self._done += 1
            self._progress.update(self._done, measuring=what)
        return found[warmup_steps:]


def random_rows(rows: int, row_tokens: int, vocab_size: int, *, seed: int, batch: int) -> list[Row]:
    """Return rows of one batch: ids (T,) and the ids after them (T,), uniform over the vocabulary."""
    ids = np.random.default_rng([seed, batch]).integers(0, vocab_size, (rows, row_tokens + 1), dtype=np.int32)
    return [(row[:-1], row[1:]) for row in ids]


def fill_zero_weights(model: nn.Module, seed: int) -> None:
    """Replace weights that start at zero by N(0, 1/columns), so that no product is trivial."""
    parameters = flatten_parameters(model)
    keys = mx.random.split(mx.random.key(seed), len(parameters))
    drawn = {
        name: mx.random.normal(value.shape, key=keys[index]) / value.shape[-1] ** 0.5
        for index, (name, value) in enumerate(parameters.items())
        if not mx.any(value != 0).item()
    }
    set_parameters(model, drawn)
