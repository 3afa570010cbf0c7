"""Steps as tasks of a real Ray cluster: a head of this machine, which is another process than the command."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from kit.commands import saved_trainings
from mlxchat.store.manifest import read_manifest
from mlxchat.store.naming import refs_of
from mlxchat.store.store import Store

pytest.importorskip("ray")
RAY = Path(sys.executable).with_name("ray")


def wait_for(found: Callable[[], object], seconds: float = 90.0) -> None:
    """Wait until `found` returns something true."""
    end = time.monotonic() + seconds
    while not found():
        assert time.monotonic() < end, "timed out"
        time.sleep(0.2)


@pytest.fixture(scope="module", autouse=True)
def head() -> Iterator[None]:
    """A running Ray; RAY_ADDRESS names it."""
    # Its sockets need a shorter path than the folder of MLX's kernels, which goes with their compiler.
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("TMPDIR", raising=False)
        patch.setenv("RAY_AUTH_MODE", "disabled")
        places = os.environ["PATH"].split(os.pathsep)
        patch.setenv("PATH", os.pathsep.join(each for each in places if "mlxchat-compiler" not in each))
        command = [
            RAY,
            "start",
            "--head",
            "--node-ip-address=127.0.0.1",
            "--port=26379",
            "--num-cpus=2",
            "--include-dashboard=false",
        ]
        subprocess.run([*command, "--disable-usage-stats"], check=True, capture_output=True, timeout=120)
        patch.setenv("RAY_ADDRESS", "127.0.0.1:26379")
        try:
            yield
        finally:
            subprocess.run([RAY, "stop", "--force"], check=False, capture_output=True, timeout=60)


@pytest.fixture
def command(tiny: tuple[str, ...], outputs: Path) -> list[str]:
    settings = ["stage=pretrain", "pretrain.num_iterations=150", "machine.checkpoint_seconds=0", f"outputs={outputs}"]
    return [*tiny, *settings, "pipeline.pretrain.executor={kind: ray, address: '127.0.0.1:26379'}"]


def attempts(outputs: Path) -> list[dict[str, Any]]:
    return read_manifest(refs_of(Store(outputs))["pretrain"])["attempts"]


def test_task_of_a_killed_command_goes_on_and_is_awaited(command, outputs, start_mlxchat, mlxchat):
    process = start_mlxchat(*command)
    wait_for(lambda: saved_trainings(outputs))
    with process:
        process.kill()
    assert re.search(r"pretrain +Ray task pretrain_\w+ runs on ", mlxchat("status", f"outputs={outputs}").stdout)
    done = mlxchat(*command)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "awaits Ray task pretrain_" in done.stdout
    assert [each["outcome"] for each in attempts(outputs)] == ["done"]


def test_killed_task_starts_again_from_its_saved_state(command, outputs, start_mlxchat):
    process = start_mlxchat(*command)
    wait_for(lambda: saved_trainings(outputs))
    (log,) = outputs.glob("work/*/attempts.jsonl")
    os.kill(int(re.findall(r'"pid": (\d+)', log.read_text())[-1]), signal.SIGKILL)
    text, _ = process.communicate(timeout=200)
    assert process.returncode == 0, text
    assert [each["outcome"] for each in attempts(outputs)] == ["killed", "done"]
    assert attempts(outputs)[1]["resumed_from"] > 0


def test_interrupted_task_saves(command, outputs, start_mlxchat):
    process = start_mlxchat(*command)
    wait_for(lambda: saved_trainings(outputs))
    process.send_signal(signal.SIGINT)
    text, _ = process.communicate(timeout=100)
    assert process.returncode == 130, text
    (log,) = outputs.glob("work/*/attempts.jsonl")
    wait_for(lambda: '"outcome": "interrupted"' in log.read_text())
