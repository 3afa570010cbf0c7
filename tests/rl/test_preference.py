"""The stage preference: from pairs to a checkpoint, resumed bit for bit, and what it gains."""

import json
import math
from pathlib import Path

import pytest

from kit.artifacts import publish_base
from kit.commands import run_here
from mlxchat.store.fingerprint import hash_file
from mlxchat.store.store import Store

SETTINGS = """
    pipeline=preference stage=preference machine=cpu machine.blas_threads=1 machine.checkpoint_seconds=0
    preference.row_tokens=64 preference.pairs_per_iteration=4 preference.num_iterations=6
    preference.schedule.init_lr_frac=0.2 preference.eval_every=3
"""


@pytest.fixture
def outputs(tmp_path: Path) -> Path:
    """Outputs with a model, and beside them pairs: cats are preferred to dogs."""
    publish_base(tmp_path / "outputs")
    with (tmp_path / "pairs.jsonl").open("w") as file:
        for number in range(40):
            line = {"prompt": f"who sat {number}", "chosen": "the cat", "rejected": "the dog"}
            file.write(json.dumps(line) + "\n")
    return tmp_path / "outputs"


def command(outputs: Path) -> list[str]:
    (base,) = (each["name"] for each in Store(outputs).manifests() if each["step"] == "base")
    checkpoint = f"pipeline.preference.checkpoint=artifact:{base}"
    pairs = f"preference.data.path={outputs.with_name('pairs.jsonl')}"
    return [*SETTINGS.split(), "preference.adapter.kind=lora", checkpoint, pairs, f"outputs={outputs}"]


def made(outputs: Path) -> Path:
    (found,) = (each for each in Store(outputs).manifests() if each["step"] == "preference")
    return outputs / "store" / str(found["name"])


def test_killed_training_ends_with_the_same_bytes_and_prefers_the_chosen(outputs, mlxchat, tmp_path):
    settings = command(outputs)
    killed = mlxchat(*settings, cwd=tmp_path, environ={"MLXCHAT_CRASH_AT": "train.iteration:4"})
    assert killed.returncode == -9, killed.stdout + killed.stderr
    assert run_here(*settings) == 0
    resumed, straight = made(outputs), outputs.with_name("straight")
    curve = [json.loads(line) for line in (resumed / "metrics.jsonl").read_text().splitlines()]
    assert [line["iteration"] for line in curve if "val_loss" in line] == [0, 3, 6]
    assert [line["iteration"] for line in curve if "loss" in line] == [1, 2, 3, 4, 5, 6]
    losses = [line["loss"] for line in curve if "loss" in line]
    assert losses[0] == pytest.approx(math.log(2), rel=1e-3), "DPO's loss of the reference itself"
    metrics = json.loads((resumed / "manifest.json").read_text())["metrics"]
    assert metrics["val_pair_accuracy"] == 1.0 > curve[0]["val_pair_accuracy"]
    assert metrics["val_loss"] < curve[0]["val_loss"]
    publish_base(straight)
    assert run_here(*settings[:-1], f"outputs={straight}") == 0
    assert hash_file(made(straight) / "adapters.safetensors") == hash_file(resumed / "adapters.safetensors")
