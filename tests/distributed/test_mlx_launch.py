"""MLX's own launcher starts mlxchat's ranks: rank 0 runs the command, the others follow it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

LAUNCHER = Path(sys.executable).with_name("mlx.launch")
pytestmark = pytest.mark.skipif(not LAUNCHER.exists(), reason="mlx.launch is not installed")


@pytest.fixture
def launch(ranks: Any) -> Callable[..., subprocess.Popen[str]]:
    """Start `mlx.launch -n 2 -- mlxchat ARGUMENTS`."""

    def start(*arguments: str | Path, size: int = 2) -> subprocess.Popen[str]:
        clean = {key: value for key, value in os.environ.items() if not key.startswith(("MLXCHAT", "MLX_", "PYTHON"))}
        port = min(ranks.free_ports(8))
        return subprocess.Popen(
            [str(LAUNCHER), "-n", str(size), "-p", str(port), "--", sys.executable, "-m", "mlxchat",
             *map(str, arguments)],
            env=clean | {"MLXCHAT_SILENCE_SECONDS": "3"}, stdin=subprocess.DEVNULL, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip

    return start


def test_what_does_not_compute_is_said_once(launch: Any, tmp_path: Path) -> None:
    text, _ = launch("ls", f"outputs={tmp_path}/nothing").communicate(timeout=60)
    assert text.count("nothing") == 1, text


def test_a_mistake_is_told_once_and_all_ranks_end(launch: Any, tmp_path: Path) -> None:
    text, _ = launch("machine.num_processes=3", "experiment=smoke", f"outputs={tmp_path}").communicate(timeout=60)
    assert text.count("error:") == 1, text
    assert "machine.num_processes is 3, but there are 2 ranks already: leave it out" in text


@pytest.mark.slow
def test_a_training_of_two_ranks_ends_when_one_is_killed_and_goes_on(
    launch: Any, tiny: tuple[str, ...], mlxchat: Any, tmp_path: Path
) -> None:
    settings = [*tiny, "stage=pretrain", "pretrain.num_iterations=80", "machine.checkpoint_seconds=0"]
    process = launch(*settings, f"outputs={tmp_path}/killed")
    until = time.monotonic() + 100
    while not list(tmp_path.glob("killed/work/*/ckpt/0000001*")):
        assert time.monotonic() < until
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.02)
    (ranks,) = tmp_path.glob("killed/runs/*/ranks.json")
    os.kill(json.loads(ranks.read_text())["pids"][1], signal.SIGKILL)
    text, _ = process.communicate(timeout=60)
    assert text.count("error:") == 1, text
    assert "rank 1 (process" in text
    assert "continues from" in text
    assert "[ring]" not in text
    text, _ = launch(*settings, f"outputs={tmp_path}/killed").communicate(timeout=200)
    assert "pretrain   done" in text, text
    whole, _ = launch(*settings, f"outputs={tmp_path}/whole").communicate(timeout=200)
    assert "pretrain   done" in whole, whole
    trees = [
        json.loads((tmp_path / name / "refs/latest/pretrain/manifest.json").read_text())["tree"]
        for name in ("killed", "whole")
    ]
    assert trees[0] == trees[1]
    done = mlxchat(*settings, "machine.num_processes=2", f"outputs={tmp_path}/whole")
    assert "nothing to do" in done.stdout
