"""The best weights are kept: which they are, through kills, and beside what an extension goes on from."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from safetensors.numpy import load_file

from kit.artifacts import adapter_sizes
from kit.models import make_model
from kit.training import NumberedBatches, make_optimizer, schedule
from mlxchat.data.tokenizer import Tokenizer
from mlxchat.errors import Interrupted
from mlxchat.model.checkpoint import load_checkpoint, save_checkpoint
from mlxchat.model.gpt import GPT, flatten_parameters, trained_parameters
from mlxchat.model.lora import attach_adapters
from mlxchat.runner.context import Context
from mlxchat.training.best import Best
from mlxchat.training.loop import Hook, fit

MakeContext = Callable[..., Context]
SCHEDULE = schedule()
# What validation says after each iteration from the first on: the lowest of all is the fourth, which is no candidate
# of every second iteration but the sixth's equal.
NUMBERS = [9.0, 5.0, 7.0, 3.0, 1.0, 3.0, 4.0, 6.0, 5.0, 8.0]
Weights = dict[str, bytes]


@dataclass
class Trained:
    """A finished training."""

    ctx: Context
    best: Best | None
    weights: Weights
    seen: dict[int, Weights]
    """The weights after each iteration."""


def bits(model: GPT) -> Weights:
    return {name: np.array(value).tobytes() for name, value in flatten_parameters(model).items()}


@pytest.fixture
def train(
    make_context: MakeContext, tokenizer: Tokenizer,
) -> Callable[..., Trained]:  # fmt: skip
    def run(
        name: str, num_iterations: int = 10, *, every: int | None = 2, extends: Path | None = None,
        stop_after: int = 99, numbers: list[float] = NUMBERS, eval_tokens: int = 100, dropout: float = 0.0,
    ) -> Trained:  # fmt: skip
        """Train to the end, or to a signal, with weights kept as scripted numbers say, and publish the result."""
        model, batches, seen = make_model(), NumberedBatches(), {}
        optimizer = make_optimizer(model)
        best = Best(every=every, basis=eval_tokens) if every else None
        ctx = make_context(name, lambda: 15 if batches.number >= stop_after else None)

        def validate(iteration: int) -> dict[str, float]:
            seen[iteration] = bits(model)
            return {"val_bpb": numbers[iteration - 1], "val_perplexity": 10 * numbers[iteration - 1]}

        fit(
            ctx, model, optimizer, batches, num_iterations=num_iterations, schedule=SCHEDULE,
            hooks=[Hook(run=validate, every=1)], extends=extends, keep_state=True, best=best, dropout=dropout,
            micro_tokens=64,
        )  # fmt: skip
        save_checkpoint(ctx.out, model, tokenizer, {})
        (ctx.out / "metrics.jsonl").write_bytes(ctx.records("metrics").path.read_bytes())
        return Trained(ctx, best, bits(model), seen)

    return run


def test_the_model_ends_with_the_weights_of_the_best_candidate(train: Callable[..., Trained]) -> None:
    """Of the iterations 2, 4, 6, 8 and 10 the fourth and the sixth are equal: the first of them counts."""
    done = train("run")
    assert done.weights == done.seen[4]
    assert done.weights != done.seen[10]
    assert bits(load_checkpoint(done.ctx.out)[0]) == done.seen[4]


def test_the_metrics_tell_which_it_was_its_numbers_and_the_last_ones(train: Callable[..., Trained]) -> None:
    metrics = train("run").ctx.metrics
    assert (metrics["best_iteration"], metrics["val_bpb"], metrics["val_perplexity"]) == (4, 3.0, 30.0)
    assert (metrics["last_val_bpb"], metrics["last_val_perplexity"]) == (8.0, 80.0)


def test_the_last_iteration_is_always_a_candidate(train: Callable[..., Trained]) -> None:
    done = train("run", every=7, numbers=[5.0] * 9 + [1.0])
    assert done.weights == done.seen[10]
    assert done.ctx.metrics["best_iteration"] == 10


def test_without_a_number_the_last_weights_stay(train: Callable[..., Trained]) -> None:
    done = train("run", numbers=[math.nan, math.inf] * 5)
    assert done.weights == done.seen[10]
    assert "best_iteration" not in done.ctx.metrics


@pytest.mark.parametrize(("stop_after", "dropout"), [(1, 0.2), (4, 0.0), (5, 0.2), (9, 0.0)])
def test_an_interrupted_training_keeps_the_same_weights_bit_for_bit(
    train: Callable[..., Trained], stop_after: int, dropout: float
) -> None:
    straight = train("straight", dropout=dropout)
    with pytest.raises(Interrupted):
        train("halting", stop_after=stop_after, dropout=dropout)
    resumed = train("halting", dropout=dropout)
    assert resumed.weights == straight.weights
    assert resumed.seen[10] == straight.seen[10]
    kept = ("best_iteration", "val_bpb", "last_val_bpb", "loss")
    assert [resumed.ctx.metrics[key] for key in kept] == [straight.ctx.metrics[key] for key in kept]


def test_dropout_changes_what_is_learnt(train: Callable[..., Trained]) -> None:
    """What the test above would not see if it did nothing."""
    assert train("with", dropout=0.2).seen[1] != train("without").seen[1]


def test_an_extension_goes_on_from_the_last_weights_and_knows_the_best(train: Callable[..., Trained]) -> None:
    straight, short = train("straight"), train("short", 6)
    assert short.weights == short.seen[4]
    extended = train("extended", extends=short.ctx.out)
    assert extended.seen[10] == straight.seen[10]
    assert extended.weights == straight.seen[4] == straight.weights
    assert extended.ctx.metrics["best_iteration"] == 4


def test_an_extension_without_keeping_goes_on_from_the_last_weights_too(train: Callable[..., Trained]) -> None:
    extended = train("extended", every=None, extends=train("short", 6).ctx.out)
    assert extended.weights == train("straight", every=None).weights


def test_numbers_of_another_validation_are_not_compared(train: Callable[..., Trained]) -> None:
    extended = train("extended", extends=train("short", 6).ctx.out, eval_tokens=200)
    assert extended.ctx.metrics["best_iteration"] == 8, "of 8 (6.0) and 10 (8.0)"
    assert extended.weights == extended.seen[8]


def test_for_a_while_the_model_has_the_best_weights() -> None:
    model, best = make_model(), Best(every=1, basis=1)
    before = bits(model)
    best.offer(1, {"val_bpb": 1.0}, model)
    model.lm_head.weight = model.lm_head.weight + 1
    after = bits(model)
    with best.in_place(model):
        assert bits(model) == before
    assert bits(model) == after


def test_saves_hold_the_best_weights_only_where_they_are_not_the_present_ones(
    train: Callable[..., Trained], tmp_path: Path
) -> None:
    for stop_after, is_present in ((4, True), (5, False)):
        with pytest.raises(Interrupted):
            train("halting", stop_after=stop_after)
        (saved,) = (tmp_path / "halting").rglob("arrays.safetensors")
        assert any(name.startswith("best.") for name in load_file(saved)) is not is_present


def test_of_rewards_the_highest_counts_and_untrained_weights_are_no_candidate() -> None:
    model, seen = make_model(), {}
    best = Best(every=2, basis=None, metric="held_out_reward", choose=max)
    for iteration, reward in enumerate([0.9, 0.8, 0.3, 0.5, 0.5, 0.4, math.nan]):
        model.lm_head.weight = model.lm_head.weight + 1
        seen[iteration] = bits(model)
        best.offer(iteration, {"held_out_reward": reward, "pass_at_1": reward / 2}, model, is_last=iteration == 6)
    found = best.put_back(model, {"held_out_reward": 0.4, "pass_at_1": 0.1, "reward": 1.0})
    assert bits(model) == seen[4]
    last = {"last_held_out_reward": 0.4, "last_pass_at_1": 0.1}
    assert found == {"held_out_reward": 0.5, "pass_at_1": 0.25, "best_iteration": 4} | last


def test_of_a_model_with_adapters_these_alone_are_kept() -> None:
    model, best = make_model(), Best(every=1, basis=None)
    attach_adapters(model, adapter_sizes(model.sizes), seed=1, dtype=mx.float32)
    best.offer(1, {"val_bpb": 1.0}, model)
    assert best.weights.keys() == trained_parameters(model).keys() < flatten_parameters(model).keys()
