"""A finished training is extended: as if it had been longer from the start, where the rates allow that."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from kit.models import make_model
from kit.training import NumberedBatches, make_optimizer, schedule
from mlxchat.data.tokenizer import Tokenizer
from mlxchat.errors import DataError, Interrupted
from mlxchat.model.checkpoint import save_checkpoint
from mlxchat.model.gpt import flatten_parameters
from mlxchat.runner.context import Context
from mlxchat.store.manifest import OBSERVATIONS
from mlxchat.training.loop import fit

MakeContext = Callable[..., Context]


@pytest.fixture
def train(
    make_context: MakeContext, tokenizer: Tokenizer,
) -> Callable[..., tuple[Context, dict[str, bytes]]]:  # fmt: skip
    def run(
        name: str, num_iterations: int, *, extends: Path | None = None, warmdown_frac: float = 0.0,
        stop_after: int = 99, keep_state: bool = True, **optimizer_changes: Any,
    ) -> tuple[Context, dict[str, bytes]]:  # fmt: skip
        """Train to the end, or to a signal; publish as the runner does; return the context and all arrays."""
        model, batches = make_model(), NumberedBatches()
        optimizer = make_optimizer(model, **optimizer_changes)
        ctx = make_context(name, lambda: 15 if batches.number >= stop_after else None)
        fit(
            ctx, model, optimizer, batches, num_iterations=num_iterations, hooks=[], micro_tokens=64,
            schedule=schedule(warmdown_frac=warmdown_frac), extends=extends, keep_state=keep_state,
        )  # fmt: skip
        save_checkpoint(ctx.out, model, tokenizer, {})
        (ctx.out / "metrics.jsonl").write_bytes(ctx.records("metrics").path.read_bytes())
        found = flatten_parameters(model) | optimizer.state
        return ctx, {key: np.array(value).tobytes() for key, value in found.items()}

    return run


def losses(ctx: Context) -> list[tuple[int, float]]:
    return [(record["iteration"], record["loss"]) for record in ctx.records("metrics").read()]


def multipliers(ctx: Context) -> list[float]:
    return [record["lr_multiplier"] for record in ctx.records("metrics").read()]


def test_six_extended_to_ten_equal_ten_bit_for_bit_at_a_constant_rate(train: Callable[..., Any]) -> None:
    straight, expected = train("straight", 10)
    short, _ = train("short", 6)
    long, got = train("long", 10, extends=short.out)
    assert got == expected
    assert losses(long) == losses(straight), "its records begin with those of what it extends"
    assert long.resumed_from is None, "nothing of its own was interrupted"


def test_an_extension_that_is_interrupted_ends_with_the_same_bits(train: Callable[..., Any]) -> None:
    short, _ = train("short", 4)
    expected = train("straight", 8, extends=short.out)[1]
    with pytest.raises(Interrupted, match="iteration 6 of 8"):
        train("long", 8, extends=short.out, stop_after=6)
    ctx, got = train("long", 8, extends=short.out)
    assert got == expected
    assert ctx.resumed_from == 6
    assert [iteration for iteration, _ in losses(ctx)] == list(range(1, 9))


def test_a_training_of_many_interruptions_leaves_the_same_files(train: Callable[..., Any]) -> None:
    """Seconds and throughput once stood in training_state.json."""
    straight, _ = train("straight", 8)
    for done in (1, 2, 4, 7):
        with pytest.raises(Interrupted):
            train("stopped", 8, stop_after=done)
    stopped, _ = train("stopped", 8)
    names = sorted(path.name for path in straight.out.iterdir())
    assert {"model.safetensors", "training_state.json", "training_state.safetensors"} < set(names)
    assert names == sorted(path.name for path in stopped.out.iterdir())
    for name in set(names) - set(OBSERVATIONS):
        assert (straight.out / name).read_bytes() == (stopped.out / name).read_bytes(), name


def test_rates_follow_the_new_horizon_from_the_extended_iteration_on(train: Callable[..., Any]) -> None:
    short, _ = train("short", 4, warmdown_frac=0.5)
    long, _ = train("long", 8, extends=short.out, warmdown_frac=0.5)
    assert multipliers(short) == pytest.approx([1, 1, 1, 0.5])
    assert multipliers(long) == pytest.approx([1, 1, 1, 0.5, 1, 0.75, 0.5, 0.25])


def test_an_extension_can_be_extended(train: Callable[..., Any]) -> None:
    first, _ = train("first", 2)
    second, _ = train("second", 4, extends=first.out)
    assert train("third", 6, extends=second.out)[1] == train("straight", 6)[1]


def test_the_state_holds_the_moments_alone(train: Callable[..., Any]) -> None:
    """The weights lie beside it already."""
    ctx, _ = train("run", 2)
    state, model = load_file(ctx.out / "training_state.safetensors"), load_file(ctx.out / "model.safetensors")
    assert state
    assert not state.keys() & model.keys()


def test_without_keeping_it_there_is_no_state(train: Callable[..., Any]) -> None:
    ctx, _ = train("run", 1, keep_state=False)
    assert list(ctx.out.glob("training_state*")) == []


def test_moments_of_other_rules_are_refused_by_name(train: Callable[..., Any]) -> None:
    short, _ = train("short", 1)
    with pytest.raises(DataError, match=r"cannot be continued, other arrays are needed: first\.transformer\.h\.0"):
        train("long", 2, extends=short.out, kind="adamw")


@pytest.mark.parametrize("damage", ["cut", "missing"])
def test_a_damaged_state_is_refused(train: Callable[..., Any], damage: str) -> None:
    short, _ = train("short", 1)
    path = short.out / "training_state.safetensors"
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-20])
    else:
        save_file({"count": np.zeros(())}, path)
    with pytest.raises(DataError, match=r"no readable training state|other arrays are needed"):
        train("long", 2, extends=short.out)
