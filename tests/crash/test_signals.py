"""Failures, signals and GPUs of a run."""

import os
import pty
import signal
import sys
from typing import Any

import pytest

from crash import stub_run
from kit.commands import wait_until
from mlxchat.store import locks


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


def test_failed_branch_stops_only_the_steps_that_need_it(stubs):
    code, text = stubs.run("score.failing=[inspect]")
    assert code == 1
    assert "error: step inspect failed: ValueError: inspect cannot be scored" in text
    assert stubs.trees().keys() == {"source", "convert", "train", "train@2", "score"}


@pytest.mark.parametrize(("number", "expected"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_stopped_step_saves_and_continues(number, expected, stubs, make_stubs):
    process = stubs.start("train.iterations=100", "train.pause=0.05")
    wait_until(lambda: has_state(stubs))
    process.send_signal(number)
    text, _ = process.communicate(timeout=120)
    assert process.returncode == expected, text
    assert "The same command continues" in text
    assert {event["step"] for event in stubs.events("step_interrupted")} == {"train"}
    stubs.check_whole()
    check_continued(stubs, make_stubs, "train.iterations=100")


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


@pytest.mark.parametrize(("held", "devices"), [(1, "0"), (1, "1,0")])
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
