"""Jobs of a sweep by an executor: the same results, Ctrl-C saves, a killed command leaves jobs to the next one."""

import re
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kit.commands import saved_trainings, wait_until
from mlxchat.store.manifest import read_manifest

pytest.importorskip("submitit")

Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def sweep(outputs: Path, tiny: tuple[str, ...], start_mlxchat: Any) -> Start:
    """Start a sweep of pretrainings as processes that submitit starts."""

    def start(*overrides: str) -> subprocess.Popen[str]:
        command = ["-m", *tiny, "stage=pretrain", *overrides, "executor=submitit_local", f"outputs={outputs}"]
        return start_mlxchat(*command)  # type: ignore[no-any-return]  # the fixture is Any

    return start


def test_jobs_give_the_same_table(sweep, outputs, short, say, swept):
    settings = ["optimizer.matrix_lr=0.01,0.03", "tokenizer.vocab_size=280"]
    process = sweep("pretrain.num_iterations=1", *settings)
    text, _ = process.communicate(timeout=600)
    assert process.returncode == 0, text
    assert len(re.findall(r"^tokenizer +done by submitit job", text, re.M)) == 1
    rows = swept.rows()
    assert [row["status"] for row in rows] == ["done"] * 2
    again = say("-m", *short, *settings, f"outputs={outputs}")
    assert len(re.findall("is done already", again)) == 2
    assert swept.rows() == rows


def test_stopped_sweep_saves_its_jobs(sweep, outputs, swept):
    process = sweep("pretrain.num_iterations=3000,3001", "machine.checkpoint_seconds=0")
    wait_until(lambda: len(saved_trainings(outputs)) == 2, process)
    process.send_signal(signal.SIGINT)
    text, _ = process.communicate(timeout=600)
    assert process.returncode == 128 + signal.SIGINT, text
    assert [row["status"] for row in swept.rows()] == ["interrupted"] * 2
    assert len(list((outputs / "work").glob("*/ckpt"))) == 2


@pytest.mark.slow
def test_jobs_outlive_their_command(sweep, outputs, swept):
    command = ["pretrain.num_iterations=150,151", "machine.checkpoint_seconds=0"]
    process = sweep(*command)
    wait_until(lambda: len(saved_trainings(outputs)) == 2, process)
    process.send_signal(signal.SIGTERM)
    text, _ = process.communicate(timeout=600)
    assert "the same command awaits it" in text
    again = sweep(*command)
    text, _ = again.communicate(timeout=600)
    assert again.returncode == 0, text
    assert [row["status"] for row in swept.rows()] == ["done"] * 2
    made = [read_manifest(path) for path in (outputs / "store").glob("pretrain-*")]
    assert sorted(len(manifest["attempts"]) for manifest in made)[-1] == 1, "awaited, not submitted again"
