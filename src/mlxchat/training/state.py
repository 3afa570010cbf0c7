"""What a training saves: to resume bit for bit, to be extended once it has finished, and its best weights."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from mlxchat.errors import DataError
from mlxchat.model.gpt import GPT, flatten_parameters, set_parameters, trained_parameters
from mlxchat.optim.optimizer import Optimizer
from mlxchat.runner.context import Context
from mlxchat.training.saves import read_newest, write_save

_BEST, _LAST = "best.", "last."


class Resumable(Protocol):
    """Something with a state as JSON data."""

    def state(self) -> dict[str, Any]:
        """Return the state."""

    def restore(self, state: dict[str, Any]) -> None:
        """Return to a state."""


class Checkpointer:
    """Saves and restores a training: weights, moments, position in the data, numbers seen so far."""

    def __init__(
        self,
        ctx: Context,
        model: GPT,
        optimizer: Optimizer,
        batches: Resumable,
        monitor: Resumable,
        best: Best | None = None,
    ) -> None:
        self.ctx, self.model, self.optimizer, self.batches, self.monitor, self.best = (
            ctx, model, optimizer, batches, monitor, best,
        )  # fmt: skip
        self._saved_at = time.monotonic()
        self._held: dict[str, Any] = {}

    def restore(self, extends: Path | None = None) -> tuple[int, int | None]:
        """Continue from the newest save of this step, else from the finished training in folder `extends`, if any.

        Returns:
            Iterations done, and the number of the hook to continue with (None: all hooks of that iteration are done).

        Raises:
            DataError: the training in `extends` does not fit this model and optimizer.
        """
        ctx, state = self.ctx, self._load()
        if state is not None:
            ctx.rewind_records(state["iteration"])
            ctx.metrics |= state.get("metrics", {})
        elif extends is not None:
            state = load_finished(extends, self.model, self.optimizer, self.best)
            ctx.take_records(extends)
        else:
            ctx.rewind_records(0)
            return 0, None
        self.batches.restore(state["batches"])
        self.monitor.restore(state)
        # Records of iteration 0 were dropped, so its hooks all run again.
        return state["iteration"], state.get("pending_hook") if state["iteration"] else None

    def hold(self) -> None:
        """Remember the state before an iteration, for `save_held`. Weights and moments need not be remembered."""
        self._held = self._state()

    def save_held(self, iteration: int) -> None:
        """Save the state before an iteration that failed or was interrupted before its update."""
        self._save(iteration, self._held)

    def save(self, iteration: int, **more: int) -> None:
        """Save the state after `iteration` iterations; older saves are removed."""
        self._save(iteration, {**self._state(), **more})

    def save_if_due(self, iteration: int) -> None:
        """Save if `machine.checkpoint_seconds` have passed since the last time."""
        if time.monotonic() - self._saved_at >= self.ctx.config.machine.checkpoint_seconds:
            self.save(iteration)
            self._saved_at = time.monotonic()

    def save_finished(self, iteration: int) -> None:
        """Leave in the artifact what an extension of this training needs."""
        save_finished(self.ctx.out, iteration, self.optimizer, self._state(), self.model, self.best)

    def _state(self) -> dict[str, Any]:
        return {"batches": self.batches.state(), **self.monitor.state()}

    def _save(self, iteration: int, state: dict[str, Any]) -> None:
        arrays = {f"model.{name}": np.asarray(value) for name, value in trained_parameters(self.model).items()}
        arrays |= {f"optimizer.{name}": np.asarray(value) for name, value in self.optimizer.whole_state().items()}
        if self.best is not None:
            arrays |= self.best.arrays(iteration)
            state = {**state, "best": self.best.state()}
        write_save(self.ctx.work, iteration, arrays, state)

    def _load(self) -> dict[str, Any] | None:
        """Restore weights and moments from the newest whole save; return its state, or None if there is none."""
        found = read_newest(self.ctx.work)
        if found is None:
            return None
        arrays, state = found
        weights = {name.removeprefix("model."): mx.array(value) for name, value in arrays.items() if name[0] == "m"}
        set_parameters(self.model, weights)
        for name in self.optimizer.state:
            self.optimizer.state[name] = mx.array(arrays[f"optimizer.{name}"])
        mx.eval(self.model.state, self.optimizer.state)
        if self.best is not None and "best" in state:
            self.best.restore(state["best"], arrays, self.model)
        return state


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

    def put_back(self, model: GPT, metrics: Mapping[str, float]) -> dict[str, float]:
        """Give the model these weights for good, if there are any.

        Returns:
            Their numbers in place of those in `metrics`, which become last_<name>; nothing if there are no weights.
        """
        if self.iteration is None:
            return {}
        set_parameters(model, self._weights)
        last = {f"last_{name}": value for name, value in metrics.items() if name in self.numbers}
        return {**self.numbers, "best_iteration": self.iteration, **last}

    def arrays(self, done: int) -> dict[str, NDArray[Any]]:
        """Return what a save after `done` iterations has to hold besides that iteration's own weights."""
        if self.iteration == done:
            return {}
        return {f"{_BEST}{name}": np.asarray(value) for name, value in self._weights.items()}

    def state(self) -> dict[str, Any]:
        """Return the rest of it, as JSON data."""
        return {"iteration": self.iteration, "numbers": self.numbers, "eval_tokens": self._eval_tokens}

    def restore(self, state: Mapping[str, Any], arrays: Mapping[str, NDArray[Any]], model: GPT) -> None:
        """Continue from a save, whose own weights the model has."""
        own = flatten_parameters(model)
        kept = {name: mx.array(value) for name, value in arrays.items()}
        self.take(state, {name: kept.get(f"{_BEST}{name}", value) for name, value in own.items()})

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


def save_finished(
    out: Path, iteration: int, optimizer: Optimizer, state: dict[str, Any], model: GPT, best: Best | None = None
) -> None:
    """Leave beside a finished model what an extension of its training needs: moments, and `state` (JSON data).

    Where the finished model will be an earlier one than the last, the last weights, `model`'s, too.
    """
    arrays = {name: np.asarray(value) for name, value in optimizer.whole_state().items()}
    if best is not None:
        state = {**state, "best": best.state()}
        if best.iteration not in (None, iteration):
            arrays |= {f"{_LAST}{name}": np.asarray(value) for name, value in flatten_parameters(model).items()}
    save_file(arrays, out / "training_state.safetensors")
    (out / "training_state.json").write_text(json.dumps({"iteration": iteration, **state}), encoding="utf-8")


def load_finished(folder: Path, model: GPT, optimizer: Optimizer, best: Best | None = None) -> dict[str, Any]:
    """Set model and optimizer to the end of a finished training, and `best` to what it has kept; return the rest.

    Raises:
        DataError: a file is missing or damaged, or holds other arrays than this model and optimizer have.
    """
    try:
        weights = load_file(folder / "model.safetensors")
        moments, last = _load_training_state(folder)
        state: dict[str, Any] = json.loads((folder / "training_state.json").read_text(encoding="utf-8"))
    except Exception as error:  # the safetensors reader has several error types of its own
        raise DataError(f"{folder}: no readable training state ({type(error).__name__}: {error})") from None
    _check_arrays(folder, flatten_parameters(model), weights)
    _check_arrays(folder, optimizer.state, moments)
    kept = {name: mx.array(value) for name, value in weights.items()}
    if last:
        _check_arrays(folder, kept, last)
    set_parameters(model, {name: mx.array(value) for name, value in last.items()} or kept)
    _set_moments(optimizer, moments)
    mx.eval(model.state)
    if best is not None and "best" in state:
        best.take(state["best"], kept)
    return state


def load_moments(folder: Path, optimizer: Optimizer) -> None:
    """Give the optimizer the moments and the iteration count of a finished training; its rates stay.

    Counterpart of `load_optimizer` in nanochat's chat_sft of 2026.

    Raises:
        DataError: the folder has none, or they are of other parameters or another optimizer.
    """
    try:
        moments, _ = _load_training_state(folder)
    except Exception as error:  # the safetensors reader has several error types of its own
        raise DataError(
            f"{folder} has no readable training state to start warm from ({error}). Pretrain it with "
            "pretrain.save_training_state=true, or give warm_start=false"
        ) from None
    _check_arrays(folder, optimizer.state, moments)
    _set_moments(optimizer, moments)


def _load_training_state(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return moments, and the last weights where the model beside them is an earlier one."""
    arrays = load_file(folder / "training_state.safetensors")
    last = {name.removeprefix(_LAST): arrays.pop(name) for name in sorted(arrays) if name.startswith(_LAST)}
    return arrays, last


def _set_moments(optimizer: Optimizer, moments: dict[str, Any]) -> None:
    for name, value in moments.items():
        optimizer.state[name] = mx.array(value)
    mx.eval(optimizer.state)


def _check_arrays(folder: Path, expected: dict[str, mx.array], found: dict[str, Any]) -> None:
    wrong = sorted(
        name
        for name in expected.keys() | found.keys()
        if name not in expected or name not in found or tuple(expected[name].shape) != found[name].shape
    )
    if wrong:
        raise DataError(f"{folder} cannot be continued, other arrays are needed: {', '.join(wrong[:5])}")
