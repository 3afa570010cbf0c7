"""Eight processes on one outputs folder, on one machine and on what looks like two: each step is made exactly once."""

from __future__ import annotations

import os
import random
import shutil
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest

ONCE = Counter({"source": 1, "convert": 1, "train": 1, "score": 1, "inspect": 1})
PROCESSES = 8


def race(stubs: Any, *, kill: random.Random | None = None) -> None:
    """Start eight runs together, kill some of them if asked to, and wait for all."""
    racers = [
        stubs.start(f"host={('alpha', 'beta')[number % 2]}", "train.pause=0.01", "score.seconds=0.02")
        for number in range(PROCESSES)
    ]
    for victim in kill.sample(racers, 3) if kill else ():
        time.sleep(kill.uniform(0.1, 0.6) if kill else 0)
        victim.kill()
    ends = [(racer.communicate(timeout=120)[0], racer.returncode) for racer in racers]
    assert {code for _, code in ends} <= ({0, -9} if kill else {0}), "\n".join(text for text, _ in ends)


def rounds(count: int, make_stubs: Callable[[], Any], *, kill: bool = False) -> None:
    trees = None
    for number in range(count):
        stubs = make_stubs()
        race(stubs, kill=random.Random(number) if kill else None)
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


def test_of_eight_processes_on_two_hosts_one_runs_each_step(make_stubs: Callable[[], Any]) -> None:
    rounds(1, make_stubs)


@pytest.mark.slow
def test_in_fifty_rounds_of_eight_processes_on_two_hosts_each_step_runs_once(make_stubs: Callable[[], Any]) -> None:
    rounds(50, make_stubs)


@pytest.mark.slow
def test_in_twenty_rounds_in_which_three_of_eight_are_killed_the_others_succeed(make_stubs: Callable[[], Any]) -> None:
    rounds(20, make_stubs, kill=True)


def test_a_waiter_names_the_process_its_host_and_its_iteration(stubs: Any) -> None:
    maker = stubs.start("host=alpha", "train.iterations=60", "train.pause=0.05")
    until = time.monotonic() + 30
    while not list((stubs.outputs / "work").glob("*/ckpt/records/metrics.jsonl")) and time.monotonic() < until:
        time.sleep(0.01)
    time.sleep(0.2)
    waiter = stubs.start("host=beta", "train.iterations=60", "train.pause=0.05")
    lines = iter(waiter.stdout.readline, "")
    line = next(line for line in lines if "waits" in line)
    maker.kill()
    text, _ = waiter.communicate(timeout=60)
    assert waiter.returncode == 0, text
    assert line.startswith(f"train      waits: process {maker.pid} on alpha (run ")
    assert ") is making it, at iteration " in line
    stubs.check_clean()


def test_a_waiter_that_is_asked_to_stop_ends_while_the_maker_goes_on(stubs: Any) -> None:
    maker = stubs.start("targets=[train]", "train.iterations=100", "train.pause=0.05")
    until = time.monotonic() + 30
    while not list((stubs.outputs / "work").glob("*/ckpt/records/metrics.jsonl")) and time.monotonic() < until:
        time.sleep(0.01)
    waiter = stubs.start("targets=[train]", "train.iterations=100", "train.pause=0.05")
    next(line for line in iter(waiter.stdout.readline, "") if "waits" in line)
    waiter.terminate()
    text, _ = waiter.communicate(timeout=120)
    assert (waiter.returncode, maker.poll()) == (143, None)
    assert "stopped while train waited. The same command continues." in text
    assert maker.wait(timeout=60) == 0
    assert stubs.executions()["train"] == 1


def test_waiters_of_a_step_that_fails_fail_with_it_and_do_not_try_it_themselves(stubs: Any) -> None:
    code, text = stubs.run("targets=[convert]")
    assert code == 0, text
    settings = ("targets=[score]", "score.failing=[score]", "train.pause=0.2")
    racers = [stubs.start(*settings) for _ in range(4)]
    ends = [(racer.communicate(timeout=60)[0], racer.returncode) for racer in racers]
    assert [code for _, code in ends] == [1] * 4, ends
    # Who came to the step after its end tries it anew; who waited for it does not.
    waited = sum("failed in another process: ValueError: score cannot be scored" in text for text, _ in ends)
    assert stubs.executions()["score"] == 4 - waited


def test_outputs_on_a_disk_without_locks_are_refused_before_anything_runs(stubs: Any) -> None:
    (stubs.folder / "sitecustomize.py").write_text(
        "import errno, fcntl, os\n"
        "def flock(handle, operation): raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))\n"
        "fcntl.flock = flock\n"
    )
    code, text = stubs.run(pythonpath=str(stubs.folder))
    assert code == 2
    assert "this file system has no locks" in text
    assert "outputs=PATH" in text
    assert not list((stubs.outputs / "store").iterdir())


def test_the_second_stop_leaves_at_once_from_inside_a_library_and_the_state_is_good(stubs: Any) -> None:
    # `sleep` of one long call stands for a computation in which Python handles no signal.
    stuck = stubs.folder / "stuck.py"
    stuck.write_text(
        "import ctypes, os, signal, threading, time\n"
        "from mlxchat.runner.process import stop_on_signals\n"
        "libc = ctypes.CDLL(None)\n"
        "with stop_on_signals(lambda number: None, lambda: None):\n"
        "    print('ready', flush=True)\n"
        "    until = time.monotonic() + 600\n"
        "    while libc.usleep(600_000_000) and time.monotonic() < until:\n"
        "        pass\n"
    )
    import subprocess
    import sys

    process = subprocess.Popen([sys.executable, str(stuck)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    process.stdout.readline()
    process.terminate()
    time.sleep(0.2)
    process.terminate()
    assert process.wait(timeout=120) == 143
    process.stdout.close()


def test_two_stops_at_once_leave_a_state_that_the_next_run_continues(stubs: Any) -> None:
    maker = stubs.start("train.iterations=60", "train.pause=0.05", "score.seconds=0.1")
    until = time.monotonic() + 30
    while not list((stubs.outputs / "work").glob("*/ckpt/0*")) and time.monotonic() < until:
        time.sleep(0.01)
    os.kill(maker.pid, 2)
    os.kill(maker.pid, 15)
    maker.communicate(timeout=120)
    assert maker.returncode in (130, 143)
    stubs.check_whole()
    code, text = stubs.run("train.iterations=60")
    assert code == 0, text
    stubs.check_clean()
