"""Hydra's launchers: jobs in other processes give the same table, can be stopped, and may be killed."""

import os
import re
import signal
from pathlib import Path

import pytest

from kit.commands import is_alive, saved_trainings, wait_until

LAUNCHERS = {"joblib": "joblib", "submitit_local": "submitit", "ray": "ray"}
SETTINGS = {
    "joblib": ["hydra.launcher.n_jobs=2"],
    "submitit_local": ["hydra.launcher.timeout_min=5"],
    "ray": ["+hydra.launcher.ray.init.num_cpus=2"],
}


@pytest.fixture(params=["joblib", *(pytest.param(name, marks=pytest.mark.slow) for name in ("submitit_local", "ray"))])
def launcher(request: pytest.FixtureRequest) -> list[str]:
    """The overrides that choose a launcher; left out where it is not installed."""
    pytest.importorskip(f"hydra_plugins.hydra_{LAUNCHERS[request.param]}_launcher")
    return [f"hydra/launcher={request.param}", *SETTINGS[request.param]]


def test_jobs_in_other_processes_give_the_same_table(launcher, swept, tiny, mlxchat, say):
    outputs = f"outputs={swept.outputs}"
    command = ["-m", *tiny, "stage=tokenizer", "tokenizer.vocab_size=301,60000,302"]
    done = mlxchat(*command, *launcher, outputs)
    assert done.returncode == 1, done.stdout + done.stderr
    rows = swept.rows()
    assert swept.column("tokenizer.vocab_size") == {301: "done", 60000: "failed", 302: "done"}
    assert "── job 1/3 tokenizer.vocab_size=301 done" in done.stdout
    assert "── job 2/3 tokenizer.vocab_size=60000 failed: tokenizer.vocab_size is 60000" in done.stdout
    assert "Traceback" not in done.stderr
    # The same jobs here find them done, under the same numbers: the processes computed what this one would.
    assert len(re.findall("is done already", say(*command, outputs, code=1))) == 2
    assert swept.rows() == rows


@pytest.fixture
def long(tiny: tuple[str, ...], outputs: Path) -> list[str]:
    """A sweep of two jobs that take long and save after every iteration."""
    return [
        "-m", *tiny, "stage=pretrain", "pretrain.num_iterations=3000,3001", "machine.checkpoint_seconds=0",
        "hydra/launcher=joblib", "hydra.launcher.n_jobs=2", f"outputs={outputs}",
    ]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_stops_remote_jobs_resumably(number, long, outputs, start_mlxchat, swept):
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    process = start_mlxchat(*long)
    wait_until(lambda: len(saved_trainings(outputs)) == 2, process)
    process.send_signal(number)
    text, _ = process.communicate(timeout=600)
    assert process.returncode == 128 + number, text
    assert "Traceback" not in text
    assert [row["status"] for row in swept.rows()] == ["interrupted"] * 2
    assert len(re.findall(r"pretrain stopped: saved at iteration \d+", text)) >= 2
    assert len(list((outputs / "work").glob("*/ckpt"))) == 2


@pytest.mark.slow
def test_killed_worker_is_a_failed_row(long, outputs, start_mlxchat, swept):
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    process = start_mlxchat(*long)
    wait_until(lambda: len(saved_trainings(outputs)) == 2, process)
    log = next((outputs / "work").glob("*/attempts.jsonl"))
    pid = int(re.findall(r'"pid": (\d+)', log.read_text())[-1])
    assert pid != process.pid
    os.kill(pid, signal.SIGKILL)
    text, _ = process.communicate(timeout=600)
    assert process.returncode == 1, text
    assert "joblib gave up" in text
    assert {row["status"] for row in swept.rows()} <= {"failed", "interrupted"}


@pytest.mark.slow
def test_jobs_of_a_killed_sweep_stop(long, outputs, start_mlxchat):
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    process = start_mlxchat(*long)
    wait_until(lambda: len(saved_trainings(outputs)) == 2, process)
    logs = [log.read_text() for log in (outputs / "work").glob("*/attempts.jsonl")]
    pids = {int(pid) for text in logs for pid in re.findall(r'"pid": (\d+)', text)}
    assert process.pid not in pids
    process.kill()
    wait_until(lambda: not any(map(is_alive, pids)), seconds=30)
    process.communicate(timeout=600)
