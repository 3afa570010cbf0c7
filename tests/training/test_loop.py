"""The loop: records, cadences, and that an interrupted training ends with the same bits."""

import json
from collections.abc import Callable
from itertools import count
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from kit import training
from kit.models import computing_on_cpu
from kit.training import NumberedBatches, Trained, make_context, schedule
from mlxchat.errors import Interrupted, StepFailed
from mlxchat.training.monitor import Monitor, Observation
from mlxchat.training.state import Checkpointer

OPTIONS: dict[str, Any] = {"rates": schedule(warmup_frac=0.2, warmdown_frac=0.5), "dropout": 0.2}
MEASURED = {"tokens_per_second", "data_wait_frac", "elapsed_seconds", "peak_memory_bytes"}


VALIDATION = Observation(run=lambda iteration: {"val_loss": float(iteration)}, every=(1,), at_start=True)


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """A training of six iterations without interruptions."""
    with computing_on_cpu():
        return training.train(tmp_path_factory.mktemp("straight"), observations=[VALIDATION], **OPTIONS)


def assert_same(found: Trained, expected: Trained) -> None:
    assert found.bits == expected.bits
    one, other = (
        [{key: value for key, value in record.items() if key not in MEASURED} for record in records(each)]
        for each in (found, expected)
    )
    assert one == other


def records(done: Trained) -> list[dict[str, Any]]:
    return done.ctx.records("metrics").read()


# Records and hooks


def test_each_iteration_is_recorded(straight):
    found = [record for record in records(straight) if "loss" in record]
    assert [record["iteration"] for record in found] == [1, 2, 3, 4, 5, 6]
    assert [record["lr_multiplier"] for record in found] == pytest.approx([1, 1, 1, 1, 2 / 3, 1 / 3])
    for record in found:
        assert {"loss", "grad_norm"} | MEASURED <= set(record)
        assert record["tokens_per_second"] > 0
        assert 0 < record["loss"] < 20
    losses, weights = [record["loss"] for record in found], 0.9 ** np.arange(5, -1, -1)
    metrics = straight.ctx.metrics
    assert metrics["loss"] == pytest.approx(float(weights @ losses / weights.sum())), "debiased exponential mean"
    assert metrics["tokens_per_second"] > 0
    assert metrics["val_loss"] == 6.0


def test_observations_and_records_follow_their_cadences(train, straight):
    """An observation whose two cadences coincide is called once."""
    cases: list[tuple[dict[str, Any], list[int]]] = [
        ({}, [6]),
        ({"every": (2,)}, [2, 4, 6]),
        ({"every": (4, None), "at_start": True}, [0, 4, 6]),
        ({"at_start": True}, [0, 6]),
        ({"every": (2, 3)}, [2, 3, 4, 6]),
        ({"every": (4, 4), "at_end": False}, [4]),
    ]
    called: list[list[int]] = [[] for _ in cases]

    def observation(number: int) -> Observation:
        def note(iteration: int) -> dict[str, float]:
            called[number].append(iteration)
            return {f"number_{number}": float(iteration)}

        return Observation(run=note, **cases[number][0])

    done = train(observations=[observation(number) for number in range(len(cases))])
    assert called == [expected for _, expected in cases]
    assert [list(done.curve(f"number_{number}")) for number in range(len(cases))] == called
    assert list(done.curve("loss")) == [1, 2, 3, 4, 5, 6]
    assert done.curve("loss")[4] != straight.curve("loss")[4], "it has no dropout"


def test_saves_take_two_percent_of_the_time(tmp_path, monkeypatch):
    """Each iteration takes 1 s and each save 4 s of a fake clock."""
    clock, saved = [0.0], []
    monkeypatch.setattr("mlxchat.training.state.time.monotonic", lambda: clock[0])

    def write(self, iteration, state):
        clock[0] += 4
        saved.append(iteration)

    monkeypatch.setattr(Checkpointer, "_save", write)
    monkeypatch.setattr(Checkpointer, "_state", lambda self: {})
    step: Any = SimpleNamespace(model=None, optimizer=None)
    for every, expected in ((30.0, [30, 230, 430]), (300.0, [300, 600]), (0.0, list(range(1, 601)))):
        saved.clear()
        checkpointer = Checkpointer(make_context(tmp_path, checkpoint_seconds=every), step, None, None)
        for iteration in range(1, 601):
            clock[0] += 1
            checkpointer.save_if_due(iteration)
        assert saved == expected


# Interruption


def test_interrupted_training_ends_with_the_same_bits(train, straight):
    options = OPTIONS | {"observations": [VALIDATION]}
    for stop in (1, 2, 5):
        with pytest.raises(Interrupted, match=f"iteration {stop} of 6") as caught:
            train(stop_after=stop, **options)
        assert caught.value.exit_code == 128 + 15
    done = train(stop_after=6, **options)  # a signal during the last iteration lets it end
    assert done.ctx.resumed_from == 5
    assert_same(done, straight)


# A fixed time


def test_training_ends_after_max_seconds_with_the_whole_schedule(train, monkeypatch):
    """Iterations take half a second by this clock, as does what is between them, which does not count.

    The first of each start does not, either: 1 + 4 iterations fill two seconds, or 2 + 4 with one interruption.
    """
    ticks = count()
    monkeypatch.setattr(Monitor, "_clocks", lambda self: (0.5 * next(ticks), 0.0, 0.0))
    options: dict[str, Any] = {"num_iterations": 100, "max_seconds": 2.0, "rates": schedule(warmdown_frac=1.0)}
    done = train("timed", observations=[VALIDATION], **options)
    assert done.curve("lr_multiplier") == pytest.approx({1: 1, 2: 1, 3: 0.75, 4: 0.5, 5: 0.25}, abs=0.02)
    assert done.ctx.metrics["val_loss"] == 5, "the end is observed"
    with pytest.raises(Interrupted, match="iteration 3 of 6"):
        train("interrupted", stop_after=3, **options)
    assert max(train("interrupted", **options).curve("loss")) == 6, "what was spent before counts"
    assert max(train("short", **options | {"num_iterations": 3}).curve("loss")) == 3, "the first limit ends it"


# Losses and gradients that are NaN or infinite

SKIP = {"on_nan": "skip"}


@pytest.fixture
def train_with(train: Callable[..., Trained]) -> Callable[..., Trained]:
    def run(name: str, broken: set[int], **settings: Any) -> Trained:
        """Train six iterations with NaN in some batches; settings are those of `training`."""
        context, batches = {"training": settings}, NumberedBatches(broken=broken)
        return train(name, batches=batches, context=context, observations=[VALIDATION], **OPTIONS)

    return run


def test_nan_stops_and_the_same_command_continues_before_it(train_with, straight, tmp_path):
    with pytest.raises(StepFailed) as caught:
        train_with("run", {3})
    message = str(caught.value)
    for part in ("iteration 4 of 6 gave loss nan and gradient norm nan", "book 3, page 7", "training.on_nan=skip",
                 f"after iteration 3 of 6 is saved in {tmp_path / 'run' / 'work'}"):  # fmt: skip
        assert part in message
    assert caught.value.exit_code == 1
    done = train_with("run", set())
    assert done.ctx.resumed_from == 3
    assert done.bits == straight.bits


def test_skipped_updates_are_counted_and_recorded(train_with, straight, capsys):
    """Bits do not depend on a stop before the first: on_nan is no part of the identity."""
    done = train_with("run", {2, 4}, **SKIP)
    found = [record for record in records(done) if "lr_multiplier" in record]
    assert (done.ctx.metrics["skipped_iterations"], "skipped_iterations" in straight.ctx.metrics) == (2, False)
    assert [record["iteration"] for record in found if "loss" not in record] == [3, 5]
    assert done.curve("skipped_iterations") == {3: 1, 5: 2}
    assert "book 2, page 7" in found[2]["warning"]
    assert np.isfinite(done.ctx.metrics["loss"])
    json.dumps(found, allow_nan=False)  # other readers than Python's refuse NaN
    assert "iteration 3: loss nan" in capsys.readouterr().err
    with pytest.raises(StepFailed):
        train_with("stopped", {2, 4})
    assert train_with("stopped", {2, 4}, **SKIP).bits == done.bits
