"""Steps in jobs: submitit's local executor and, if installed, Ray on this machine."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from kit.commands import saved_trainings, wait_until
from kit.models import composed
from mlxchat.composition.sections import executor_of
from mlxchat.config.schema import Config, ExecutorConfig
from mlxchat.errors import ConfigError, Interrupted
from mlxchat.pipeline import place_steps, plan_of
from mlxchat.runner import executors
from mlxchat.runner.executors import Job, attach, submit
from mlxchat.runner.process import stop_on_signals
from mlxchat.store.manifest import read_manifest
from mlxchat.store.naming import refs_of
from mlxchat.store.store import Store

pytest.importorskip("submitit")
cloudpickle = pytest.importorskip("cloudpickle")
cloudpickle.register_pickle_by_value(sys.modules[__name__])  # a job cannot import this file
# submitit's own job, which is dropped at once, holds the process of the job.
pytestmark = pytest.mark.filterwarnings("ignore:Exception ignored in. <function Popen.__del__")


def config_of(*overrides: str) -> Config:
    return composed("experiment=smoke", "machine=cpu", *overrides)


LOCAL = config_of("executor=submitit_local").executor


def count(file: Path, most: int = 10_000) -> None:
    """Count to `most`, a hundred a second, and save the number in a file, from which it resumes."""
    heard: list[int] = []
    began = int(file.read_text()) if file.exists() else 0
    with stop_on_signals(heard.append, lambda: None):
        for number in range(began, most):
            if heard:
                raise Interrupted("stopped", heard[0])
            file.write_text(str(number + 1))
            time.sleep(0.01)
    file.with_name("place").write_text(f"{began} {Path.cwd()}")


@pytest.fixture
def submitted(tmp_path: Path) -> Iterator[list[Job]]:
    """Jobs that end with the test."""
    jobs: list[Job] = []
    yield jobs
    for job in jobs:
        job.cancel()


def start(file: Path, submitted: list[Job], *arguments: Any, settings: ExecutorConfig = LOCAL) -> Job:
    folder, call = file.parent, partial(count, file, *arguments)
    job = submit(settings, "test", call, folder / "job.jsonl", {}, folder / "jobs")
    submitted.append(job)
    return job


def process_of(job: Any) -> int:
    """Return the process that runs the call; submitit's own starts it, and starts it again."""
    return int(subprocess.check_output(["ps", "-o", "pid=", "--ppid", job.facts["id"]]))


def test_timed_out_job_is_requeued_in_the_same_directory(tmp_path, submitted, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "count"
    job = start(file, submitted, 100)
    assert attach(job.path) is not None
    wait_until(lambda: file.exists() and file.read_text())
    os.kill(process_of(job), signal.SIGUSR2)  # as SLURM does
    wait_until(job.done)
    assert attach(job.path) is None
    assert (job.take(), len(job.starts), file.read_text()) == ("", 2, "100")
    began, place = (tmp_path / "place").read_text().split()
    assert (0 < int(began) < 100, place) == (True, str(tmp_path))


@pytest.mark.parametrize(
    ("end", "error"),
    [
        ("kill", r"submitit job \d+ was lost .*Its log: {}/jobs/\d+_0_log\.out"),
        ("cancel", "stopped\nIts job ended: it was"),
    ],
)
def test_lost_and_cancelled_jobs_say_why(end, error, tmp_path, submitted):
    file = tmp_path / "count"
    job = start(file, submitted)
    wait_until(lambda: file.exists() and file.read_text())
    if end == "kill":
        os.kill(process_of(job), signal.SIGKILL)
    else:
        job.cancel()
    wait_until(job.done)
    assert attach(job.path) is None
    assert re.match(error.format(tmp_path), job.take())


def test_state_of_a_slurm_job_is_that_of_squeue(tmp_path, monkeypatch):
    """Bug: without accounting (sacct) a lost job was waited for without end."""
    record, answer = tmp_path / "job.jsonl", tmp_path / "answer"
    facts = {"job": "a", "kind": "slurm", "id": "7", "queue": "mlxchat-sft", "host": "h", "log": "7.out"}
    record.write_text(json.dumps(facts) + "\n")
    (tmp_path / "squeue").write_text(f"#!/bin/sh\ncat {answer}\n")
    (tmp_path / "squeue").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(executors, "_ASK_SECONDS", -1.0)
    monkeypatch.setattr(executors, "_LATE_SECONDS", 0.0)
    said = []
    for line in ("7|mlxchat-sft|PENDING", "7|mlxchat-sft|RUNNING", "7|other|RUNNING", "7|mlxchat-sft|TIMEOUT", ""):
        answer.write_text(line)
        job = Job(record)
        said.append((job.describe(), job.done(), job.state()))
    assert said == [
        ("is queued", False, "PENDING"), ("is queued", False, "RUNNING"),
        ("has ended", True, "no longer in the queue"), ("has ended", True, "TIMEOUT"),
        ("has ended", True, "no longer in the queue"),
    ]  # fmt: skip
    assert attach(record) is None


def test_missing_slurm_is_one_message(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match=r"executor=slurm: .*slurm") as error:
        start(tmp_path / "count", [], settings=config_of("executor=slurm").executor)
    assert "\n" not in str(error.value)


def test_step_executor_overrides_the_runs_or_uses_conf():
    config = config_of("executor=slurm", "executor.partition=gpu", "pipeline.pretrain.executor={gpus_per_node: 1}")
    assert executor_of(config, "sft") is config.executor
    assert executor_of(config, "pretrain") == replace(config.executor, gpus_per_node="1")
    config = config_of("pipeline.pretrain.executor=slurm", "pipeline.eval_base.executor={kind: ray, cpus_per_task: 4}")
    assert config.executor.kind == "local"
    assert executor_of(config, "pretrain") == config_of("executor=slurm").executor
    assert executor_of(config, "eval_base") == config_of("executor=ray", "executor.cpus_per_task=4").executor


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("pipeline.pretrain.executor=slrum", 'pipeline.pretrain.executor: "slrum" is not an executor.*"slurm"'),
        ("pipeline.pretrain.executor={gpus: 8}", 'there is no "pipeline.pretrain.executor.gpus"'),
        ("executor.kind=slrum", 'executor.kind is "slrum", expected one of local, slurm'),
        ("pipeline.pretrain.executor={kind: slurm, gpus_per_node: 'a100:8'}", "a100:8, but a job is one process"),
    ],
)
def test_invalid_executor_is_refused(override, message):
    with pytest.raises(ConfigError, match=message):
        config_of(override)


def test_remote_step_requires_a_dtype_and_need_not_fit_here(tmp_path):
    settings = ["executor=slurm", "executor.gpus_per_node=1", "stage=pretrain"]
    config = config_of(*settings, "machine.compute_dtype=auto")
    with pytest.raises(ConfigError, match=r"pretrain runs on GPUs of another machine .*compute_dtype=bfloat16"):
        place_steps(config, plan_of(config, Store(tmp_path)))
    config = config_of(*settings, "machine.compute_dtype=bfloat16")
    assert place_steps(config, plan_of(config, Store(tmp_path))).keys() == {"corpus", "tokenizer", "pretrain"}
    small = "machine.memory_limit_bytes=1000000"
    config = config_of("stage=pretrain", small)
    with pytest.raises(ConfigError, match="pretrain needs about"):
        place_steps(config, plan_of(config, Store(tmp_path)))
    config = config_of("stage=pretrain", small, "pipeline.pretrain.executor=submitit_local")
    assert place_steps(config, plan_of(config, Store(tmp_path))).keys() == {"pretrain"}


@pytest.fixture(params=["submitit_local", pytest.param("ray", marks=pytest.mark.slow)])
def kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """An executor of this machine; Ray where it is installed."""
    if request.param == "ray":
        pytest.importorskip("ray")
        # Its sockets need a shorter path than the folder of MLX's kernels, which goes with their compiler.
        monkeypatch.delenv("TMPDIR", raising=False)
        places = os.environ["PATH"].split(os.pathsep)
        monkeypatch.setenv("PATH", os.pathsep.join(each for each in places if "mlxchat-compiler" not in each))
    return str(request.param)


def test_job_gives_the_same_bytes(kind, tiny, mlxchat, tmp_path, finished):
    outputs = tmp_path / "outputs"
    command = [*tiny, "stage=pretrain", f"outputs={outputs}"]
    done = mlxchat(*command, f"pipeline.pretrain.executor={kind}")
    assert done.returncode == 0, done.stdout + done.stderr
    name = {"submitit_local": "submitit job", "ray": "Ray task"}[kind]
    assert re.search(rf"^pretrain +{name} \w+ (is queued|runs on )", done.stdout, re.MULTILINE)
    assert re.search(rf"^pretrain +done by {name} \w+: pretrain-d2-", done.stdout, re.MULTILINE)
    made, alone = (read_manifest(refs_of(Store(each))["pretrain"]) for each in (outputs, finished.outputs))
    assert (made["key"], made["tree"]) == (alone["key"], alone["tree"])


@pytest.mark.slow
@pytest.mark.parametrize("way", ["kill", "cancel"])
def test_same_command_awaits_the_job_of_an_earlier_one(way, tiny, start_mlxchat, mlxchat, outputs):
    """Bug: after kill -9 of the command its job went on, and the repetition submitted a second one."""
    command = [*tiny, "stage=pretrain", "pretrain.num_iterations=300", "machine.checkpoint_seconds=0"]
    command += [f"outputs={outputs}", "pipeline.pretrain.executor=submitit_local"]
    process = start_mlxchat(*command)
    wait_until(lambda: saved_trainings(outputs), process)
    with process:  # also closes its pipe, which is not read
        process.send_signal(signal.SIGKILL)
    told = mlxchat("status", f"outputs={outputs}").stdout
    assert re.search(r"^  pretrain +submitit job \d+ runs on \S+ \(run ", told, re.MULTILINE), told
    if way == "cancel":
        assert "is cancelled" in mlxchat("status", "--cancel", f"outputs={outputs}").stdout
        (log,) = outputs.glob("work/*/attempts.jsonl")
        wait_until(lambda: '"outcome": "interrupted"' in log.read_text())
    done = mlxchat(*command)
    assert done.returncode == 0, done.stdout + done.stderr
    assert ("awaits submitit job" in done.stdout) == (way != "cancel")
    outcomes = [each["outcome"] for each in read_manifest(refs_of(Store(outputs))["pretrain"])["attempts"]]
    assert outcomes == (["interrupted", "done"] if way == "cancel" else ["done"])
    assert not list(outputs.glob("jobs/*.jsonl"))
