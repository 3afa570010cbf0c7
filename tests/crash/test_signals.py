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


def test_failed_branch_stops_only_the_steps_that_need_it(stubs):
    code, text = stubs.run("score.failing=[inspect]")
    assert code == 1
    assert "error: step inspect failed: ValueError: inspect cannot be scored" in text
    assert stubs.trees().keys() == {"source", "convert", "train", "train@2", "score"}


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
