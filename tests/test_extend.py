"""`<stage>.extend=ID` on the command line: plans, refusals and records. For the numbers see training/test_loop.py."""

import json
from collections.abc import Callable
from typing import Any

import pytest

from mlxchat.composition.compose import compose_config
from mlxchat.errors import MlxchatError
from mlxchat.pipeline import plan_of
from mlxchat.runner.plan import PlannedStep
from mlxchat.store.manifest import CONTINUATION, read_manifest
from mlxchat.store.naming import refs_of
from mlxchat.store.store import Store


@pytest.fixture
def plan(tiny: tuple[str, ...], finished: Any) -> Callable[..., PlannedStep]:
    """Return pretrain as it would be planned, on the finished outputs, which no plan changes."""

    def run(*settings: str) -> PlannedStep:
        config = compose_config([*tiny, "stage=pretrain", *settings, f"outputs={finished.outputs}"]).config
        (step,) = (step for step in plan_of(config, Store(finished.outputs)) if step.name == "pretrain")
        return step

    return run


@pytest.fixture
def pretrain(finished: Any) -> dict[str, Any]:
    return read_manifest(refs_of(Store(finished.outputs))["pretrain"])


def test_all_forms_of_a_name_extend_the_same(plan, pretrain):
    names = ("pretrain", pretrain["rid"][:8])
    steps = [plan(f"pretrain.extend={name}", "pretrain.num_iterations=6") for name in names]
    assert len({step.key for step in steps}) == 1
    assert {(step.state, step.reason) for step in steps} == {("run", f"extends {pretrain['name']}")}
    assert plan("pretrain.num_iterations=6").key != steps[0].key, "an extension is another artifact"
    assert plan("pretrain.save_training_state=false").key == plan().key


def test_incompatible_settings_are_reported_together(plan):
    with pytest.raises(MlxchatError) as caught:
        plan(
            "pretrain.extend=pretrain", "pretrain.num_iterations=6", "model=d4", "model.context_tokens=512",
            "pretrain.batch.row_tokens=256", "architecture.rope_theta=5000", "optimizer.kind=adamw",
            "tokenizer.vocab_size=310", "corpus.validation_documents=31",
        )  # fmt: skip
    said = str(caught.value)
    for difference in ("model.depth is 4, but", "optimizer.kind is adamw, but", "its corpus is another one,"):
        assert difference in said
    assert len(said.splitlines()) == 6


def test_extension_records_its_source_and_is_cached(say, tiny, outputs, pretrain):
    settings = [*tiny, "stage=pretrain", f"outputs={outputs}", "pretrain.extend=pretrain"]
    say(*settings, "pretrain.num_iterations=6", "pretrain.save_training_state=false")
    manifest = read_manifest(refs_of(Store(outputs))["pretrain"])
    lineage = {key: pretrain[key] for key in ("step", "rid", "tree")} | {"artifact": pretrain["name"]}
    assert manifest["inputs"]["extends"] == lineage
    assert manifest["derived"]["num_iterations"] == 6
    # By now the step `pretrain` of the latest run is the extension itself, which was made without its state.
    assert "nothing to do" in say(*settings, "pretrain.num_iterations=6")
    refused = say("plan", *settings, "pretrain.num_iterations=8", code=2)
    assert f"{manifest['name']} has no training state" in refused
    assert "pretrain.save_training_state=true 'force=[pretrain]'" in refused


LATER_STAGES = {
    "sft": ("sft.packing=stream",),
    "rl": ("rl.minibatches_per_rollout=2", "adapter=lora", "+rl.rewards={y: {kind: format, pattern: y}}"),
}


@pytest.mark.parametrize("stage", [pytest.param("sft", marks=pytest.mark.slow), "rl"])
def test_extension_is_bit_identical_to_one_training(say, tiny, outputs, stage):
    settings = [f"stage={stage}", f"{stage}.schedule.warmdown_frac=0", f"{stage}.save_training_state=true"]
    settings += LATER_STAGES[stage]

    def train(iterations: int, *more: str) -> dict[str, Any]:
        say(*tiny, *settings, f"outputs={outputs}", f"{stage}.num_iterations={iterations}", *more)
        place = refs_of(Store(outputs))[stage]
        weights = next(place.glob("*[ls].safetensors"))
        names = (weights.name, *CONTINUATION)
        records = map(json.loads, (place / "metrics.jsonl").read_text().splitlines())
        losses = [record["loss"] for record in records if "loss" in record]
        return {"losses": losses} | {name: (place / name).read_bytes() for name in names}

    straight, short = train(4), train(2)
    extended = train(4, f"{stage}.extend={stage}")
    for name in straight:
        assert extended[name] == straight[name] != short[name], name
