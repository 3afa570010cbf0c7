"""Resumable state: everything an interrupted training needs to end as if nothing had happened.

ckpt/<iteration>/ holds arrays.safetensors and state.json; the folder gets its name in one rename, when it is whole.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from safetensors.numpy import load_file, save_file

from mlxchat.model.gpt import GPT
from mlxchat.model.weights import flatten_parameters, set_parameters
from mlxchat.optim.groups import Optimizer


def save_state(work: Path, iteration: int, model: GPT, optimizer: Optimizer, state: dict[str, Any]) -> None:
    """Save weights, optimizer and `state` (JSON data) after `iteration` iterations; drop the older saves."""
    place = work / f"{iteration:08d}"
    temporary = work / f".{iteration:08d}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    arrays = {f"model.{name}": np.asarray(value) for name, value in flatten_parameters(model).items()}
    arrays |= {f"optimizer.{name}": np.asarray(value) for name, value in optimizer.state.items()}
    save_file(arrays, temporary / "arrays.safetensors")
    (temporary / "state.json").write_text(json.dumps({"iteration": iteration, **state}), encoding="utf-8")
    shutil.rmtree(place, ignore_errors=True)
    temporary.rename(place)
    for older in _saves(work):
        if older != place:
            shutil.rmtree(older, ignore_errors=True)


def load_state(work: Path, model: GPT, optimizer: Optimizer) -> dict[str, Any] | None:
    """Restore the newest readable save into model and optimizer; return its state, or None if there is none."""
    for place in reversed(_saves(work)):
        try:
            arrays = load_file(place / "arrays.safetensors")
            state: dict[str, Any] = json.loads((place / "state.json").read_text(encoding="utf-8"))
        except Exception:  # cut short by a crash of the machine: an older save serves
            shutil.rmtree(place, ignore_errors=True)
            continue
        weights = {name.removeprefix("model."): mx.array(value) for name, value in arrays.items() if name[0] == "m"}
        set_parameters(model, weights)
        for name in optimizer.state:
            optimizer.state[name] = mx.array(arrays[f"optimizer.{name}"])
        mx.eval(model.state, optimizer.state)
        return state
    return None


def _saves(work: Path) -> list[Path]:
    return sorted(path for path in work.glob("[0-9]*") if path.is_dir()) if work.is_dir() else []
