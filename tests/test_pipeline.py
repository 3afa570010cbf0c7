"""The whole pipeline on bundled text: artifacts, determinism, and what a change reruns; the same from Python."""

import json
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

import mlxchat
from mlxchat.errors import ConfigError, DataError, StoreError
from mlxchat.store.files import Records
from mlxchat.store.manifest import read_manifest
from mlxchat.store.naming import refs_of
from mlxchat.store.store import Store

KINDS = {
    "corpus": "corpus", "tokenizer": "tokenizer",
    "pretrain": "checkpoint", "midtrain": "checkpoint", "sft": "checkpoint", "rl": "checkpoint",
    "eval_base": "scores", "eval_mid": "scores", "eval_sft": "scores", "eval_rl": "scores",
}  # fmt: skip
INPUTS = {
    "corpus": {}, "tokenizer": {"corpus": "corpus"}, "pretrain": {"corpus": "corpus", "tokenizer": "tokenizer"},
    "midtrain": {"checkpoint": "pretrain"}, "sft": {"checkpoint": "midtrain"}, "rl": {"checkpoint": "sft"},
    "eval_base": {"checkpoint": "pretrain", "corpus": "corpus"}, "eval_mid": {"checkpoint": "midtrain"},
    "eval_sft": {"checkpoint": "sft"}, "eval_rl": {"checkpoint": "rl"},
}  # fmt: skip


@pytest.fixture(scope="module")
def manifests(finished: Any) -> dict[str, dict[str, Any]]:
    return {step: read_manifest(place) for step, place in refs_of(Store(finished.outputs)).items()}


def test_run_folder_records_plan_and_events(finished, tiny, manifests):
    (folder,) = (finished.outputs / "runs").iterdir()
    plan = json.loads((folder / "plan.json").read_text())
    assert (plan["run"], plan["experiment"], plan["targets"]) == (folder.name, "smoke", list(KINDS))
    assert plan["overrides"] == [*tiny, f"outputs={finished.outputs}"]
    assert {step["step"]: (step["kind"], step["inputs"], step["rid"], step["artifact"]) for step in plan["steps"]} == {
        name: (KINDS[name], INPUTS[name], manifest["rid"], manifest["name"]) for name, manifest in manifests.items()
    }
    assert {(step["state"], step["reason"]) for step in plan["steps"]} == {("run", "missing")}
    events = [(event["event"], event.get("step")) for event in Records(folder / "events.jsonl").read()]
    middle = [(event, step) for step in KINDS for event in ("step_started", "step_done")]
    assert events == [("run_started", None), *middle, ("run_done", None)]


@pytest.mark.parametrize("step", ["pretrain", "midtrain", "sft"])
def test_an_iteration_has_the_tokens_that_were_set(step, manifests):
    """512, in rows of 256."""
    derived = manifests[step]["derived"]
    assert derived["tokens_per_iteration"] == 512


def test_equal_settings_give_equal_bytes(finished, manifests, mlxchat, tiny, tmp_path):
    outputs = tmp_path / "again"
    done = mlxchat(*tiny, f"outputs={outputs}", environ={"PYTHONHASHSEED": "7"})
    assert done.returncode == 0, done.stderr
    again = {step: read_manifest(place) for step, place in refs_of(Store(outputs)).items()}
    for key in ("rid", "tree", "name", "derived"):
        assert {step: manifest[key] for step, manifest in again.items()} == {
            step: manifest[key] for step, manifest in manifests.items()
        }


def test_longer_sft_reruns_exactly_its_dependents(finished, tiny, say):
    plan = json.loads(say("plan", *tiny, f"outputs={finished.outputs}", "sft.num_epochs=2", "--json"))
    assert {each["step"]: each["reason"] for each in plan["steps"] if each["state"] in ("run", "maybe")} == {
        "sft": "config changed: sft.num_epochs 1 → 2",
        **dict.fromkeys(("rl", "eval_sft"), "input checkpoint (sft) will be rebuilt"),
        "eval_rl": "input checkpoint (rl) will be rebuilt",
    }


def test_composed_pipeline_is_planned_and_returns_its_artifacts(finished, tiny, capsys):
    pipeline = mlxchat.compose(*tiny, f"outputs={finished.outputs}")
    assert {step.state for step in pipeline.plan()} == {"done"}
    made = pipeline.run()
    assert "nothing to do" in capsys.readouterr().out
    assert list(made) == list(pipeline.config.pipeline)
    assert made["sft"].path == mlxchat.open("sft", finished.outputs).path
    with pytest.raises(ConfigError, match=r'Did you mean "sft\.num_epochs"'):
        mlxchat.compose("sft.num_epoch=2")


def test_artifact_has_metrics_config_and_curves(finished):
    pretrain = mlxchat.open("pretrain", finished.outputs)
    manifest = json.loads((pretrain.path / "manifest.json").read_text())
    assert pretrain.metrics == manifest["metrics"]
    assert pretrain.config["model"]["depth"] == manifest["config"]["model"]["depth"]
    records = [json.loads(line) for line in (pretrain.path / "metrics.jsonl").read_text().splitlines()]
    expected = [(each["iteration"], each["loss"]) for each in records if "loss" in each]
    iterations, values = pretrain.curves()["loss"]
    assert list(zip(iterations.tolist(), values.tolist(), strict=True)) == expected
    assert values[-1] < values[0]


def test_checkpoint_answers_as_the_command_does(finished, say):
    sft = mlxchat.open("sft", finished.outputs)
    assert sft.chat("What is 1 + 1?", max_new_tokens=8) in say(
        "chat", "sft", "-p", "What is 1 + 1?", "--max-tokens", "8", "--temperature", "0",
        f"outputs={finished.outputs}",
    )  # fmt: skip
    logits = sft.model()(mx.array([[1, 2, 3]]))
    assert logits.shape[:2] == (1, 3)
    assert np.isfinite(np.array(logits.astype(mx.float32))).all()
    base = mlxchat.open("pretrain", finished.outputs)
    assert isinstance(base.generate("The", max_new_tokens=4, temperature=1.0, seed=3), str)


def test_wrong_names_are_one_message(finished):
    with pytest.raises(DataError, match="is a corpus, no model"):
        mlxchat.open("corpus", finished.outputs).chat("Hello")
    with pytest.raises(StoreError, match="nothing"):
        mlxchat.open("nothing", finished.outputs)
