"""The best weights of a training by a held-out number."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import mlx.core as mx

from mlxchat.model.gpt import GPT, set_parameters, trained_parameters


class Best:
    """The candidate with the best held-out number, the first of equals.

    Candidates are the iterations that `every` divides and the last one, however often the number is measured.
    """

    def __init__(
        self, *, every: int, basis: Any, metric: str = "val_bpb", choose: Callable[[float, float], float] = min
    ) -> None:
        """Start without weights.

        Args:
            every: iterations between candidates.
            basis: what the number is measured on, as JSON data; numbers of another basis are not compared.
            metric: the number.
            choose: min or max, whichever returns the better of two numbers.
        """
        self.every, self.metric, self._basis, self._choose = every, metric, basis, choose
        self.iteration: int | None = None
        """Of the kept weights; None: no candidate had a finite number."""
        self.numbers: dict[str, float] = {}
        """Their held-out numbers."""
        self.weights: dict[str, mx.array] = {}

    def offer(self, iteration: int, numbers: Mapping[str, float], model: GPT, *, is_last: bool = False) -> None:
        """Keep the model's trained weights if this is a candidate and the best so far."""
        found, before = numbers.get(self.metric, math.nan), self.numbers.get(self.metric)
        if not iteration or not (is_last or iteration % self.every == 0) or not math.isfinite(found):
            return
        if before is None or (found != before and self._choose(found, before) == found):
            self.iteration, self.numbers = iteration, dict(numbers)
            # The arrays themselves: training replaces them, it does not write into them.
            self.weights = trained_parameters(model)

    @contextmanager
    def in_place(self, model: GPT) -> Iterator[None]:
        """Set the model to these weights, if there are any, within the block."""
        own = trained_parameters(model)
        set_parameters(model, self.weights)
        try:
            yield
        finally:
            set_parameters(model, own)

    def put_back(self, model: GPT, metrics: Mapping[str, float]) -> dict[str, float]:
        """Set the model to these weights.

        Returns:
            best_iteration and their numbers, in place of those in `metrics`, which become last_<name>.
        """
        assert self.iteration is not None, "no candidate had a finite number"
        set_parameters(model, self.weights)
        last = {f"last_{name}": value for name, value in metrics.items() if name in self.numbers}
        return {**self.numbers, "best_iteration": self.iteration, **last}

    def state(self) -> dict[str, Any]:
        """Return everything except the weights, as JSON data."""
        return {"iteration": self.iteration, "numbers": self.numbers, "basis": self._basis}

    def restore(self, state: Mapping[str, Any], weights: Mapping[str, mx.array]) -> None:
        """Continue from a state and its weights, unless they were measured on another basis."""
        # Earlier versions called it eval_tokens.
        if state["iteration"] is None or state.get("basis", state.get("eval_tokens")) != self._basis:
            return
        self.iteration, self.numbers, self.weights = state["iteration"], dict(state["numbers"]), dict(weights)
        mx.eval(self.weights)

    def show(self) -> dict[str, str]:
        """Return what the progress line shows."""
        if self.iteration is None:
            return {}
        return {"best": f"{self.metric} {self.numbers[self.metric]:.4f} at {self.iteration}"}
