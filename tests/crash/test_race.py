"""Eight processes on one outputs folder: each step is computed exactly once. Signals stop it in order."""

import os
import pty
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from typing import Any

import pytest

from crash import stub_run
from kit.commands import saved_trainings, wait_until
from mlxchat.store import locks

ONCE = Counter({"source": 1, "convert": 1, "train": 1, "score": 1, "inspect": 1})
PROCESSES = 8


def race(stubs: Any, kill: random.Random | None) -> None:
    """Start eight runs together, kill three of them if requested, and wait for all."""
    racers = [stubs.start("train.pause=0.01", "score.seconds=0.02") for _ in range(PROCESSES)]
    for victim in kill.sample(racers, 3) if kill else ():
        time.sleep(kill.uniform(0.05, 0.3) if kill else 0)
        victim.kill()
    ends = [(racer.communicate(timeout=120)[0], racer.returncode) for racer in racers]
    assert {code for _, code in ends} <= ({0, -9} if kill else {0}), "\n".join(text for text, _ in ends)


@pytest.mark.parametrize(
    ("rounds", "kill"),
    [(1, False), pytest.param(50, False, marks=pytest.mark.slow), pytest.param(20, True, marks=pytest.mark.slow)],
)
def test_one_of_eight_processes_runs_each_step(rounds, kill, make_stubs):
    trees = None
    for number in range(rounds):
        stubs = make_stubs()
        race(stubs, random.Random(number) if kill else None)
        if kill:
            code, text = stubs.run()
            assert code == 0, text
        else:
            assert stubs.executions() == ONCE
            assert Counter(event["step"] for event in stubs.events("step_done")) == ONCE
        stubs.check_clean()
        trees = trees or stubs.trees()
        assert stubs.trees() == trees
        shutil.rmtree(stubs.folder)


def start_training(stubs: Any, *settings: str) -> Any:
    """Start a run and return it once its training has a saved state."""
    maker = stubs.start(*settings)
    wait_until(lambda: saved_trainings(stubs.outputs), maker)
    return maker


def test_waiter_names_the_holder_and_takes_over_from_a_killed_one(stubs):
    settings = ("train.iterations=30", "train.pause=0.05")
    maker = start_training(stubs, *settings)
    waiter = stubs.start(*settings)
    line = next(line for line in iter(waiter.stdout.readline, "") if "waits" in line)
    maker.kill()
    text, _ = waiter.communicate(timeout=60)
    assert waiter.returncode == 0, text
    assert line.startswith(f"train      waits: process {maker.pid} on {locks.host_name()} (run ")
    assert ") is making it, at iteration " in line
    stubs.check_clean()


# `usleep` of one long call stands for a computation in which Python handles no signal.
STUCK = """
import ctypes, time
from mlxchat.runner.process import stop_on_signals
libc = ctypes.CDLL(None)
with stop_on_signals(lambda number: None, lambda: print("stopping", flush=True)):
    print("ready", flush=True)
    until = time.monotonic() + 600
    while libc.usleep(600_000_000) and time.monotonic() < until:
        pass
"""


def test_second_stop_exits_at_once_inside_a_library():
    process = subprocess.Popen([sys.executable, "-c", STUCK], stdout=subprocess.PIPE, text=True)
    for line in ("ready\n", "stopping\n"):
        assert process.stdout.readline() == line
        process.terminate()
    assert process.wait(timeout=120) == 143
    process.stdout.close()


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
