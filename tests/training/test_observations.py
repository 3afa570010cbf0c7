"""Evaluations during training: their numbers, that they affect no bits, and that an interrupted one resumes."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from kit import training
from kit.models import composed, computing_on_cpu, make_model
from kit.text import core_items, write_bundle
from kit.training import Trained, make_context
from mlxchat.config.schema import CoreConfig, PretrainConfig, TaskItem
from mlxchat.errors import Interrupted
from mlxchat.model.gpt import GPT
from mlxchat.model.parameters import flatten_parameters
from mlxchat.runner.context import Context
from mlxchat.training.loop import Observation
from mlxchat.training.observations import observe_core, observe_suite

SUITE = {"letters": TaskItem(task="kinds_mc", split="test", stop=8), "sums": TaskItem(task="arithmetic", size=3)}


@pytest.fixture
def pretrain(tmp_path: Path) -> PretrainConfig:
    """A pretraining that estimates CORE every second iteration, of a bundle with two small tasks."""
    kind = "multiple_choice"
    tasks = {label: (kind, 0, 50, core_items(kind, count)) for label, count in (("one", 12), ("two", 13))}
    folder = write_bundle(tmp_path / "bundle", tasks)
    return replace(composed().pretrain, core=CoreConfig(bundle=str(folder)), core_every=2, core_max_per_task=10)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """The training without hooks."""
    with computing_on_cpu():
        return training.train(tmp_path_factory.mktemp("plain"), 4)


def test_core_estimates_change_no_byte_and_continue_after_a_stop(train, plain, pretrain, tokenizer, tmp_path):
    """The stop comes after the first batch of the estimate at iteration 2, before the training has saved anything."""

    def hooks(ctx: Context, model: GPT) -> list[Observation]:
        return observe_core(ctx, pretrain, model, tokenizer)

    def stop() -> int | None:
        return 15 if (tmp_path / "stopped" / "work" / "core" / "2" / "one.jsonl").exists() else None

    straight = train("straight", 4, observations=hooks)
    assert straight.bits == plain.bits
    estimates = straight.curve("core_estimate")
    assert estimates.keys() == {2, 4}
    assert straight.ctx.metrics["core_estimate"] == estimates[4]
    with pytest.raises(Interrupted, match="CORE's task 1 of 2"):
        train("stopped", 4, observations=hooks, context={"stop_signal": stop})
    resumed = train("stopped", 4, observations=hooks)
    assert (resumed.bits, resumed.curve("core_estimate")) == (plain.bits, estimates)
    assert resumed.ctx.resumed_from == 2


def test_core_estimates_respect_both_limits_and_selected_tasks(tmp_path, pretrain, tokenizer):
    """The standard error tells the number of examples: 0.5 in either task of n is sqrt(0.25 / n) × 2 / sqrt(2)."""

    def estimate(**core: Any) -> dict[str, float]:
        config = replace(pretrain, core=replace(pretrain.core, **core))
        (hook,) = observe_core(make_context(tmp_path), config, make_model(), tokenizer)
        return hook.run(4)

    found = estimate(max_per_task=4)
    grid = {(a / 4, b / 4) for a in range(5) for b in range(5)}
    # Centred (p − 0.5) / 0.5, its mean over two tasks, and the error of that.
    possible = {(round(a + b - 1, 9), round(((a * (1 - a) + b * (1 - b)) / 4) ** 0.5, 9)) for a, b in grid}
    assert (round(found["core_estimate"], 9), round(found["core_estimate_stderr"], 9)) in possible
    one = estimate(tasks=["two"])
    assert "core_estimate" not in one
    assert -1 <= one["core_tasks_estimate"] <= 1


def test_suite_changes_no_byte_and_computes_in_the_dtype_of_the_training(train, plain, tokenizer, monkeypatch):
    sft = replace(composed().sft, suite=SUITE, suite_every=2, suite_max_new_tokens=4)
    done = train("with", 4, observations=lambda ctx, model: observe_suite(ctx, sft, model, tokenizer))
    assert done.bits == plain.bits
    accuracies, metrics = done.curve("accuracy_letters"), done.ctx.metrics
    assert accuracies.keys() == {2, 4}
    centered = (accuracies[4] - 0.25) / 0.75
    assert metrics["mean_centered_choice"] == pytest.approx(centered, abs=1e-12)
    assert metrics["mean_centered"] == pytest.approx((centered + metrics["accuracy_sums"]) / 2, abs=1e-12)

    monkeypatch.setenv("MLXCHAT_CPU", "plain")
    model, dtypes, hidden = make_model(), set[mx.Dtype](), GPT.hidden

    def noted(*given: Any) -> mx.array:
        found = hidden(*given)
        dtypes.add(found.dtype)
        return found

    def hooks(ctx: Context, model: GPT) -> list[Observation]:
        (hook,) = observe_suite(ctx, sft, model, tokenizer)

        def run(done: int) -> dict[str, float]:
            with monkeypatch.context() as patched:
                patched.setattr(GPT, "hidden", noted)
                return hook.run(done)

        return [Observation(run=run, every=(1,))]

    train("bfloat16", 1, model=model, observations=hooks, context={"compute_dtype": "bfloat16"})
    assert dtypes == {mx.bfloat16}
    assert {value.dtype for value in flatten_parameters(model).values()} == {mx.float32}
