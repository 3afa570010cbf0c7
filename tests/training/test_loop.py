"""The loop: what it records, when it calls, and that an interrupted training ends as if nothing had happened."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from kit.models import make_model
from kit.training import make_optimizer, schedule
from mlxchat.data.packing import RowStream
from mlxchat.errors import Interrupted
from mlxchat.model.gpt import flatten_parameters
from mlxchat.ops import device
from mlxchat.ops.device import prepare_machine
from mlxchat.runner.context import Context
from mlxchat.training.batches import RowBatches
from mlxchat.training.loop import Hook, fit
from mlxchat.training.monitor import Meter

MakeContext = Callable[..., Context]
NUM_ITERATIONS = 6
SCHEDULE = schedule(warmup_frac=0.2, warmdown_frac=0.5)


class CountedRows(RowStream):
    """Rows that follow from their number, which is all the position there is."""

    def __init__(self) -> None:
        super().__init__(None, row_tokens=16)
        self.number = 0

    def _pieces(self, space: int) -> Iterator[tuple[int, np.ndarray, bool]]:
        self.number += 1
        yield self.number - 1, np.random.default_rng(self.number - 1).integers(0, 280, space), True

    def counts(self) -> dict[str, int]:
        return {}

    def state(self) -> dict[str, Any]:
        return {"number": self.number}

    def restore(self, state: dict[str, Any]) -> None:
        self.number = state["number"]


class Crash(Exception):
    """What a power cut is to a process."""


@pytest.fixture
def train(make_context: MakeContext) -> Callable[..., tuple[Context, dict[str, np.ndarray]]]:
    def run(
        name: str, *, stop_after: int | None = None, hooks: list[Hook] | None = None, **machine: Any
    ) -> tuple[Context, dict[str, np.ndarray]]:
        """Train, from where an earlier attempt of this name stopped; return the context and all arrays at the end."""
        model, rows = make_model(), CountedRows()
        optimizer = make_optimizer(model)
        stop = (lambda: 15 if rows.number >= 3 * stop_after else None) if stop_after is not None else (lambda: None)
        ctx = make_context(name, stop, **machine)
        fit(
            ctx, model, optimizer, RowBatches(rows, 3), num_iterations=NUM_ITERATIONS, schedule=SCHEDULE,
            hooks=hooks or [], micro_tokens=64,
        )  # fmt: skip
        arrays = flatten_parameters(model) | optimizer.state
        return ctx, {key: np.array(value) for key, value in arrays.items()}

    return run


def records(ctx: Context) -> list[dict[str, Any]]:
    return ctx.records("metrics").read()


def same_bits(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> bool:
    return one.keys() == other.keys() and all(one[key].tobytes() == other[key].tobytes() for key in one)


def reproducible(ctx: Context) -> list[dict[str, Any]]:
    """Return the records without what clocks and memory say."""
    measured = ("tokens_per_second", "mfu", "data_wait_frac", "elapsed_seconds", "peak_memory_bytes")
    return [{key: value for key, value in record.items() if key not in measured} for record in records(ctx)]


# Records


def test_every_iteration_is_recorded_with_its_numbers(train: Callable[..., Any]) -> None:
    ctx, _ = train("run")
    assert [record["iteration"] for record in records(ctx)] == [1, 2, 3, 4, 5, 6]
    for record in records(ctx):
        assert {
            "loss",
            "mfu",
            "lr_multiplier",
            "grad_norm",
            "tokens_per_second",
            "elapsed_seconds",
            "peak_memory_bytes",
        } <= set(record)
        assert record["tokens_per_second"] > 0
        assert 0 < record["loss"] < 20


def test_records_may_be_rarer_but_the_last_iteration_has_one(train: Callable[..., Any]) -> None:
    ctx, _ = train("run", log_every=4)
    assert [record["iteration"] for record in records(ctx)] == [4, 6]


def test_the_schedule_sets_the_rate_of_each_iteration(train: Callable[..., Any]) -> None:
    ctx, _ = train("run")
    assert [record["lr_multiplier"] for record in records(ctx)] == pytest.approx([1, 1, 1, 1, 2 / 3, 1 / 3])


def test_the_final_numbers_are_in_the_metrics_of_the_step(train: Callable[..., Any]) -> None:
    ctx, _ = train("run")
    assert ctx.metrics["loss"] == pytest.approx(records(ctx)[-1]["smooth_loss"])
    assert ctx.metrics["tokens_per_second"] > 0


def test_the_smoothed_loss_is_an_unbiased_mean_of_decay_nine_tenths() -> None:
    meter, losses = Meter(), [5.0, 4.0, 3.5, 3.0]
    for loss in losses:
        meter.add(loss, 10, 1.0)
    weights = 0.9 ** np.arange(3, -1, -1)
    assert meter.loss == pytest.approx(float(weights @ losses / weights.sum()))


def test_utilisation_is_the_models_operations_per_second_over_the_peak() -> None:
    meter = Meter(flops_per_token=6e6, peak_flops=1e10)
    for _ in range(3):
        meter.add(1.0, 500, 0.5)  # 1000 tokens/s, so 6e9 FLOP/s
    assert meter.record(1.0)["mfu"] == pytest.approx(0.6)
    assert meter.show()["mfu"] == "60%"


def test_training_faster_than_the_peak_raises_it() -> None:
    # 101 % and 272 % were shown after the peak had been measured beside other work.
    rates: list[float] = []
    meter = Meter(flops_per_token=6e6, peak_flops=1e9, raise_peak=lambda rate: [rates.append(rate), 1e10][1])  # type: ignore[func-returns-value]
    meter.add(1.0, 500, 0.5)  # 6e9 FLOP/s
    assert meter.record(1.0)["mfu"] == pytest.approx(0.6)
    meter.add(1.0, 500_000, 0.5)
    assert meter.record(1.0)["mfu"] == 1.0
    assert meter.show()["mfu"] == "100%"
    assert rates == [6e9, pytest.approx(3.003e12)], "once each time"


def test_where_the_peak_is_unknown_nothing_is_said_of_utilisation() -> None:
    meter = Meter(flops_per_token=6e6, peak_flops=None)
    meter.add(1.0, 500, 0.5)
    assert "mfu" not in meter.record(1.0).keys() | meter.show().keys()


@pytest.mark.parametrize(("where", "wired"), [("cpu", []), ("cuda", []), ("metal", [3000])])
def test_limits_are_applied_where_the_device_has_them(
    make_context: MakeContext, monkeypatch: pytest.MonkeyPatch, where: str, wired: list[int]
) -> None:
    calls: dict[str, list[int]] = {"memory": [], "cache": [], "wired": []}
    for name, seen in calls.items():
        monkeypatch.setattr(mx, f"set_{name}_limit", seen.append)
    monkeypatch.setattr(device, "backend", lambda: where)
    limits = {"memory_limit_bytes": 1000, "cache_limit_bytes": 2000, "wired_limit_bytes": 3000}
    prepare_machine(make_context(**limits).config.machine)
    assert calls == {"memory": [1000], "cache": [2000], "wired": wired}


def test_without_limits_none_is_set(make_context: MakeContext, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("memory", "cache", "wired"):
        monkeypatch.setattr(mx, f"set_{name}_limit", lambda limit: pytest.fail(f"set to {limit}"))
    prepare_machine(make_context().config.machine)


# Hooks


@pytest.mark.parametrize(
    ("every", "at_start", "called"),
    [(None, False, [6]), (2, False, [2, 4, 6]), (2, True, [0, 2, 4, 6]), (4, True, [0, 4, 6]), (None, True, [0, 6])],
)
def test_a_hook_is_called_at_its_cadence_and_once_at_the_end(
    train: Callable[..., Any], every: int | None, at_start: bool, called: list[int]
) -> None:
    calls: list[int] = []

    def note(iteration: int) -> dict[str, float]:
        calls.append(iteration)
        return {"val_loss": float(iteration)}

    ctx, _ = train("run", hooks=[Hook(run=note, every=every, at_start=at_start)])
    assert calls == called
    assert [record["iteration"] for record in records(ctx) if "val_loss" in record] == called
    assert ctx.metrics["val_loss"] == 6.0


@pytest.mark.parametrize(("every", "also_every", "called"), [(None, 4, [4, 6]), (2, 3, [2, 3, 4, 6]), (4, 4, [4, 6])])
def test_a_hook_with_two_cadences_is_called_once_where_both_are_due(
    train: Callable[..., Any], every: int | None, also_every: int, called: list[int]
) -> None:
    calls: list[int] = []

    def note(iteration: int) -> dict[str, float]:
        calls.append(iteration)
        return {}

    train("run", hooks=[Hook(run=note, every=every, also_every=(also_every,))])
    assert calls == called


# Interruption


def test_a_repeated_training_gives_the_same_bits(train: Callable[..., Any]) -> None:
    (first, one), (second, other) = train("one"), train("other")
    assert same_bits(one, other)
    assert reproducible(first) == reproducible(second)


@pytest.mark.parametrize("stops", [[1], [3], [5], [2, 4], [1, 2, 3, 4, 5]], ids=str)
def test_an_interrupted_training_ends_with_the_same_bits(train: Callable[..., Any], stops: list[int]) -> None:
    straight, expected = train("straight")
    for stop in stops:
        with pytest.raises(Interrupted, match=f"iteration {stop} of 6"):
            train("interrupted", stop_after=stop)
    ctx, got = train("interrupted")
    assert ctx.resumed_from == stops[-1]
    assert same_bits(got, expected)
    assert reproducible(ctx) == reproducible(straight)


def test_a_signal_during_the_last_iteration_lets_it_end(train: Callable[..., Any]) -> None:
    assert same_bits(train("interrupted", stop_after=NUM_ITERATIONS)[1], train("straight")[1])


def test_an_interruption_keeps_the_number_of_its_signal(train: Callable[..., Any]) -> None:
    with pytest.raises(Interrupted) as caught:
        train("interrupted", stop_after=1)
    assert caught.value.exit_code == 128 + 15


def crash_at(iteration: int, done: dict[str, bool]) -> Hook:
    def run(now: int) -> dict[str, float]:
        if now == iteration and not done.get("crashed"):
            done["crashed"] = True
            raise Crash
        return {"val_loss": float(now)}

    return Hook(run=run, every=1, at_start=True)


@pytest.mark.parametrize("checkpoint_seconds", [0.0, 1e9], ids=["saved every iteration", "never saved"])
@pytest.mark.parametrize("iteration", [1, 3, 5])
def test_a_killed_training_ends_with_the_same_bits_and_records(
    train: Callable[..., Any], iteration: int, checkpoint_seconds: float
) -> None:
    """It continues from its last save, or from the beginning, and what it did after that leaves no trace."""
    straight, expected = train("straight", hooks=[crash_at(99, {})])
    crashed: dict[str, bool] = {}
    with pytest.raises(Crash):
        train("killed", hooks=[crash_at(iteration, crashed)], checkpoint_seconds=checkpoint_seconds)
    ctx, got = train("killed", hooks=[crash_at(iteration, crashed)], checkpoint_seconds=checkpoint_seconds)
    assert same_bits(got, expected)
    assert reproducible(ctx) == reproducible(straight)


@pytest.mark.parametrize("damage", ["arrays.safetensors", "state.json"])
def test_a_save_that_a_crash_damaged_is_not_used(train: Callable[..., Any], tmp_path: Path, damage: str) -> None:
    expected = train("straight")[1]
    with pytest.raises(Interrupted):
        train("damaged", stop_after=3)
    (path,) = (tmp_path / "damaged").rglob(damage)
    path.write_bytes(path.read_bytes()[:-20])
    ctx, got = train("damaged")
    assert ctx.resumed_from is None
    assert same_bits(got, expected)
