"""One command imports a published model, trains it by GRPO on GSM8K, and evaluates before and after."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mlxchat.store.manifest import read_manifest
from mlxchat.store.naming import resolve
from mlxchat.store.store import Store

HUB = Path(__file__).resolve().parents[3] / "shared" / "hub"


@pytest.mark.skipif(not HUB.exists(), reason="the models and GSM8K are not on this machine")
def test_one_command_imports_trains_and_evaluates(mlxchat: Callable[..., Any], tmp_path: Path) -> None:
    spec = importlib.util.spec_from_file_location("shared_hub_of_recipe", HUB / "serve.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["shared_hub_of_recipe"] = module
    spec.loader.exec_module(module)
    command = ("experiment=grpo_nanochat_rehearsal", "machine=cpu", "machine.blas_threads=1", "suite.gsm8k.stop=2")
    with module.HubServer(str(HUB / "root")) as server:
        environ = {
            "HF_ENDPOINT": server.url, "HF_HOME": str(tmp_path / "hf"), "MLXCHAT_CACHE": str(tmp_path / "cache"),
            "NO_PROXY": "127.0.0.1", "HF_HUB_OFFLINE": "0",
        }  # fmt: skip
        killed = mlxchat(*command, cwd=tmp_path, environ=environ | {"MLXCHAT_CRASH_AT": "train.iteration"})
        assert killed.returncode == -9, killed.stdout + killed.stderr
        done = mlxchat(*command, cwd=tmp_path, environ=environ)
    del sys.modules["shared_hub_of_recipe"]
    assert done.returncode == 0, done.stdout + done.stderr
    store = Store(tmp_path / "outputs")
    made = {name: read_manifest(resolve(store, name)) for name in ("imported", "rl", "eval_imported", "eval_rl")}
    assert made["rl"]["inputs"]["checkpoint"]["rid"] == made["imported"]["rid"]
    assert made["imported"]["externals"][0]["url"].startswith("hf://models/karpathy/nanochat-d32/model_")
    rollouts = [json.loads(line) for line in (resolve(store, "rl") / "rollouts.jsonl").read_text().splitlines()]
    assert rollouts
    assert set(json.loads((resolve(store, "eval_rl") / "scores.json").read_text())["tasks"]) == {"gsm8k"}
