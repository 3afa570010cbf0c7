"""Resumable state: everything an interrupted training needs to end as if nothing had happened."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from safetensors.numpy import load_file, save_file

from mlxchat.errors import DataError
from mlxchat.model.gpt import GPT, flatten_parameters, set_parameters, trained_parameters
from mlxchat.optim.groups import Optimizer
from mlxchat.training.best import Best
from mlxchat.training.saves import read_newest, write_save

_LAST = "last."


def save_state(
    work: Path, iteration: int, model: GPT, optimizer: Optimizer, state: dict[str, Any], best: Best | None = None
) -> None:
    """Save trained weights, optimizer and `state` (JSON data) after `iteration` iterations; drop the older saves."""
    arrays = {f"model.{name}": np.asarray(value) for name, value in trained_parameters(model).items()}
    arrays |= {f"optimizer.{name}": np.asarray(value) for name, value in optimizer.whole_state().items()}
    if best is not None:
        arrays |= best.arrays(iteration)
        state = {**state, "best": best.state()}
    write_save(work, iteration, arrays, state)


def load_state(work: Path, model: GPT, optimizer: Optimizer, best: Best | None = None) -> dict[str, Any] | None:
    """Restore the newest whole save; return its state, or None if there is none."""
    found = read_newest(work)
    if found is None:
        return None
    arrays, state = found
    weights = {name.removeprefix("model."): mx.array(value) for name, value in arrays.items() if name[0] == "m"}
    set_parameters(model, weights)
    for name in optimizer.state:
        optimizer.state[name] = mx.array(arrays[f"optimizer.{name}"])
    # In saves of former versions it has an axis.
    optimizer.state["count"] = optimizer.state["count"].reshape(())
    mx.eval(model.state, optimizer.state)
    if best is not None and "best" in state:
        best.restore(state["best"], arrays, model)
    return state


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
    """Set the optimizer's moments, and how many iterations they are from, to those of a finished training.

    Its rates stay. Counterpart of `load_optimizer` in nanochat's chat_sft of 2026.

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
