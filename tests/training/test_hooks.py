"""What is looked at while a training goes on: right numbers, which change nothing, and a stop in the middle of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from kit.models import composed, make_model
from kit.training import NumberedBatches, make_optimizer, schedule
from mlxchat.config.schema import CoreConfig, PretrainConfig, TaskItem
from mlxchat.data.tokenizer import Tokenizer
from mlxchat.errors import Interrupted
from mlxchat.model.gpt import GPT, flatten_parameters
from mlxchat.runner.context import Context
from mlxchat.training.hooks import core_hooks, suite_hooks, train_text_hooks
from mlxchat.training.loop import Hook, fit

SCHEDULE = schedule(warmdown_frac=0.5)
NUM_ITERATIONS = 4


@pytest.fixture
def pretrain(tmp_path: Path) -> PretrainConfig:
    """A pretraining that estimates CORE of a bundle with two small tasks after every second iteration."""
    rng, folder = np.random.default_rng(0), tmp_path / "bundle"
    (folder / "eval_data").mkdir(parents=True)
    words = ["the", "cat", "sat", "on", "mat", "dog", "log"]
    for label in ("one", "two"):
        items = [
            {"query": " ".join(rng.choice(words, 4)), "choices": ["the cat 0", "a dog 1"], "gold": int(rng.integers(2))}
            for _ in range(12)
        ]
        (folder / "eval_data" / f"{label}.jsonl").write_text("\n".join(map(json.dumps, items)))
    tasks = [
        {"label": label, "icl_task_type": "multiple_choice", "num_fewshot": [0], "dataset_uri": f"{label}.jsonl"}
        for label in ("one", "two")
    ]
    (folder / "core.yaml").write_text(json.dumps({"icl_tasks": tasks}))
    (folder / "eval_meta_data.csv").write_text("Eval Task,Random baseline\none,50\ntwo,50")
    config = composed().pretrain
    return replace(config, core=CoreConfig(bundle=str(folder)), core_every=2, core_max_per_task=10)


@pytest.fixture
def train(make_context: Any) -> Callable[..., Any]:
    def run(
        name: str, make_hooks: Callable[[Context, GPT], list[Hook]], stop: Callable[[], int | None] = lambda: None
    ) -> tuple[Context, dict[str, bytes]]:
        """Train, from where an earlier attempt of this name stopped; return the context and the bytes of all arrays."""
        model, ctx = make_model(), make_context(name, stop)
        optimizer = make_optimizer(model)
        hooks = make_hooks(ctx, model)
        fit(
            ctx,
            model,
            optimizer,
            NumberedBatches(),
            num_iterations=NUM_ITERATIONS,
            schedule=SCHEDULE,
            hooks=hooks,
            micro_tokens=64,
        )
        arrays = flatten_parameters(model) | optimizer.state
        return ctx, {key: np.array(value).tobytes() for key, value in arrays.items()}

    return run


def logged(ctx: Context, name: str) -> dict[int, float]:
    return {record["iteration"]: record[name] for record in ctx.records("metrics").read() if name in record}


def test_estimates_of_core_change_no_byte_of_a_training(
    train: Callable[..., Any], pretrain: PretrainConfig, tokenizer: Tokenizer
) -> None:
    _, expected = train("without", lambda ctx, model: [])
    ctx, got = train("with", lambda ctx, model: core_hooks(ctx, pretrain, model, tokenizer))
    assert got == expected
    assert logged(ctx, "core_estimate").keys() == {2, 4}
    assert ctx.metrics["core_estimate"] == logged(ctx, "core_estimate")[4]


def test_an_estimate_of_core_that_was_stopped_goes_on_and_ends_the_same(
    train: Callable[..., Any], pretrain: PretrainConfig, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    """The stop comes after the first batch of the estimate at iteration 2, while nothing of the training was saved."""
    straight, expected = train("straight", lambda ctx, model: core_hooks(ctx, pretrain, model, tokenizer))

    def stop() -> int | None:
        return 15 if (tmp_path / "stopped" / "work" / "core" / "2" / "one.jsonl").exists() else None

    calls: list[int] = []

    def hooks(ctx: Context, model: GPT) -> list[Hook]:
        note = Hook(run=lambda iteration: calls.append(iteration) or {"val_loss": 1.0}, every=2)
        return [note, *core_hooks(ctx, pretrain, model, tokenizer)]

    with pytest.raises(Interrupted, match="CORE's task 1 of 2"):
        train("stopped", hooks, stop)
    ctx, got = train("stopped", hooks)
    assert got == expected
    assert logged(ctx, "core_estimate") == logged(straight, "core_estimate")
    assert calls == [2, 4], "what had been looked at before the stop is not looked at again"
    assert ctx.resumed_from == 2


def test_an_estimate_is_of_as_many_examples_as_both_limits_allow(
    train: Callable[..., Any], pretrain: PretrainConfig, tokenizer: Tokenizer
) -> None:
    """By the standard error, which tells: 0.5 in either task, of n examples, is sqrt(0.25 / n) × 2 / sqrt(2)."""
    config = replace(pretrain, core=replace(pretrain.core, max_per_task=4), core_every=None)
    ctx, _ = train("run", lambda ctx, model: core_hooks(ctx, config, model, tokenizer))
    estimate, error = logged(ctx, "core_estimate")[4], logged(ctx, "core_estimate_stderr")[4]
    grid = {(a / 4, b / 4) for a in range(5) for b in range(5)}
    possible = {
        (round(a + b - 1, 9), round(((a * (1 - a) + b * (1 - b)) / 4) ** 0.5, 9)) for a, b in grid
    }  # centred (p − 0.5) / 0.5, its mean over two tasks, and the error of that
    assert (round(estimate, 9), round(error, 9)) in possible


def test_of_some_tasks_there_is_no_core_but_their_mean(
    train: Callable[..., Any], pretrain: PretrainConfig, tokenizer: Tokenizer
) -> None:
    config = replace(pretrain, core=replace(pretrain.core, tasks=["two"]), core_every=None)
    ctx, _ = train("run", lambda ctx, model: core_hooks(ctx, config, model, tokenizer))
    assert "core_estimate" not in ctx.metrics
    assert -1 <= ctx.metrics["core_tasks_estimate"] <= 1


def test_looking_at_tasks_changes_no_byte_and_logs_each_accuracy_and_the_centred_means(
    train: Callable[..., Any], tokenizer: Tokenizer
) -> None:
    config = composed()
    letters = TaskItem(task="kinds_mc", split="test", stop=8)
    sums = TaskItem(task="arithmetic", split="test", size=3)
    sft = replace(config.sft, suite={"letters": letters, "sums": sums}, suite_every=2, suite_max_new_tokens=4)
    _, expected = train("without", lambda ctx, model: [])
    ctx, got = train("with", lambda ctx, model: suite_hooks(ctx, sft, model, tokenizer))
    assert got == expected
    accuracies = logged(ctx, "accuracy_letters")
    assert accuracies.keys() == {2, 4}
    centered = (accuracies[4] - 0.25) / 0.75
    assert ctx.metrics["mean_centered_choice"] == pytest.approx(centered, abs=1e-12)
    assert ctx.metrics["mean_centered"] == pytest.approx((centered + ctx.metrics["accuracy_sums"]) / 2, abs=1e-12)


@pytest.mark.parametrize("kind", ["core", "suite"])
def test_hooks_compute_in_the_dtype_of_the_training(
    kind: str, make_context: Any, pretrain: PretrainConfig, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLXCHAT_CPU", "plain")
    model, ctx, dtypes = make_model(), make_context(compute_dtype="bfloat16"), set[mx.Dtype]()
    suite = {"letters": TaskItem(task="kinds_mc", split="test", stop=8), "sums": TaskItem(task="arithmetic", size=3)}
    sft = replace(composed().sft, suite=suite, suite_max_new_tokens=4)
    (hook,) = core_hooks(ctx, pretrain, model, tokenizer) if kind == "core" else suite_hooks(ctx, sft, model, tokenizer)
    hidden = GPT.hidden

    def noted(*given: Any) -> mx.array:
        found = hidden(*given)
        dtypes.add(found.dtype)
        return found

    def look(done: int) -> dict[str, float]:
        with monkeypatch.context() as patched:
            patched.setattr(GPT, "hidden", noted)
            return hook.run(done)

    fit(
        ctx, model, make_optimizer(model), NumberedBatches(), num_iterations=1, schedule=SCHEDULE,
        hooks=[Hook(run=look, every=1)], micro_tokens=64,
    )  # fmt: skip
    assert dtypes == {mx.bfloat16}
    assert {value.dtype for value in flatten_parameters(model).values()} == {mx.float32}


def test_the_suites_answers_take_the_rows_that_fit_beside_the_training(
    make_context: Any, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    ctx, made = make_context("suite"), []
    ctx.derived["sampled_rows"] = 3
    monkeypatch.setattr("mlxchat.training.hooks.Engine", lambda *given, **options: made.append(options))
    sft = replace(composed().sft, suite={"sums": TaskItem(task="gsm8k")})
    suite_hooks(ctx, sft, make_model(), tokenizer)
    assert [options["max_rows"] for options in made] == [3]


def test_without_bundle_suite_or_tokens_nothing_is_looked_at(make_context: Any, tokenizer: Tokenizer) -> None:
    """And that is what the default pipeline has."""
    config, ctx, model = composed(), make_context(), make_model()
    assert core_hooks(ctx, config.pretrain, model, tokenizer) == []
    assert suite_hooks(ctx, config.sft, model, tokenizer) == suite_hooks(ctx, config.midtrain, model, tokenizer) == []
    assert train_text_hooks(ctx, config.pretrain, model, tokenizer, lambda count: []) == []


def test_bits_per_byte_of_training_text_are_of_the_first_rows_and_the_last_weights(
    train: Callable[..., Any], pretrain: PretrainConfig, tokenizer: Tokenizer
) -> None:
    ids = np.array([tokenizer.bos, *tokenizer.encode("the cat sat on the mat and the dog")] * 3, np.int32)
    rows = [(ids[:-1][:16], ids[1:][:16]), (ids[:-1][4:20], ids[1:][4:20]), (ids[:-1][8:24], ids[1:][8:24])]
    config = replace(pretrain, train_bpb_tokens=2 * pretrain.batch.row_tokens + 1)
    models: list[GPT] = []

    def hooks(ctx: Context, model: GPT) -> list[Hook]:
        models.append(model)
        return train_text_hooks(ctx, config, model, tokenizer, lambda count: rows[:count])

    ctx, _ = train("run", hooks)
    assert logged(ctx, "train_bpb").keys() == {4}
    nats, num_bytes = 0.0, 0
    for inputs, targets in rows[:2]:
        logits = np.asarray(models[0].logits(models[0].hidden(mx.array(inputs[None])))[0]).astype(np.float64)
        log_sum = np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1)) + logits.max(-1)
        for place, target in enumerate(targets):
            if tokenizer.token_bytes[target]:
                nats += log_sum[place] - logits[place, target]
                num_bytes += int(tokenizer.token_bytes[target])
    assert ctx.metrics["train_bpb"] == pytest.approx(nats / np.log(2) / num_bytes, rel=1e-5)
