"""Locks: one holder at a time, and none after its death."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from mlxchat.errors import StoreError
from mlxchat.runner import locks

HOLDER = """
import subprocess, sys, time
from pathlib import Path
from mlxchat.runner import locks
with locks.hold(Path(sys.argv[1]), {"step": "pretrain", "run": "run7"}, lambda owner: None):
    child = subprocess.Popen(["sleep", "60"]) if len(sys.argv) > 2 else None
    print(child.pid if child else 0, flush=True)
    time.sleep(60)
"""


@pytest.fixture
def hold_elsewhere(tmp_path: Path) -> Iterator[Callable[..., tuple[subprocess.Popen[str], int]]]:
    """Start a process that holds tmp_path/x.lock; returns it and the id of its own child."""
    started: list[subprocess.Popen[str]] = []

    def start(*arguments: str) -> tuple[subprocess.Popen[str], int]:
        holder = subprocess.Popen(
            [sys.executable, "-c", HOLDER, str(tmp_path / "x.lock"), *arguments], stdout=subprocess.PIPE, text=True
        )
        started.append(holder)
        assert holder.stdout is not None
        return holder, int(holder.stdout.readline())

    yield start
    for holder in started:
        holder.kill()
        holder.communicate()


def test_a_waiter_is_told_the_holder_once_and_gets_the_lock_when_the_holder_is_killed(
    tmp_path: Path, hold_elsewhere: Any
) -> None:
    holder, _ = hold_elsewhere()
    told: list[dict[str, Any]] = []

    def kill_holder(owner: dict[str, Any]) -> None:
        told.append(owner)
        holder.send_signal(signal.SIGKILL)

    with locks.hold(tmp_path / "x.lock", {"step": "mine"}, kill_holder) as waited:
        assert waited
        assert locks.read_owner(tmp_path / "x.lock")["step"] == "mine"
    assert [(owner["pid"], owner["step"], owner["run"]) for owner in told] == [(holder.pid, "pretrain", "run7")]


def test_a_lock_is_held_until_its_holder_is_killed(tmp_path: Path, hold_elsewhere: Any) -> None:
    assert not locks.is_held(tmp_path / "x.lock")
    holder, _ = hold_elsewhere()
    assert locks.is_held(tmp_path / "x.lock")
    holder.kill()
    holder.wait()
    assert not locks.is_held(tmp_path / "x.lock")


def test_a_program_that_the_holder_started_does_not_keep_the_lock(tmp_path: Path, hold_elsewhere: Any) -> None:
    holder, child = hold_elsewhere("with a child")
    try:
        holder.kill()
        holder.wait()
        os.kill(child, 0)  # it lives
        assert not locks.is_held(tmp_path / "x.lock")
    finally:
        os.kill(child, signal.SIGKILL)


def test_a_free_lock_is_taken_without_waiting_and_given_back(tmp_path: Path) -> None:
    path = tmp_path / "locks" / "x.lock"
    with locks.hold(path, {"step": "sft"}, lambda owner: pytest.fail("nobody holds it")) as waited:
        assert not waited
        assert locks.is_held(path)
        assert locks.read_owner(path) == {"pid": os.getpid(), "host": os.uname().nodename, "step": "sft"}
    assert not locks.is_held(path)
    assert locks.read_owner(path) == {}


def test_a_body_that_raises_gives_the_lock_back(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), locks.hold(tmp_path / "x.lock", {}, lambda owner: None):
        _ = 1 / 0
    assert not locks.is_held(tmp_path / "x.lock")


COUNTER = """
import sys, time
from pathlib import Path
from mlxchat.runner import locks
count = Path(sys.argv[2])
for _ in range(5):
    with locks.hold(Path(sys.argv[1]), {}, lambda owner: None):
        number = int(count.read_text())
        time.sleep(0.001)
        count.write_text(str(number + 1))
"""


def test_eight_processes_never_hold_it_together(tmp_path: Path) -> None:
    count = tmp_path / "count"
    count.write_text("0")
    racers = [subprocess.Popen([sys.executable, "-c", COUNTER, str(tmp_path / "x.lock"), str(count)]) for _ in range(8)]
    assert [racer.wait(timeout=60) for racer in racers] == [0] * 8
    assert count.read_text() == "40"


def test_a_file_system_without_locks_is_refused_with_the_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_locks(handle: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with pytest.raises(StoreError, match=r"no locks .*outputs=PATH"), locks.hold(tmp_path / "x.lock", {}, print):
        pass


@pytest.mark.parametrize("content", ["", "{", "[]", "null"])
def test_an_unreadable_owner_is_an_empty_record(content: str, tmp_path: Path) -> None:
    (tmp_path / "x.lock").write_text(content)
    assert locks.read_owner(tmp_path / "x.lock") == {}


def test_waiting_takes_no_cpu(tmp_path: Path, hold_elsewhere: Any) -> None:
    holder, _ = hold_elsewhere()
    used: list[float] = []

    def wait_a_while(owner: dict[str, Any]) -> None:
        used.append(time.process_time())

    killer = subprocess.Popen(["sh", "-c", f"sleep 1; kill -9 {holder.pid}"])
    with locks.hold(tmp_path / "x.lock", {}, wait_a_while):
        used.append(time.process_time())
    assert killer.wait() == 0
    assert used[1] - used[0] < 0.2
