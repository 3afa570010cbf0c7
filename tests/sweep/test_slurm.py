"""SLURM through submitit, with a stub that runs the script given to sbatch."""

import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from kit.commands import saved_trainings, wait_until
from mlxchat.composition.compose import Composed, compose_config
from mlxchat.errors import Interrupted
from mlxchat.runner.plan import PlannedStep
from mlxchat.store import locks
from mlxchat.store.manifest import read_manifest
from mlxchat.sweep import jobs as sweep_jobs
from mlxchat.sweep.results import SweepFolder

pytest.importorskip("submitit")

Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def stub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """SLURM's commands on PATH; returns the folder of their state. Nothing that they started outlives the test."""
    programs, state = tmp_path / "slurm-bin", tmp_path / "slurm"
    programs.mkdir()
    state.mkdir()
    source = Path(__file__).with_name("slurm_stub.py").read_text().partition("\n")[2]
    for name in ("sbatch", "srun", "sacct", "scontrol", "scancel"):
        (programs / name).write_text(f"#!{sys.executable}\n{source}")
        (programs / name).chmod(0o755)
    controller = programs / "slurm_stub.py"
    controller.write_text(source)
    (programs / "sbatch").write_text((programs / "sbatch").read_text().replace("__file__", repr(str(controller))))
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_STUB", str(state))
    yield state
    for place in Path("/proc").glob("[0-9]*"):
        try:
            ours = f"SLURM_STUB={state}".encode() in (place / "environ").read_bytes().split(b"\0")
            if ours and int(place.name) != os.getpid():
                os.kill(int(place.name), signal.SIGKILL)
        except OSError:
            continue


@pytest.fixture
def sweep(stub: Path, outputs: Path, tiny: tuple[str, ...], start_mlxchat: Any) -> Start:
    """Start a sweep of pretrainings through SLURM, each iteration of which is saved."""

    def start(*overrides: str, parallel: int = 2) -> subprocess.Popen[str]:
        return start_mlxchat(  # type: ignore[no-any-return]  # the fixture is Any
            "-m", *tiny, "stage=pretrain", "machine.checkpoint_seconds=0", *overrides, "executor=slurm",
            f"executor.array_parallelism={parallel}", "executor.timeout_min=5", f"outputs={outputs}",
        )  # fmt: skip

    return start


def script_of_array(stub: Path) -> Path:
    """Return the script of the job array; what the jobs share ran before, each step in a job of its own."""
    return max(stub.glob("script-*"), key=lambda path: int(path.name.partition("-")[2]))


def pid_of(stub: Path, number: int, process: subprocess.Popen[str], outputs: Path) -> int:
    """Wait until a training has saved a state, and return the process of a task of the job array."""
    wait_until(lambda: saved_trainings(outputs), process)
    array = script_of_array(stub).name.partition("-")[2]
    return int((stub / f"pid-{array}_{number}").read_text())


def attempts(outputs: Path) -> list[dict[str, Any]]:
    """Return the attempts of the pretraining that had the most."""
    manifests = [read_manifest(path.parent) for path in (outputs / "store").glob("pretrain-*/manifest.json")]
    return max((manifest["attempts"] for manifest in manifests), key=len)


@pytest.mark.slow
def test_queued_jobs_give_the_same_table(sweep, outputs, short, mlxchat, swept, stub):
    settings = ["pretrain.num_iterations=1", "optimizer.matrix_lr=0.01,0.03"]
    process = sweep(*settings)
    text, _ = process.communicate(timeout=600)
    assert process.returncode == 0, text
    script = script_of_array(stub).read_text()
    for line in ("--array=0-1%2", "--requeue", "--signal=USR2@120", "--time=5"):
        assert f"#SBATCH {line}" in script
    rows = swept.rows()
    assert [row["status"] for row in rows] == ["done"] * 2
    again = mlxchat("-m", *short, *settings[1:], f"outputs={outputs}")
    assert len(re.findall("is done already", again.stdout)) == 2
    assert swept.rows() == rows


@pytest.mark.slow
@pytest.mark.parametrize("signals", ["USR2", "TERM USR2"])
def test_timed_out_job_is_requeued_and_resumes(signals, sweep, stub, outputs, swept):
    process = sweep("pretrain.num_iterations=120", "optimizer.matrix_lr=0.01,0.03", parallel=1)
    pid = pid_of(stub, 0, process, outputs)
    for name in signals.split():
        os.kill(pid, getattr(signal, f"SIG{name}"))
    text, _ = process.communicate(timeout=600)
    assert process.returncode == 0, text
    assert [row["status"] for row in swept.rows()] == ["done"] * 2
    first, second = attempts(outputs)
    assert (first["outcome"], second["outcome"]) == ("interrupted", "done")
    assert second["resumed_from"] > 0


@pytest.mark.slow
def test_stopped_sweep_saves_and_cancels_its_jobs(sweep, stub, outputs, swept):
    process = sweep("pretrain.num_iterations=3000,3001", parallel=1)
    pid_of(stub, 0, process, outputs)
    process.send_signal(signal.SIGINT)
    text, _ = process.communicate(timeout=600)
    assert process.returncode == 128 + signal.SIGINT, text
    statuses = {row["job"]: row["status"] for row in swept.rows()}
    assert statuses[1] == "interrupted"
    assert statuses[2] in ("interrupted", "not run"), "it was taken out of the queue, or saw at once that it is over"
    assert len(list((outputs / "work").glob("*/ckpt"))) == 1


def test_queue_interruption_leaves_no_row(tmp_path, monkeypatch, tiny):
    def stopped(*_: object, **__: object) -> None:
        raise Interrupted("stopped", signal.SIGTERM)

    monkeypatch.setattr(sweep_jobs, "run_pipeline", stopped)
    folder = SweepFolder(tmp_path / "sweep")
    folder.write_state({})
    overrides = [*tiny, "stage=tokenizer", f"outputs={tmp_path}/outputs"]

    def prepare() -> tuple[Composed, list[PlannedStep]]:
        return compose_config(overrides), []

    with locks.hold(folder.lock, {}, lambda owner: None), pytest.raises(Interrupted):
        sweep_jobs.run_job(folder, 1, overrides, prepare, is_queued=True)
    assert (folder.rows(), folder.stop()) == ({}, None)


@pytest.mark.slow
def test_sbatch_array_of_the_guide_requeues(stub, outputs, tiny, tmp_path):
    text = (Path(__file__).parents[2] / "docs" / "guides" / "sweeps.md").read_text(encoding="utf-8")
    recipe = re.findall(r"```bash\n(#!/bin/bash\n#SBATCH --array.*?)```", text, re.DOTALL)
    assert len(recipe) == 1
    settings = " ".join([*tiny, "stage=pretrain", "pretrain.num_iterations=120", "machine.checkpoint_seconds=0"])
    command = f"{sys.executable} -m mlxchat {settings} outputs={outputs}"
    script = recipe[0].replace("mlxchat experiment=smoke outputs=/shared/outputs", command)
    assert command in script
    (tmp_path / "script.sh").write_text(script.replace("--array=0-2", "--array=0-1%1"))
    subprocess.run(["sbatch", str(tmp_path / "script.sh")], check=True)
    wait_until(lambda: saved_trainings(outputs))
    os.kill(int((stub / "pid-1000_0").read_text()), signal.SIGTERM)
    wait_until(lambda: [(stub / f"state-1000_{task}").read_text() for task in (0, 1)] == ["COMPLETED"] * 2)
    assert [each["outcome"] for each in attempts(outputs)] == ["interrupted", "done"]
    assert attempts(outputs)[1]["resumed_from"] > 0
