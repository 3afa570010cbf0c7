"""The weights with the lowest validation loss of a training."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import mlx.core as mx

from mlxchat.model.gpt import GPT, flatten_parameters, set_parameters


class Best:
    """The candidate with the lowest bits per byte of validation, the first of equals.

    Candidates are every so many iterations and the last one, so the result does not depend on how often validation is
    shown.
    """

    METRIC = "val_bpb"

    def __init__(self, *, every: int, eval_tokens: int) -> None:
        """Keep none yet; a candidate comes every `every` iterations and is validated on `eval_tokens` tokens."""
        self.every, self._eval_tokens = every, eval_tokens
        self.iteration: int | None = None
        """Whose weights are kept; None: there was no candidate with a finite number."""
        self.numbers: dict[str, float] = {}
        """Their numbers of validation."""
        self.weights: dict[str, mx.array] = {}

    def offer(self, iteration: int, numbers: Mapping[str, float], model: GPT, *, is_last: bool = False) -> None:
        """Keep the model's weights if this is a candidate and the best so far."""
        if self.METRIC not in numbers or not (is_last or iteration % self.every == 0):
            return
        if numbers[self.METRIC] < self.numbers.get(self.METRIC, math.inf):  # NaN never is
            self.iteration, self.numbers = iteration, dict(numbers)
            # The arrays themselves: training replaces them, it does not write into them.
            self.weights = flatten_parameters(model)

    @contextmanager
    def in_place(self, model: GPT) -> Iterator[None]:
        """Give the model these weights for a while, if there are any."""
        own = flatten_parameters(model)
        set_parameters(model, self.weights)
        try:
            yield
        finally:
            set_parameters(model, own)

    def put_back(self, model: GPT, metrics: Mapping[str, float]) -> dict[str, float]:
        """Give the model these weights for good.

        Returns:
            best_iteration and their numbers, in place of those in `metrics`, which become last_<name>.
        """
        assert self.iteration is not None, "no candidate had a finite number"
        set_parameters(model, self.weights)
        last = {f"last_{name}": value for name, value in metrics.items() if name in self.numbers}
        return {**self.numbers, "best_iteration": self.iteration, **last}

    def state(self) -> dict[str, Any]:
        """Return all of it but the weights, as JSON data."""
        return {"iteration": self.iteration, "numbers": self.numbers, "eval_tokens": self._eval_tokens}

    def restore(self, state: Mapping[str, Any], weights: Mapping[str, mx.array]) -> None:
        """Continue from a state and its weights, unless they were validated on another number of tokens."""
        if state["iteration"] is None or state["eval_tokens"] != self._eval_tokens:
            return
        self.iteration, self.numbers, self.weights = state["iteration"], dict(state["numbers"]), dict(weights)
        mx.eval(self.weights)

    def show(self) -> dict[str, str]:
        """Return what the progress line shows."""
        if self.iteration is None:
            return {}
        return {"best": f"{self.numbers[self.METRIC]:.4f} bpb at {self.iteration}"}
