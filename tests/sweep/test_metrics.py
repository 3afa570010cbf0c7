"""Metrics of sweeps and their directions."""

import json
import re
from pathlib import Path

import pytest

from mlxchat.composition.compose import compose_config
from mlxchat.errors import ConfigError
from mlxchat.pipeline import plan_of
from mlxchat.runner.plan import PlannedStep, entries_of
from mlxchat.runner.stage import Stages
from mlxchat.store.store import Store
from mlxchat.sweep.results import find_metric, metrics_of_plan

APART = ("tokens_per_second", "data_wait_frac")


def plans(*overrides: str, outputs: Path = Path("nowhere")) -> list[list[PlannedStep]]:
    """Return what `find_metric` takes, for one configuration."""
    config = compose_config(["experiment=smoke", *overrides, f"outputs={outputs}"]).config
    return [plan_of(config, Store(outputs))]


def declared(*overrides: str) -> dict[str, str | None]:
    """Return STEP.METRIC → direction of what a configuration records."""
    (plan,) = plans(*overrides)
    return {name: better for name, (better, needs) in metrics_of_plan(plan).items() if not needs}


def test_stages_declare_exactly_their_recorded_metrics(finished, tiny):
    recorded = {
        f"{manifest['step']}.{name}"
        for manifest in Store(finished.outputs).manifests()
        if manifest["stage"] != "tokens"
        for name in [*manifest["metrics"], *(key for key in APART if manifest.get(key) is not None)]
    }
    assert recorded == set(declared(*tiny))


def test_training_metrics_are_in_metrics_jsonl(finished):
    for stage in ("pretrain", "midtrain", "sft", "rl"):
        (folder,) = (finished.outputs / "store").glob(f"{stage}-*")
        names = {name for line in (folder / "metrics.jsonl").read_text().splitlines() for name in json.loads(line)}
        expected = {each.name for each in Stages()[stage].metrics if each.curve} - {"core_estimate"}
        assert expected, stage
        assert expected <= names, stage


def test_compare_sorts_a_metric_best_first(toys, say):
    body = """
        (ctx.out / "result.txt").write_text("x")
        ctx.metrics |= {"score": ctx.config.toy.number, "val_loss": ctx.config.toy.number}
    """
    toys.add("make", body, metrics={"score": "maximize", "val_loss": "minimize"})
    for number in (2, 3, 1):
        toys.config.toy.number = number
        plan = toys.plan({"first": {"stage": "make"}})
        run = toys.run(plan)
        (run.folder / "plan.json").write_text(json.dumps({"steps": entries_of(plan)}))
    outputs = f"outputs={toys.outputs}"
    for metric, best_first in ("score", ["3", "2", "1"]), ("val_loss", ["1", "2", "3"]):
        lines = say("compare", "--sort", metric, outputs).splitlines()
        assert next(line.split()[1:] for line in lines if line.startswith("first.score")) == best_first


def test_unrecorded_metric_is_refused_with_the_reason():
    found = plans("rl.eval_samples=2")
    assert find_metric("pretrain.val_bpb", None, found) == "minimize"
    assert find_metric("pretrain.val_bpb", "maximize", found) == "maximize"
    for metric, message in {
        "eval_base.core": "not recorded here; it needs core=nanochat",
        "eval_sft.core": "it needs core=nanochat and a base model",
        "kinds_mc": r'expected STEP.METRIC, one of: .*Did you mean "eval_\w+.kinds_mc"',
        "pretran.val_bpb": 'Did you mean "pretrain.val_bpb"',
        "pretrain.seconds_to_target": "it needs pretrain.target_bpb",
        "corpus.train_chars": "give sweep.direction=minimize or sweep.direction=maximize",
    }.items():
        with pytest.raises(ConfigError) as caught:
            find_metric(metric, None, found)
        assert re.search(message, str(caught.value)), str(caught.value)
