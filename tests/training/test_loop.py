"""The loop: records, cadences, and that an interrupted training ends with the same bits."""

from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from kit import training
from kit.models import computing_on_cpu
from kit.training import Trained, make_context, schedule
from mlxchat.errors import Interrupted, StoreError
from mlxchat.ops import device
from mlxchat.ops.device import prepare_machine
from mlxchat.training.loop import Hook
from mlxchat.training.monitor import Meter
from mlxchat.training.state import read_newest, write_save

OPTIONS: dict[str, Any] = {"schedule": schedule(warmup_frac=0.2, warmdown_frac=0.5), "dropout": 0.2}
MEASURED = {"tokens_per_second", "mfu", "data_wait_frac", "elapsed_seconds", "peak_memory_bytes"}


class Crash(Exception):
    """A power cut."""


def validation(crash_at: int | None = None) -> Hook:
    def run(iteration: int) -> dict[str, float]:
        if iteration == crash_at:
            raise Crash
        return {"val_loss": float(iteration)}

    return Hook(run=run, every=1, at_start=True)


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """A training of six iterations without interruptions."""
    with computing_on_cpu():
        return training.train(tmp_path_factory.mktemp("straight"), hooks=[validation()], **OPTIONS)


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
    metrics = straight.ctx.metrics
    assert metrics["loss"] == pytest.approx(found[-1]["smooth_loss"])
    assert metrics["tokens_per_second"] > 0
    assert metrics["val_loss"] == 6.0


def test_hooks_and_records_follow_their_cadences(train, straight):
    """A hook whose two cadences coincide is called once."""
    cases: list[tuple[int | None, tuple[int | None, ...], bool, list[int]]] = [
        (None, (), False, [6]), (2, (), False, [2, 4, 6]), (4, (), True, [0, 4, 6]), (None, (), True, [0, 6]),
        (None, (4,), False, [4, 6]), (2, (3,), False, [2, 3, 4, 6]), (4, (4,), False, [4, 6]),
    ]  # fmt: skip
    called: list[list[int]] = [[] for _ in cases]

    def hook(number: int) -> Hook:
        def note(iteration: int) -> dict[str, float]:
            called[number].append(iteration)
            return {f"hook_{number}": float(iteration)}

        every, also_every, at_start, _ = cases[number]
        return Hook(run=note, every=every, also_every=also_every, at_start=at_start)

    done = train(hooks=[hook(number) for number in range(len(cases))], context={"log_every": 4})
    assert called == [expected for *_, expected in cases]
    assert [list(done.curve(f"hook_{number}")) for number in range(len(cases))] == called
    assert list(done.curve("loss")) == [4, 6]
    assert done.curve("loss")[4] != straight.curve("loss")[4], "it has no dropout"


def test_smoothed_loss_is_the_debiased_exponential_mean():
    meter, losses = Meter(), [5.0, 4.0, 3.5, 3.0]
    for loss in losses:
        meter.add(loss, 10, 1.0)
    weights = 0.9 ** np.arange(3, -1, -1)
    assert meter.loss == pytest.approx(float(weights @ losses / weights.sum()))


def test_mfu_is_the_rate_over_the_peak_and_never_above_one():
    """Training faster than the measured peak raises the peak; an unknown peak gives no MFU."""
    rates: list[float] = []

    def raise_peak(rate: float) -> float:
        rates.append(rate)
        return 1e10

    meter = Meter(flops_per_token=6e6, peak_flops=1e9, raise_peak=raise_peak)
    meter.add(1.0, 500, 0.5)  # 1000 tokens/s, so 6e9 FLOP/s
    assert meter.record(1.0)["mfu"] == pytest.approx(0.6)
    assert meter.show()["mfu"] == "60%"
    meter.add(1.0, 500_000, 0.5)
    assert meter.record(1.0)["mfu"] == 1.0
    assert rates == [6e9, pytest.approx(3.003e12)], "once each time"
    unknown = Meter(flops_per_token=6e6, peak_flops=None)
    unknown.add(1.0, 500, 0.5)
    assert "mfu" not in unknown.record(1.0).keys() | unknown.show().keys()


@pytest.mark.parametrize(
    ("where", "limits", "expected"),
    [("cpu", (1, 2, 3), ([1], [2], [])), ("metal", (1, 2, 3), ([1], [2], [3])),
     ("metal", (None, None, None), ([], [], []))],
)  # fmt: skip
def test_memory_limits_apply_where_the_device_has_them(where, limits, expected, tmp_path, monkeypatch):
    calls: dict[str, list[int]] = {"memory": [], "cache": [], "wired": []}
    for name, seen in calls.items():
        monkeypatch.setattr(mx, f"set_{name}_limit", seen.append)
    monkeypatch.setattr(device, "backend", lambda: where)
    machine = {f"{name}_limit_bytes": limit for name, limit in zip(calls, limits, strict=True)}
    prepare_machine(make_context(tmp_path, **machine).config.machine)
    assert tuple(calls.values()) == expected


# Interruption


def test_interrupted_training_ends_with_the_same_bits(train, straight):
    options = OPTIONS | {"hooks": [validation()]}
    for stop in (1, 2, 5):
        with pytest.raises(Interrupted, match=f"iteration {stop} of 6") as caught:
            train(stop_after=stop, **options)
        assert caught.value.exit_code == 128 + 15
    done = train(stop_after=6, **options)  # a signal during the last iteration lets it end
    assert done.ctx.resumed_from == 5
    assert_same(done, straight)


@pytest.mark.parametrize("checkpoint_seconds", [0.0, 1e9], ids=["saved each iteration", "never saved"])
def test_killed_training_ends_with_the_same_bits_and_records(train, straight, checkpoint_seconds):
    options = OPTIONS | {"context": {"checkpoint_seconds": checkpoint_seconds}}
    for iteration in (1, 4):
        with pytest.raises(Crash):
            train(hooks=[validation(crash_at=iteration)], **options)
    done = train(hooks=[validation()], **options)
    assert done.ctx.resumed_from == (None if checkpoint_seconds else 3)
    assert_same(done, straight)


def test_training_without_its_lock_saves_nothing(train, tmp_path):
    """Outputs that are removed meanwhile do not come back with a save but without their intermediate models."""

    def without_lock(ctx, model):
        ctx.check_lock = refuse
        return []

    def refuse():
        raise StoreError("removed")

    with pytest.raises(StoreError):
        train(hooks=without_lock, context={"checkpoint_seconds": 0.0})
    assert list(tmp_path.rglob("state.json")) == []


@pytest.mark.parametrize("damaged", ["arrays.safetensors", "state.json"])
def test_damaged_save_is_not_used(train, straight, tmp_path, damaged):
    with pytest.raises(Interrupted):
        train(stop_after=3)
    (path,) = tmp_path.rglob(damaged)
    path.write_bytes(path.read_bytes()[:-20])
    done = train(hooks=[validation()], **OPTIONS)
    assert done.ctx.resumed_from is None
    assert_same(done, straight)


def test_saved_arrays_keep_their_shapes(tmp_path):
    # A count with an axis would broadcast into AdamW's update of jul2026's scalars.
    arrays = {"count": np.asarray(np.float32(3)), "row": np.arange(3.0), "turned": np.arange(6.0).reshape(2, 3).T}
    write_save(tmp_path, 1, arrays, {})
    found = read_newest(tmp_path)
    for name, value in arrays.items():
        assert found[0][name].shape == value.shape
        assert (found[0][name] == value).all()
