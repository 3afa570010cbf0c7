"""Resumable state: everything an interrupted training needs to end as if nothing had happened."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from safetensors.numpy import load_file, save_file

from mlxchat.errors import DataError
from mlxchat.model.gpt import GPT
from mlxchat.model.weights import flatten_parameters, set_parameters
from mlxchat.optim.groups import Optimizer
from mlxchat.training.saves import read_newest, write_save


def save_state(work: Path, iteration: int, model: GPT, optimizer: Optimizer, state: dict[str, Any]) -> None:
    """Save weights, optimizer and `state` (JSON data) after `iteration` iterations; drop the older saves."""
    arrays = {f"model.{name}": np.asarray(value) for name, value in flatten_parameters(model).items()}
    arrays |= {f"optimizer.{name}": np.asarray(value) for name, value in optimizer.state.items()}
    write_save(work, iteration, arrays, state)


def load_state(work: Path, model: GPT, optimizer: Optimizer) -> dict[str, Any] | None:
    """Restore the newest whole save into model and optimizer; return its state, or None if there is none."""
    found = read_newest(work)
    if found is None:
        return None
    arrays, state = found
    weights = {name.removeprefix("model."): mx.array(value) for name, value in arrays.items() if name[0] == "m"}
    set_parameters(model, weights)
    for name in optimizer.state:
        optimizer.state[name] = mx.array(arrays[f"optimizer.{name}"])
    mx.eval(model.state, optimizer.state)
    return state


def save_finished(out: Path, iteration: int, optimizer: Optimizer, state: dict[str, Any]) -> None:
    """Leave beside a finished model what an extension of its training needs: moments, and `state` (JSON data)."""
    save_file({name: np.asarray(value) for name, value in optimizer.state.items()}, out / "training_state.safetensors")
    (out / "training_state.json").write_text(json.dumps({"iteration": iteration, **state}), encoding="utf-8")


def load_finished(folder: Path, model: GPT, optimizer: Optimizer) -> dict[str, Any]:
    """Set model and optimizer to the end of a finished training; return the rest of its state.

    Raises:
        DataError: a file is missing or damaged, or holds other arrays than this model and optimizer have.
    """
    try:
        weights = load_file(folder / "model.safetensors")
        moments = load_file(folder / "training_state.safetensors")
        state: dict[str, Any] = json.loads((folder / "training_state.json").read_text(encoding="utf-8"))
    except Exception as error:  # the safetensors reader has several error types of its own
        raise DataError(f"{folder}: no readable training state ({type(error).__name__}: {error})") from None
    _check_arrays(folder, flatten_parameters(model), weights)
    _check_arrays(folder, optimizer.state, moments)
    set_parameters(model, {name: mx.array(value) for name, value in weights.items()})
    _set_moments(optimizer, moments)
    mx.eval(model.state)
    return state


def load_moments(folder: Path, optimizer: Optimizer) -> None:
    """Set the optimizer's moments, and how many iterations they are from, to those of a finished training.

    Its rates stay. Counterpart of `load_optimizer` in nanochat's chat_sft of 2026.

    Raises:
        DataError: the folder has none, or they are of other parameters or another optimizer.
    """
    try:
        moments = load_file(folder / "training_state.safetensors")
    except Exception as error:  # the safetensors reader has several error types of its own
        raise DataError(
            f"{folder} has no readable training state to start warm from ({error}). Pretrain it with "
            "pretrain.save_training_state=true, or give warm_start=false"
        ) from None
    _check_arrays(folder, optimizer.state, moments)
    _set_moments(optimizer, moments)


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
