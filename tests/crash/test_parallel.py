"""Steps in processes of their own: several at a time, one on the GPU, and none that outlives the run."""

from __future__ import annotations

import os
import re
import signal
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from mlxchat.store import locks
from mlxchat.store.manifest import read_manifest
from mlxchat.store.naming import refs_of
from mlxchat.store.store import Store

PARALLEL = "max_parallel_steps=3"


def wait_for(stubs: Any, pattern: str) -> None:
    """Return when a file of the outputs is there."""
    until = time.monotonic() + 60
    while not list(stubs.outputs.glob(pattern)):
        assert time.monotonic() < until, pattern
        time.sleep(0.01)


def test_branches_run_at_the_same_time_and_end_with_the_same_bytes(stubs: Any, make_stubs: Any) -> None:
    code, text = stubs.run(PARALLEL, "train.pause=0.3", "score.seconds=0.5")
    assert code == 0, text
    started = {event["step"]: event["time"] for event in stubs.events("step_started")}
    done = {event["step"]: event["time"] for event in stubs.events("step_done")}
    assert started["inspect"] < done["train"]
    assert started["train"] < done["inspect"]
    assert stubs.executions() == Counter(["source", "convert", "train", "score", "inspect"])
    stubs.check_clean()
    alone = make_stubs()
    assert alone.run()[0] == 0
    assert stubs.trees() == alone.trees()


def test_what_a_step_prints_bears_its_name_and_is_in_its_log(stubs: Any) -> None:
    code, text = stubs.run(PARALLEL)
    assert code == 0
    assert all(line.split()[0] in ("source", "convert", "train", "score", "inspect") for line in text.splitlines())
    (run,) = (stubs.outputs / "runs").iterdir()
    assert (run / "train.log").read_text().splitlines()[0] == "train      starts (missing)"


def test_a_branch_that_fails_does_not_stop_the_others_and_is_told_at_once_and_at_the_end(stubs: Any) -> None:
    for how in ((), (PARALLEL,)):
        code, text = stubs.run("score.failing=[inspect]", "train.pause=0.02", *how)
        assert code == 1
        assert "error: step inspect failed: ValueError: inspect cannot be scored" in text
    assert stubs.trees().keys() == {"source", "convert", "train", "train@2", "score"}


def test_what_needs_a_step_that_failed_is_left_out(stubs: Any) -> None:
    for how in ((), (PARALLEL,)):
        code, text = stubs.run("train.iterations=1000", "train.pause=0.05", "timeout.train=0.3", *how)
        assert code == 1
        assert "score      is skipped: train failed" in text
        assert stubs.events("step_skipped")[-1]["failed"] == "train"


def test_fail_fast_stops_the_other_branch_which_saves_what_it_has(stubs: Any) -> None:
    settings = ("score.failing=[inspect]", "train.iterations=200", "train.pause=0.05", PARALLEL)
    code, text = stubs.run(*settings, "fail_fast=true")
    assert code == 1
    assert "inspect cannot be scored" in text
    assert "train" not in stubs.trees()
    (interrupted,) = stubs.events("step_interrupted")
    assert interrupted["step"] == "train"
    assert list((stubs.outputs / "work").glob("*/ckpt/0*"))


def test_fail_fast_without_processes_runs_nothing_after_a_failure(stubs: Any) -> None:
    code, text = stubs.run("score.failing=[score]", "fail_fast=true")
    assert code == 1
    assert stubs.trees().keys() == {"source", "convert", "train", "train@2"}
    assert "other steps continue" not in text


def test_steps_that_exceed_the_memory_together_run_one_after_the_other(stubs: Any) -> None:
    needs = "memory={train: 60, inspect: 50, score: 101}"
    code, text = stubs.run(PARALLEL, needs, "memory_limit=100", "train.pause=0.1", "targets=[score, inspect]")
    assert code == 0, text
    began = {event["step"]: event["time"] for event in stubs.events("step_started")}
    ended = {event["step"]: event["time"] for event in stubs.events("step_done")}
    assert ended["train"] <= began["inspect"] or ended["inspect"] <= began["train"]
    assert re.search(r"(train|inspect) +waits for memory: it needs \d0 B beside \w+'s \d0 B, and 100 B may be", text)
    assert "score" in ended, "a step that is alone always starts"


@pytest.mark.parametrize(
    ("number", "expected"), [(signal.SIGINT, 130), pytest.param(signal.SIGTERM, 143, marks=pytest.mark.slow)]
)
def test_a_stop_reaches_every_child_once_and_all_save(number: int, expected: int, stubs: Any) -> None:
    settings = ("train.iterations=100", "train.pause=0.05", "score.seconds=60", PARALLEL)
    process = stubs.start(*settings)
    wait_for(stubs, "work/*/ckpt/0*")
    while len(stubs.events("step_started")) < 4:
        time.sleep(0.01)
    process.send_signal(number)
    text, _ = process.communicate(timeout=120)
    assert process.returncode == expected, text
    assert "The same command continues" in text
    assert {event["step"] for event in stubs.events("step_interrupted")} == {"train", "inspect"}
    stubs.check_whole()
    code, text = stubs.run("train.iterations=100", PARALLEL)
    assert code == 0, text
    stubs.check_clean()


def test_the_second_stop_leaves_at_once_with_every_child(stubs: Any) -> None:
    process = stubs.start("train.iterations=100", "train.pause=600", "score.seconds=600", PARALLEL)
    while not (stubs.folder / "executions.txt").exists() or len(stubs.events("step_started")) < 4:
        time.sleep(0.01)
    process.terminate()
    time.sleep(0.3)
    assert process.poll() is None, "train is in an iteration of 10 minutes"
    process.terminate()
    process.communicate(timeout=120)
    assert process.returncode == 143
    ends = time.monotonic() + 60  # the kernel ends the children with it, which may take a moment
    while any(map(locks.is_held, (stubs.outputs / "locks").glob("*.lock"))):
        assert time.monotonic() < ends, "a child goes on"
        time.sleep(0.05)
    stubs.check_whole()
    assert stubs.run(PARALLEL)[0] == 0


def test_children_of_a_run_that_is_killed_save_and_end(stubs: Any) -> None:
    process = stubs.start("train.iterations=400", "train.pause=0.05", PARALLEL)
    wait_for(stubs, "work/*/ckpt/0*")
    process.kill()
    until = time.monotonic() + 120
    while not stubs.events("step_interrupted"):
        assert time.monotonic() < until
        time.sleep(0.02)
    code, text = stubs.run("train.iterations=400")
    assert code == 0, text
    stubs.check_clean()


@pytest.mark.parametrize(
    "place",
    ["publish.renamed:3", "train.iteration:2"]
    + [pytest.param(place, marks=pytest.mark.slow) for place in ("step.ran:3", "checkpoint.renamed:2")],
)
def test_a_child_that_is_killed_is_told_and_the_next_run_continues(place: str, stubs: Any, make_stubs: Any) -> None:
    # Points are counted in each process: the first step that passes one so often does not exist, but train does.
    point = place.split(":")[0]
    code, text = stubs.run(PARALLEL, AT=place if point.startswith(("train", "checkpoint")) else f"{point}:1")
    assert code == 1
    assert "its process ended by signal 9" in text
    stubs.check_whole()
    code, text = stubs.run(PARALLEL)
    assert code == 0, text
    stubs.check_clean()
    alone = make_stubs()
    assert alone.run()[0] == 0
    assert stubs.trees() == alone.trees()


def start_on_gpus(stubs: Any, devices: str) -> Any:
    """Start a training on devices; the locks of this machine's GPUs are in the stubs' folder."""
    settings = ("targets=[train]", "gpu=true", "train.iterations=2")
    return stubs.start(*settings, cuda_visible_devices=devices, mlxchat_locks=str(stubs.folder))


@pytest.mark.parametrize("devices", ["0", "0,1", "1,0"])
def test_a_step_waits_for_each_of_its_gpus_and_says_for_whom(devices: str, stubs: Any) -> None:
    """The lock was once of one outputs folder, and of the whole list of devices."""
    with locks.hold(stubs.folder / "gpu-0.lock", {"run": "run7"}, lambda owner: None):
        process = start_on_gpus(stubs, devices)
        line = next(line for line in process.stdout if "waits" in line)
    text, _ = process.communicate(timeout=60)
    assert f"train      waits: process {os.getpid()} on {locks.host_name()} (run run7) has GPU 0" in line
    assert process.returncode == 0, text


def test_a_step_does_not_wait_for_another_gpu(stubs: Any) -> None:
    with locks.hold(stubs.folder / "gpu-1.lock", {"run": "run7"}, lambda owner: None):
        text, _ = start_on_gpus(stubs, "0").communicate(timeout=60)
    assert "train      done" in text
    assert "waits" not in text


@pytest.mark.slow
def test_the_whole_pipeline_in_processes_ends_with_the_same_bytes(
    tiny: tuple[str, ...], mlxchat: Any, finished: Any, tmp_path: Path
) -> None:
    outputs = tmp_path / "outputs"
    done = mlxchat(*tiny, "machine.max_parallel_steps=3", f"outputs={outputs}", timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    alone, parallel = refs_of(Store(finished.outputs)), refs_of(Store(outputs))
    assert alone.keys() == parallel.keys()
    for step, place in alone.items():
        assert read_manifest(parallel[step])["tree"] == read_manifest(place)["tree"], step
