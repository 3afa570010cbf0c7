"""Evaluations during training: their numbers, that they affect no bits, and that an interrupted one resumes."""

from dataclasses import replace
from pathlib import Path

import pytest

from kit import training
from kit.models import composed, computing_on_cpu
from kit.text import core_items, write_bundle
from kit.training import Trained
from mlxchat.config.schema import CoreConfig, PretrainConfig, TaskItem
from mlxchat.errors import Interrupted
from mlxchat.model.gpt import GPT
from mlxchat.runner.context import Context
from mlxchat.training.monitor import Observation, observe_core, observe_suite

SUITE = {"letters": TaskItem(task="kinds_mc", split="test", stop=8), "sums": TaskItem(task="arithmetic", size=3)}


@pytest.fixture
def pretrain(tmp_path: Path) -> PretrainConfig:
    """A pretraining that estimates CORE every second iteration, of a bundle with two small tasks."""
    kind = "multiple_choice"
    tasks = {label: (kind, 0, 50, core_items(kind, count)) for label, count in (("one", 12), ("two", 13))}
    folder = write_bundle(tmp_path / "bundle", tasks)
    return replace(composed().pretrain, core=CoreConfig(bundle=str(folder)), core_every=2)


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


def test_suite_changes_no_byte(train, plain, tokenizer, monkeypatch):
    monkeypatch.setattr("mlxchat.training.monitor.SUITE_ANSWER_TOKENS", 4)
    sft = replace(composed().sft, suite=SUITE, suite_every=2)
    done = train("with", 4, observations=lambda ctx, model: observe_suite(ctx, sft, model, tokenizer))
    assert done.bits == plain.bits
    accuracies, metrics = done.curve("accuracy_letters"), done.ctx.metrics
    assert accuracies.keys() == {2, 4}
    centered = (accuracies[4] - 0.25) / 0.75
    assert metrics["mean_centered_choice"] == pytest.approx(centered, abs=1e-12)
    assert metrics["mean_centered"] == pytest.approx((centered + metrics["accuracy_sums"]) / 2, abs=1e-12)
