"""The best weights of a training: looked for while it goes on, put in place of the last ones at its end."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from mlxchat.model.gpt import GPT, flatten_parameters, set_parameters

_PREFIX = "best."


class Best:
    """The weights with the lowest bits per byte of validation among those that were candidates, the first of equals.

    Only so many iterations and the last one are candidates, however often people have asked to see a validation: so
    the result does not depend on what is shown.
    """

    METRIC = "val_bpb"

    def __init__(self, *, every: int, eval_tokens: int) -> None:
        """Begin with none.

        Args:
            every: iterations between candidates.
            eval_tokens: of a validation; numbers of another size are not compared.
        """
        self.every, self._eval_tokens = every, eval_tokens
        self.iteration: int | None = None
        """Whose weights are kept; None: there was no candidate with a finite number."""
        self.numbers: dict[str, float] = {}
        """What validation said of them."""
        self._weights: dict[str, mx.array] = {}

    def is_candidate(self, iteration: int, num_iterations: int) -> bool:
        """Tell whether weights after so many iterations may be kept."""
        return iteration == num_iterations or iteration % self.every == 0

    def offer(self, iteration: int, numbers: Mapping[str, float], model: GPT) -> bool:
        """Keep the model's weights if they are the best so far; tell whether they are."""
        if not numbers[self.METRIC] < self.numbers.get(self.METRIC, math.inf):  # NaN never is
            return False
        self.iteration, self.numbers = iteration, dict(numbers)
        # The arrays themselves: training replaces them, it does not write into them.
        self._weights = flatten_parameters(model)
        return True

    @contextmanager
    def in_place(self, model: GPT) -> Iterator[None]:
        """Give the model these weights for a while, if there are any."""
        own = flatten_parameters(model)
        set_parameters(model, self._weights)
        try:
            yield
        finally:
            set_parameters(model, own)

    def put_back(self, model: GPT) -> None:
        """Give the model these weights for good, if there are any."""
        set_parameters(model, self._weights)

    def arrays(self, done: int) -> dict[str, NDArray[Any]]:
        """Return what a save after `done` iterations has to hold besides that iteration's own weights."""
        if self.iteration == done:
            return {}
        return {f"{_PREFIX}{name}": np.asarray(value) for name, value in self._weights.items()}

    def state(self) -> dict[str, Any]:
        """Return the rest of it, as JSON data."""
        return {"iteration": self.iteration, "numbers": self.numbers, "eval_tokens": self._eval_tokens}

    def restore(self, state: Mapping[str, Any], arrays: Mapping[str, NDArray[Any]], model: GPT) -> None:
        """Continue from a save, whose own weights the model has."""
        own = flatten_parameters(model)
        kept = {name: mx.array(value) for name, value in arrays.items()}
        self.take(state, {name: kept.get(f"{_PREFIX}{name}", value) for name, value in own.items()})

    def take(self, state: Mapping[str, Any], weights: Mapping[str, mx.array]) -> None:
        """Continue from what another training has kept, unless its numbers are of another validation."""
        if state["iteration"] is None or state["eval_tokens"] != self._eval_tokens:
            return
        self.iteration, self.numbers, self._weights = state["iteration"], dict(state["numbers"]), dict(weights)
        mx.eval(self._weights)

    def show(self) -> dict[str, str]:
        """Return what the progress line says of it."""
        if self.iteration is None:
            return {}
        return {"best": f"{self.numbers[self.METRIC]:.4f} bpb at {self.iteration}"}
