"""The whole pipeline on bundled text: artifacts, determinism, and what a change reruns."""

import json
import math
from typing import Any

import pytest

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
CONTRACT = {
    "schema", "key", "rid", "name", "stage", "step", "kind", "version", "config", "excluded", "overrides", "inputs",
    "outputs", "tree", "externals", "metrics", "derived", "seed", "attempts", "code", "git", "versions", "device",
    "peak_memory_bytes", "peak_array_bytes", "seconds", "tokens_per_second", "argv", "published",
}  # fmt: skip


@pytest.fixture(scope="module")
def manifests(finished: Any) -> dict[str, dict[str, Any]]:
    return {step: read_manifest(place) for step, place in refs_of(Store(finished.outputs)).items()}


def test_manifests_have_every_field_of_the_contract(manifests):
    for step, manifest in manifests.items():
        assert manifest.keys() >= CONTRACT
        assert manifest["peak_memory_bytes"] > 10e6
        assert (manifest["peak_array_bytes"] or 0) < manifest["peak_memory_bytes"]
        assert (manifest["tokens_per_second"] is not None) == (step in ("pretrain", "midtrain", "sft", "rl"))
        assert all(isinstance(value, int | float) and math.isfinite(value) for value in manifest["metrics"].values())


def test_scores_depend_on_the_model_format(manifests, finished):
    def scores(step: str) -> dict[str, Any]:
        return dict(json.loads((finished.outputs / "store" / manifests[step]["name"] / "scores.json").read_text()))

    base, chat = scores("eval_base"), scores("eval_rl")
    assert (base["tasks"], base["mean_centered"]) == ({}, None)
    assert 0 < base["bpb"]["ngram_order2"] < base["bpb"]["untrained"]
    assert chat["bpb"] is None
    suite = manifests["eval_rl"]["config"]["suite"]
    assert {name: task["num_examples"] for name, task in chat["tasks"].items()} == dict.fromkeys(suite, 3)
    for step in ("eval_base", "eval_rl"):
        assert len(Records(finished.outputs / "store" / manifests[step]["name"] / "samples.jsonl").read()) == 3


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
        "rl": "input checkpoint (sft) will be rebuilt",
        "eval_sft": "input checkpoint (sft) will be rebuilt",
        "eval_rl": "input checkpoint (rl) will be rebuilt",
    }
