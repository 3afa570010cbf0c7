"""Losses and gradients that are NaN or infinite stop a training or skip the update."""

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from kit import training
from kit.models import computing_on_cpu
from kit.training import NumberedBatches, Trained
from mlxchat.errors import StepFailed

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


def test_skipped_updates_are_counted_and_recorded(train_with, straight, capsys):
    """Bits do not depend on a stop before the first: on_nan is no part of the identity."""
    done = train_with("run", {2, 5}, **SKIP)
    found = done.ctx.records("metrics").read()
    assert (done.ctx.metrics["skipped_iterations"], "skipped_iterations" in straight.ctx.metrics) == (2, False)
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


def test_too_many_skipped_in_a_row_stop(train_with):
    bad = {1, 3, 4, 5}
    assert train_with("enough", bad, **SKIP, max_skipped_in_a_row=3).ctx.metrics["skipped_iterations"] == 4
    with pytest.raises(StepFailed, match="iteration 6 of 8"):
        train_with("too many", bad, **SKIP, max_skipped_in_a_row=2)
