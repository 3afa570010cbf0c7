"""NaN and Inf: nothing is updated, and the training stops or goes on as it was told; warnings of exploding norms."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from kit.models import composed, make_model
from kit.training import NumberedBatches, make_optimizer, schedule
from mlxchat.errors import StepFailed
from mlxchat.model.gpt import GPT, flatten_parameters
from mlxchat.optim.optimizer import Optimizer, Rates
from mlxchat.runner.context import Context
from mlxchat.training.batches import Batch
from mlxchat.training.loop import Hook, fit
from mlxchat.training.monitor import Overfitting, Watch
from mlxchat.training.step import TrainStep

MakeContext = Callable[..., Context]
NUM_ITERATIONS = 8
CONSTANT = schedule()


def arrays(model: GPT, optimizer: Optimizer) -> dict[str, bytes]:
    return {name: np.array(value).tobytes() for name, value in (flatten_parameters(model) | optimizer.state).items()}


@pytest.fixture
def train(make_context: MakeContext) -> Callable[..., Any]:
    def run(name: str, bad: set[int], **training: Any) -> tuple[Context, dict[str, bytes]]:
        model = make_model()
        optimizer = make_optimizer(model)
        ctx = make_context(name, training=training)
        fit(
            ctx,
            model,
            optimizer,
            NumberedBatches(rows=4, broken=bad),
            num_iterations=NUM_ITERATIONS,
            schedule=CONSTANT,
            hooks=[],
            micro_tokens=64,
        )
        return ctx, arrays(model, optimizer)

    return run


def records(ctx: Context) -> list[dict[str, Any]]:
    return ctx.records("metrics").read()


# The step


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("micro_rows", [1, 3, 4], ids=["four parts", "two parts", "whole"])
def test_a_step_without_numbers_changes_neither_weights_nor_moments(micro_rows: int, value: float) -> None:
    model = make_model()
    optimizer = make_optimizer(model)
    step, source = (
        TrainStep(model, optimizer, micro_tokens=16 * micro_rows, dtype=mx.float32),
        NumberedBatches(rows=4, broken={1}, value=value),
    )
    step(source.next_batch(0), Rates(1.0, 0.9, 1.0))
    before = arrays(model, optimizer)
    assert not np.isfinite(step(source.next_batch(1), Rates(1.0, 0.9, 1.0))).all()
    assert arrays(model, optimizer) == before
    assert np.isfinite(step(source.next_batch(2), Rates(1.0, 0.9, 1.0))).all()
    assert arrays(model, optimizer) != before


# on_nan=stop


def test_a_nan_stops_with_iteration_numbers_documents_and_the_way_on(train: Callable[..., Any], tmp_path: Path) -> None:
    with pytest.raises(StepFailed) as caught:
        train("run", {3})
    said = str(caught.value)
    assert "iteration 4 of 8 gave loss nan and gradient norm nan" in said
    assert "book 3, page 7" in said
    assert f"after iteration 3 of 8 is saved in {tmp_path / 'run' / 'work'}" in said
    assert "training.on_nan=skip" in said
    assert caught.value.exit_code == 1


def test_after_a_stop_the_same_command_continues_before_the_bad_batch(train: Callable[..., Any]) -> None:
    """As if whatever made the batch bad had been mended."""
    expected = train("straight", set())[1]
    with pytest.raises(StepFailed):
        train("run", {3})
    ctx, got = train("run", set())
    assert ctx.resumed_from == 3
    assert got == expected


def test_a_nan_in_the_first_iteration_leaves_a_state_too(train: Callable[..., Any]) -> None:
    with pytest.raises(StepFailed, match="after iteration 0"):
        train("run", {0})
    assert train("run", set())[1] == train("straight", set())[1]


# on_nan=skip


def test_a_skipped_update_is_counted_recorded_and_the_rest_goes_on(
    train: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    ctx, _ = train("run", {2, 5}, on_nan="skip")
    found = records(ctx)
    assert ctx.metrics["skipped_iterations"] == 2
    assert [record["iteration"] for record in found] == list(range(1, 9))
    assert [record["iteration"] for record in found if "loss" not in record] == [3, 6]
    assert [record["skipped_iterations"] for record in found if "skipped_iterations" in record] == [1, 2]
    assert "book 2, page 7" in found[2]["warning"]
    assert np.isfinite(ctx.metrics["loss"])
    json.dumps(found, allow_nan=False)  # else no reader but Python's takes the file
    assert "iteration 3: loss nan" in capsys.readouterr().err


def test_where_nothing_goes_wrong_skipping_changes_nothing(train: Callable[..., Any]) -> None:
    (stop, one), (skip, other) = train("stop", set()), train("skip", set(), on_nan="skip")
    assert one == other
    assert (skip.metrics["skipped_iterations"], "skipped_iterations" in stop.metrics) == (0, False)
    assert [record["loss"] for record in records(stop)] == [record["loss"] for record in records(skip)]


def test_skipping_after_a_stop_ends_as_skipping_from_the_beginning(train: Callable[..., Any]) -> None:
    """Which is why on_nan is no part of the identity."""
    expected = train("straight", {3}, on_nan="skip")[1]
    with pytest.raises(StepFailed):
        train("run", {3}, on_nan="stop")
    ctx, got = train("run", {3}, on_nan="skip")
    assert ctx.resumed_from == 3
    assert got == expected


def test_too_many_skipped_in_a_row_stop_all_the_same(train: Callable[..., Any]) -> None:
    bad = {1, 3, 4, 5}
    assert train("enough", bad, on_nan="skip", max_skipped_in_a_row=3)[0].metrics["skipped_iterations"] == 4
    with pytest.raises(StepFailed, match="iteration 6 of 8"):
        train("too many", bad, on_nan="skip", max_skipped_in_a_row=2)


# Warnings


def warned(norms: list[float], **settings: Any) -> list[int]:
    """Return the iterations at which these norms are warned of."""
    watch = Watch(replace(composed().training, **settings))
    return [iteration for iteration, norm in enumerate(norms, 1) if watch.warn(iteration, norm) is not None]


USUAL = [1.0, 1.2, 0.8, 1.1] * 5


def test_a_norm_far_above_the_median_is_warned_of() -> None:
    assert warned([*USUAL, 9.0]) == []
    assert warned([*USUAL, 11.0]) == [21]
    assert warned([*USUAL, 3.5], norm_warning_factor=3) == [21]


def test_trouble_that_lasts_is_warned_of_once_per_while() -> None:
    assert warned([*USUAL, *[11.0] * 9]) == [21]
    assert warned([*USUAL * 3, 12.0, *USUAL * 3, 12.0]) == [61, 122]


def test_the_first_norms_and_a_rise_over_many_iterations_are_not_warned_of() -> None:
    assert warned([100.0, 1.0, 50.0, 1.0]) == []
    assert warned([1.03**iteration for iteration in range(100)]) == []


def test_warnings_can_be_switched_off() -> None:
    assert warned([*USUAL, 1e9], norm_warning_factor=None) == []


def test_a_warning_does_not_depend_on_interruptions() -> None:
    config = composed().training
    norms = [*USUAL, 11.0, 11.0, *USUAL * 3, 12.0]
    watch, said = Watch(config), []
    for iteration, norm in enumerate(norms, 1):
        said.append(watch.warn(iteration, norm))
        state, watch = watch.state(), Watch(config)
        watch.restore(json.loads(json.dumps(state)))
    assert [index for index, text in enumerate(said, 1) if text] == warned(norms)


def test_an_exploding_norm_is_recorded_and_shown(make_context: MakeContext, capsys: pytest.CaptureFixture[str]) -> None:
    class Loud(NumberedBatches):
        def next_batch(self, iteration: int) -> Batch:
            batch = super().next_batch(iteration)
            return Batch(batch.ids, batch.targets, batch.weights * (1000 if iteration == 12 else 1))

    model, ctx = make_model(), make_context()
    fit(
        ctx, model, make_optimizer(model), Loud(rows=4), num_iterations=14, schedule=CONSTANT, hooks=[], micro_tokens=64
    )
    (record,) = (record for record in records(ctx) if "warning" in record)
    assert record["iteration"] == 13
    assert "times its median of late" in record["warning"]
    said = capsys.readouterr().err
    assert "iteration 13: gradient norm" in said
    assert "warning gradient norm" in said


# Overfitting


def told(validations: list[float], losses: list[float], *, restart_after: int | None = None) -> list[int]:
    """Return after which validations overfitting was told; a restart goes on from the saved state."""
    watch, found = Overfitting(), []
    for number, (value, loss) in enumerate(zip(validations, losses, strict=True), 1):
        if watch.look(10 * number, "val_bpb", value, loss) is not None:
            found.append(number)
        if number == restart_after:
            watch = Overfitting(**json.loads(json.dumps(asdict(watch))))
    return found


FALLING = [5.0, 4.0, 3.0, 2.5, 2.0, 1.5, 1.0]


@pytest.mark.parametrize(
    ("validations", "losses", "expected"),
    [
        ([3.0, 2.0, 2.1, 2.2, 2.3, 2.4, 2.5], FALLING, [5]),
        ([3.0, 2.0, 2.1, 2.2, 1.9, 2.0, 2.1], FALLING, []),  # a better one begins anew
        ([3.0, 2.0, 2.1, 2.2, 2.3, 2.4, 2.5], FALLING[::-1], []),  # the training's loss rises too: something else
        ([3.0, 2.9, 2.8, 2.7, 2.6, 2.5, 2.4], FALLING, []),
        ([3.0, 2.0, math.nan, math.nan, math.nan, 2.0, 2.0], FALLING, [5]),
    ],
)
def test_overfitting_is_told_once_and_only_where_it_is(
    validations: list[float], losses: list[float], expected: list[int]
) -> None:
    assert told(validations, losses) == expected
    assert [told(validations, losses, restart_after=number) for number in range(1, 8)] == [expected] * 7


class OneBatch(NumberedBatches):
    """The same batch again and again, which is soon learnt by heart."""

    def next_batch(self, iteration: int) -> Batch:
        self.number = 0
        return super().next_batch(iteration)


def test_a_training_that_overfits_says_since_when(
    make_context: MakeContext, capsys: pytest.CaptureFixture[str]
) -> None:
    values = [9.0, 5.0, 6.0, 7.0, 8.0, 9.0, 9.0, 9.0]
    model = make_model()
    fit(
        make_context("run"), model, make_optimizer(model), OneBatch(rows=4), num_iterations=NUM_ITERATIONS,
        schedule=CONSTANT, hooks=[Hook(run=lambda iteration: {"val_loss": values[iteration - 1]}, every=1)],
        micro_tokens=64,
    )  # fmt: skip
    said = [line for line in "".join(capsys.readouterr()).splitlines() if "overfitting" in line]
    assert len(said) == 1
    assert "since iteration 2 val_loss has risen from 5.0000 to 8.0000" in said[0]
