"""The whole pipeline with adapters in every stage, by the command line."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kit.artifacts import some_ids
from mlxchat.model.checkpoint import load_checkpoint
from mlxchat.store.bases import find_chain
from mlxchat.store.manifest import read_manifest
from mlxchat.store.naming import resolve
from mlxchat.store.store import Store

pytestmark = pytest.mark.slow


def logits(folder: Path) -> np.ndarray[Any, Any]:
    return np.asarray(load_checkpoint(folder)[0](some_ids(20)))


def test_stacked_adapters_train_fuse_and_open_in_mlx_lm(mlxchat: Callable[..., Any], tmp_path: Path) -> None:
    done = mlxchat("experiment=smoke", "adapter=lora", "adapter.rank=2", "midtrain.adapter.kind=dora", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    store = Store(tmp_path / "outputs")
    chain = find_chain(resolve(store, "rl"))
    assert [read_manifest(folder)["step"] for folder in chain] == ["rl", "sft", "midtrain", "pretrain"]
    found = [logits(folder) for folder in chain]
    # After so short a training, RL gets no reward and no gradient.
    assert all(not np.array_equal(upper, lower) for upper, lower in pairwise(found[1:]))

    assert mlxchat("fuse", "rl", cwd=tmp_path).returncode == 0
    store.forget()
    np.testing.assert_array_equal(logits(resolve(store, "fused")), found[0])
    again = mlxchat("plan", "experiment=smoke", "adapter=lora", "adapter.rank=2", "midtrain.adapter.kind=dora",
                    "--exit-code", cwd=tmp_path)  # fmt: skip
    assert again.returncode == 0, again.stdout

    mlx_lm = pytest.importorskip("mlx_lm")
    base, tuned = resolve(store, "pretrain"), resolve(store, "midtrain")
    theirs, _ = mlx_lm.load(str(base), adapter_path=str(tuned))
    np.testing.assert_allclose(np.asarray(theirs(some_ids(20))), logits(tuned), atol=1e-3)
