"""What a training saves: to resume bit for bit, to be extended once it has finished, and its best weights.

A save is a folder ckpt/<iteration>/ with arrays.safetensors and state.json. It gets its name by one rename after all of
it is on disk; only then are older saves removed. state.json has its own digest and that of the arrays, so a save that
was cut or altered is never used.
"""

from __future__ import annotations

import json
import math
import shutil
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
from mlxchat.runner.crash import crash_point
from mlxchat.runner.fingerprint import hash_file
from mlxchat.runner.sealed import seal, sync, unseal

Arrays = dict[str, NDArray[Any]]

_ARRAYS, _STATE = "arrays.safetensors", "state.json"
_BEST, _LAST = "best.", "last."


def write_save(work: Path, iteration: int, arrays: Mapping[str, NDArray[Any]], state: Mapping[str, Any]) -> None:
    """Save arrays and `state` (JSON data) after `iteration` iterations; remove older saves."""
    place, temporary = work / f"{iteration:08d}", work / f".{iteration:08d}.tmp"
    for unfinished in work.glob(".*.tmp"):
        shutil.rmtree(unfinished, ignore_errors=True)
    temporary.mkdir(parents=True)
    # ascontiguousarray gives a scalar an axis, and a count with an axis would broadcast into AdamW's update.
    whole = {name: np.ascontiguousarray(value).reshape(value.shape) for name, value in arrays.items()}
    save_file(whole, temporary / _ARRAYS)
    crash_point("checkpoint.arrays")
    digest = hash_file(temporary / _ARRAYS)
    (temporary / _STATE).write_bytes(seal({"iteration": iteration, "arrays_sha256": digest, **state}))
    for path in (temporary / _ARRAYS, temporary / _STATE, temporary):
        sync(path)
    crash_point("checkpoint.written")
    shutil.rmtree(place, ignore_errors=True)
    temporary.rename(place)
    sync(work)
    crash_point("checkpoint.renamed")
    for older in _saves(work):
        if older != place:
            shutil.rmtree(older, ignore_errors=True)
    crash_point("checkpoint.done")


def read_newest(work: Path) -> tuple[Arrays, dict[str, Any]] | None:
    """Return arrays and state of the newest save that is whole, or None; damaged saves are removed."""
    for place in reversed(_saves(work)):
        try:
            state, sealed = unseal((place / _STATE).read_bytes())
            digest = state.pop("arrays_sha256", None)
            # Saves from before there were digests have neither.
            if sealed == (digest is not None) and (not sealed or digest == hash_file(place / _ARRAYS)):
                return load_file(place / _ARRAYS), state
        except Exception:
            pass  # damaged; the safetensors reader has several error types of its own
        shutil.rmtree(place, ignore_errors=True)
    return None


def _saves(work: Path) -> list[Path]:
    """Return the folders of all saves, the oldest first."""
    return sorted(path for path in work.glob("[0-9]*") if path.is_dir()) if work.is_dir() else []


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
        self.ctx, self.model, self.optimizer, self.best = ctx, model, optimizer, best
        self.batches, self.monitor = batches, monitor
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
        """Remember the state before an iteration, for `save_held`. Weights and moments change only at its end."""
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
        _set_moments(self.optimizer, {name: arrays[f"optimizer.{name}"] for name in self.optimizer.state})
        mx.eval(self.model.state)
        if self.best is not None and "best" in state:
            self.best.restore(state["best"], arrays, self.model)
        return state


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
        self._weights: dict[str, mx.array] = {}

    def is_candidate(self, iteration: int, num_iterations: int) -> bool:
        """Return whether weights after so many iterations may be kept."""
        return iteration == num_iterations or iteration % self.every == 0

    def offer(self, iteration: int, numbers: Mapping[str, float], model: GPT) -> bool:
        """Keep the model's weights if they are the best so far; return whether they are."""
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
        """Return what a save after `done` iterations needs besides that iteration's weights."""
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
        """Continue from what another training kept, unless its validation had another size."""
        if state["iteration"] is None or state["eval_tokens"] != self._eval_tokens:
            return
        self.iteration, self.numbers, self._weights = state["iteration"], dict(state["numbers"]), dict(weights)
        mx.eval(self._weights)

    def show(self) -> dict[str, str]:
        """Return what the progress line shows."""
        if self.iteration is None:
            return {}
        return {"best": f"{self.numbers[self.METRIC]:.4f} bpb at {self.iteration}"}


def save_finished(
    out: Path, iteration: int, optimizer: Optimizer, state: dict[str, Any], model: GPT, best: Best | None = None
) -> None:
    """Write what an extension needs: moments, `state` (JSON data) and, where the best weights were kept, the last."""
    arrays = {name: np.asarray(value) for name, value in optimizer.whole_state().items()}
    if best is not None:
        state = {**state, "best": best.state()}
        if best.iteration not in (None, iteration):
            arrays |= {f"{_LAST}{name}": np.asarray(value) for name, value in flatten_parameters(model).items()}
    save_file(arrays, out / "training_state.safetensors")
    (out / "training_state.json").write_text(json.dumps({"iteration": iteration, **state}), encoding="utf-8")


def load_finished(folder: Path, model: GPT, optimizer: Optimizer, best: Best | None = None) -> dict[str, Any]:
    """Set model, optimizer and `best` to the end of a finished training; return the rest of its state.

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
