"""Candidates: the weights of a training among which a held-out number decides."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx

from mlxchat.model.gpt import GPT
from mlxchat.model.parameters import set_parameters, trained_parameters


@dataclass(kw_only=True)
class Candidates:
    """Which weights are kept, and whether a target ends the training.

    Candidates are the iterations that `every` divides and the last one, however often the number is measured. The best
    is the first of those with the best finite number.
    """

    every: int
    metric: str = "val_bpb"
    choose: Callable[[float, float], float] = min
    """min or max, whichever returns the better of two numbers."""
    keep: bool = True
    """Whether the training ends with the best weights."""
    target: float | None = None
    """The training ends at the first candidate whose number is at most this; None: at its horizon."""
    basis: Any = None
    """What the number is measured on, as JSON data; an extension with another basis starts without weights."""
    iteration: int | None = None
    """Of the kept weights; None: no candidate yet."""
    numbers: dict[str, float] = field(default_factory=dict)
    """Their held-out numbers."""
    weights: dict[str, mx.array] = field(default_factory=dict)

    def reach_target(self, iteration: int, numbers: Mapping[str, float]) -> bool:
        """Return whether these numbers end the training before its horizon."""
        found = numbers.get(self.metric, math.inf)
        return self.target is not None and iteration % self.every == 0 and found <= self.target

    def offer(self, iteration: int, numbers: Mapping[str, float], model: GPT, *, is_last: bool = False) -> None:
        """Keep the model's trained weights if this is a candidate and the best so far."""
        found = numbers.get(self.metric, math.nan)
        if not (is_last or iteration % self.every == 0) or iteration == 0 or not math.isfinite(found):
            return
        before = self.numbers.get(self.metric)
        if before is None or (found != before and self.choose(found, before) == found):
            self.iteration = iteration
            self.numbers = dict(numbers)
            # The arrays themselves: training replaces them, it does not write into them.
            self.weights = trained_parameters(model)

    def put_back(self, model: GPT, metrics: Mapping[str, float]) -> dict[str, float]:
        """Set the model to the best weights; return metrics: their numbers, and those of the last weights."""
        assert self.iteration is not None, "no candidate had a finite number"
        set_parameters(model, self.weights)
        last = {f"last_{name}": value for name, value in metrics.items() if name in self.numbers}
        return {**self.numbers, "best_iteration": self.iteration, **last}

    def state(self) -> dict[str, Any]:
        """Return everything except the weights, as JSON data."""
        return {"iteration": self.iteration, "numbers": self.numbers, "basis": self.basis}

    def restore(self, state: Mapping[str, Any], weights: Mapping[str, mx.array]) -> None:
        """Continue from a state and its weights, unless they were measured on another basis."""
        if state["iteration"] is not None and state["basis"] == self.basis:
            self.iteration = state["iteration"]
            self.numbers = dict(state["numbers"])
            self.weights = dict(weights)
            mx.eval(self.weights)
