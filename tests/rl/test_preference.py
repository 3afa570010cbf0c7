"""The stage preference: from pairs to a checkpoint, resumed and extended bit for bit; what it refuses and gains."""

import json
from pathlib import Path

import pytest

from kit.artifacts import publish_base
from kit.commands import run_here
from mlxchat.store.fingerprint import hash_file
from mlxchat.store.manifest import CONTINUATION
from mlxchat.store.naming import refs_of
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


def command(outputs: Path, *more: str) -> list[str]:
    (base,) = (each["name"] for each in Store(outputs).manifests() if each["step"] == "base")
    checkpoint = f"pipeline.preference.checkpoint=artifact:{base}"
    return [
        *SETTINGS.split(),
        checkpoint,
        f"preference.data.path={outputs.with_name('pairs.jsonl')}",
        f"outputs={outputs}",
        *more,
    ]


def made(outputs: Path) -> Path:
    (found,) = (each for each in Store(outputs).manifests() if each["step"] == "preference")
    return outputs / "store" / str(found["name"])


def test_killed_training_ends_with_the_same_bytes_and_prefers_the_chosen(outputs, mlxchat, tmp_path):
    settings = command(outputs, "preference.adapter.kind=lora")
    killed = mlxchat(*settings, cwd=tmp_path, environ={"MLXCHAT_CRASH_AT": "train.iteration:4"})
    assert killed.returncode == -9, killed.stdout + killed.stderr
    assert run_here(*settings) == 0
    resumed, straight = made(outputs), outputs.with_name("straight")
    curve = [json.loads(line) for line in (resumed / "metrics.jsonl").read_text().splitlines()]
    assert [line["iteration"] for line in curve if "val_loss" in line] == [0, 3, 6]
    assert [line["iteration"] for line in curve if "loss" in line] == [1, 2, 3, 4, 5, 6]
    metrics = json.loads((resumed / "manifest.json").read_text())["metrics"]
    assert metrics["val_pair_accuracy"] == 1.0 > curve[0]["val_pair_accuracy"]
    assert metrics["val_loss"] < curve[0]["val_loss"]
    publish_base(straight)
    assert run_here(*settings[:-2], settings[-1], f"outputs={straight}") == 0
    assert hash_file(made(straight) / "adapters.safetensors") == hash_file(resumed / "adapters.safetensors")


def test_extension_is_bit_identical_to_one_training(outputs):
    """48 pairs are trained on, of which there are 38: the second epoch's order is the same too, and the reference."""
    constant = ("preference.schedule.warmup_frac=0", "preference.schedule.warmdown_frac=0")

    def train(iterations: int, *extend: str) -> dict[str, object]:
        settings = (f"preference.num_iterations={iterations}", "preference.save_training_state=true", *extend)
        assert run_here(*command(outputs, *constant, *settings)) == 0
        place = refs_of(Store(outputs))["preference"]
        records = map(json.loads, (place / "metrics.jsonl").read_text().splitlines())
        names = (next(place.glob("*[ls].safetensors")).name, *CONTINUATION)
        losses = [record["loss"] for record in records if "loss" in record]
        return {"losses": losses} | {name: (place / name).read_bytes() for name in names}

    straight, short = train(12), train(4)
    extended = train(12, "preference.extend=preference")
    for name in straight:
        assert extended[name] == straight[name] != short[name], name
