"""Files of values that nanochat's own code computed, the tokenizer and models of their set, and comparisons.

The environment variable MLXCHAT_PARITY names the folder of the files.
"""

import base64
import json
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from safetensors import safe_open

from mlxchat.data.tokenizer import Tokenizer
from mlxchat.interop.names import sizes_from_nanochat
from mlxchat.model.gpt import GPT
from mlxchat.model.parameters import flatten_parameters, set_parameters
from mlxchat.model.sizes import GPTSizes

Array = np.ndarray[Any, Any]
Arrays = dict[str, Array]
FOLDER = Path(os.environ.get("MLXCHAT_PARITY") or Path(__file__).resolve().parents[3] / "shared" / "parity")
VARIANTS = ("oct2025", "jul2026")


@dataclass(frozen=True)
class Values:
    """A file of values."""

    path: Path

    @cached_property
    def json(self) -> Any:
        return json.loads(self.path.read_text(encoding="utf-8"))

    @cached_property
    def tensors(self) -> Arrays:
        with safe_open(self.path, "np") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118

    def companion(self, stem: str, suffix: str) -> "Values":
        """Return another file of the set, whose name ends equally."""
        return Values(FOLDER / f"{stem}_{self.path.stem.rpartition('_')[2]}{suffix}")

    @cached_property
    def tokenizer(self) -> Tokenizer:
        file = self if self.path.name.startswith("tokenizer_") else self.companion("tokenizer", ".json")
        tokens = file.json["mergeable_ranks_base64"]
        return Tokenizer({base64.b64decode(token): rank for rank, token in enumerate(tokens)})

    def core_model(self, variant: str) -> GPT:
        """Return the set's small trained model of a snapshot."""
        stem = "core_model" if variant == "oct2025" else f"core_model_{variant}"
        return self.companion(stem, ".safetensors").model("")

    @cached_property
    def sizes(self) -> GPTSizes:
        with safe_open(self.path, "np") as file:
            config = json.loads(file.metadata()["config"])
        return sizes_from_nanochat(config, [name.removeprefix("weights.") for name in self.tensors], self.path.name)

    @property
    def variant(self) -> str:
        """The snapshot of a model."""
        return self.sizes.architecture

    def weights(self, prefix: str) -> Arrays:
        return {name[len(prefix) :]: value for name, value in self.tensors.items() if name.startswith(prefix)}

    def model(self, prefix: str) -> GPT:
        """Return a model with the weights under a prefix, whose names and shapes must be ours."""
        model, weights = GPT(self.sizes), self.weights(prefix)
        shapes = {name: value.shape for name, value in flatten_parameters(model).items()}
        assert shapes == {name: value.shape for name, value in weights.items()}
        set_parameters(model, {name: mx.array(value) for name, value in weights.items()})
        return model


def of_files(pattern: str) -> Callable[[Any], Any]:
    """Run a test with each file of a pattern as its argument `values`."""
    files = [pytest.param(Values(path), id=path.stem) for path in sorted(FOLDER.glob(pattern))]
    absent = pytest.param(None, marks=pytest.mark.skip(reason="MLXCHAT_PARITY names no folder of nanochat's values"))
    return pytest.mark.parametrize("values", files or [absent])


def distance(got: Any, expected: Any) -> float:
    """Return the largest difference, absolute below 1 and relative above."""
    got, expected = np.asarray(got, dtype=np.float64), np.asarray(expected, dtype=np.float64)
    assert got.shape == expected.shape
    return float((np.abs(got - expected) / np.maximum(1, np.abs(expected))).max(initial=0))


def relative(got: Any, expected: Any) -> float:
    """Return |got − expected| / |expected| in the 2-norm."""
    got, expected = np.asarray(got, dtype=np.float64), np.asarray(expected, dtype=np.float64)
    assert got.shape == expected.shape
    return float(np.linalg.norm(got - expected) / (np.linalg.norm(expected) or 1.0))


def assert_within(tolerance: float, errors: dict[str, float]) -> None:
    """Every error is within the tolerance, which NaN is not; there is at least one."""
    assert errors
    beyond = {name: error for name, error in errors.items() if not error <= tolerance}
    assert not beyond, beyond


def assert_same(cases: Iterable[tuple[Any, Any, Any]]) -> None:
    """In every case (what, got, expected) both are equal; there is at least one."""
    found = list(cases)
    assert found
    differing = [case for case in found if case[1] != case[2]]
    assert not differing, differing[0]
