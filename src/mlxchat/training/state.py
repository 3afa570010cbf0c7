"""What a training saves: to resume bit for bit, and to be extended once it has finished.

A save is a folder ckpt/<iteration>/ with arrays.safetensors and state.json. It gets its name by one rename after all of
it is on disk; only then are older saves removed. state.json has its own digest and that of the arrays, so a save that
was cut or altered is never used.
"""

from __future__ import annotations

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

from mlxchat.errors import DataError, Interrupted, PeerLost, StepFailed
from mlxchat.model.gpt import GPT, set_parameters, trained_parameters
from mlxchat.model.lora import ADAPTERS_FILE, adapters_of
from mlxchat.optim.optimizer import Optimizer
from mlxchat.runner.context import Context
from mlxchat.store.crash import crash_point
from mlxchat.store.files import seal, sync, unseal
from mlxchat.store.fingerprint import hash_file
from mlxchat.training.batches import BatchSource
from mlxchat.training.best import Best
from mlxchat.training.monitor import Monitor

Arrays = dict[str, NDArray[Any]]

_ARRAYS, _STATE = "arrays.safetensors", "state.json"
_FINISHED_ARRAYS, _FINISHED_STATE = "training_state.safetensors", "training_state.json"
_MODEL, _OPTIMIZER, _BEST, _LAST = "model.", "optimizer.", "best.", "last."


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


class Checkpointer:
    """Saves and restores a training: weights, moments, position in the data, numbers seen so far."""

    def __init__(
        self, ctx: Context, model: GPT, optimizer: Optimizer, batches: BatchSource, monitor: Monitor, best: Best | None
    ) -> None:
        self.ctx, self.model, self.optimizer, self.best = ctx, model, optimizer, best
        self.batches, self.monitor = batches, monitor
        self._saved_at = time.monotonic()

    def restore(self, extends: Path | None = None) -> tuple[int, int | None]:
        """Continue from the newest save of this step, else from the finished training in folder `extends`, if any.

        Returns:
            Iterations done, and the number of the hook to continue with (None: all hooks of that iteration are done).

        Raises:
            DataError: the training in `extends` does not fit this model and optimizer.
        """
        if (found := read_newest(self.ctx.work)) is not None:
            state = self._restore_save(*found)
            self.ctx.rewind_records(state["iteration"])
            self.ctx.metrics |= state.get("metrics", {})
        elif extends is not None:
            state = self._restore_finished(extends)
            self.ctx.take_records(extends)
        else:
            self.ctx.rewind_records(0)
            return 0, 0
        mx.eval(self.model.state)
        if "batches" in state:  # not of an imported model, whose text is read from its beginning
            self.batches.restore(state["batches"])
            self.monitor.restore(state)
        # Records of iteration 0 were dropped, so all its hooks run again.
        return state["iteration"], state.get("pending_hook") if state["iteration"] else 0

    def save(self, iteration: int) -> None:
        """Save the state after `iteration` iterations; older saves are removed."""
        self._save(iteration, self._state())

    def save_if_due(self, iteration: int) -> None:
        """Save if `machine.checkpoint_seconds` have passed since the last time."""
        if time.monotonic() - self._saved_at >= self.ctx.config.machine.checkpoint_seconds:
            self.save(iteration)
            self._saved_at = time.monotonic()

    @contextmanager
    def saving_on_stop(self, iteration: int, **more: int) -> Iterator[None]:
        """Save the state before the body, with `more` in it, if the body is interrupted or fails.

        The body changes weights and moments last, or not at all.
        """
        before = {**self._state(), **more}
        try:
            yield
        except PeerLost:
            raise  # the moments of a lost rank cannot be saved
        except (Interrupted, StepFailed) as error:
            self._save(iteration, before)
            if isinstance(error, Interrupted):
                raise
            saved = (
                f"The state after iteration {iteration} of {self.monitor.num_iterations} is saved in {self.ctx.work}"
            )
            raise StepFailed(f"{error}\n{saved}; the same command continues there.") from error

    def save_finished(self, iteration: int, folder: Path, *, intermediate: bool = False) -> None:
        """Write what an extension needs: moments, state and, where the best weights are earlier ones, the last.

        It contains no times, so that trainings of one key leave equal files. An intermediate model has the present
        weights, so its extension starts without best ones.
        """
        state: dict[str, Any] = {"batches": self.batches.state(), "meter": self.monitor.meter.loss_state()}
        arrays = _numpy(self.optimizer.whole_state())
        if self.best is not None and not intermediate:
            state["best"] = self.best.state()
            if self.best.iteration not in (None, iteration):
                arrays |= _numpy(trained_parameters(self.model), _LAST)
        save_file(arrays, folder / _FINISHED_ARRAYS)
        text = json.dumps({"iteration": iteration, **state})
        (folder / _FINISHED_STATE).write_text(text, encoding="utf-8")

    def _state(self) -> dict[str, Any]:
        return {"batches": self.batches.state(), **self.monitor.state()}

    def _save(self, iteration: int, state: dict[str, Any]) -> None:
        arrays = _numpy(trained_parameters(self.model), _MODEL) | _numpy(self.optimizer.whole_state(), _OPTIMIZER)
        if self.best is not None:
            state = {**state, "best": self.best.state()}
            if self.best.iteration != iteration:
                arrays |= _numpy(self.best.weights, _BEST)
        self.ctx.check_lock()  # a save among removed outputs would later continue without their intermediate models
        write_save(self.ctx.work, iteration, arrays, state)

    def _restore_save(self, arrays: Arrays, state: dict[str, Any]) -> dict[str, Any]:
        """Set model, optimizer and best weights to those of a save; return its state."""
        set_parameters(self.model, _arrays(arrays, _MODEL))
        _set_moments(self.optimizer, {name: arrays[f"{_OPTIMIZER}{name}"] for name in self.optimizer.state})
        if self.best is not None and "best" in state:
            self.best.restore(state["best"], trained_parameters(self.model) | _arrays(arrays, _BEST))
        return state

    def _restore_finished(self, folder: Path) -> dict[str, Any]:
        """Set model, optimizer and best weights to the end of a finished training; return its state."""
        moments, last = _read_moments(folder)
        with _reading(folder):
            kept = load_file(folder / ("model.safetensors" if adapters_of(self.model) is None else ADAPTERS_FILE))
            state: dict[str, Any] = json.loads((folder / _FINISHED_STATE).read_text(encoding="utf-8"))
        if state["iteration"] >= (total := self.monitor.num_iterations):
            raise DataError(f"{folder} already has {state['iteration']} iterations, expected fewer than {total}")
        _check_arrays(folder, trained_parameters(self.model), kept)
        _check_arrays(folder, self.optimizer.state, moments)
        if last:
            _check_arrays(folder, kept, last)
        weights = _arrays(kept)
        set_parameters(self.model, _arrays(last) or weights)
        _set_moments(self.optimizer, moments)
        if self.best is not None and "best" in state:
            self.best.restore(state["best"], weights)
        return state


def load_moments(folder: Path, optimizer: Optimizer) -> None:
    """Give the optimizer the moments and the iteration count of a finished training; its rates stay.

    Counterpart of `load_optimizer` in nanochat's chat_sft of 2026.

    Raises:
        DataError: the folder has none, or they are of other parameters or another optimizer.
    """
    moments, _ = _read_moments(folder, advice=", or give warm_start=false")
    _check_arrays(folder, optimizer.state, moments)
    _set_moments(optimizer, moments)


def _read_moments(folder: Path, advice: str = "") -> tuple[Arrays, Arrays]:
    """Return moments, and the last weights where the model beside them has earlier ones."""
    with _reading(folder, advice):
        arrays = load_file(folder / _FINISHED_ARRAYS)
    last = {name.removeprefix(_LAST): arrays.pop(name) for name in sorted(arrays) if name.startswith(_LAST)}
    return arrays, last


@contextmanager
def _reading(folder: Path, advice: str = "") -> Iterator[None]:
    """Raise DataError if the body cannot read a finished training."""
    try:
        yield
    except Exception as error:  # the safetensors reader has several error types of its own
        raise DataError(
            f"{folder} has no readable training state ({type(error).__name__}: {error}). Train it with "
            f"its stage's save_training_state=true{advice}"
        ) from None


def _numpy(arrays: Mapping[str, mx.array], prefix: str = "") -> Arrays:
    """Return arrays for a file, their names behind a prefix."""
    return {f"{prefix}{name}": np.asarray(value) for name, value in arrays.items()}


def _arrays(found: Arrays, prefix: str = "") -> dict[str, mx.array]:
    """Return the arrays of a file whose names have a prefix, without it."""
    return {name.removeprefix(prefix): mx.array(value) for name, value in found.items() if name.startswith(prefix)}


def _set_moments(optimizer: Optimizer, moments: Arrays) -> None:
    optimizer.state.update(_arrays(moments))
    mx.eval(optimizer.state)


def _check_arrays(folder: Path, expected: Mapping[str, Any], found: Arrays) -> None:
    wrong = sorted(
        name
        for name in expected.keys() | found.keys()
        if name not in expected or name not in found or tuple(expected[name].shape) != found[name].shape
    )
    if wrong:
        raise DataError(f"{folder} cannot be continued: these arrays do not fit: {', '.join(wrong[:5])}")
