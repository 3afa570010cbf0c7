"""Training to a validation loss: where it ends, its metrics, and that stops change nothing."""

from collections.abc import Callable
from typing import Any

import pytest

from kit.training import Trained
from mlxchat.errors import Interrupted
from mlxchat.training.loop import Hook, Target

# val_bpb after each iteration. Compared every second iteration, it first reaches 3.0 at the sixth.
NUMBERS = [9.0, 5.0, 2.0, 3.5, 6.0, 3.0, 1.0, 1.0, 1.0, 2.5]
Train = Callable[..., tuple[Trained, dict[str, Any], list[int]]]


@pytest.fixture
def to_target(train: Callable[..., Trained]) -> Train:
    def run(name: str, value: float | None, stop: int = 99) -> tuple[Trained, dict[str, Any], list[int]]:
        """Train ten iterations, or to the target; return metrics and when the last hook was called.

        A signal arrives at iteration `stop`, or during the last hook if it is negative.
        """
        called: list[int] = []

        def sample(iteration: int) -> dict[str, float]:
            called.append(iteration)
            if stop == -iteration:
                raise Interrupted("stopped while sampling", 15)
            return {}

        hooks = [Hook(run=lambda done: {"val_bpb": NUMBERS[done - 1]}, every=1), Hook(run=sample, every=None)]
        target = None if value is None else Target(metric="val_bpb", value=value, every=2)
        done = train(name, 10, hooks=hooks, target=target, stop_after=max(stop, 0))
        metrics = done.ctx.metrics
        return done, {name: metrics.get(name) for name in ("reached_target", "iterations", "val_bpb")}, called

    return run


@pytest.mark.parametrize(
    ("target", "reached", "iterations", "val_bpb"),
    [(3.0, 1.0, 6, 3.0), (0.5, 0.0, 10, 2.5), (2.5, 1.0, 8, 1.0), (None, None, None, 2.5)],
)
def test_training_ends_where_a_comparison_finds_the_target(to_target, target, reached, iterations, val_bpb):
    done, metrics, called = to_target("run", target)
    assert metrics == {"reached_target": reached, "iterations": iterations, "val_bpb": val_bpb}
    assert called == [iterations or 10], "hooks of the end run there"
    assert target is None or done.ctx.metrics["seconds_to_target"] > 0


def test_stops_before_and_in_the_last_hook_change_nothing(to_target):
    straight, expected, _ = to_target("straight", 3.0)
    for stop in (1, 5, -6):
        with pytest.raises(Interrupted):
            to_target("stopped", 3.0, stop)
    done, metrics, called = to_target("stopped", 3.0)
    assert (done.bits, metrics, called) == (straight.bits, expected, [6])


def test_target_of_core_ignores_estimates_between_its_comparisons(train):
    """CORE is estimated every third iteration for display and every fourth for the target."""
    estimates = {3: 0.9, 4: 0.2, 6: 0.9, 8: 0.5, 9: 0.1}
    done = train(
        "core", 10, target=Target(metric="core_estimate", value=0.5, every=4, choose=max),
        hooks=[Hook(run=lambda iteration: {"val_bpb": 1.0}, every=1),
               Hook(run=lambda iteration: {"core_estimate": estimates[iteration]}, every=3, also_every=(4,))],
    )  # fmt: skip
    assert (done.ctx.metrics["iterations"], done.ctx.metrics["core_estimate"]) == (8, 0.5)
