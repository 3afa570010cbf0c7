"""Agreement with values that nanochat's own code computed, and failures of `check.py` on altered values and files.

The tolerances are those that the README of the values expects of float32.
"""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import check
import numpy as np
import pytest
from check import QUANTITIES, SUFFIXES, compare, open_file, show
from comparison import Comparison, exact, largest
from parity_file import FOLDER, ParityFile
from safetensors.numpy import load_file, save_file

Alter = Callable[[Any], Any]
FILES = sorted(path for path in FOLDER.glob("*_*") if path.suffix in SUFFIXES) if FOLDER.is_dir() else []
ABSENT = pytest.mark.skip(reason="nanochat's values are missing; MLXCHAT_PARITY names their folder")
CASES = [
    pytest.param(path, quantity, id=f"{path.stem}-{quantity.__name__}")
    for path in FILES
    for quantity in QUANTITIES[open_file(path).kind]
]


@pytest.mark.parametrize(("path", "quantity"), CASES or [pytest.param(None, None, id="absent", marks=ABSENT)])
def test_quantity_agrees_with_nanochat(path, quantity):
    assert [show(line) for line in compare(open_file(path), quantity) if not line.ok] == []


def failures(path: Path, quantity: str) -> list[str]:
    """Return the names of a quantity's failed lines."""
    file = open_file(path)
    (compared,) = (each for each in QUANTITIES[file.kind] if each.__name__ == quantity)
    return [line.name for line in compare(file, compared) if not line.ok]


def flip(row: Any, place: Any = -1) -> None:
    row[place] = row[place] + 1


def swap(row: list[Any]) -> None:
    row[-1], row[-2] = row[-2], row[-1]


JSON: dict[str, tuple[str, str, Alter]] = {
    "a merge": ("tokenizer", "training", lambda v: swap(v["mergeable_ranks_base64"])),
    "a multiplier": ("schedules", "schedules", lambda v: swap(v["jul2026"]["schedules"][5]["lr_multiplier"])),
    "a policy loss": ("rl", "policy_gradient", lambda v: v["cases"][0]["oct2025"].update(loss_sum_over_passes=0.5)),
    "a greedy token": ("engine", "greedy", lambda v: flip(v["greedy"]["jul2026"][1]["tokens"])),
    "a calculation": ("tasks", "calculator", lambda v: v["calculator"][0].update(result="5")),
}

TENSORS: dict[str, tuple[str, str, float]] = {
    "a logit": ("logits", "logits", 1e-3),
    "a token's loss": ("loss_none", "losses", 1e-3),
    "a gradient": ("grads.transformer.h.1.attn.c_v.weight", "gradients", 1e-2),
    "losses of steps": ("losses3", "optimizer_steps", 1e-2),
    "a token": ("greedy", "greedy", 1.0),
}


def original(pattern: str) -> Path:
    """Return the first file of a pattern, or skip the test."""
    found = sorted(FOLDER.glob(pattern)) if FOLDER.is_dir() else []
    if not found:
        pytest.skip("nanochat's values are missing")
    return found[0]


@pytest.mark.parametrize("what", JSON)
def test_altered_json_value_fails(what, tmp_path):
    kind, quantity, alter = JSON[what]
    path = original(f"{kind}_*.json")
    values = json.loads(path.read_text(encoding="utf-8"))
    alter(values)
    altered = tmp_path / path.name  # the tokenizer and models are then read from FOLDER
    altered.write_text(json.dumps(values), encoding="utf-8")
    assert failures(altered, quantity)


@pytest.mark.parametrize("variant", ["oct2025", "jul2026"])
@pytest.mark.parametrize("what", TENSORS)
def test_altered_tensor_fails(what, variant, tmp_path):
    name, quantity, change = TENSORS[what]
    path = original(f"nanochat_{variant}_*.safetensors")
    file, values = ParityFile(path), load_file(path)
    values[name].reshape(-1)[-1] += np.asarray(change, values[name].dtype)
    if what == "a gradient":
        values[name] *= 1.01
    altered = tmp_path / path.name
    save_file(values, altered, metadata=file.metadata)
    assert failures(altered, quantity)


def test_nan_or_no_case_fails():
    assert not Comparison("", float("nan"), 1.0).ok
    assert not largest("", {"a": 0.0, "b": float("nan")}, 1.0).ok
    assert not largest("", {}, 1.0).ok
    assert not exact("", [], 0).ok


def test_check_runs_from_any_folder_and_names_a_missing_file(tmp_path):
    command = [sys.executable, str(Path(check.__file__)), "nanochat_none.safetensors"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert done.stderr == "error: nanochat_none.safetensors: no such file\n"
