"""`mlxchat doctor --gpu`, here on the CPU's plain path in bfloat16."""

import json
from typing import Any

import mlx.core as mx
import pytest

from mlxchat.commands import device_checks
from mlxchat.commands.device_checks import LOSSES, SIZES, check_device, run_checks


@pytest.fixture(autouse=True)
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLXCHAT_CPU", "plain")
    monkeypatch.setattr(device_checks, "prepare_machine", lambda machine: None)  # it changes limits of this process


def some(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    chosen = {name: device_checks._CHECKS[name] for name in names}
    monkeypatch.setattr(device_checks, "_CHECKS", chosen)


def test_every_check_passes_on_the_plain_path():
    stored = json.loads(LOSSES.read_text())["tiny"]
    assert {check.name: check for check in run_checks(SIZES["tiny"], stored) if not check.passed} == {}


def test_wrong_kernels_fail_their_check(monkeypatch, capsys):
    def wrong(*args: Any, **kwargs: Any) -> mx.array:
        return 1.1 * right(*args, **kwargs)

    right = mx.quantized_matmul
    monkeypatch.setattr(mx, "quantized_matmul", wrong)
    some(monkeypatch, "4-bit product", "save and load")
    assert not check_device("tiny")
    printed = capsys.readouterr().out
    assert "FAIL  4-bit product" in printed
    assert "ok    save and load" in printed
    assert "failed: 4-bit product\n" in printed.partition("For a bug report:")[2]


def test_other_losses_and_exceptions_fail(monkeypatch):
    stored = json.loads(LOSSES.read_text())["tiny"]
    some(monkeypatch, "20 steps, oct2025", "sampling")
    monkeypatch.setattr(device_checks, "_log_softmax", lambda logits: 1 / 0)
    moved = {case: [loss + 0.1 * (place == 19) for place, loss in enumerate(losses)] for case, losses in stored.items()}
    training, sampling = run_checks(SIZES["tiny"], moved)
    assert not training.passed
    assert not sampling.passed
    assert "ZeroDivisionError" in sampling.measured


def test_doctor_ends_with_1_if_a_check_failed(monkeypatch, command):
    for passed in (True, False):
        monkeypatch.setattr(device_checks, "check_device", lambda passed=passed: passed)
        assert command("doctor", "--gpu")[0] == (0 if passed else 1)
