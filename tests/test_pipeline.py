"""The whole pipeline on bundled text: artifacts, determinism, and what a change reruns."""

import json
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
