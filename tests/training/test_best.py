"""The best weights are kept: which they are, through kills, and beside the last ones for an extension."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from safetensors.numpy import load_file

from kit import training
from kit.artifacts import adapter_sizes
from kit.models import computing_on_cpu, make_model
from kit.training import bits
from mlxchat.errors import Interrupted
from mlxchat.model.checkpoint import load_checkpoint
from mlxchat.model.gpt import flatten_parameters, trained_parameters
from mlxchat.model.lora import attach_adapters
from mlxchat.runner.context import Context
from mlxchat.training.best import Best
from mlxchat.training.loop import Hook

# val_bpb after each iteration. Every second one is a candidate: the lowest of these is 3.0, at the fourth and sixth.
NUMBERS = [9.0, 5.0, 7.0, 3.0, 1.0, 3.0, 4.0, 6.0, 5.0, 8.0]
Weights = dict[str, bytes]


@dataclass
class Trained:
    ctx: Context
    weights: Weights
    seen: dict[int, Weights]
    """The weights after each iteration."""


def train(folder: Path, num_iterations: int = 10, *, every: int | None = 2, basis: int = 1, **options: Any) -> Trained:
    """Train to the end or to a signal, and keep the weights that are best by NUMBERS."""
    model, seen = make_model(), dict[int, Weights]()

    def validate(iteration: int) -> dict[str, float]:
        seen[iteration] = bits(model)
        return {"val_bpb": NUMBERS[iteration - 1], "val_perplexity": 10 * NUMBERS[iteration - 1]}

    done = training.train(
        folder, num_iterations, model=model, hooks=[Hook(run=validate, every=1)], keep_state=True,
        best=Best(every=every, basis=basis) if every else None, **options,
    )  # fmt: skip
    return Trained(done.ctx, bits(model), seen)


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    with computing_on_cpu():
        return train(tmp_path_factory.mktemp("straight"))


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """Its first six iterations."""
    with computing_on_cpu():
        return train(tmp_path_factory.mktemp("short"), 6)


def test_model_ends_with_the_weights_of_the_best_candidate(straight):
    assert straight.weights == straight.seen[4] != straight.seen[10]
    assert bits(load_checkpoint(straight.ctx.out)[0]) == straight.seen[4]
    metrics = straight.ctx.metrics
    assert (metrics["best_iteration"], metrics["val_bpb"], metrics["val_perplexity"]) == (4, 3.0, 30.0)
    assert (metrics["last_val_bpb"], metrics["last_val_perplexity"]) == (8.0, 80.0)


@pytest.mark.parametrize(
    ("every", "numbers", "choose", "expected"),
    [
        (7, [5.0] * 9 + [1.0], min, 10),  # the last is always a candidate
        (2, [math.nan, math.inf] * 5, min, None),
        (2, NUMBERS, min, 4),  # the first of equals
        (2, NUMBERS, max, 10),
    ],
)
def test_best_is_the_first_candidate_with_the_best_finite_number(every, numbers, choose, expected):
    model, best = make_model(), Best(every=every, basis=None, metric="reward", choose=choose)
    best.offer(0, {"reward": choose(-99.0, 99.0)}, model)
    for iteration, number in enumerate(numbers, 1):
        best.offer(iteration, {"reward": number, "pass_at_1": 2 * number}, model, is_last=iteration == len(numbers))
    assert best.iteration == expected
    if expected is not None:
        found = best.put_back(model, {"reward": 0.4, "pass_at_1": 0.1, "loss": 1.0})
        number = numbers[expected - 1]
        assert found == {"reward": number, "pass_at_1": 2 * number, "best_iteration": expected,
                         "last_reward": 0.4, "last_pass_at_1": 0.1}  # fmt: skip


def test_last_iteration_of_a_training_is_a_candidate(tmp_path):
    assert train(tmp_path, 5, every=3).ctx.metrics["best_iteration"] == 5


def test_without_a_finite_number_the_last_weights_stay(tmp_path):
    model, hook = make_model(), Hook(run=lambda _: {"val_bpb": math.nan}, every=1)
    done = training.train(tmp_path, 2, model=model, best=Best(every=1, basis=1), hooks=[hook])
    assert "best_iteration" not in done.ctx.metrics


def test_interrupted_training_keeps_the_same_weights(straight, tmp_path):
    """Saves hold the best weights only where they are not the present ones."""
    for stop, is_present in ((4, True), (5, False), (9, False)):
        with pytest.raises(Interrupted):
            train(tmp_path, stop_after=stop)
        (saved,) = tmp_path.rglob("arrays.safetensors")
        assert any(name.startswith("best.") for name in load_file(saved)) is not is_present
    resumed = train(tmp_path)
    assert (resumed.weights, resumed.seen[10]) == (straight.weights, straight.seen[10])
    kept = ("best_iteration", "val_bpb", "last_val_bpb", "loss")
    assert [resumed.ctx.metrics[key] for key in kept] == [straight.ctx.metrics[key] for key in kept]


def test_extension_continues_from_the_last_weights_and_keeps_the_best(straight, short, tmp_path):
    assert short.weights == short.seen[4]
    extended = train(tmp_path / "extended", extends=short.ctx.out)
    assert extended.seen[10] == straight.seen[10]
    assert extended.weights == straight.seen[4]
    assert extended.ctx.metrics["best_iteration"] == 4
    without = train(tmp_path / "without", every=None, extends=short.ctx.out)
    assert without.weights == straight.seen[10]
    # Numbers of another validation are not compared: of 6.0 at 8 and 8.0 at 10 the first is better.
    assert train(tmp_path / "other", basis=2, extends=short.ctx.out).ctx.metrics["best_iteration"] == 8


def test_model_has_the_best_weights_for_a_while():
    model, best = make_model(), Best(every=1, basis=1)
    before = bits(model)
    best.offer(1, {"val_bpb": 1.0}, model)
    model.lm_head.weight = model.lm_head.weight + 1
    after = bits(model)
    with best.in_place(model):
        assert bits(model) == before
    assert bits(model) == after


def test_only_adapters_are_kept_of_a_model_that_has_them():
    model, best = make_model(), Best(every=1, basis=None)
    attach_adapters(model, adapter_sizes(model.sizes), seed=1, dtype=mx.float32)
    best.offer(1, {"val_bpb": 1.0}, model)
    assert best.weights.keys() == trained_parameters(model).keys() < flatten_parameters(model).keys()
