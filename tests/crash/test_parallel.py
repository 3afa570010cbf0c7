"""Steps in separate processes: several at a time, one on each GPU, and none that outlives the run."""

import os
import pty
import re
import signal
import sys
import time
from collections import Counter
from typing import Any

import pytest

from crash import stub_run
from kit.commands import wait_until
from mlxchat.store import locks

PARALLEL = "max_parallel_steps=3"
STEPS = ("source", "convert", "train", "score", "inspect")


def has_state(stubs: Any) -> bool:
    return any(stubs.outputs.glob("work/*/ckpt/0*"))


def check_continued(stubs: Any, make_stubs: Any, *settings: str) -> None:
    """Run again; the result is that of an undisturbed run."""
    code, text = stubs.run(*settings)
    assert code == 0, text
    stubs.check_clean()
    alone = make_stubs()
    assert alone.run(*settings)[0] == 0
    assert stubs.trees() == alone.trees()


def test_branches_run_at_the_same_time_with_the_same_bytes(stubs, make_stubs):
    code, text = stubs.run(PARALLEL, "train.pause=0.2", "score.seconds=0.4")
    assert code == 0, text
    started = {event["step"]: event["time"] for event in stubs.events("step_started")}
    done = {event["step"]: event["time"] for event in stubs.events("step_done")}
    assert started["inspect"] < done["train"]
    assert started["train"] < done["inspect"]
    assert stubs.executions() == Counter(STEPS)
    assert all(line.split()[0] in STEPS for line in text.splitlines()), "each line has the name of its step"
    (run,) = (stubs.outputs / "runs").iterdir()
    assert (run / "train.log").read_text().splitlines()[0] == "train      starts (missing)"
    stubs.check_clean()
    alone = make_stubs()
    assert alone.run()[0] == 0
    assert stubs.trees() == alone.trees()


@pytest.mark.parametrize("how", [(), (PARALLEL,)], ids=str)
def test_failed_branch_stops_only_the_steps_that_need_it(how, stubs):
    code, text = stubs.run("score.failing=[inspect]", "train.pause=0.02", *how)
    assert code == 1
    assert "error: step inspect failed: ValueError: inspect cannot be scored" in text
    assert stubs.trees().keys() == {"source", "convert", "train", "train@2", "score"}
    code, text = stubs.run("train.iterations=1000", "train.pause=0.05", "timeout.train=0.3", *how)
    assert code == 1
    assert "score      is skipped: train failed" in text
    assert stubs.events("step_skipped")[-1]["failed"] == "train"


def test_fail_fast_stops_the_other_branch_resumably(stubs, make_stubs):
    settings = ("score.failing=[inspect]", "train.iterations=200", "train.pause=0.05", PARALLEL)
    code, text = stubs.run(*settings, "fail_fast=true")
    assert code == 1
    assert "inspect cannot be scored" in text
    assert "train" not in stubs.trees()
    (interrupted,) = stubs.events("step_interrupted")
    assert interrupted["step"] == "train"
    assert has_state(stubs)
    alone = make_stubs()
    code, text = alone.run("score.failing=[score]", "fail_fast=true")
    assert code == 1
    assert alone.trees().keys() == {"source", "convert", "train", "train@2"}
    assert "other steps continue" not in text


def test_steps_that_together_exceed_the_memory_run_in_turn(stubs):
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
def test_stop_reaches_every_child_once_and_all_save(number, expected, stubs, make_stubs):
    process = stubs.start("train.iterations=100", "train.pause=0.05", "score.seconds=60", PARALLEL)
    wait_until(lambda: has_state(stubs) and len(stubs.events("step_started")) == 4)
    process.send_signal(number)
    text, _ = process.communicate(timeout=120)
    assert process.returncode == expected, text
    assert "The same command continues" in text
    assert {event["step"] for event in stubs.events("step_interrupted")} == {"train", "inspect"}
    stubs.check_whole()
    check_continued(stubs, make_stubs, "train.iterations=100")


@pytest.mark.slow
def test_second_stop_exits_at_once_with_every_child(stubs, make_stubs):
    process = stubs.start("train.pause=600", "score.seconds=600", PARALLEL)
    wait_until(lambda: stubs.outputs.exists() and len(stubs.events("step_started")) == 4)
    process.terminate()
    time.sleep(0.3)
    assert process.poll() is None, "train is in an iteration of 10 minutes"
    process.terminate()
    process.communicate(timeout=120)
    assert process.returncode == 143
    # The kernel ends the children with it, which may take a moment.
    wait_until(lambda: not any(map(locks.is_held, (stubs.outputs / "locks").glob("*.lock"))))
    stubs.check_whole()
    check_continued(stubs, make_stubs)


def test_closed_terminal_stops_a_run_that_saves(stubs):
    pid, terminal = pty.fork()
    if pid == 0:
        command = [sys.executable, stub_run.__file__, str(stubs.outputs), "train.iterations=400", "train.pause=0.05"]
        os.execv(command[0], command)
    wait_until(lambda: has_state(stubs))
    os.close(terminal)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 128 + signal.SIGHUP
    (interrupted,) = stubs.events("step_interrupted")
    assert interrupted["step"] == "train"


def test_children_of_a_killed_run_save_and_end(stubs):
    process = stubs.start("train.iterations=400", "train.pause=0.05", PARALLEL)
    wait_until(lambda: has_state(stubs))
    process.kill()
    wait_until(lambda: stubs.events("step_interrupted"))
    code, text = stubs.run("train.iterations=400")
    assert code == 0, text
    stubs.check_clean()


@pytest.mark.parametrize(
    "place",
    [
        "train.iteration:2",  # passes are counted in each process
        *(pytest.param(place, marks=pytest.mark.slow) for place in ("step.ran", "checkpoint.done:2")),
    ],
)
def test_killed_child_is_reported_and_its_step_continued(place, stubs, make_stubs):
    code, text = stubs.run(PARALLEL, AT=place)
    assert code == 1
    assert "its process ended by signal 9" in text
    stubs.check_whole()
    code, text = stubs.run(PARALLEL)
    assert code == 0, text
    check_continued(stubs, make_stubs)


@pytest.mark.parametrize("held", [0, 1])
@pytest.mark.parametrize("devices", ["0", "1,0"])
def test_step_waits_for_each_of_its_gpus_only(devices, held, stubs):
    """The locks of this machine's GPUs are in the stubs' folder."""
    settings = ("targets=[train]", "gpu=true", "train.iterations=2")
    with locks.hold(stubs.folder / f"gpu-{held}.lock", {"run": "run7"}, lambda owner: None):
        process = stubs.start(*settings, cuda_visible_devices=devices, mlxchat_locks=str(stubs.folder))
        line = next(line for line in process.stdout if "waits" in line or ("done" in line and line[:5] == "train"))
    process.communicate(timeout=60)
    assert process.returncode == 0
    waits = f"train      waits: process {os.getpid()} on {locks.host_name()} (run run7) has GPU {held}"
    assert (waits in line) == (str(held) in devices), line
