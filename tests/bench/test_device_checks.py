"""`mlxchat doctor --gpu`, here on the CPU's plain path in bfloat16."""

from typing import Any

import mlx.core as mx
import pytest

from mlxchat.commands import device_checks


@pytest.fixture(autouse=True)
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLXCHAT_CPU", "plain")
    monkeypatch.setattr(device_checks, "prepare_machine", lambda machine: None)  # it changes limits of this process


def test_every_check_passes_on_the_plain_path(command):
    code, printed = command("doctor", "--gpu")
    assert (code, printed.count("ok    ")) == (0, len(device_checks.CHECKS)), printed


def test_wrong_kernels_and_exceptions_fail(monkeypatch, command):
    def wrong(*args: Any, **kwargs: Any) -> mx.array:
        product = right(*args, **kwargs)
        return 1.1 * product if product.dtype == mx.bfloat16 else product

    right = mx.quantized_matmul
    monkeypatch.setattr(mx, "quantized_matmul", wrong)
    checks = {"4-bit product": device_checks.CHECKS["4-bit product"], "division": lambda: 1 / 0}
    monkeypatch.setattr(device_checks, "CHECKS", checks)
    code, printed = command("doctor", "--gpu")
    assert code == 1
    assert "FAIL  4-bit product" in printed
    assert "FAIL  division         ZeroDivisionError" in printed
