"""Training to a validation loss: where it ends, what it says, and that stops and kills change nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from kit.models import make_model
from kit.training import NumberedBatches, make_optimizer, schedule
from mlxchat.errors import Interrupted
from mlxchat.model.gpt import flatten_parameters
from mlxchat.runner.context import Context
from mlxchat.training.loop import Hook, Target, fit

# What validation says after each iteration. Looked at every second iteration, 3 is reached first after the sixth.
NUMBERS = [9.0, 5.0, 2.0, 3.5, 6.0, 3.0, 1.0, 1.0, 1.0, 2.5]
Train = Callable[..., tuple[Context, dict[str, bytes], list[int]]]


@pytest.fixture
def train(make_context: Callable[..., Context]) -> Train:
    def run(name: str, target: float | None, *, stop_after: int = 99) -> tuple[Context, dict[str, bytes], list[int]]:
        """Train ten iterations, or to the target; return the context, the weights and when the last hook was called."""
        model, batches, called = make_model(), NumberedBatches(), []
        ctx = make_context(name, lambda: 15 if batches.number >= stop_after else None)

        def sample(iteration: int) -> dict[str, float]:
            called.append(iteration)
            if stop_after == -iteration:
                raise Interrupted("stopped while sampling", 15)
            return {}

        fit(
            ctx, model, make_optimizer(model), batches, num_iterations=10, schedule=schedule(),
            hooks=[Hook(run=lambda iteration: {"val_bpb": NUMBERS[iteration - 1]}, every=1),
                   Hook(run=sample, every=None)],
            target=None if target is None else Target(metric="val_bpb", value=target, every=2), micro_tokens=64,
        )  # fmt: skip
        weights = {name: np.array(value).tobytes() for name, value in flatten_parameters(model).items()}
        return ctx, weights, called

    return run


def numbers(ctx: Context) -> dict[str, Any]:
    return {name: ctx.metrics.get(name) for name in ("reached_target", "iterations", "val_bpb")}


def test_a_training_ends_where_a_look_finds_the_target_and_samples_there(train: Train) -> None:
    ctx, _, called = train("run", 3.0)
    assert numbers(ctx) == {"reached_target": 1.0, "iterations": 6, "val_bpb": 3.0}
    assert ctx.metrics["seconds_to_target"] > 0
    assert called == [6], "what comes at the end comes at this end"


@pytest.mark.parametrize(("target", "reached", "iterations"), [(0.5, 0.0, 10), (2.5, 1.0, 8), (1.0, 1.0, 8)])
def test_other_targets(train: Train, target: float, reached: float, iterations: int) -> None:
    found = numbers(train("run", target)[0])
    assert (found["reached_target"], found["iterations"]) == (reached, iterations)


def test_a_training_without_a_target_has_none_of_its_numbers(train: Train) -> None:
    ctx, _, called = train("run", None)
    assert numbers(ctx) == {"reached_target": None, "iterations": None, "val_bpb": 2.5}
    assert called == [10]


@pytest.mark.parametrize("stop_after", [1, 3, 5, -6])
def test_a_stop_on_the_way_or_in_the_last_hook_changes_nothing(train: Train, stop_after: int) -> None:
    """-6: in the sampling after the sixth iteration, when the target has been reached."""
    _, straight, _ = train("straight", 3.0)
    with pytest.raises(Interrupted):
        train("stopped", 3.0, stop_after=stop_after)
    ctx, weights, called = train("stopped", 3.0)
    assert numbers(ctx) == {"reached_target": 1.0, "iterations": 6, "val_bpb": 3.0}
    assert weights == straight
    assert called == [6]


def test_a_target_of_core_takes_no_estimate_from_between_its_looks(make_context: Callable[..., Context]) -> None:
    """CORE is estimated every third iteration for display, and every fourth for the target, which 4 does not reach."""
    estimates = {3: 0.9, 4: 0.2, 6: 0.9, 8: 0.5, 9: 0.1}
    ctx, model = make_context("core"), make_model()
    fit(
        ctx, model, make_optimizer(model), NumberedBatches(), num_iterations=10, schedule=schedule(), micro_tokens=64,
        hooks=[Hook(run=lambda iteration: {"val_bpb": 1.0}, every=1),
               Hook(run=lambda iteration: {"core_estimate": estimates[iteration]}, every=3, also_every=(4,))],
        target=Target(metric="core_estimate", value=0.5, every=4, choose=max),
    )  # fmt: skip
    assert (ctx.metrics["iterations"], ctx.metrics["core_estimate"]) == (8, 0.5)
