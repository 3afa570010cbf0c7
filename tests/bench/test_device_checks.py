"""`mlxchat doctor --gpu`, here on the CPU's plain path in bfloat16."""

import mlx.core as mx
import pytest

from mlxchat.commands import device_checks


@pytest.mark.parametrize(("error", "code", "told"), [(0.0, 0, "ok  losses"), (0.1, 1, "FAIL  losses")])
def test_losses_are_compared_with_the_cpu(error, code, told, monkeypatch, command):
    losses = device_checks.losses
    monkeypatch.setenv("MLXCHAT_CPU", "plain")
    monkeypatch.setattr(device_checks, "prepare_machine", lambda machine: None)  # it changes limits of this process
    monkeypatch.setattr(
        device_checks, "losses", lambda dtype: [loss + error * (dtype == mx.bfloat16) for loss in losses(dtype)]
    )
    ended, printed = command("doctor", "--gpu")
    assert (ended, told in printed) == (code, True), printed
