"""Saved states on disk: ckpt/<iteration>/ with arrays.safetensors and state.json, whole or not there.

A save gets its name in one rename when it is on disk; only then the older ones go. state.json knows its own digest and
that of the arrays, so a save that was cut or altered afterwards is told from a good one and never used.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from mlxchat.runner.crash import crash_point
from mlxchat.runner.fingerprint import hash_file
from mlxchat.runner.sealed import seal, sync, unseal

Arrays = dict[str, NDArray[Any]]

_ARRAYS, _STATE = "arrays.safetensors", "state.json"


def write_save(work: Path, iteration: int, arrays: Mapping[str, NDArray[Any]], state: Mapping[str, Any]) -> None:
    """Save arrays and `state` (JSON data) after `iteration` iterations; drop the older saves."""
    place, temporary = work / f"{iteration:08d}", work / f".{iteration:08d}.tmp"
    for unfinished in work.glob(".*.tmp"):
        shutil.rmtree(unfinished, ignore_errors=True)
    temporary.mkdir(parents=True)
    # NumPy makes what has no axis one with an axis, and a count like that would give a row of numbers another shape.
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
    for older in saves(work):
        if older != place:
            shutil.rmtree(older, ignore_errors=True)
    crash_point("checkpoint.done")


def read_newest(work: Path) -> tuple[Arrays, dict[str, Any]] | None:
    """Return arrays and state of the newest save that is whole, or None; damaged ones are removed."""
    for place in reversed(saves(work)):
        try:
            return _read(place)
        except Exception:  # the safetensors reader has several error types of its own
            shutil.rmtree(place, ignore_errors=True)
    return None


def saves(work: Path) -> list[Path]:
    """Return the folders of all saves, the oldest first."""
    return sorted(path for path in work.glob("[0-9]*") if path.is_dir()) if work.is_dir() else []


def _read(place: Path) -> tuple[Arrays, dict[str, Any]]:
    state, sealed = unseal((place / _STATE).read_bytes())
    digest = state.pop("arrays_sha256", None)
    # Saves from before there were digests have neither.
    if sealed != (digest is not None) or (sealed and digest != hash_file(place / _ARRAYS)):
        raise ValueError("its contents do not have the digest that it names")
    return load_file(place / _ARRAYS), state
