"""Several processes on one outputs folder: each step is made once, and a dead maker is replaced."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from mlxchat.store.files import Records
from mlxchat.store.manifest import describe_outputs
from mlxchat.store.store import Store

Start = Callable[..., "subprocess.Popen[str]"]

STEPS = {"corpus", "tokenizer", "pretrain", "midtrain", "sft", "rl", "eval_base", "eval_mid", "eval_sft", "eval_rl"}


@pytest.fixture
def start(start_mlxchat: Start) -> Iterator[Start]:
    """Start processes and end those that a failing test leaves."""
    started: list[subprocess.Popen[str]] = []

    def begin(*arguments: str | Path) -> subprocess.Popen[str]:
        started.append(start_mlxchat(*arguments))
        return started[-1]

    yield begin
    for process in started:
        process.kill()
        process.communicate()


def events(outputs: Path) -> list[list[dict[str, str]]]:
    """Return the events of every run."""
    return [Records(log).read() for log in (outputs / "runs").glob("*/events.jsonl")]


def count(outputs: Path, event: str) -> Counter[str]:
    """Return step → how often this event happened in any run."""
    return Counter(record["step"] for run in events(outputs) for record in run if record["event"] == event)


def finish(*processes: subprocess.Popen[str]) -> None:
    """Wait for processes that must succeed; their pipes are read meanwhile."""
    texts = ["" for _ in processes]

    def read(index: int) -> None:
        texts[index] = processes[index].communicate(timeout=200)[0]

    readers = [threading.Thread(target=read, args=(index,)) for index in range(len(processes))]
    for reader in readers:
        reader.start()
    for reader in readers:
        reader.join()
    assert [process.returncode for process in processes] == [0] * len(processes), "\n\n".join(texts)


def pause_in_training(maker: subprocess.Popen[str], outputs: Path) -> None:
    """Stop the process, as ctrl-z does, after some iterations of its first training."""
    while not any(len(Records(log).read()) > 5 for log in (outputs / "work").glob("*/ckpt/records/metrics.jsonl")):
        assert maker.poll() is None
        time.sleep(0.005)
    os.kill(maker.pid, signal.SIGSTOP)


@pytest.mark.slow  # tests/crash/test_stub_race.py has the claim on stubs
def test_two_runs_started_together_make_every_step_once(tiny: tuple[str, ...], start: Start, tmp_path: Path) -> None:
    outputs = tmp_path / "outputs"
    finish(*(start(*tiny, f"outputs={outputs}") for _ in range(2)))
    assert count(outputs, "step_started") == count(outputs, "step_done") == Counter(dict.fromkeys(STEPS, 1))
    assert count(outputs, "step_cached") == Counter(dict.fromkeys(STEPS, 1)), "the other run used each result"
    assert len(events(outputs)) == 2
    assert {run[-1]["event"] for run in events(outputs)} == {"run_done"}
    for manifest in Store(outputs).manifests():
        assert [attempt["outcome"] for attempt in manifest["attempts"]] == ["done"]
        assert describe_outputs(outputs / "store" / manifest["name"]) == (manifest["outputs"], manifest["tree"])
    assert list((outputs / "work").iterdir()) == []


@pytest.mark.slow
def test_three_runs_started_together_make_every_step_once(tiny: tuple[str, ...], start: Start, tmp_path: Path) -> None:
    outputs = tmp_path / "outputs"
    finish(*(start(*tiny, "stage=tokenizer", f"outputs={outputs}") for _ in range(3)))
    assert count(outputs, "step_started") == {"corpus": 1, "tokenizer": 1}
    assert len(list((outputs / "store").iterdir())) == 2


@pytest.mark.slow
def test_a_waiter_goes_on_where_a_killed_maker_was(tiny: tuple[str, ...], start: Start, tmp_path: Path) -> None:
    outputs = tmp_path / "outputs"
    settings = [
        *tiny,
        "stage=pretrain",
        "pretrain.num_iterations=120",
        "machine.checkpoint_seconds=0",
        f"outputs={outputs}",
    ]
    maker = start(*settings)
    pause_in_training(maker, outputs)  # so that it is still at it when the waiter comes
    waiter = start(*settings)
    assert waiter.stdout is not None
    printed = iter(waiter.stdout.readline, "")
    line = next(line for line in printed if "waits" in line)
    os.kill(maker.pid, signal.SIGKILL)
    finish(waiter)
    assert line.startswith(f"pretrain   waits: process {maker.pid} on ")
    (manifest,) = (manifest for manifest in Store(outputs).manifests() if manifest["step"] == "pretrain")
    assert [attempt["outcome"] for attempt in manifest["attempts"]] == ["killed", "done"]
    assert [attempt["pid"] for attempt in manifest["attempts"]] == [maker.pid, waiter.pid]
    assert manifest["attempts"][1]["resumed_from"] > 0


def test_status_tells_who_is_at_work_without_disturbing(
    tiny: tuple[str, ...], start: Start, mlxchat: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    outputs = tmp_path / "outputs"
    maker = start(*tiny, "stage=pretrain", "pretrain.num_iterations=100", f"outputs={outputs}")
    pause_in_training(maker, outputs)
    done = mlxchat("status", f"outputs={outputs}")
    os.kill(maker.pid, signal.SIGCONT)
    finish(maker)
    # It may encode text of the next shard meanwhile, which has a line of its own.
    (line,) = (line for line in done.stdout.splitlines() if line.startswith("  pretrain ") and "running" in line)
    assert line.startswith(f"  pretrain    running in process {maker.pid} on {os.uname().nodename} (run ")
    assert ") at iteration " in line
