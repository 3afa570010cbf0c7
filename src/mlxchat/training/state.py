"""What a training saves: to resume bit for bit, and to be extended once it has finished.

A save is a folder ckpt/<iteration>/ with arrays.safetensors and state.json. It gets its name by one rename after all of
it is on disk; only then are older saves removed. state.json has its own digest and that of the arrays, so a save that
was cut or altered is never used.
"""

import json
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from mlxchat.data.packing import BatchSource
from mlxchat.errors import DataError, Interrupted, StepFailed
from mlxchat.model.lora import ADAPTERS_FILE, adapters_of
from mlxchat.model.parameters import set_parameters, trained_parameters
from mlxchat.optim.optimizer import Flat, Optimizer
from mlxchat.runner.context import Context
from mlxchat.store.files import crash_point, seal, sync, unseal
from mlxchat.store.fingerprint import hash_file
from mlxchat.training.monitor import Monitor
from mlxchat.training.step import TrainStep

Arrays = dict[str, NDArray[Any]]

_ARRAYS, _STATE = "arrays.safetensors", "state.json"
_FINISHED_ARRAYS, _FINISHED_STATE = "training_state.safetensors", "training_state.json"
_SAVE_EVERY_COSTS = 50  # saves take 2 % of the time at most
_MODEL, _OPTIMIZER = "model.", "optimizer."


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
            state = unseal((place / _STATE).read_bytes())
            if state.pop("arrays_sha256") == hash_file(place / _ARRAYS):
                return load_file(place / _ARRAYS), state
        except Exception:
            pass  # damaged; the safetensors reader has several error types of its own
        shutil.rmtree(place, ignore_errors=True)
    return None


def _saves(work: Path) -> list[Path]:
    return sorted(path for path in work.glob("[0-9]*") if path.is_dir()) if work.is_dir() else []


class Checkpointer:
    """Saves and restores a training: weights, moments, position in the data, numbers seen so far."""

    def __init__(self, ctx: Context, step: TrainStep, batches: BatchSource, monitor: Monitor) -> None:
        self.ctx, self.model, self.optimizer = ctx, step.model, step.optimizer
        self.batches, self.monitor = batches, monitor
        self._saved_at, self._cost_seconds = time.monotonic(), 0.0

    def restore(self, extends: Path | None) -> tuple[int, bool]:
        """Continue from the newest save of this step, else from the finished training in folder `extends`, if any.

        Returns the iterations done, and whether the observations after them were made.
        """
        if (found := read_newest(self.ctx.work)) is not None:
            arrays, state = found
            weights, moments = _arrays(arrays, _MODEL), _arrays(arrays, _OPTIMIZER)
            self.ctx.rewind_records(state["iteration"])
            self.ctx.metrics |= state["metrics"]
        elif extends is not None:
            weights, moments, state = self._read_finished(extends)
            self.ctx.take_records(extends)
        else:
            self.ctx.rewind_records(0)
            return 0, False
        set_parameters(self.model, weights)
        self.optimizer.state.update(moments)
        mx.eval(self.model.state, self.optimizer.state)
        self.batches.restore(state["batches"])
        self.monitor.restore(state)
        # Records of iteration 0 were dropped, so it is observed again.
        return state["iteration"], state["iteration"] > 0 and state.get("is_observed", True)

    def save_if_due(self, iteration: int) -> None:
        """Save if `machine.checkpoint_seconds` and _SAVE_EVERY_COSTS times the last save's seconds have passed."""
        began, every = time.monotonic(), self.ctx.config.machine.checkpoint_seconds
        if began - self._saved_at >= (max(every, _SAVE_EVERY_COSTS * self._cost_seconds) if every else 0):
            self._save(iteration, self._state())
            self._saved_at = time.monotonic()
            self._cost_seconds = self._saved_at - began

    @contextmanager
    def saving_on_stop(self, iteration: int, *, is_observed: bool = True) -> Iterator[None]:
        """Save the state before the body if the body is interrupted or fails.

        The body changes weights and moments last, or not at all.
        """
        before = {**self._state(), "is_observed": is_observed}
        try:
            yield
        except Interrupted:
            self._save(iteration, before)
            raise
        except StepFailed as error:
            self._save(iteration, before)
            where = f"iteration {iteration} of {self.monitor.num_iterations} is saved in {self.ctx.work}"
            raise StepFailed(f"{error}\nThe state after {where}; the same command continues there.") from error

    def save_finished(self, iteration: int, folder: Path) -> None:
        """Write what an extension needs besides the model, without times: trainings of one key leave equal files."""
        state = {"iteration": iteration, "batches": self.batches.state(), **self.monitor.finished_state()}
        save_file(_numpy(self.optimizer.state), folder / _FINISHED_ARRAYS)
        (folder / _FINISHED_STATE).write_text(json.dumps(state), encoding="utf-8")

    def _state(self) -> dict[str, Any]:
        return {"batches": self.batches.state(), **self.monitor.state()}

    def _save(self, iteration: int, state: dict[str, Any]) -> None:
        arrays = _numpy(trained_parameters(self.model), _MODEL) | _numpy(self.optimizer.state, _OPTIMIZER)
        self.ctx.check_lock()  # a save among removed outputs would later continue without their intermediate models
        write_save(self.ctx.work, iteration, arrays, state)

    def _read_finished(self, folder: Path) -> tuple[Flat, Flat, dict[str, Any]]:
        weights_file = "model.safetensors" if adapters_of(self.model) is None else ADAPTERS_FILE
        moments, weights, state = _read(folder, _FINISHED_ARRAYS, weights_file, _FINISHED_STATE)
        if state["iteration"] >= (total := self.monitor.num_iterations):
            raise DataError(f"{folder} already has {state['iteration']} iterations, expected fewer than {total}")
        _check_arrays(folder, trained_parameters(self.model), weights)
        _check_arrays(folder, self.optimizer.state, moments)
        return _arrays(weights), _arrays(moments), state


def load_moments(folder: Path, optimizer: Optimizer) -> None:
    """Give the optimizer the moments and the iteration count of a finished training; its rates stay.

    Counterpart of `load_optimizer` in nanochat's chat_sft of 2026. DataError: there are none, or they do not fit.
    """
    (moments,) = _read(folder, _FINISHED_ARRAYS, advice=", or give warm_start=false")
    _check_arrays(folder, optimizer.state, moments)
    optimizer.state.update(_arrays(moments))
    mx.eval(optimizer.state)


def _read(folder: Path, *names: str, advice: str = "") -> list[Any]:
    """Return the arrays or the JSON data of files of a finished training."""
    try:
        paths = [folder / name for name in names]
        return [json.loads(path.read_bytes()) if path.suffix == ".json" else load_file(path) for path in paths]
    except Exception as error:  # the safetensors reader has several error types of its own
        fault = f"{folder} has no readable training state ({type(error).__name__}: {error})"
        raise DataError(f"{fault}. Train it with its stage's save_training_state=true{advice}") from None


def _check_arrays(folder: Path, expected: Mapping[str, Any], found: Arrays) -> None:
    shapes, found_shapes = ({name: tuple(value.shape) for name, value in each.items()} for each in (expected, found))
    wrong = sorted(name for name, _ in shapes.items() ^ found_shapes.items())
    if wrong:
        raise DataError(f"{folder} cannot be continued: these arrays do not fit: {', '.join(wrong[:5])}")


def _numpy(arrays: Mapping[str, mx.array], prefix: str = "") -> Arrays:
    return {f"{prefix}{name}": np.asarray(value) for name, value in arrays.items()}


def _arrays(found: Arrays, prefix: str = "") -> Flat:
    """Return the arrays of a file whose names have a prefix, without it."""
    return {name.removeprefix(prefix): mx.array(value) for name, value in found.items() if name.startswith(prefix)}
