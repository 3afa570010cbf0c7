"""mlx.launch starts mlxchat's ranks: rank 0 runs the command, the others follow it."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from distributed import ranks
from kit.commands import clean_environment, wait_until

LAUNCHER = Path(sys.executable).with_name("mlx.launch")
PRETRAIN = ("stage=pretrain", "pretrain.num_iterations=12", "machine.checkpoint_seconds=0", "machine.blas_threads=1")


@pytest.fixture
def launch(tiny, tmp_path) -> Callable[..., subprocess.Popen[str]]:
    """Start `mlx.launch -n SIZE -- mlxchat` with small settings."""
    if not LAUNCHER.exists():
        pytest.skip("mlx.launch is not installed")

    def start(size: int, *arguments: str) -> subprocess.Popen[str]:
        # At the end of its input the launcher polls without pause, and Ctrl-C can leave one of its queues locked.
        port = ranks.first_of_free_ports(size)  # the launcher counts up from it
        return subprocess.Popen(
            [str(LAUNCHER), "-n", str(size), "-p", str(port), "--", sys.executable, "-m", "mlxchat", *tiny, *PRETRAIN,
             f"outputs={tmp_path}", *arguments],
            env=clean_environment(), stdin=subprocess.PIPE, text=True, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip

    return start


def manifest_of(outputs: Path) -> dict[str, Any]:
    return json.loads((outputs / "refs/latest/pretrain/manifest.json").read_text())


def test_an_interrupted_run_resumes_with_another_number_of_ranks(launch, mlxchat, tiny, tmp_path, monkeypatch):
    process = launch(2)
    wait_until(lambda: list(tmp_path.glob("work/*/ckpt/0000*")), process)
    os.killpg(process.pid, signal.SIGINT)  # as Ctrl-C does
    text, _ = process.communicate(timeout=60)
    assert "2 ranks compute together (ring)" in text
    done, rest = launch(3).communicate(timeout=120)
    assert "resumes" in done, (text, done, rest)
    found = manifest_of(tmp_path)
    assert found["excluded"]["ranks"] == {"size": 3, "backend": "ring", "hosts": [os.uname().nodename] * 3}
    alone = mlxchat(*tiny, *PRETRAIN, f"outputs={tmp_path}/alone")
    assert alone.returncode == 0, alone.stderr
    expected = manifest_of(tmp_path / "alone")["metrics"]["loss"]
    assert found["metrics"]["loss"] == pytest.approx(expected, rel=1e-5)


def test_a_wrong_setting_is_one_error_and_ends_all_ranks(launch):
    text, _ = launch(2, "seed=abc").communicate(timeout=60)
    assert text.count("error:") == 1
