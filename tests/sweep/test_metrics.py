"""Metrics of sweeps and their directions; scaling laws."""

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mlxchat.composition.compose import compose_config
from mlxchat.errors import ConfigError
from mlxchat.pipeline import plan_of
from mlxchat.runner.plan import PlannedStep, entries_of
from mlxchat.runner.stage import Stages
from mlxchat.store.store import Store
from mlxchat.sweep.scaling import Training, describe_laws, fit_power_law, fit_scaling_laws
from mlxchat.sweep.sweeper import find_metric, metrics_of_plan

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
        "corpus.train_chars": "give sweep.direction=minimize or =maximize",
    }.items():
        with pytest.raises(ConfigError) as caught:
            find_metric(metric, None, found)
        assert re.search(message, str(caught.value)), str(caught.value)


# Hoffmann et al. 2022 (arXiv 2203.15556), equation 10: L = E + A / N^α + B / D^β.
E, A, B, ALPHA, BETA = 1.69, 406.4, 410.7, 0.34, 0.28


def training(size: float, flops: float, bpb: float | None = None) -> Training:
    tokens = flops / (6 * size)
    loss = E + A / size**ALPHA + B / tokens**BETA
    return Training(size=round(size), tokens=round(tokens), flops=flops, bpb=loss if bpb is None else bpb)


def best_size(flops: float) -> float:
    return (ALPHA * A / (BETA * B)) ** (1 / (ALPHA + BETA)) * (flops / 6) ** (BETA / (ALPHA + BETA))


def test_laws_are_those_of_the_loss_surface():
    """N* grows as C^(β/(α+β)), D* as C^(α/(α+β)): within 0.005, the parabola's error over a factor of four."""
    budgets = np.geomspace(1e18, 1e22, 5).tolist()
    grid = [training(best_size(c) * factor, c) for c in budgets for factor in np.geomspace(0.5, 2, 7)]
    laws: Any = fit_scaling_laws(grid)
    assert laws.size.exponent == pytest.approx(BETA / (ALPHA + BETA), abs=0.005)
    assert laws.tokens.exponent == pytest.approx(ALPHA / (ALPHA + BETA), abs=0.005)
    assert laws.size.exponent + laws.tokens.exponent == pytest.approx(1, abs=1e-6)
    for one in laws.budgets:
        best = best_size(one.flops)
        assert one.size == pytest.approx(best, rel=0.02)
        assert one.tokens == pytest.approx(one.flops / 6 / best, rel=0.02)
        assert one.bpb == pytest.approx(training(best, one.flops).bpb, rel=1e-4)


def test_standard_error_is_that_of_least_squares():
    x = np.geomspace(1, 100, 6)
    y = 3 * x**0.5 * np.exp(np.array([0.1, -0.2, 0.05, 0.15, -0.1, 0.02]))
    law: Any = fit_power_law(x.tolist(), y.tolist())
    rest = np.log(y) - np.log(law.at_centre * (x / law.centre) ** law.exponent)
    spread = ((np.log(x) - np.log(x).mean()) ** 2).sum()
    assert abs(rest.sum()) < 1e-12, "least squares leave residuals of mean 0"
    assert abs((rest * np.log(x)).sum()) < 1e-12, "and uncorrelated with x"
    assert law.error == pytest.approx(math.sqrt((rest**2).sum() / 4 / spread), rel=1e-9)


def test_budget_without_minimum_suggests_sizes():
    falling = [training(size, 1e12, bpb) for size, bpb in ((10**5, 3.0), (2 * 10**5, 2.9), (4 * 10**5, 2.8))]
    bowl = [training(size, 1e13, bpb) for size, bpb in ((10**5, 2.6), (2 * 10**5, 2.5), (4 * 10**5, 2.6))]
    laws = fit_scaling_laws(falling + bowl)
    assert laws is not None
    text = describe_laws(laws)
    assert "| 1e+12 | 3 | none among these sizes: try larger ones | | | 2.8000 |" in text
    assert "| 1e+13 | 3 | 200,000 | 8,333,333 | 41.7 | 2.5000 |" in text


@pytest.mark.slow
def test_sweep_over_sizes_and_budgets_fits_laws(mlxchat, tmp_path):
    settings = ["experiment=smoke", "stage=pretrain", "model.aspect_ratio=8,16,32", "model.head_width=16"]
    settings += ["pretrain.num_iterations=null", "pretrain.target_flops=1e10,3e10", "pretrain.eval_tokens=2048"]
    done = mlxchat("-m", *settings, f"outputs={tmp_path / 'outputs'}", timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    (folder,) = (tmp_path / "outputs" / "multirun").iterdir()
    assert "## Scaling laws" in (folder / "report.md").read_text()
