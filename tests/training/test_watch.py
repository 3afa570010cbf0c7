"""NaN and Inf stop a training or skip the update; warnings of exploding norms and of overfitting."""

import json
import math
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import pytest

from kit import training
from kit.models import composed, computing_on_cpu
from kit.training import NumberedBatches, Trained
from mlxchat.errors import StepFailed
from mlxchat.training.batches import Batch
from mlxchat.training.loop import Hook
from mlxchat.training.monitor import Overfitting, Watch

SKIP = {"on_nan": "skip"}


@pytest.fixture
def train_with(train: Callable[..., Trained]) -> Callable[..., Trained]:
    def run(name: str, broken: set[int], **settings: Any) -> Trained:
        """Train eight iterations with NaN in some batches; settings are those of `training`."""
        return train(name, 8, batches=NumberedBatches(broken=broken), context={"training": settings})

    return run


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    with computing_on_cpu():
        return training.train(tmp_path_factory.mktemp("straight"), 8)


def test_nan_stops_and_the_same_command_continues_before_it(train_with, straight, tmp_path):
    with pytest.raises(StepFailed, match="after iteration 0"):
        train_with("run", {0})
    with pytest.raises(StepFailed) as caught:
        train_with("run", {3})
    message = str(caught.value)
    for part in ("iteration 4 of 8 gave loss nan and gradient norm nan", "book 3, page 7", "training.on_nan=skip",
                 f"after iteration 3 of 8 is saved in {tmp_path / 'run' / 'work'}"):  # fmt: skip
        assert part in message
    assert caught.value.exit_code == 1
    done = train_with("run", set())
    assert done.ctx.resumed_from == 3
    assert done.bits == straight.bits


def test_skipped_updates_are_counted_and_recorded(train_with, capsys):
    """Bits do not depend on a stop before the first: on_nan is no part of the identity."""
    done = train_with("run", {2, 5}, **SKIP)
    found = done.ctx.records("metrics").read()
    assert done.ctx.metrics["skipped_iterations"] == 2
    assert [record["iteration"] for record in found] == list(range(1, 9))
    assert [record["iteration"] for record in found if "loss" not in record] == [3, 6]
    assert done.curve("skipped_iterations") == {3: 1, 6: 2}
    assert "book 2, page 7" in found[2]["warning"]
    assert np.isfinite(done.ctx.metrics["loss"])
    json.dumps(found, allow_nan=False)  # other readers than Python's refuse NaN
    assert "iteration 3: loss nan" in capsys.readouterr().err
    with pytest.raises(StepFailed):
        train_with("stopped", {2, 5})
    assert train_with("stopped", {2, 5}, **SKIP).bits == done.bits


def test_skipping_changes_nothing_where_all_is_finite(train_with, straight):
    skip = train_with("skip", set(), **SKIP)
    assert (skip.bits, skip.curve("loss")) == (straight.bits, straight.curve("loss"))
    assert (skip.ctx.metrics["skipped_iterations"], "skipped_iterations" in straight.ctx.metrics) == (0, False)


def test_too_many_skipped_in_a_row_stop(train_with):
    bad = {1, 3, 4, 5}
    assert train_with("enough", bad, **SKIP, max_skipped_in_a_row=3).ctx.metrics["skipped_iterations"] == 4
    with pytest.raises(StepFailed, match="iteration 6 of 8"):
        train_with("too many", bad, **SKIP, max_skipped_in_a_row=2)


# Warnings of norms

USUAL = [1.0, 1.2, 0.8, 1.1] * 5


@pytest.mark.parametrize(
    ("norms", "factor", "expected"),
    [
        ([*USUAL, 9.0], 10, []),
        ([*USUAL, 11.0], 10, [21]),
        ([*USUAL, 3.5], 3, [21]),
        ([*USUAL, 1e9], None, []),
        ([*USUAL, *[11.0] * 9], 10, [21]),  # once for a while
        ([*USUAL * 3, 12.0, *USUAL * 3, 12.0], 10, [61, 122]),
        ([100.0, 1.0, 50.0, 1.0], 10, []),  # too few for a median
        ([1.03**iteration for iteration in range(100)], 10, []),  # a slow rise
    ],
)
def test_norms_far_above_the_median_give_a_warning(norms, factor, expected):
    """Also where the training is resumed after every iteration."""
    config = replace(composed().training, norm_warning_factor=factor)
    for resumed in (False, True):
        watch, found = Watch(config), []
        for iteration, norm in enumerate(norms, 1):
            if watch.warn(iteration, norm) is not None:
                found.append(iteration)
            if resumed:
                state, watch = watch.state(), Watch(config)
                watch.restore(json.loads(json.dumps(state)))
        assert found == expected


def test_exploding_norm_is_recorded_and_shown(train, capsys):
    class Loud(NumberedBatches):
        def next_batch(self, iteration: int) -> Batch:
            batch = super().next_batch(iteration)
            return Batch(batch.ids, batch.targets, batch.weights * (1000 if iteration == 12 else 1))

    warnings = train("run", 14, batches=Loud()).curve("warning")
    assert list(warnings) == [13]
    printed = capsys.readouterr().err
    assert "iteration 13: gradient norm" in printed
    assert "warning gradient norm" in printed


# Overfitting

FALLING = [5.0, 4.0, 3.0, 2.5, 2.0, 1.5, 1.0]


@pytest.mark.parametrize(
    ("validations", "losses", "expected"),
    [
        ([3.0, 2.0, 2.1, 2.2, 2.3, 2.4, 2.5], FALLING, [5]),
        ([3.0, 2.0, 2.1, 2.2, 1.9, 2.0, 2.1], FALLING, []),  # a better one restarts the count
        ([3.0, 2.0, 2.1, 2.2, 2.3, 2.4, 2.5], FALLING[::-1], []),  # the training's loss rises too
        ([3.0, 2.9, 2.8, 2.7, 2.6, 2.5, 2.4], FALLING, []),
        ([3.0, 2.0, math.nan, math.nan, math.nan, 2.0, 2.0], FALLING, [5]),
    ],
)
def test_overfitting_is_reported_once(validations, losses, expected):
    """Also where the training is resumed after any validation."""
    for restart_after in range(8):
        watch, found = Overfitting(), []
        for number, (value, loss) in enumerate(zip(validations, losses, strict=True), 1):
            if watch.add(10 * number, "val_bpb", value, loss) is not None:
                found.append(number)
            if number == restart_after:
                watch = Overfitting(**json.loads(json.dumps(asdict(watch))))
        assert found == expected


def test_training_that_overfits_prints_since_when(train, capsys):
    class OneBatch(NumberedBatches):
        def next_batch(self, iteration: int) -> Batch:
            self.number = 0
            return super().next_batch(iteration)

    values = [9.0, 5.0, 6.0, 7.0, 8.0, 9.0, 9.0, 9.0]
    hook = Hook(run=lambda iteration: {"val_loss": values[iteration - 1]}, every=1)
    train("run", 8, batches=OneBatch(), hooks=[hook])
    (line,) = [line for line in "".join(capsys.readouterr()).splitlines() if "overfitting" in line]
    assert "since iteration 2 val_loss has risen from 5.0000 to 8.0000" in line
